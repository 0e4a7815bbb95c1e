"""Tokens per second of a training step, for each method of gradient checkpointing.

    python benchmarks/speed.py                              # CPU: 2,048 and 8,192 tokens; takes about half an hour
    python benchmarks/speed.py --methods every-layer MA-GC --lengths 2048 --output_dir elsewhere
    python benchmarks/speed.py --device cuda --resume       # Mamba-2-2.7B, 2^14 to 2^19 tokens
    python benchmarks/speed.py --plot_only                  # draw and tabulate the results again

The step (`common/training_step.py`) is forward and backward, as in the paper's Table 8.

On a CPU the methods take turns, so that other load on the machine falls on all of them. In each round each method has
a process of its own, which runs one step that does not count and two that do. The median of all rounds counts. glibc's
allocator keeps its own settings. On a GPU each method has one process; with `--resume` the times of `memory.py` count.

Writes `speed.json`, `speed.md` and `speed.png` to `benchmarks/results`, on a GPU `speed_cuda.*`.
"""

import statistics
from pathlib import Path

from common.figure import draw_bars
from common.methods import METHODS, REFERENCE, RowsByLength
from common.options import base_parser, parse_step
from common.paper_figures import DEVICE, TOKENS_PER_SECOND
from common.recording import Record, page, reasons, run_worker, table
from common.training_step import GPU_LENGTHS, describe, measure_lengths, new_row, run_methods

STEPS = 2  # steps of a process that count
LENGTHS = [2**11, 2**13]  # on a CPU


def measure_in_turns(record: Record, job: dict, methods: list[str], length: int, rounds: int) -> None:
    """Add the rows of a length, whose methods take turns on a CPU."""
    rows = [new_row(record, job, method, length) for method in methods if not record.has(method=method, length=length)]
    for turn in range(rounds):
        for row in rows:
            if "skipped" not in row and "failed" not in row:
                take_turn(row, job, turn)
    for row in rows:
        if "seconds" in row:
            row["tokens_per_second"] = round(length / statistics.median(row["seconds"]), 1)
        record.add(row)


def take_turn(row: dict, job: dict, turn: int) -> None:
    """Add the seconds of `STEPS` steps to a row, or the reason why there are none."""
    method, length = row["method"], row["length"]
    measured = run_worker(__file__, {**job, "method": method, "lengths": [length], "most_steps": 1 + STEPS})
    if "seconds" not in measured:
        row |= measured
        return
    row["peak_bytes"] = measured["peak_bytes"]
    row.setdefault("seconds", []).extend(measured["step_seconds"])
    seconds = ", ".join(f"{second:.2f}" for second in measured["step_seconds"])
    print(f"{length:>7,} tokens, round {turn + 1}, {METHODS[method]}: {seconds} s", flush=True)


def spread(row: dict) -> str:
    """Return the median and the range of a row's seconds."""
    seconds = row.get("step_seconds") or row["seconds"]
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def report(results: dict) -> str:
    """Return the results as a Markdown page."""
    found = RowsByLength(results)
    entry = "tokens_per_second"

    def lines(cell) -> list[list[str]]:
        return [found.line(METHODS[method], method, cell) for method in found.methods]

    paper = []
    for method, figures in TOKENS_PER_SECOND.items() if results["job"].get("step") == "tokens" else ():
        for length, figure in figures.items():
            ours = found.get(method, length, entry)
            if ours:
                paper.append([METHODS[method], f"{length:,}", f"{ours:,.0f}", f"{figure:,}", f"{ours / figure:.2f}"])
    header = ["method", "tokens", "tokens/s", "paper", "times"]
    counted = f"the median of {STEPS * results['rounds']}" if "rounds" in results else "of one step, or the median"
    return page(
        "Tokens per second of one training step (forward, loss, backward), by tokens in the sequence.",
        found.table("tokens/s", lines(lambda row: f"{row[entry]:,.0f}")),
        f"The same as a multiple of “{METHODS[REFERENCE]}”:",
        found.table("speed", [found.ratios(METHODS[m], m, REFERENCE, entry) for m in found.methods]),
        *([f"Beside the paper's measurement on {DEVICE} (Table 8):", table(header, paper)] if paper else []),
        f"Seconds of a step: {counted}, and the range.",
        found.table("seconds", lines(spread)),
        reasons(results["rows"]),
        describe(results),
    )


def draw(results: dict, path: Path) -> None:
    """Draw a bar for each length and method."""
    bars = {}
    for row in results["rows"]:
        if "tokens_per_second" in row:
            bars.setdefault(row["length"], []).append((row["method"], row["tokens_per_second"]))
    draw_bars(bars, "tokens per second of a training step", path)


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="on a CPU (default: %(default)s)")
    arguments = parse_step(parser, measure_lengths, GPU_LENGTHS, LENGTHS)

    def measure(record: Record, job: dict, methods: list[str]) -> None:
        for length in arguments.lengths:
            measure_in_turns(record, job, methods, length, arguments.rounds)

    run_methods(arguments, __file__, "speed", "memory", {"rounds": arguments.rounds}, measure, report, draw)


if __name__ == "__main__":
    main()
