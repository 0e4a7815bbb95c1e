"""Figures of the benchmarks: lines over the length of the sequence, and bars."""

import sys
from pathlib import Path

from common.methods import METHODS

COLOURS = {
    "none": "#8a8a8a",
    "every-layer": "#d1603d",
    "every-sqrt": "#c9a227",
    "every-layer-ssd-scan": "#5b8e7d",
    "MA-GC": "#1f5fa8",
    "MA-GC-minimal": "#0b2e59",
    "MA-GC-offload": "#7a4fa3",
    "MA-GC-offload-2.8GB": "#b48ad0",
}


def import_pyplot():
    """Return `matplotlib.pyplot`, which draws to files, or None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("Nothing is drawn: that needs matplotlib, pip install -e .[benchmarks].", file=sys.stderr)
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def new_axes(title: str, height: float):
    """Return a figure and its axes, or None, None without matplotlib."""
    pyplot = import_pyplot()
    if pyplot is None:
        return None, None
    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_by_length(
    lines: dict[str, list[tuple[int, float]]],
    title: str,
    path: Path,
    dashed: dict[str, list[tuple[int, float]]] | None = None,
) -> None:
    """Draw `{method: [(length, value), ...]}` on logarithmic axes, each line with its name at the end.

    `dashed` are lines to compare them with, in the same colours.
    """
    if not lines:
        return
    figure, axes = new_axes(title, height=4.5)
    if figure is None:
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(y=0.1)  # room for a name above the highest line
    lengths = sorted({length for points in lines.values() for length, _ in points})
    # The names of lines that end at the same length keep a distance.
    values = [value for points in lines.values() for _, value in points]
    apart = (max(values) / min(values)) ** 0.09
    heights = {}
    for method, points in sorted(lines.items(), key=lambda item: item[1][-1][1]):
        length, height = points[-1]
        if length < lengths[-1]:  # its name stands above it and above the dashed line
            height = max([height, *(value for at, value in (dashed or {}).get(method, ()) if at == length)])
        below = [taken for other, taken in heights.items() if lines[other][-1][0] == length]
        heights[method] = max([height, *(taken * apart for taken in below)])
    for method, points in lines.items():
        width = 2.8 if method.startswith("MA-GC") else 1.7
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4.5, linewidth=width, color=COLOURS[method])
        if points[-1][0] == lengths[-1]:
            name, offset, aligned = METHODS[method].replace(", ", ",\n").replace(" (", "\n("), (10, 0), "left"
        else:  # above the end of a line that ends early, because other lines go on beside it
            name = (
                METHODS[method].split(" (")[0] if dashed else METHODS[method]
            )  # with dashed lines, more lines end early
            offset, aligned = (0, 12), "center"
        axes.annotate(
            name,
            (points[-1][0], heights[method]),
            xytext=offset,
            textcoords="offset points",
            ha=aligned,
            va="center",
            color=COLOURS[method],
            annotation_clip=False,
        )
    for method, points in (dashed or {}).items():
        style = {"linestyle": "--", "marker": "o", "markersize": 3, "linewidth": 1.2, "markerfacecolor": "white"}
        axes.plot(*zip(*points, strict=True), color=COLOURS[method], **style)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_xlabel("tokens in the sequence")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    figure.savefig(path, dpi=160)


def draw_bars(groups: dict[int, list[tuple[str, float]]], title: str, path: Path) -> None:
    """Draw `{length: [(method, value), ...]}` as bars, the lengths one below the other."""
    if not groups:
        return
    num_bars = sum(len(bars) for bars in groups.values())
    figure, axes = new_axes(title, height=0.8 + 0.32 * num_bars + 0.3 * len(groups))
    if figure is None:
        return
    ticks, position = {}, 0.0
    for length, bars in groups.items():
        axes.text(0, position, f" {length:,} tokens", va="center", fontweight="bold")
        for method, value in bars:
            position += 1
            ticks[position] = METHODS[method]
            axes.barh(position, value, height=0.75, color=COLOURS[method])
            axes.text(value, position, f" {value:,.0f}", va="center")
        position += 1.2
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(max(ticks) + 0.6, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    figure.savefig(path, dpi=160)
