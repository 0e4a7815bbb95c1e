"""The share of films of which the model remembers a flash of one second, by the film's length and the flash's place.

    python benchmarks/needle.py                                    # six minutes on one core
    python benchmarks/needle.py --minutes 1 2 4 --films 8 --output_dir elsewhere
    python benchmarks/needle.py --plot_only                        # draw the results again

The model is the one that ships with the package, trained on films of 8 to 20 seconds. The films are those of
`examples/make_videos.py`, of two kinds:

    quiet   nothing but the flash happens
    busy    the other events of the training films happen, too, once each, anywhere in the film

`qa.watch` watches each rendered film from its first second to its last, one frame a second, without a video codec. All
colours are equally frequent in each group of films (a length and a place), so guessing gets 0.25. An answer is right
if it is the colour's name and nothing else; "ranked" counts the films whose right colour is the likeliest of the four.
Writes `needle.json` and `needle.png` to `benchmarks/results`.
"""

import random
import sys
import time
from itertools import islice, product
from pathlib import Path

from common.figure import import_pyplot
from common.recording import VIDEO_PACKAGES, describe_run, new_parser, publish, table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from make_videos import COLOURS, FPS, QUESTIONS, plan_film, render

MINUTES = [1, 2, 4, 8, 15, 30, 60, 120]
DEPTHS = [0, 25, 50, 75, 100]  # percent
SCENES = {
    "quiet": "Nothing but the flash happens",
    "busy": "The other events of the training films happen, too",
}
QUESTION = QUESTIONS["flash"][0]


def plan(scene: str, seconds: int, depth: int, colour: str, rng: random.Random) -> dict:
    """Return a film for `render` with its flash at `depth` percent."""
    answers = {kind: rng.choice(choices) for kind, (_, choices) in QUESTIONS.items()}
    film = plan_film(seconds, {**answers, "flash": colour}, rng)
    film["flash"] = (colour, round((seconds - 1) * depth / 100))
    if scene == "quiet":
        never = (-1, -1)
        film |= {"shape": ("circle", *never), "ball": ("left", *never), "blocks": [], "blinks": []}
    return film


def measure_films(qa, scene: str, minutes: float, depth: int, num_films: int, seed: int) -> dict:
    """Return the answers on `num_films` films and the share of right ones."""
    colours, said, ranked = list(COLOURS), [], 0
    start = time.perf_counter()
    for index in range(num_films):
        colour = colours[index % len(colours)]
        film = plan(scene, round(minutes * 60), depth, colour, random.Random(f"{seed}/{minutes}/{depth}/{index}"))
        session = qa.watch(islice(render(film), 0, None, FPS), progress=False)
        answer = session.ask(QUESTION, max_new_tokens=16)["answer"]
        said.append({"right": colour, "answer": answer})
        ranked += session.ask(QUESTION, candidates=colours)[0]["answer"] == colour
    correct = sum(entry["right"] == entry["answer"] for entry in said)
    return {
        "scene": scene,
        "minutes": minutes,
        "depth": depth,
        "films": num_films,
        "accuracy": correct / num_films,
        "ranked_accuracy": ranked / num_films,
        "seconds": round(time.perf_counter() - start, 1),
        "answers": said,
    }


def grid(results: dict, scene: str, name: str) -> list[list[float]]:
    """Return accuracies, a row for each depth and a column for each length."""
    cells = {(cell["minutes"], cell["depth"]): cell[name] for cell in results["cells"] if cell["scene"] == scene}
    return [[cells[minutes, depth] for minutes in results["minutes"]] for depth in results["depths"]]


