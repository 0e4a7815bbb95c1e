"""Draws docs/grid.svg: multi-axis gradient checkpointing walks its grid of cells in two orders.

python docs/grid.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

ROWS, COLUMNS = 3, 5
HIDDEN, STATE, CELL, INK = "#2166ac", "#d6604d", "#fddbc7", "#333333"


def draw(axes, title, row_major: bool):
    """Draws one grid, with its borders, when the backward pass has reached the 7th cell."""
    for row in range(ROWS):
        for column in range(COLUMNS):
            # The number on a cell is its turn in the backward pass.
            if row_major:
                turn = (ROWS - 1 - row) * COLUMNS + (COLUMNS - 1 - column)
            else:
                turn = (COLUMNS - 1 - column) * ROWS + (ROWS - 1 - row)
            alive = turn == 6
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=CELL if alive else "white", edgecolor="#cccccc"))
            axes.text(column + 0.5, row + 0.5, str(turn + 1), ha="center", va="center", color=INK, fontsize=10)
    for row in range(ROWS):
        if row_major or row == 0:
            axes.plot([0, COLUMNS], [row, row], color=HIDDEN, linewidth=3.5, solid_capstyle="butt", zorder=3)
        else:  # restored for the current column only
            axes.plot([2, 3], [row, row], color=HIDDEN, linewidth=2, linestyle=(0, (2, 1.2)), zorder=3)
    for column in range(1, COLUMNS):
        axes.plot([column, column], [0, ROWS], color=STATE, linewidth=2.5, solid_capstyle="butt", zorder=2)
    axes.set(xlim=(-0.05, COLUMNS + 0.05), ylim=(-0.1, ROWS + 0.05), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=12, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    arrow = dict(arrowstyle="->", color=INK)
    axes.annotate("", (COLUMNS, -0.28), (0, -0.28), arrowprops=arrow, annotation_clip=False)
    axes.text(COLUMNS / 2, -0.42, "sequence", ha="center", va="top", fontsize=9.5, color=INK)
    axes.annotate("", (-0.25, ROWS), (-0.25, 0), arrowprops=arrow, annotation_clip=False)
    axes.text(-0.4, ROWS / 2, "layers", ha="right", va="center", rotation=90, fontsize=9.5, color=INK)


def main():
    """Writes docs/grid.svg."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7))
    draw(left, "layer-major: one row after another", row_major=True)
    draw(right, "sequence-major: one column after another", row_major=False)
    figure.legend(
        handles=[
            Line2D([], [], color=HIDDEN, linewidth=3.5, label="hidden states, kept"),
            Line2D([], [], color=HIDDEN, linewidth=2, linestyle=(0, (2, 1.2)), label="restored for one column"),
            Line2D([], [], color=STATE, linewidth=2.5, label="recurrent states, kept"),
            Patch(facecolor=CELL, edgecolor="#cccccc", label="the 7th cell of backward"),
        ],
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=9.5,
    )
    figure.subplots_adjust(left=0.05, right=0.98, top=0.9, bottom=0.24, wspace=0.12)
    figure.savefig(Path(__file__).with_name("grid.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
