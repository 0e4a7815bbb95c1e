"""The recurrent state over a long film: its norm, the half-life of each head's memory, and the limits of both.

    python benchmarks/state.py                    # after `make demo`; two minutes on one core
    python benchmarks/state.py --hours 2 4 8 24   # and films of a day; ten minutes
    python benchmarks/state.py --plot_only        # draw and tabulate the results again

Three models are compared: the one before its training, the one of the demo's first stage, trained on clips of 8 to 20
seconds, and the one that ships with the package, trained on films of up to two hours as well. The films are those of
`examples/make_videos.py`.

**One film of two hours.** After each of 60 moments, equally spaced on a logarithmic scale, the benchmark takes the
norm of each head's state. The half-life of a head's memory at a token is ln 2 / (A dt), in tokens: after as many
tokens with the same time step dt, half of the state is left. It is given in seconds of film, as the median over the
seconds in which nothing happens, and over those with an event.

**Films of `--hours`.** The model trained on films answers all six questions about films whose events are within the
first 20 seconds, anywhere, or within the last 20 seconds. The model trained on clips does so at the first length only.
The state after a film with events at the start is the sum of two parts: the *background* is the state after the same
film without events, and the *trace* is the rest. The model also answers from sums of a part from the end of the film
and a fresh one from its 20th second:

    aged trace       wrong answers show that the trace is lost: it has decayed or changed
    aged background  wrong answers show that the background has drifted: it hides a trace as good as new

The films with events at the start are watched a second time in float64, which shows the effect of rounding. Norms and
A stay in float32, as in Transformers.

Writes `state.json`, `state.md` and `state.png` to `benchmarks/results`.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common.figure import import_pyplot
from common.recording import VIDEO_PACKAGES, describe_environment, describe_run, new_parser, page, publish, table
from common.toy_films import load_pipeline, random_answers, watch, without_events
from make_videos import FPS, QUESTIONS, plan_film, render
from transformers import Cache

from transformers_ma2mba import VideoSession
from transformers_ma2mba.mamba2 import LayerState, copy_cache, read_state, write_state
from transformers_ma2mba.session.answering import Answerer

MODELS = {
    "untrained": "before training",
    "clips": "trained on clips of 8 to 20 seconds",
    "films": "trained on films of up to two hours as well",
}
MODEL_COLOURS = {"untrained": "#8a8a8a", "clips": "#d1603d", "films": "#1f5fa8"}
TIMES = {1: "1 s", 20: "20 s", 120: "2 min", 900: "15 min", 7200: "2 h", 86400: "24 h"}
COLUMNS = {
    "start": "events in the first 20 seconds",
    "start, float64": "the same films in float64",
    "anywhere": "events anywhere",
    "end": "events in the last 20 seconds",
    "aged trace": "first 20 seconds: aged trace, fresh background",
    "aged background": "first 20 seconds: fresh trace, aged background",
}
CLIP_SECONDS = 20
FILM_SECONDS = 7200
NUM_MOMENTS = 60


# One film, closely


@contextmanager
def recorded_time_steps(model) -> Iterator[list[list[torch.Tensor]]]:
    """Collect dt at all tokens that go through the model: for each layer a list of `(num_tokens, num_heads)`."""
    mixers = [layer.mixer for layer in model.model.language_model.layers]
    steps = [[] for _ in mixers]

    def recorder(mixer, found: list) -> Callable:
        def record(in_proj, inputs, output_BTC):
            dt = output_BTC[0, :, -mixer.num_heads :] + mixer.dt_bias
            found.append(F.softplus(dt).clamp(*mixer.time_step_limit))

        return record

    pairs = zip(mixers, steps, strict=True)
    handles = [mixer.in_proj.register_forward_hook(recorder(mixer, found)) for mixer, found in pairs]
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def decay_rates(model) -> torch.Tensor:
    """Return A of each head, `(num_layers, num_heads)`, with a positive sign."""
    return torch.stack([layer.mixer.A_log.exp() for layer in model.model.language_model.layers])


def half_lives(model, steps: list[list[torch.Tensor]]) -> torch.Tensor:
    """Return the half-lives in seconds of film, `(num_frames, num_layers, num_heads)`."""
    dt = torch.stack([torch.cat(found) for found in steps], dim=1)  # tokens, layers, heads
    tokens = math.log(2) / (decay_rates(model) * dt)
    per_frame = model.config.tokens_per_frame
    return tokens.unflatten(0, (-1, per_frame)).median(1).values / per_frame / model.config.frame_rate


def norms(cache: Cache) -> torch.Tensor:
    """Return the norm of each head's state, `(num_layers, num_heads)`, as the mean over the samples."""
    return torch.stack([read_state(layer).recurrent.flatten(2).norm(dim=-1).mean(0) for layer in cache.layers])


