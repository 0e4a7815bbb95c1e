"""The time of each part of the model on a GPU, its share of the chip's peak, and the cost of copies to the host.

    python benchmarks/breakdown.py --device cuda             # Video-Ma²mba-3.1B and its Mamba-2-2.7B; two minutes
    python benchmarks/breakdown.py --device cuda --resume --what offload

    watching   seconds of decoding a film (640 x 360, on the CPU, resized), and of each part of the model on as many
               frames, waiting for the device after each part; and seconds of the kernels by kind
    training   seconds of the kernels of one step (`common/training_step.py`, MA-GC, 2^16 tokens) by kind
    offload    one step with checkpoints in host memory, 2^17 tokens: the share of the time of copies between host and
               device in which a kernel runs too, by PyTorch's profiler

Model FLOPs are those that the model needs, without those that checkpointing repeats. A matrix product takes 2 for each
weight and row. A Mamba-2 layer takes for each token 2 D (2 E + 2 G N + H) + 2 E D for its projections,
2 K (E + 2 G N) for the convolution, and Q (G N + E) + 4 N E for the scan in chunks of Q, which needs half of each
chunk's square. A layer of the vision tower with T patches of width W and inner width I takes T (8 W^2 + 4 W I) +
4 T^2 W. Backward takes twice as many. The peak is 989 TFLOP/s, that of an H100 and an H200 in dense bfloat16.

Writes `breakdown.json` to `benchmarks/results`.
"""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from common.films import write_film
from common.options import base_job, base_parser, parse_step
from common.recording import Record, describe_environment, page, run_benchmark, table, worker_rows
from common.training_step import PREDICTED, TrainingStep
from common.video_model import duration, load_model, random_frames, synchronize, watch_pieces
from torch import nn

PEAK_FLOPS = 989e12
# A kernel's kind is the first whose pattern is found in its name.
KINDS = {
    "scan": r"chunk_scan|chunk_state|state_passing|chunk_cumsum|bmm_chunk|ssd",
    "convolution": r"conv1d",
    "norms": r"layer_norm|rms_?norm",
    "attention": r"flash|fmha|attention",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk",
    "element by element": r"elementwise|vectorized|reduce|copy|cat|fill|index|embedding|memset",
}
SIZES = {"cuda": {"film": 60, "training": 2**16, "offload": 2**17}, "cpu": {"film": 2, "training": 64, "offload": 64}}

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same time as intervals that do not touch, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def length_of(intervals: Iterable[Interval]) -> float:
    """Return the time that at least one interval covers."""
    return sum(end - start for start, end in union(intervals))


def overlap(copies: Iterable[Interval], kernels: Iterable[Interval]) -> float:
    """Return the time in which both a copy and a kernel run."""
    first, second, common = union(copies), union(kernels), 0.0
    while first and second:
        common += max(0.0, min(first[-1][1], second[-1][1]) - max(first[-1][0], second[-1][0]))
        (first if first[-1][0] >= second[-1][0] else second).pop()
    return common


def mamba2_flops(config) -> float:
    """Return the FLOPs of one token forward through the layers of a language model."""
    inner, groups = config.expand * config.hidden_size, config.n_groups * config.state_size
    projections = 2 * config.hidden_size * (2 * inner + 2 * groups + config.num_heads) + 2 * inner * config.hidden_size
    convolution = 2 * config.conv_kernel * (inner + 2 * groups)
    scan = config.chunk_size * (groups + inner) + 4 * config.state_size * inner
    return config.num_hidden_layers * (projections + convolution + scan)


def head_flops(config) -> float:
    """Return the FLOPs of the head at one position."""
    return 2 * config.hidden_size * config.vocab_size


def vision_flops(config) -> float:
    """Return the FLOPs of one frame through the layers of the vision tower that its features come from."""
    vision = config.vision_config
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    tokens = patches + 1
    layers = config.vision_feature_layer % (vision.num_hidden_layers + 1)
    layer = tokens * (8 * width**2 + 4 * width * vision.intermediate_size) + 4 * tokens**2 * width
    return layers * layer + 2 * patches * 3 * vision.patch_size**2 * width


def projector_flops(config) -> float:
    """Return the FLOPs of the projector for one frame."""
    width = config.text_config.hidden_size
    return 2 * config.tokens_per_frame * width * (config.vision_config.hidden_size + width)


def share_of_peak(flops: float, seconds: float, device: str) -> float | None:
    """Return the share of `PEAK_FLOPS` on a GPU, or None on a CPU."""
    return round(flops / seconds / PEAK_FLOPS, 4) if device == "cuda" else None


