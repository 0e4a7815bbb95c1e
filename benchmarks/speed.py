"""Tokens per second of a training step, for each method of gradient checkpointing.

    python benchmarks/speed.py                              # CPU: 2,048 and 8,192 tokens; takes about half an hour
    python benchmarks/speed.py --methods every-layer MA-GC --lengths 2048 --output_dir elsewhere
    python benchmarks/speed.py --device cuda --resume       # Mamba-2-2.7B, 2^14 to 2^19 tokens
    python benchmarks/speed.py --plot_only                  # draw and tabulate the results again

The step is that of `training_step.py`: forward and backward, as in the paper's Table 8.

On a CPU the methods take turns, so that whatever else the machine does falls on all of them: in each round each has a
process of its own, which runs one step that does not count and two that do. The median of all rounds counts. The
allocator is left as it is. On a GPU each method has one process; with `--resume` what `memory.py` has timed counts.

Writes `speed.json`, `speed.md` and `speed.png` to `benchmarks/results`, on a GPU `speed_cuda.*`.
"""

import statistics
from pathlib import Path

from paper_figures import DEVICE, TOKENS_PER_SECOND
from recording import Record, expected_shortage, reasons, run_benchmark, run_worker, table
from training_step import (
    GPU_LENGTHS,
    GPU_METHODS,
    METHODS,
    REFERENCE,
    TINY_LENGTHS,
    base_job,
    base_parser,
    describe,
    goes_by_method,
    measure_by_method,
    parse,
    plan_of,
)
from training_step import __file__ as WORKER

STEPS = 2  # that count, of a process
LENGTHS = [2**11, 2**13]  # on a CPU
BESIDE = ["method", "tokens", "tokens/s", "paper", "times"]


def measure_all(record: Record, job: dict, methods: list[str], lengths: list[int], rounds: int) -> None:
    """Adds a row for each length and method, measured in turns on a CPU."""
    for length in sorted(lengths):
        turns = {m: {"method": m, "length": length} for m in methods if not record.has(method=m, length=length)}
        for method, row in turns.items():
            shorter = [row for row in record.results["rows"] if row["method"] == method]
            plan = plan_of({**job, **row})
            if plan:
                row["plan"] = plan
            elif shorter:
                reason = shorter[-1].get("skipped")
                if not reason:
                    reason = expected_shortage(shorter[-1]["peak_bytes"] * length // shorter[-1]["length"])
                if reason:
                    row["skipped"] = reason
        for turn in range(rounds):
            for method, row in turns.items():
                if "skipped" in row or "failed" in row:
                    continue
                worker_job = {**job, "method": method, "lengths": [length], "most_steps": 1 + STEPS}
                measured = run_worker(WORKER, worker_job)
                if "seconds" not in measured:
                    row |= measured
                    continue
                row["peak_bytes"] = measured["peak_bytes"]
                row.setdefault("seconds", []).extend(measured["step_seconds"])
                seconds = ", ".join(f"{second:.2f}" for second in measured["step_seconds"])
                print(f"{length:>7,} tokens, round {turn + 1}, {METHODS[method]}: {seconds} s", flush=True)
        for row in turns.values():
            if "seconds" in row:
                row["tokens_per_second"] = round(length / statistics.median(row["seconds"]), 1)
            record.add(row)


def report(results: dict) -> str:
    """The results as a Markdown page."""
    rows = {(row["method"], row["length"]): row for row in results["rows"]}
    lengths = sorted({length for _, length in rows})
    measured = {method for method, _ in rows}
    methods = [method for method in METHODS if method in measured]

    def line(name: str, cell) -> list[str]:
        return [name, *(cell(length) for length in lengths)]

    def speed(method, length) -> float | None:
        return rows[method, length].get("tokens_per_second") if (method, length) in rows else None

    def tokens(method, length) -> str:
        return f"{speed(method, length):,.0f}" if speed(method, length) else "–"

    def ratio(method, length) -> str:
        ours, reference = speed(method, length), speed(REFERENCE, length)
        return f"{ours / reference:.2f}" if ours and reference else "–"

    def spread(method, length) -> str:
        row = rows.get((method, length), {})
        seconds = row.get("step_seconds") or row.get("seconds")
        if not seconds:
            return "–"
        return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"

    header = [f"{length:,}" for length in lengths]
    paper = []
    for method, figures in TOKENS_PER_SECOND.items():
        for length, figure in figures.items():
            if speed(method, length) and results["job"].get("step") == "tokens":
                ours = speed(method, length)
                paper.append([METHODS[method], f"{length:,}", f"{ours:,.0f}", f"{figure:,}", f"{ours / figure:.2f}"])
    counted = (
        "what the step took, or the median"
        if "rounds" not in results
        else f"the median of {STEPS * results['rounds']}"
    )
    text = [
        "Tokens per second of one training step (forward, loss, backward), by tokens in the sequence.",
        "",
        *table(["tokens/s", *header], [line(METHODS[m], lambda s, m=m: tokens(m, s)) for m in methods]),
        "",
        f"The same as a multiple of “{METHODS[REFERENCE]}”:",
        "",
        *table(["speed", *header], [line(METHODS[m], lambda s, m=m: ratio(m, s)) for m in methods]),
        "",
        *([f"Beside what the paper measured on {DEVICE} (Table 8):", "", *table(BESIDE, paper), ""] if paper else []),
        f"Seconds of a step: {counted}, and the range.",
        "",
        *table(["seconds", *header], [line(METHODS[m], lambda s, m=m: spread(m, s)) for m in methods]),
        "",
        *reasons(results["rows"]),
        describe(results),
        "",
    ]
    return "\n".join(text)


def draw(results: dict, path: Path) -> None:
    from figure import draw_bars

    bars = {}
    for row in results["rows"]:
        if "tokens_per_second" in row:
            bars.setdefault(row["length"], []).append((row["method"], row["tokens_per_second"]))
    draw_bars(bars, "tokens per second of a training step", path)


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="on a CPU (default: %(default)s)")
    arguments = parse(parser)
    job, by_method = base_job(arguments), goes_by_method(arguments)

    def measure(record: Record):
        if by_method:
            if arguments.resume:
                record.borrow(arguments.output_dir / "memory_cuda.json")
            lengths = arguments.lengths or (TINY_LENGTHS if arguments.tiny else GPU_LENGTHS)
            measure_by_method(record, job, arguments.methods or GPU_METHODS, lengths, arguments.most_steps)
        else:
            methods = arguments.methods or [method for method in METHODS if "offload" not in method]
            measure_all(record, job, methods, arguments.lengths or LENGTHS, arguments.rounds)

    head = {"job": job} if by_method else {"job": job, "rounds": arguments.rounds}
    run_benchmark(arguments, __file__, "speed_cuda" if by_method else "speed", head, measure, report, draw)


if __name__ == "__main__":
    main()
