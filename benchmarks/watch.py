"""What it costs to watch a film of two hours once, beside decoding it and beside the model's own work.

    python benchmarks/watch.py --film_dir films              # five minutes, the films not counted
    python benchmarks/watch.py --film_dir films --hours 0.5

With the model that ships with the package. The films are those of `video_reader.py`, and are made if they are not in
`--film_dir`. Each measurement has a process of its own with one thread of PyTorch, one after the other:

    decode   frames at the model's rate, resized to its size and dropped
    model    as many frames that are in memory in that size through vision tower and language model, piece by piece
    watch    `qa.watch(film)`, which is both; and the state's file
    ask      the same question to the states of a long and a short film in turn

Memory is the highest resident size while watching above that before, with the pipeline loaded (Linux only). Writes
`watch.json` and `watch.md` to `benchmarks/results`.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from video_reader import FRAMES_PER_SECOND, HEIGHT, RESULTS, WIDTH, environment, write_film

SHORT_SECONDS, TINY_SECONDS = 600, 10
QUESTION = "Which colour is the flash?"
ANSWER_TOKENS = 8  # always so many, so that answers of different films take the same work
TIMES_ASKED = 101
MOST_TIME, MOST_DIFFERENCE, MOST_MEMORY, MOST_DELAY = 1.3, 150e6, 0.25, 0.1  # the targets


def load_pipeline():
    """The pipeline with the model that ships with the package."""
    import torch
    from transformers import pipeline

    import transformers_ma2mba  # noqa: F401  registers the pipeline

    torch.set_num_threads(1)
    return pipeline("video-question-answering")


def resident_bytes(field: str) -> int:
    """`VmRSS`, this process's resident size now, or `VmHWM`, the highest since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


class Stopwatch:
    """Seconds and CPU seconds from its making on."""

    def __init__(self):
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        seconds, cpu_seconds = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}


def measure_decode(film: str) -> dict:
    """Reads and resizes the film as `watch` does, and keeps nothing."""
    import torch

    from transformers_ma2mba.video_reader import iter_frames

    qa = load_pipeline()
    fit = qa.processor.video_processor.frame_fitter()
    stopwatch = Stopwatch()
    frames = iter_frames(film, qa.model.config.frame_rate, lambda frame: fit(torch.from_numpy(frame).permute(2, 0, 1)))
    num_frames = sum(1 for _ in frames)
    return {"frames": num_frames, **stopwatch.read()}


def measure_model(num_frames: str) -> dict:
    """Random frames, in memory in the model's size, through vision tower and language model."""
    import torch

    model = load_pipeline().model
    side = model.config.vision_config.image_size
    frames = torch.randint(256, (int(num_frames), 3, side, side), dtype=torch.uint8)
    cache = None
    stopwatch = Stopwatch()
    with torch.no_grad():
        for piece in frames.split(model.config.frames_per_vision_pass):
            features = model.get_video_features(piece).pooler_output
            embeddings = features.reshape(1, -1, features.shape[-1])
            outputs = model(inputs_embeds=embeddings, cache_params=cache, use_cache=True, logits_to_keep=1)
            cache = outputs.cache_params
    return {"frames": int(num_frames), **stopwatch.read()}


def measure_watch(film: str, state_file: str) -> dict:
    """Watches the film and saves its state."""
    qa = load_pipeline()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident_bytes("VmRSS")
    stopwatch = Stopwatch()
    session = qa.watch(film, progress=False)
    times = stopwatch.read()
    peak = resident_bytes("VmHWM") - before
    session.save(state_file)
    return {
        "frames": session.num_frames,
        **times,
        "peak_bytes": peak,
        "pipeline_bytes": before,
        "state_file_bytes": os.path.getsize(state_file),
    }


def measure_ask(*state_files: str) -> dict:
    """Milliseconds for an answer from each state: the median, all asked in turn."""
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


