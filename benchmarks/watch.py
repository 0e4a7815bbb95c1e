"""The cost of watching a film of two hours once, beside decoding it and beside the model's own work.

    python benchmarks/watch.py --film_dir films              # five minutes, without the making of the films
    python benchmarks/watch.py --film_dir films --hours 0.5
    python benchmarks/watch.py --plot_only                   # tabulate the results again

The model is the one that ships with the package. The films are those of `video_reader.py`, made if `--film_dir` lacks
them. The measurements run one after the other, each in a process of its own with one thread of PyTorch:

    decode   frames at the model's rate, resized to its size and dropped
    model    as many frames of that size, already in memory, through vision tower and language model, piece by piece
    watch    `qa.watch(film)`, which does both, and the size of the state's file
    ask      the same question to the states of a long and a short film in turn

Memory is the highest resident size while watching above that before, with the pipeline loaded (Linux only). Writes
`watch.json` and `watch.md` to `benchmarks/results`.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common.films import FRAMES_PER_SECOND, HEIGHT, WIDTH, film_of
from common.memory_use import PeakMemory
from common.recording import (
    RESULTS,
    VIDEO_PACKAGES,
    Stopwatch,
    describe_environment,
    describe_run,
    new_parser,
    page,
    parse,
    publish,
    require_row,
    table,
)
from common.video_model import watch_pieces

SHORT_SECONDS, TINY_SECONDS = 600, 10
QUESTION = "Which colour is the flash?"
ANSWER_TOKENS = 8  # of every answer, so that answers about different films take the same work
TIMES_ASKED = 101
MOST_TIME, MOST_DIFFERENCE, MOST_MEMORY, MOST_DELAY = 1.3, 150e6, 0.25, 0.1  # the targets


def load_pipeline():
    """Return the pipeline with the model that ships with the package."""
    from transformers import pipeline

    import transformers_ma2mba  # noqa: F401  registers the pipeline

    return pipeline("video-question-answering")


def measure_decode(film: str) -> dict:
    """Read and resize the film as `watch` does, and keep nothing."""
    from transformers_ma2mba import iter_frames

    qa = load_pipeline()
    fit = qa.processor.video_processor.frame_fitter()
    stopwatch = Stopwatch()
    frames = iter_frames(film, qa.model.config.frame_rate, lambda frame: fit(torch.from_numpy(frame).permute(2, 0, 1)))
    num_frames = sum(1 for _ in frames)
    return {"frames": num_frames, **stopwatch.read()}


def measure_model(num_frames: int) -> dict:
    """Run random frames of the model's size through vision tower and language model."""
    model = load_pipeline().model
    side = model.config.vision_config.image_size
    frames = torch.randint(256, (num_frames, 3, side, side), dtype=torch.uint8)
    stopwatch = Stopwatch()
    watch_pieces(model, frames, model.config.frames_per_vision_pass)
    return {"frames": num_frames, **stopwatch.read()}


def measure_watch(film: str, state_file: str) -> dict:
    """Watch the film and save its state."""
    qa = load_pipeline()
    peak, stopwatch = PeakMemory(torch.device("cpu")), Stopwatch()
    session = qa.watch(film, progress=False)
    row = {"frames": session.num_frames, **stopwatch.read(), **peak.read()}
    session.save(state_file)
    return {**row, "pipeline_bytes": peak.resident, "state_file_bytes": os.path.getsize(state_file)}


def measure_ask(*state_files: str) -> dict:
    """Return the median milliseconds of an answer from each state; the states answer in turn."""
    qa = load_pipeline()
    sessions = [qa.resume(path) for path in state_files]
    times = [[] for _ in sessions]
    for _ in range(TIMES_ASKED + 1):
        for session, own_times in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.ask(QUESTION, min_new_tokens=ANSWER_TOKENS, max_new_tokens=ANSWER_TOKENS)
            own_times.append(time.perf_counter() - start)
    return {"milliseconds": [round(statistics.median(own_times[1:]) * 1000, 2) for own_times in times]}  # 1st: warm-up


MEASUREMENTS = {"decode": measure_decode, "model": measure_model, "watch": measure_watch, "ask": measure_ask}


def measure_one(job: dict) -> Iterator[dict]:
    """Yield the row of the job's measurement."""
    torch.set_num_threads(job["threads"])
    yield MEASUREMENTS[job["what"]](*job["of"])


def in_own_process(name: str, *arguments) -> dict:
    """Return the row of a measurement in a new process."""
    return require_row(__file__, {"threads": 1, "what": name, "of": arguments})