def draw(results: dict, path: Path) -> None:
    """Draw a heat map for each kind of film: length, depth, accuracy."""
    pyplot = import_pyplot()
    if pyplot is None:
        return
    scenes, columns, rows = results["scenes"], results["minutes"], results["depths"]
    size = (2.2 + 0.85 * len(columns), 1.0 + (0.7 + 0.45 * len(rows)) * len(scenes))
    figure, axes = pyplot.subplots(len(scenes), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for scene, panel in zip(scenes, axes[:, 0], strict=True):
        accuracies = grid(results, scene, "accuracy")
        picture = panel.imshow(accuracies, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(accuracies):
            for column, accuracy in enumerate(line):
                colour = "black" if accuracy > 0.6 else "white"
                panel.text(column, row, f"{accuracy:.2f}", ha="center", va="center", color=colour, fontsize=9)
        panel.set_title(SCENES[scene], loc="left", fontsize=10)
        panel.set_xticks(range(len(columns)), [f"{minutes:g}" for minutes in columns])
        panel.set_yticks(range(len(rows)), [f"{depth}" for depth in rows])
        panel.set_ylabel("place of the flash\n(% of the film)")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_xticks([column + 0.5 for column in range(len(columns) - 1)], minor=True)
        panel.set_yticks([row + 0.5 for row in range(len(rows) - 1)], minor=True)
        panel.grid(which="minor", color="white", linewidth=1.5)
        panel.tick_params(which="minor", length=0)
    axes[-1, 0].set_xlabel("length of the film (minutes, one frame a second)")
    bar = figure.colorbar(picture, ax=axes[:, 0].tolist(), aspect=30, pad=0.02)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "0.25\nchance", "0.5", "0.75", "1"])
    bar.ax.axhline(0.25, color="white", linewidth=1.5)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label("share of films answered word for word")
    num_films = results["films_per_cell"]
    title = f"“{QUESTION}” The demo's model, trained on films of 8 to 20 seconds; {num_films} films a square"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=160)


def report(results: dict) -> str:
    """Return accuracy by length in Markdown, over all depths."""
    lines = []
    for scene in results["scenes"]:
        for name, answers in (("accuracy", "word for word"), ("ranked_accuracy", "ranked")):
            columns = zip(*grid(results, scene, name), strict=True)
            lines.append([scene, answers, *(f"{sum(column) / len(column):.2f}" for column in columns)])
    header = ["films", "answers", *(f"{minutes:g} min" for minutes in results["minutes"])]
    return "\n".join(table(header, lines, left=2))


def measure_all(arguments) -> dict:
    """Return the results of all kinds of film, lengths and depths."""
    import torch
    from transformers import pipeline

    import transformers_ma2mba  # noqa: F401  registers the pipeline

    torch.set_num_threads(1)
    qa = pipeline("video-question-answering")
    cells = []
    for scene, minutes, depth in product(arguments.scenes, arguments.minutes, arguments.depths):
        cell = measure_films(qa, scene, minutes, depth, arguments.films, arguments.seed)
        cells.append(cell)
        shares = f"{cell['accuracy']:.2f}, ranked {cell['ranked_accuracy']:.2f} ({cell['seconds']:.0f} s)"
        print(f"{scene}, {minutes:g} min, flash at {depth} %: {shares}", flush=True)
    return {
        **describe_run(__file__, packages=VIDEO_PACKAGES),
        "question": QUESTION,
        "chance": 1 / len(COLOURS),
        "films_per_cell": arguments.films,
        "films": arguments.films * len(cells),
        "scenes": arguments.scenes,
        "minutes": arguments.minutes,
        "depths": arguments.depths,
        "cells": cells,
    }


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", nargs="+", type=float, default=MINUTES, help="lengths of films")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="places of the flash, in percent")
    parser.add_argument("--films", type=int, default=4, help="of a length and place, a multiple of 4 (default: 4)")
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES), help="default: both")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.films < 1 or arguments.films % len(COLOURS):
        parser.error(f"--films must be a multiple of {len(COLOURS)}, the number of colours; got {arguments.films}")
    publish(arguments, "needle", lambda: measure_all(arguments), report, draw)


if __name__ == "__main__":
    main()
