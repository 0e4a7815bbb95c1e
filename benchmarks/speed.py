"""Tokens per second of a training step, for each method of gradient checkpointing.

    python benchmarks/speed.py                              # CPU: 2,048 and 8,192 tokens; takes about half an hour
    python benchmarks/speed.py --methods every-layer MA-GC --lengths 2048 --output_dir /tmp
    python benchmarks/speed.py --device cuda                # Mamba-2-2.7B, 2^12, 2^14 and 2^16 tokens
    python benchmarks/speed.py --plot_only                  # draw and tabulate the results again

The step is that of `training_step.py`: forward and backward, as in the paper's Table 8. The methods take turns, so
that whatever else the machine does falls on all of them: in each round each has a process of its own, which runs one
step that does not count and two that do. The median of all rounds counts. The allocator is left as it is.

Writes `speed.json`, `speed.md` and `speed.png` to `benchmarks/results`, on a GPU `speed_cuda.*`.
"""

import json
import resource
import statistics
from pathlib import Path

import torch
from training_step import (
    METHODS,
    REFERENCE,
    TrainingStep,
    base_job,
    base_parser,
    command_line,
    describe,
    environment,
    expected_shortage,
    plan_of,
    run_worker,
    table,
)

STEPS = 2  # that count, of a process
LENGTHS = {"cpu": [2**11, 2**13], "cuda": [2**12, 2**14, 2**16]}


def measure(job: dict) -> dict:
    """Seconds of each step that counts, and the memory that this process took."""
    try:
        step = TrainingStep(job)
        seconds = []
        for _ in range(1 + STEPS):
            step.model.zero_grad(set_to_none=True)
            seconds.append(round(step(job["length"]), 4))
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    return {"seconds": seconds[1:], "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_all(job: dict, methods: list[str], lengths: list[int], rounds: int) -> list[dict]:
    """A row for each length and method."""
    rows = []
    for length in sorted(lengths):
        turns = {method: {"method": method, "length": length} for method in methods}
        for method, row in turns.items():
            shorter = [row for row in rows if row["method"] == method]
            plan = plan_of({**job, **row})
            if plan:
                row["plan"] = plan
            elif shorter:
                reason = shorter[-1].get("skipped")
                if not reason and job["device"] == "cpu":
                    reason = expected_shortage(shorter[-1]["resident_bytes"] * length // shorter[-1]["length"])
                if reason:
                    row["skipped"] = reason
        for turn in range(rounds):
            for method, row in turns.items():
                if "skipped" in row:
                    continue
                measured = run_worker(__file__, {**job, "method": method, "length": length})
                if "skipped" in measured:
                    row["skipped"] = measured["skipped"]
                    continue
                row["resident_bytes"] = measured["resident_bytes"]
                row.setdefault("seconds", []).extend(measured["seconds"])
                seconds = ", ".join(f"{second:.2f}" for second in measured["seconds"])
                print(f"{length:>7,} tokens, round {turn + 1}, {METHODS[method]}: {seconds} s", flush=True)
        for row in turns.values():
            if "skipped" not in row:
                row["tokens_per_second"] = round(length / statistics.median(row["seconds"]), 1)
        rows += turns.values()
    return rows


def report(results: dict) -> str:
    """The results as a Markdown page."""
    rows = {(row["method"], row["length"]): row for row in results["rows"]}
    lengths = sorted({length for _, length in rows})
    methods = list(dict.fromkeys(method for method, _ in rows))

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
        seconds = rows[method, length].get("seconds")
        if not seconds:
            return "–"
        return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"

    header = [f"{length:,}" for length in lengths]
    reasons = dict.fromkeys(row["skipped"] for row in results["rows"] if "skipped" in row)
    text = [
        "Tokens per second of one training step (forward, loss, backward), by tokens in the sequence.",
        "",
        *table(["tokens/s", *header], [line(METHODS[m], lambda s, m=m: tokens(m, s)) for m in methods]),
        "",
        f"The same as a multiple of “{METHODS[REFERENCE]}”:",
        "",
        *table(["speed", *header], [line(METHODS[m], lambda s, m=m: ratio(m, s)) for m in methods]),
        "",
        f"Seconds of a step: the median of {STEPS * results['rounds']}, and the range.",
        "",
        *table(["seconds", *header], [line(METHODS[m], lambda s, m=m: spread(m, s)) for m in methods]),
        "",
        *([f"“–” is for want of memory: {'; '.join(reasons)}.", ""] if reasons else []),
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
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker)))
        return
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    output = arguments.output_dir / ("speed_cuda.json" if arguments.device == "cuda" else "speed.json")
    if arguments.plot_only:
        results = json.loads(output.read_text())
    else:
        job = base_job(arguments)
        methods = arguments.methods or [m for m in METHODS if m != "MA-GC-offload" or job["device"] == "cuda"]
        results = {
            "command": command_line(__file__),
            "environment": environment(arguments.device, arguments.threads),
            "job": job,
            "rounds": arguments.rounds,
            "rows": measure_all(job, methods, arguments.lengths or LENGTHS[arguments.device], arguments.rounds),
        }
        output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(report(results))
    print(report(results))
    draw(results, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
