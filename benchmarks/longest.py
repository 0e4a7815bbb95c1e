"""The longest training step that completes on a GPU of 80 GB: 2^20, 2^21 and 2^22 tokens, checkpoints in host memory.

    python benchmarks/longest.py --device cuda               # Mamba-2-2.7B; six minutes
    python benchmarks/longest.py --device cuda --resume --lengths 4194304

The step is that of `training_step.py` with random tokens. Weights and gradients are loaded: those of a short step
before stay, as in gradient accumulation. Each length has a process of its own and takes one step, under the fastest
plan that should fit the device and the host, or else the smallest; it counts if loss and gradients are finite. Its
seconds include those in which host memory is pinned for the first time. A GPU that has more memory is held to 80 GB.

Writes `longest.json` to `benchmarks/results`.
"""

import sys
from collections.abc import Iterator

import torch
from recording import PeakMemory, Record, describe_environment, gigabytes, print_rows, reasons, run_benchmark, table
from training_step import (
    TINY_LENGTHS,
    WARM_UP_TOKENS,
    TrainingStep,
    base_job,
    base_parser,
    fitting_settings,
    goes_by_method,
    measure_by_method,
    parse,
    plan_of,
)

LENGTHS = [2**20, 2**21, 2**22]


def measure_longest(job: dict) -> Iterator[dict]:
    """One step of each length, the gradients of another loaded."""
    for length in job["lengths"]:
        row = {"length": length}
        try:
            settings = fitting_settings(job, length)
        except ValueError as error:
            yield {**row, "skipped": str(error)}
            return
        row["plan"] = plan_of({**job, "ma_gc": settings, "length": length})
        try:
            step = TrainingStep({**job, "ma_gc": settings})
            step(WARM_UP_TOKENS[job["device"]])
            peak = PeakMemory(step.device)
            seconds = step(length)
        except torch.OutOfMemoryError:
            yield {**row, "skipped": "out of memory"}
            return
        row |= {**peak.read(), "seconds": round(seconds, 2), "tokens_per_second": round(length / seconds, 1)}
        weights = sum(parameter.nbytes for parameter in step.model.parameters())
        row |= {"weight_bytes": weights, "gradient_bytes": step.gradient_bytes(), "loss": step.loss}
        yield {**row, "finite": step.loss == step.loss and step.has_finite_gradients()}


def report(results: dict) -> str:
    """The results as a Markdown page."""
    lines = []
    for row in sorted(results["rows"], key=lambda row: row["length"]):
        if "seconds" in row:
            loaded = row["weight_bytes"] + row["gradient_bytes"]
            cell = f"{row['plan']['layer_interval']} × {row['plan']['sequence_interval']:,}, {row['plan']['order']}"
            sizes = [gigabytes(size) for size in (row["peak_bytes"] + loaded, row["peak_bytes"])]
            host = gigabytes(row.get("host_bytes", 0))
            times = [f"{row['seconds']:.0f}", f"{row['tokens_per_second']:,.0f}"]
            finite = f"{row['loss']:.3f}, " + ("all finite" if row["finite"] else "**not finite**")
            lines.append([f"{row['length']:,}", *sizes, host, *times, finite, cell])
        else:
            lines.append([f"{row['length']:,}", *"–" * 7])
    header = [
        "tokens",
        "peak, GB",
        "of it beyond weights and gradients",
        "host",
        "seconds",
        "tokens/s",
        "loss, gradients",
    ]
    text = [
        "One training step with weights and gradients loaded, checkpoints in host memory, on at most 80 GB.",
        "",
        *table([*header, "layers × tokens of a cell"], lines),
        "",
        *reasons(results["rows"]),
        describe_environment(results),
        "",
    ]
    return "\n".join(text)


def main():
    arguments = parse(base_parser(__doc__))
    if arguments.worker:
        print_rows(measure_longest(arguments.worker))
        return
    if not goes_by_method(arguments):
        sys.exit("This is about a GPU: --device cuda, or --tiny to rehearse it.")
    job = base_job(arguments)

    def measure(record: Record):
        for length in arguments.lengths or (TINY_LENGTHS if arguments.tiny else LENGTHS):
            measure_by_method(record, job, ["MA-GC-offload"], [length], 1, script=__file__)

    run_benchmark(arguments, __file__, "longest", {"job": job}, measure, report)


if __name__ == "__main__":
    main()