def in_own_process(name: str, *arguments) -> dict:
    """What a measurement returns, made in a new process."""
    print(f"{name} {' '.join(Path(str(argument)).name for argument in arguments)} ...", flush=True)
    command = [sys.executable, __file__, "--measure", name, *map(str, arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    print(f"    {result}", flush=True)
    return result


def stock_peak_bytes() -> int:
    """What Transformers' own loader takes for two hours of this film, by the results of `video_reader.py`."""
    readers = json.loads((RESULTS / "video_reader.json").read_text())["readers"]
    return next(row["peak_bytes"] for row in readers if row["reader"] == "stock")


def check(measured: dict) -> list[dict]:
    """Each target beside what was measured."""
    decode, model, long, short = (measured[name] for name in ("decode", "model", "long", "short"))
    stock = stock_peak_bytes()
    after_long, after_short = measured["ask"]["milliseconds"]
    targets = []

    def add(what: str, value: str, target: str, is_met: bool):
        targets.append({"what": what, "measured": value, "target": target, "is_met": bool(is_met)})

    for unit in ("seconds", "cpu_seconds"):
        ratio = long[unit] / (decode[unit] + model[unit])
        what = f"watching the long film, {unit.replace('cpu_', 'CPU ')}"
        parts = f"{long[unit]:.1f}; decoding {decode[unit]:.1f}, model {model[unit]:.1f}: {ratio:.2f} x their sum"
        add(what, parts, f"at most {MOST_TIME} x decoding and model alone", ratio <= MOST_TIME)
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
    """The results as a Markdown page."""
    where, film = results["environment"], results["film"]
    packages = ", ".join(f"{name} {where[name]}" for name in ("av", "torch", "torchvision", "transformers", "numpy"))
    lines = [
        f"A film of {film['seconds']:,} seconds (long) and one of {film['short_seconds']} (short), {WIDTH}x{HEIGHT}, "
        f"{FRAMES_PER_SECOND} frames per second, H.264, watched at one frame per second by the model that ships with "
        "the package.",
        "",
        "| what | measured | target | met |",
        "| --- | --- | --- | --- |",
    ]
    for row in results["targets"]:
        lines.append(f"| {row['what']} | {row['measured']} | {row['target']} | {'yes' if row['is_met'] else 'no'} |")
    lines += [
        "",
        f"{where['cpu']}, {where['cores']} cores, one thread of PyTorch (FFmpeg takes its own), {where['date']}; "
        f"Python {where['python']}, {packages}; `{results['command']}`.",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="length of the long film (default: %(default)s)")
    parser.add_argument("--film_dir", type=Path, help="folder that keeps the films (default: temporary)")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--measure", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, *rest = arguments.measure
        print(json.dumps(MEASUREMENTS[name](*rest)))
        return
    seconds = {"long": round(arguments.hours * 3600), "short": SHORT_SECONDS, "tiny": TINY_SECONDS}
    with tempfile.TemporaryDirectory() as temporary:
        film_dir = arguments.film_dir or Path(temporary)
        film_dir.mkdir(parents=True, exist_ok=True)
        films = {name: film_dir / f"film_{length}s.mp4" for name, length in seconds.items()}
        for name, film in films.items():
            if not film.exists():
                print(f"Making {film.name} ...", flush=True)
                write_film(film, seconds[name])
        states = {name: Path(temporary) / f"{name}.safetensors" for name in films}
        measured = {name: in_own_process("watch", films[name], states[name]) for name in ("tiny", "short")}
        measured["decode"] = in_own_process("decode", films["long"])
        measured["model"] = in_own_process("model", measured["decode"]["frames"])
        measured["long"] = in_own_process("watch", films["long"], states["long"])
        measured["ask"] = in_own_process("ask", states["long"], states["short"])
    results = {
        "command": f"python benchmarks/watch.py --hours {arguments.hours:g}",
        "film": {"seconds": seconds["long"], "short_seconds": seconds["short"], "tiny_seconds": seconds["tiny"]},
        "environment": {**environment(), "date": time.strftime("%Y-%m-%d")},
        "targets": check(measured),
        "measured": measured,
    }
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "watch.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.output_dir / "watch.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