def trace(call: Callable[[], object], device: torch.device) -> list[dict]:
    """Return the profile of a call as events of a Chrome trace, with times in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def interval(event: dict) -> Interval:
    """Return the start and the end of an event in seconds."""
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def kernels_by_kind(events: list[dict]) -> dict[str, float]:
    """Return the seconds of kernels and of memory sets by `KINDS`, the longest first."""
    seconds = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memset"):
            name = event["name"]
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other")
            seconds[kind] = seconds.get(kind, 0.0) + event["dur"] / 1e6
    return {kind: round(value, 4) for kind, value in sorted(seconds.items(), key=lambda item: -item[1])}


def copies_and_kernels(events: list[dict]) -> dict:
    """Return the copies between host and device, and the part of their time in which kernels run."""
    kernels = [interval(event) for event in events if event.get("cat") == "kernel"]
    found = {"kernel_seconds": round(length_of(kernels), 4)}
    for name, mark in (("to_host", "DtoH"), ("to_device", "HtoD"), ("both", "to")):
        copies = [event for event in events if event.get("cat") == "gpu_memcpy" and mark in event["name"]]
        copies = [event for event in copies if "DtoD" not in event["name"]]
        intervals = [interval(event) for event in copies]
        seconds = length_of(intervals)
        found[name] = {
            "bytes": sum(event.get("args", {}).get("bytes", 0) for event in copies),
            "seconds": round(seconds, 4),
            "beside_kernels": round(overlap(intervals, kernels), 4),
            "share": round(overlap(intervals, kernels) / seconds, 4) if seconds else None,
        }
    return found


class PhaseTimer:
    """Seconds of modules, which wait for the device before and after each call."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]):
        self.seconds, self.handles, self.started = dict.fromkeys(modules, 0.0), [], {}
        for name, module in modules.items():

            def start(*_, name=name):
                synchronize(model)
                self.started[name] = time.perf_counter()

            def stop(*_, name=name):
                synchronize(model)
                self.seconds[name] += time.perf_counter() - self.started[name]

            self.handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]

    def remove(self) -> dict[str, float]:
        """Remove the hooks and return the seconds."""
        for handle in self.handles:
            handle.remove()
        return self.seconds


def measure_decoding(num_seconds: int, size: int) -> float:
    """Return the seconds to read a film of `num_seconds` at one frame a second, resized to `size`."""
    from transformers_ma2mba import Ma2mbaVideoProcessor, iter_frames

    fit = Ma2mbaVideoProcessor(size={"height": size, "width": size}).frame_fitter()
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder) / "film.mp4"
        write_film(film, num_seconds)
        start = time.perf_counter()
        for _ in iter_frames(str(film), 1.0, lambda frame: fit(torch.from_numpy(frame).permute(2, 0, 1))):
            pass
        return time.perf_counter() - start