def rounded(values: torch.Tensor) -> list:
    """Return the values as nested lists, with four digits."""
    if values.ndim:
        return [rounded(value) for value in values]
    return float(f"{values.item():.4g}")


@torch.no_grad()
def measure_film(qa, seconds: int, seed: int) -> dict:
    """Return norms and half-lives over one film."""
    rng = random.Random(seed)
    film = plan_film(seconds, random_answers(rng), rng)
    frames = list(islice(render(film), 0, None, FPS))
    still = next(render(without_events(film)))
    is_event = torch.tensor([bool((frame != still).any()) for frame in frames])
    moments = sorted({round(seconds ** (step / (NUM_MOMENTS - 1))) for step in range(NUM_MOMENTS)})
    session, found = VideoSession(qa.model, qa.processor), []
    with recorded_time_steps(qa.model) as steps:
        for start, end in pairwise([0, *moments]):
            session.extend(frames[start:end], progress=False)
            found.append(norms(session.state()))
    lives = half_lives(qa.model, steps)
    return {
        "event_seconds": is_event.nonzero().flatten().tolist(),
        "moments": moments,
        "A": rounded(decay_rates(qa.model)),  # layers, heads
        "norms": rounded(torch.stack(found)),  # moments, layers, heads
        "half_lives": rounded(lives[~is_event].median(0).values),  # layers, heads
        "half_lives_at_events": rounded(lives[is_event].median(0).values),
    }


# Films of many hours


def plan(place: str, seconds: int, seed: int, index: int) -> tuple[dict, dict[str, str]]:
    """Return a film, and the right answers about it; films with events at the start begin alike at all lengths."""
    rng = random.Random(f"{seed}/{place}/{index}")
    answers = random_answers(rng)
    if place == "anywhere":
        return plan_film(seconds, answers, rng), answers
    answers["when"] = place
    film = plan_film(CLIP_SECONDS, answers, rng)
    later = seconds - CLIP_SECONDS if place == "end" else 0
    for kind in ("shape", "ball"):
        name, start, end = film[kind]
        film[kind] = (name, start + later, end + later)
    film["blocks"] = [(colour, start + later) for colour, start in film["blocks"]]
    film["blinks"] = [start + later for start in film["blinks"]]
    film["flash"] = (film["flash"][0], film["flash"][1] + later)
    return {**film, "seconds": seconds}, answers


def combine(function: Callable[..., torch.Tensor], *caches: Cache) -> Cache:
    """Return a cache whose tensors are a function of the tensors of others."""
    result = copy_cache(caches[0])
    for target, *layers in zip(result.layers, *(cache.layers for cache in caches), strict=True):
        states = zip(*map(read_state, layers), strict=True)
        write_state(target, LayerState(*(function(*tensors) for tensors in states)))
    return result


class Examiner:
    """Asks a model all six questions about each of several films, and remembers the states.

    Args:
        qa: the pipeline of the model.
        num_films: the number of films of each length and place.
    """

    def __init__(self, qa, num_films: int, seed: int):
        self.qa, self.num_films, self.seed = qa, num_films, seed
        self.answerer = Answerer(qa.model, qa.processor)

    def planned(self, place: str, seconds: int) -> tuple[list[dict], list[dict[str, str]]]:
        """Return the films, and the right answers about each."""
        films, answers = zip(*(plan(place, seconds, self.seed, index) for index in range(self.num_films)), strict=True)
        return list(films), list(answers)

    def states(self, films: list[dict]) -> list[Cache]:
        """Return the state after each film."""
        return [session.state() for session in watch(self.qa, films)]

    def accuracy(self, states: list[Cache], right: list[dict[str, str]]) -> dict[str, float]:
        """Return the share of right answers to each question, and to all."""
        questions = [question for question, _ in QUESTIONS.values()]
        counts = dict.fromkeys(QUESTIONS, 0)
        for state, answers in zip(states, right, strict=True):
            found = self.answerer.ask(lambda state=state: state, questions, max_new_tokens=16)
            for kind, entry in zip(QUESTIONS, found, strict=True):
                counts[kind] += entry["answer"] == answers[kind]
        shares = {kind: count / len(states) for kind, count in counts.items()}
        return {**shares, "all": sum(shares.values()) / len(shares)}

    def events_at_start(self, seconds: int) -> tuple[list[Cache], list[Cache]]:
        """Return backgrounds and traces after films with events at the start."""
        films, _ = self.planned("start", seconds)
        backgrounds = self.states([without_events(film) for film in films])
        traces = [
            combine(torch.sub, state, background)
            for state, background in zip(self.states(films), backgrounds, strict=True)
        ]
        return backgrounds, traces


def sums(backgrounds: list[Cache], traces: list[Cache]) -> list[Cache]:
    """Return the states with these backgrounds and traces."""
    return [combine(torch.add, *pair) for pair in zip(backgrounds, traces, strict=True)]