def stock_peak_bytes() -> int:
    """Return the peak memory of Transformers' own loader on two hours of this film, by `video_reader.json`."""
    readers = json.loads((RESULTS / "video_reader.json").read_text())["readers"]
    return next(row["peak_bytes"] for row in readers if row["reader"] == "stock")


def check(measured: dict) -> list[dict]:
    """Return each target beside its measurement."""
    decode, model, long, short = (measured[name] for name in ("decode", "model", "long", "short"))
    stock = stock_peak_bytes()
    after_long, after_short = measured["ask"]["milliseconds"]
    targets = []

    def add(name: str, value: str, target: str, is_met: bool) -> None:
        targets.append({"what": name, "measured": value, "target": target, "is_met": bool(is_met)})

    for unit in ("seconds", "cpu_seconds"):
        ratio = long[unit] / (decode[unit] + model[unit])
        name = f"watching the long film, {unit.replace('cpu_', 'CPU ')}"
        parts = f"{long[unit]:.1f}; decoding {decode[unit]:.1f}, model {model[unit]:.1f}: {ratio:.2f} x their sum"
        add(name, parts, f"at most {MOST_TIME} x decoding and model alone", ratio <= MOST_TIME)
    difference = abs(long["peak_bytes"] - short["peak_bytes"])
    memory = f"{long['peak_bytes'] / 1e6:,.0f} MB; short film {short['peak_bytes'] / 1e6:,.0f} MB"
    most = f"at most {MOST_DIFFERENCE / 1e6:.0f} MB apart"
    add("peak memory above the loaded pipeline", memory, most, difference <= MOST_DIFFERENCE)
    share = long["peak_bytes"] / stock
    add(
        "the same beside Transformers' loader for two hours",
        f"{share:.2%} of {stock / 1e9:.1f} GB",
        f"at most {MOST_MEMORY:.0%}",
        share <= MOST_MEMORY,
    )
    delay = after_long / after_short - 1
    add(
        f"one answer of {ANSWER_TOKENS} tokens, median of {TIMES_ASKED}",
        f"{after_long:.1f} ms after the long film, {after_short:.1f} ms after the short one ({delay:+.1%})",
        f"within {MOST_DELAY:.0%}",
        abs(delay) <= MOST_DELAY,
    )
    sizes = {name: measured[name]["state_file_bytes"] for name in ("tiny", "short", "long")}
    add(
        "the state's file",
        f"{sizes['tiny']:,} B after {TINY_SECONDS} seconds, {sizes['long']:,} B after the long film",
        "the same size",
        len(set(sizes.values())) == 1,
    )
    return targets


def report(results: dict) -> str:
    """Return the results as a Markdown page."""
    film = results["film"]
    lines = [
        [row["what"], row["measured"], row["target"], "yes" if row["is_met"] else "no"] for row in results["targets"]
    ]
    return page(
        f"A film of {film['seconds']:,} seconds (long) and one of {film['short_seconds']} (short), {WIDTH}x{HEIGHT}, "
        f"{FRAMES_PER_SECOND} frames per second, H.264, watched at one frame per second by the model that ships with "
        "the package. PyTorch has one thread; FFmpeg chooses its own number.",
        table(["what", "measured", "target", "met"], lines, left=4),
        describe_environment(results),
    )


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--hours", type=float, default=2.0, help="length of the long film (default: %(default)s)")
    parser.add_argument("--film_dir", type=Path, help="folder that keeps the films (default: temporary)")
    arguments = parse(parser, measure_one)
    seconds = {"long": round(arguments.hours * 3600), "short": SHORT_SECONDS, "tiny": TINY_SECONDS}

    def measure() -> dict:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.film_dir or Path(temporary)
            films = {name: str(film_of(folder, length)) for name, length in seconds.items()}
            states = {name: f"{temporary}/{name}.safetensors" for name in films}
            measured = {name: in_own_process("watch", films[name], states[name]) for name in ("tiny", "short")}
            measured["decode"] = in_own_process("decode", films["long"])
            measured["model"] = in_own_process("model", measured["decode"]["frames"])
            measured["long"] = in_own_process("watch", films["long"], states["long"])
            measured["ask"] = in_own_process("ask", states["long"], states["short"])
        return {
            **describe_run(__file__, packages=VIDEO_PACKAGES),
            "film": {"seconds": seconds["long"], "short_seconds": seconds["short"], "tiny_seconds": seconds["tiny"]},
            "targets": check(measured),
            "measured": measured,
        }

    publish(arguments, "watch", measure, report, markdown=True)


if __name__ == "__main__":
    main()