def measure_watching(job: dict) -> dict:
    """Return the row of watching a film of `job["size"]` seconds, with each phase."""
    num_frames = job["size"]
    model = load_model(job)
    config = model.config
    frames = random_frames(model, num_frames)
    trunk = {"vision": model.model.vision_tower, "projection": model.model.multi_modal_projector}
    trunk |= {"language model": model.model.language_model, "head": model.lm_head}

    def watch():
        watch_pieces(model, frames, job["frames_per_piece"])

    watch()
    start = time.perf_counter()
    watch()
    seconds = time.perf_counter() - start
    timer = PhaseTimer(model, trunk)
    start = time.perf_counter()
    watch()
    one_by_one = time.perf_counter() - start
    phases = timer.remove()
    phases["other"] = one_by_one - sum(phases.values())
    flops = {
        "vision": num_frames * vision_flops(config),
        "projection": num_frames * projector_flops(config),
        "language model": num_frames * config.tokens_per_frame * mamba2_flops(config.text_config),
        "head": -(-num_frames // job["frames_per_piece"]) * head_flops(config.text_config),
    }
    decoding = measure_decoding(num_frames, config.vision_config.image_size)
    return {
        "frames": num_frames,
        "seconds": round(seconds, 4),
        "phases": {"decoding, on the CPU": round(decoding, 4), **{k: round(v, 4) for k, v in phases.items()}},
        "flops": {**flops, "all": sum(flops.values())},
        "shares_of_peak": {
            **{name: share_of_peak(flops[name], phases[name], job["device"]) for name in flops},
            "all": share_of_peak(sum(flops.values()), seconds, job["device"]),
        },
        "kernels": kernels_by_kind(trace(watch, model.device)),
    }


def measure_training(job: dict) -> dict:
    """Return the row of one step, and the profile of another."""
    length = job["size"]
    step = TrainingStep(job)
    config = step.model.config

    def one() -> float:
        step.model.zero_grad(set_to_none=True)
        return step(length)

    one()
    seconds = one()
    events = trace(one, step.device)
    flops = 3 * (length * mamba2_flops(config) + min(PREDICTED, length) * head_flops(config))
    return {
        "length": length,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(length / seconds, 1),
        "flops": flops,
        "share_of_peak": share_of_peak(flops, seconds, job["device"]),
        "kernels": kernels_by_kind(events),
        "copies": copies_and_kernels(events),
    }


MEASUREMENTS = {"watching": measure_watching, "training": measure_training, "offload": measure_training}


def measure_one(job: dict) -> Iterator[dict]:
    """Yield the row of the job's measurement."""
    try:
        yield MEASUREMENTS[job["what"]](job)
    except torch.OutOfMemoryError:
        yield {"skipped": "out of memory"}


def percentage(share: float | None) -> str:
    """Return a share in percent, or a dash for None."""
    return "–" if share is None else f"{share:.1%}"


def report(results: dict) -> str:
    """Return the results as a Markdown page."""
    rows = {row["what"]: row for row in results["rows"]}
    measured = {name: row for name, row in rows.items() if "seconds" in row}
    parts = report_watching(measured["watching"]) if "watching" in measured else []
    for name, row in measured.items():
        if name != "watching":
            kind = "with checkpoints in host memory" if name == "offload" else "with MA-GC"
            parts.append(
                f"A training step {kind}, {row['length']:,} tokens: {row['seconds']:.2f} s, "
                f"{row['tokens_per_second']:,.0f} tokens/s, {row['flops'] / 1e12:,.1f} model TFLOP, "
                f"{percentage(row['share_of_peak'])} of the peak."
            )
    kernels = {name: row["kernels"] for name, row in measured.items() if row["kernels"]}
    if kernels:
        kinds = list(dict.fromkeys(kind for seconds in kernels.values() for kind in seconds))
        lines = [[kind, *(f"{seconds.get(kind, 0):.2f}" for seconds in kernels.values())] for kind in kinds]
        parts += ["Seconds of kernels by kind:", table(["kernels", *kernels], lines)]
    if "offload" in measured:
        parts += report_copies(measured["offload"]["copies"])
    missing = [f"{name}: {row.get('skipped') or row['failed']}" for name, row in rows.items() if name not in measured]
    return page(*parts, f"Not measured: {'; '.join(missing)}." if missing else "", describe_environment(results))


def report_watching(row: dict) -> list:
    """Return parts of the page: a table of the phases of watching."""
    lines = []
    for name, seconds in {**row["phases"], "all": row["seconds"]}.items():
        flops = f"{row['flops'].get(name, 0) / 1e12:,.2f}"
        label = "the model at once" if name == "all" else name
        lines.append([label, f"{seconds:.2f}", flops, percentage(row["shares_of_peak"].get(name))])
    return [
        f"Watching {duration(row['frames'])} of film, waiting for each phase; below, the whole model without waiting:",
        table(["phase", "seconds", "model TFLOP", "of the peak"], lines),
    ]


def report_copies(copies: dict) -> list:
    """Return parts of the page: a table of the copies of the step with checkpoints in host memory."""
    lines = []
    for name, label in (("to_host", "to the host"), ("to_device", "to the device"), ("both", "both")):
        one = copies[name]
        times = [f"{one['seconds']:.2f}", f"{one['beside_kernels']:.2f}", percentage(one["share"])]
        lines.append([label, f"{one['bytes'] / 1e9:.2f}", *times])
    header = ["copies", "GB", "seconds", "seconds beside kernels", "share"]
    return ["Copies of that step between device and host:", table(header, lines)]


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--what", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="default: all")
    arguments = parse_step(parser, measure_one)
    job = {**base_job(arguments), "preset": arguments.preset or (None if arguments.tiny else "3.1b")}
    job["frames_per_piece"] = 1 if arguments.tiny else 48
    sizes = SIZES[arguments.device]

    def measure(record: Record) -> None:
        for what in arguments.what:
            if record.has(what=what):
                continue
            method = "MA-GC-offload" if what == "offload" else "MA-GC"
            size = sizes["film" if what == "watching" else what]
            for row in worker_rows(__file__, {**job, "what": what, "method": method, "size": size}):
                record.add({"what": what, **row})
                print(f"{what}: {row}", flush=True)

    run_benchmark(arguments, __file__, "breakdown", {"job": job}, measure, report, keys=("what",))


if __name__ == "__main__":
    main()