def mean_norms(caches: list[Cache]) -> torch.Tensor:
    """Return the norm of each head's state, `(num_layers, num_heads)`, as the mean over films."""
    return torch.stack([norms(cache) for cache in caches]).mean(0)


def largest_difference(caches: list[Cache], others: list[Cache]) -> float:
    """Return the largest difference of a layer's state from another, relative to its norm."""
    ratios = []
    for cache, other in zip(caches, others, strict=True):
        for layer, exact in zip(cache.layers, other.layers, strict=True):
            exact = read_state(exact).recurrent
            ratios.append((read_state(layer).recurrent - exact).norm() / exact.norm())
    return torch.stack(ratios).max().item()


@torch.no_grad()
def measure_hours(qa, hours: list[float], num_films: int, seed: int) -> list[dict]:
    """Return answers and states after films of several lengths, in float32 and float64."""
    examiner = Examiner(qa, num_films, seed)
    _, right = examiner.planned("start", CLIP_SECONDS)
    rows, aged = [], {}
    fresh_backgrounds, fresh_traces = examiner.events_at_start(CLIP_SECONDS)
    for length in hours:
        seconds = round(length * 3600)
        backgrounds, traces = aged[length] = examiner.events_at_start(seconds)
        accuracy = {"start": examiner.accuracy(sums(backgrounds, traces), right)}
        for place in ("anywhere", "end"):
            films, answers = examiner.planned(place, seconds)
            accuracy[place] = examiner.accuracy(examiner.states(films), answers)
        accuracy["aged trace"] = examiner.accuracy(sums(fresh_backgrounds, traces), right)
        accuracy["aged background"] = examiner.accuracy(sums(backgrounds, fresh_traces), right)
        row = {"hours": length, "accuracy": accuracy}
        row["background_growth"] = rounded(mean_norms(backgrounds) / mean_norms(fresh_backgrounds))  # layers, heads
        row["trace_left"] = rounded(mean_norms(traces) / mean_norms(fresh_traces))
        rows.append(row)
        print(f"    {length:g} hours: {accuracy}", flush=True)
    qa.model.double()
    for row in rows:
        states = sums(*examiner.events_at_start(round(row["hours"] * 3600)))
        row["accuracy"]["start, float64"] = examiner.accuracy(states, right)
        row["rounding"] = largest_difference(sums(*aged[row["hours"]]), states)
    return rows


def measure_all(arguments) -> dict:
    """Return the results of all models."""
    models = {"untrained": arguments.untrained, "clips": arguments.clips_model, "films": arguments.model}
    results = {
        **describe_run(__file__, packages=VIDEO_PACKAGES),
        "film_seconds": arguments.seconds,
        "films": arguments.films,
        "models": {},
    }
    for name, path in models.items():
        print(f"The model {MODELS[name]} ...", flush=True)
        qa = load_pipeline(path)
        results["models"][name] = measure_film(qa, arguments.seconds, arguments.seed)
        hours = {"untrained": [], "clips": arguments.hours[:1], "films": arguments.hours}[name]
        results["models"][name]["hours"] = measure_hours(qa, hours, arguments.films, arguments.seed)
    return results


# Pages


def seconds_in_words(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.2g} s"


def half_life_table(results: dict) -> list[str]:
    lines, initial = [], results["models"]["untrained"]
    for name, found in results["models"].items():
        pairs = zip(found["half_lives"], found["half_lives_at_events"], strict=True)
        for layer, (quiet, events) in enumerate(pairs):
            ratio = median(still / moving for still, moving in zip(quiet, events, strict=True))
            changes = [rate / first for rate, first in zip(found["A"][layer], initial["A"][layer], strict=True)]
            change = f"{min(changes):.2f} to {max(changes):.2f}"
            lines.append([MODELS[name], str(layer), *map(seconds_in_words, quiet), f"{ratio:.2g}", change])
    heads = [f"head {head}" for head in range(len(quiet))]
    return table(["model", "layer", *heads, "quiet / event", "A / initial A"], lines)


def accuracy_table(results: dict) -> list[str]:
    lines = []
    for name, found in results["models"].items():
        for row in found["hours"]:
            shares = [f"{row['accuracy'][column]['all']:.2f}" for column in COLUMNS]
            heads = [sum(row[part], []) for part in ("background_growth", "trace_left")]  # of all layers
            ranges = [f"{median(values):.2g} ({min(values):.1g} to {max(values):.2g})" for values in heads]
            lines.append([MODELS[name], f"{row['hours']:g}", *shares, *ranges, f"{row['rounding']:.0e}"])
    more = ["norm of the background", "norm of the trace", "difference from float64"]
    return table(["model", "hours", *COLUMNS.values(), *more], lines)


