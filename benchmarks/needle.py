"""The share of films of which the model remembers a flash of one second, by the film's length and the flash's place.

    python benchmarks/needle.py                                    # after `make demo`; five minutes on one core
    python benchmarks/needle.py --minutes 1 2 4 --films 4 --output_dir elsewhere
    python benchmarks/needle.py --plot_only                        # draw the results again

Three viewers see the same films:

    clips    the model of the demo's first stage, trained on clips of 8 to 20 seconds
    films    the model that ships with the package, trained on films of up to two hours as well
    sampled  the same model, which sees 16 frames evenly spread over the film and nothing else

The films are those of `examples/make_videos.py`, of two kinds:

    quiet    nothing but the flash happens
    busy     the other events of the training films happen, too, once each, anywhere in the film

The first two viewers see a frame each second, from the first second to the last. The 16 frames begin at a random
moment of the film's first sixteenth: with a fixed moment, all samples or none would show the flash at a given place.
The frames are rendered, without a video codec.

All colours are equally frequent in each group of films (a length and a place), so guessing gets 0.25. An answer is
right if it is the colour's name and nothing else; "ranked" counts the films whose right colour is the likeliest of the
four. Writes `needle.json` and `needle.png` to `benchmarks/results`.
"""

import random
import time
from itertools import product
from pathlib import Path

from common.figure import import_pyplot
from common.recording import VIDEO_PACKAGES, describe_run, new_parser, publish, table
from common.toy_films import load_pipeline, random_answers, watch, without_events
from make_videos import COLOURS, QUESTIONS, paint, plan_film

MINUTES = [1, 2, 4, 8, 15, 30, 60, 120]
DEPTHS = [0, 25, 50, 75, 100]  # percent
NUM_SAMPLED = 16
VIEWERS = {
    "clips": "Trained on clips of 8 to 20 seconds; sees every second",
    "films": "Trained on films of up to two hours as well; sees every second",
    "sampled": f"The same model; sees {NUM_SAMPLED} frames of the film",
}
SCENES = {"quiet": "nothing but the flash happens", "busy": "the other events happen, too"}
QUESTION = QUESTIONS["flash"][0]


def plan(scene: str, seconds: int, depth: int, colour: str, rng: random.Random) -> dict:
    """Return a film with its flash at `depth` percent."""
    film = plan_film(seconds, {**random_answers(rng), "flash": colour}, rng)
    film["flash"] = (colour, round((seconds - 1) * depth / 100))
    return {**without_events(film), "flash": film["flash"]} if scene == "quiet" else film


def sample_frames(film: dict, rng: random.Random) -> list:
    """Return `NUM_SAMPLED` frames, evenly spread over the film."""
    picture, apart = paint(film), film["seconds"] / NUM_SAMPLED
    start = rng.uniform(0, apart)
    return [picture(start + index * apart) for index in range(NUM_SAMPLED)]


def measure_films(qa, viewer: str, scene: str, minutes: float, depth: int, num_films: int, seed: int) -> dict:
    """Return the share of films that are answered rightly, and the wrong answers."""
    start = time.perf_counter()
    colours = list(COLOURS)
    right = [colours[index % len(colours)] for index in range(num_films)]
    rngs = [random.Random(f"{seed}/{minutes}/{depth}/{index}") for index in range(num_films)]
    films = [plan(scene, round(minutes * 60), depth, *pair) for pair in zip(right, rngs, strict=True)]
    if viewer == "sampled":
        sessions = qa.watch([sample_frames(film, rng) for film, rng in zip(films, rngs, strict=True)], progress=False)
    else:
        sessions = watch(qa, films)
    answers = [session.ask(QUESTION, max_new_tokens=16)["answer"] for session in sessions]
    likeliest = [session.ask(QUESTION, candidates=colours)[0]["answer"] for session in sessions]
    return {
        "viewer": viewer,
        "scene": scene,
        "minutes": minutes,
        "depth": depth,
        "accuracy": sum(map(str.__eq__, answers, right)) / num_films,
        "ranked_accuracy": sum(map(str.__eq__, likeliest, right)) / num_films,
        "seconds": round(time.perf_counter() - start, 1),
        "wrong": [f"{colour}: {answer}" for colour, answer in zip(right, answers, strict=True) if answer != colour],
    }


def grid(results: dict, viewer: str, scene: str, name: str) -> list[list[float]]:
    """Return accuracies, a row for each depth and a column for each length."""
    group = [cell for cell in results["cells"] if (cell["viewer"], cell["scene"]) == (viewer, scene)]
    cells = {(cell["minutes"], cell["depth"]): cell[name] for cell in group}
    return [[cells[minutes, depth] for minutes in results["minutes"]] for depth in results["depths"]]


