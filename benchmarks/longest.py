"""The longest training step that fits a GPU of 80 GB: 2^20, 2^21 and 2^22 tokens, checkpoints in host memory.

    python benchmarks/longest.py --device cuda               # Mamba-2-2.7B; six minutes
    python benchmarks/longest.py --device cuda --resume --lengths 4194304

The step is that of `common/training_step.py` with random tokens. Weights and gradients are loaded: a short step before
leaves its gradients, as in gradient accumulation. Each length has a process of its own and takes one step, under the
fastest plan that should fit the device and the host, or else the smallest. A step counts if its loss and gradients are
finite. Its seconds include the first pinning of host memory. A larger GPU is limited to 80 GB.

Writes `longest.json` to `benchmarks/results`.
"""

from collections.abc import Iterator

import torch
from common.memory_use import PeakMemory, gigabytes
from common.methods import cell_size
from common.options import base_job, base_parser, parse_step
from common.plans import fitting_settings, plan_of
from common.recording import Record, describe_environment, page, reasons, run_benchmark, table
from common.training_step import WARM_UP_TOKENS, TrainingStep, measure_by_method

LENGTHS = [2**20, 2**21, 2**22]


def measure_longest(job: dict) -> Iterator[dict]:
    """Yield a row for one step of each length, with the gradients of another step loaded."""
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
    """Return the results as a Markdown page."""
    lines = []
    for row in sorted(results["rows"], key=lambda row: row["length"]):
        cells = ["–"] * 7
        if "seconds" in row:
            loaded = row["weight_bytes"] + row["gradient_bytes"]
            sizes = (row["peak_bytes"] + loaded, row["peak_bytes"], row.get("host_bytes", 0))
            cells = [*map(gigabytes, sizes), f"{row['seconds']:.0f}", f"{row['tokens_per_second']:,.0f}"]
            cells.append(f"{row['loss']:.3f}, " + ("all finite" if row["finite"] else "**not finite**"))
            cells.append(f"{cell_size(row)}, {row['plan']['order']}")
        lines.append([f"{row['length']:,}", *cells])
    header = ["tokens", "peak, GB", "beyond weights and gradients", "host", "seconds", "tokens/s", "loss, gradients"]
    return page(
        "One training step with weights and gradients loaded, checkpoints in host memory, on at most 80 GB.",
        table([*header, "layers × tokens of a cell"], lines),
        reasons(results["rows"]),
        describe_environment(results),
    )


def main():
    arguments = parse_step(base_parser(__doc__), measure_longest, LENGTHS)
    job = base_job(arguments)

    def measure(record: Record) -> None:
        for length in arguments.lengths:
            measure_by_method(record, job, ["MA-GC-offload"], [length], 1, __file__)

    run_benchmark(arguments, __file__, "longest", {"job": job}, measure, report)


if __name__ == "__main__":
    main()