def report(results: dict) -> str:
    """Return the page of the results."""
    film = seconds_in_words(results["film_seconds"])
    return page(
        f"Half-life of each head's memory in a film of {film}: the median over the seconds in which nothing happens. "
        "The next column is its ratio to the half-life in seconds with an event, as the median over the heads. The "
        "last column compares the heads' A with its initial value.",
        half_life_table(results),
        f"Share of right answers to all six questions, about {results['films']} films a cell. The norms of background "
        "and trace are those at the end of a film with events in its first 20 seconds, relative to those at its 20th "
        "second: the median over all heads, and the range. The last column is the largest difference of a layer's "
        "state in float32 from that in float64, relative to its norm.",
        accuracy_table(results),
        f"Conditions: {describe_environment(results)}",
    )


def draw_norms(panel, found: dict, layer: int, colours):
    """Draw the norms of a layer's heads over the film, and its events as ticks."""
    for head, colour in enumerate(colours):
        values = [moment[layer][head] for moment in found["norms"]]
        panel.plot(found["moments"], values, color=colour, linewidth=1.5, label=f"head {head}")
    panel.axvline(CLIP_SECONDS, color="#bbbbbb", linewidth=1, linestyle=":")
    across = panel.get_xaxis_transform()  # x in seconds, y as a share of the panel's height
    panel.vlines(found["event_seconds"], 0, 0.04, transform=across, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(list(TIMES), list(TIMES.values()))
    panel.set_xlim(1, found["moments"][-1] * 1.1)
    panel.minorticks_off()


def draw_half_lives(panel, models: dict, layer: int):
    """Draw the half-lives of a layer's heads by model: a dot for quiet seconds, a dash for seconds with an event."""
    for place, (name, found) in enumerate(models.items()):
        quiet, events = found["half_lives"][layer], found["half_lives_at_events"][layer]
        heads = [head + 0.22 * (place - 1) for head in range(len(quiet))]
        panel.vlines(heads, quiet, events, color=MODEL_COLOURS[name], linewidth=1.2, alpha=0.6)
        panel.plot(heads, events, "_", color=MODEL_COLOURS[name], markersize=7)
        panel.plot(heads, quiet, "o", color=MODEL_COLOURS[name], markersize=5, label=MODELS[name])
    panel.set_yscale("log")
    panel.set_yticks(list(TIMES), list(TIMES.values()))
    panel.minorticks_off()
    panel.grid(axis="y", color="#eeeeee")
    panel.set_axisbelow(True)
    panel.set_xticks(range(len(quiet)), [f"head {head}" for head in range(len(quiet))], fontsize=8)


def draw(results: dict, path: Path) -> None:
    """Draw norms over the film by layer and head for both trained models, and half-lives for all three."""
    pyplot = import_pyplot()
    if pyplot is None:
        return
    models = results["models"]
    num_layers, num_heads = len(models["films"]["half_lives"]), len(models["films"]["half_lives"][0])
    colours = pyplot.get_cmap("viridis")([head / num_heads for head in range(num_heads)])
    figure = pyplot.figure(figsize=(3.6 * num_layers, 9.6), layout="constrained")
    headings = [f"Norm of each head's state, {MODELS[name]}" for name in ("clips", "films")]
    headings.append("Half-life of each head's memory: dots while nothing happens, dashes at events")
    axes = []
    for part, heading in zip(figure.subfigures(3, 1), headings, strict=True):
        part.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes.append(part.subplots(1, num_layers, sharey=True, squeeze=False)[0])
        for layer, panel in enumerate(axes[-1]):
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_title(f"layer {layer}", loc="right", fontsize=10)
    for layer in range(num_layers):
        draw_norms(axes[0][layer], models["clips"], layer, colours)
        draw_norms(axes[1][layer], models["films"], layer, colours)
        draw_half_lives(axes[2][layer], models, layer)
    limits = [bound for panels in axes[:2] for bound in panels[0].get_ylim()]
    for panels in axes[:2]:
        panels[0].set_ylim(min(limits), max(limits))
    for panel in axes[1]:
        panel.set_xlabel("time in the film; ticks: events")
    axes[0][0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.legend(*axes[2][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--untrained", default="demo/untrained", help="a checkpoint (default: %(default)s)")
    parser.add_argument("--clips_model", default="demo/clips", help="a checkpoint (default: %(default)s)")
    parser.add_argument("--model", help="a checkpoint (default: the one that ships with the package)")
    parser.add_argument("--seconds", type=int, default=FILM_SECONDS, help="of the one film (default: %(default)s)")
    parser.add_argument("--hours", nargs="+", type=float, default=[2], help="lengths of the other films (default: 2)")
    parser.add_argument("--films", type=int, default=8, help="of a length and place (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    publish(arguments, "state", lambda: measure_all(arguments), report, draw, markdown=True)


if __name__ == "__main__":
    main()