def draw_panel(panel, accuracies: list[list[float]], minutes: list[float], depths: list[int]):
    """Draw a heat map of length, depth and accuracy, and return its picture."""
    picture = panel.imshow(accuracies, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, line in enumerate(accuracies):
        for column, accuracy in enumerate(line):
            colour = "black" if accuracy > 0.6 else "white"
            panel.text(column, row, f"{accuracy:.0%}"[:-1], ha="center", va="center", color=colour, fontsize=9)
    panel.set_xticks(range(len(minutes)), [f"{length:g}" for length in minutes])
    panel.set_yticks(range(len(depths)), [f"{depth}" for depth in depths])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_xticks([column + 0.5 for column in range(len(minutes) - 1)], minor=True)
    panel.set_yticks([row + 0.5 for row in range(len(depths) - 1)], minor=True)
    panel.grid(which="minor", color="white", linewidth=1.5)
    panel.tick_params(which="minor", length=0)
    return picture


def draw(results: dict, path: Path) -> None:
    """Draw a heat map for each viewer and each kind of film."""
    pyplot = import_pyplot()
    if pyplot is None:
        return
    scenes, viewers, minutes, depths = (results[name] for name in ("scenes", "viewers", "minutes", "depths"))
    size = (1.2 + (0.2 + 0.46 * len(minutes)) * len(scenes), 1.4 + (0.45 + 0.33 * len(depths)) * len(viewers))
    figure, axes = pyplot.subplots(
        len(viewers), len(scenes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for viewer, panels in zip(viewers, axes, strict=True):
        for scene, panel in zip(scenes, panels, strict=True):
            picture = draw_panel(panel, grid(results, viewer, scene, "accuracy"), minutes, depths)
        panels[0].set_title(VIEWERS[viewer], loc="left", fontsize=11, fontweight="bold")
        panels[0].set_ylabel("place of the flash\n(% of the film)")
    for scene, panel in zip(scenes, axes[-1], strict=True):
        panel.set_xlabel(f"length of the {scene} film in minutes\n({SCENES[scene]})")
    bar = figure.colorbar(picture, ax=axes.ravel().tolist(), aspect=40, pad=0.01)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25: a guess", "50", "75", "100"])
    bar.ax.axhline(0.25, color="white", linewidth=1.5)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    figure.suptitle(f"“{QUESTION}” Right answers in percent of {results['films_per_cell']} films", fontsize=12)
    figure.savefig(path, dpi=150)


def report(results: dict) -> str:
    """Return accuracy by length in Markdown, over all depths."""
    lines = []
    for viewer, scene in product(results["viewers"], results["scenes"]):
        for name, answers in (("accuracy", "word for word"), ("ranked_accuracy", "ranked")):
            columns = zip(*grid(results, viewer, scene, name), strict=True)
            lines.append([viewer, scene, answers, *(f"{sum(column) / len(column):.2f}" for column in columns)])
    header = ["viewer", "films", "answers", *(f"{minutes:g} min" for minutes in results["minutes"])]
    return "\n".join(table(header, lines, left=3))


def measure_all(arguments) -> dict:
    """Return the results of all viewers, kinds of film, lengths and depths."""
    films_model = load_pipeline(arguments.model)
    pipelines = {"clips": load_pipeline(arguments.clips_model), "films": films_model, "sampled": films_model}
    cells = []
    groups = product(VIEWERS, arguments.scenes, arguments.minutes, arguments.depths)
    for viewer, scene, minutes, depth in groups:
        cell = measure_films(pipelines[viewer], viewer, scene, minutes, depth, arguments.films, arguments.seed)
        cells.append(cell)
        shares = f"{cell['accuracy']:.2f}, ranked {cell['ranked_accuracy']:.2f} ({cell['seconds']:.0f} s)"
        print(f"{viewer}, {scene}, {minutes:g} min, flash at {depth} %: {shares}", flush=True)
    return {
        **describe_run(__file__, packages=VIDEO_PACKAGES),
        "question": QUESTION,
        "chance": 1 / len(COLOURS),
        "films_per_cell": arguments.films,
        "viewers": list(VIEWERS),
        "scenes": arguments.scenes,
        "minutes": arguments.minutes,
        "depths": arguments.depths,
        "cells": cells,
    }


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--clips_model", default="demo/clips", help="a checkpoint (default: %(default)s)")
    parser.add_argument("--model", help="a checkpoint (default: the one that ships with the package)")
    parser.add_argument("--minutes", nargs="+", type=float, default=MINUTES, help="lengths of films")
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS, help="places of the flash, in percent")
    parser.add_argument("--films", type=int, default=8, help="of a length and place, a multiple of 4 (default: 8)")
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=list(SCENES), help="default: both")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.films < 1 or arguments.films % len(COLOURS):
        parser.error(f"--films must be a multiple of {len(COLOURS)}, the number of colours; got {arguments.films}")
    publish(arguments, "needle", lambda: measure_all(arguments), report, draw)


if __name__ == "__main__":
    main()
