"""Peak memory of a training step by the length of the sequence, for each method of gradient checkpointing.

    python benchmarks/memory.py                                      # CPU: 2,048 to 32,768 tokens; some minutes
    python benchmarks/memory.py --methods every-layer MA-GC --lengths 8192 --output_dir elsewhere
    python benchmarks/memory.py --device cuda                        # Mamba-2-2.7B, 2^10 to 2^19 tokens
    python benchmarks/memory.py --default_allocator                  # as processes are, with what glibc holds back
    python benchmarks/memory.py --plot_only                          # draw and tabulate the results again

The peak is what one step (`training_step.py`) takes above the loaded model, so the weights' gradients are in it. Each
measurement has a process of its own, and a short step before, so that libraries have been loaded. On a GPU it is the
memory that PyTorch allocated. On a CPU it is the highest resident size (Linux only); for every method glibc is told to
give freed memory back at once and to keep one arena, or the peak would be that of its free lists, which
`--default_allocator` shows. A length is left out, "–", where the method's peak at the length before says that memory
would not do.

Writes `memory.json`, `memory.md` and `memory.png` to `benchmarks/results`; on a GPU `memory_cuda.*`, with
`--default_allocator` `memory_default_allocator.*`.
"""

import ctypes
import json
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

RETURN_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
WARM_UP_TOKENS = 300  # more than a chunk
LENGTHS = {"cpu": [2**n for n in range(11, 16)], "cuda": [2**n for n in range(10, 20)]}


def resident_bytes(field: str) -> int:
    """`VmRSS`, this process's resident size now, or `VmHWM`, the highest since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(job: dict) -> dict:
    """One step in this process: its peak memory, the share of the weights' gradients in it, and its time."""
    try:
        step = TrainingStep(job)
        step(WARM_UP_TOKENS)
        step.model.zero_grad(set_to_none=True)
        if job["device"] == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = step(job["length"])
            peak = torch.cuda.max_memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = resident_bytes("VmRSS")
            seconds = step(job["length"])
            peak = resident_bytes("VmHWM")
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    return {"peak_bytes": peak - before, "gradient_bytes": step.gradient_bytes(), "seconds": round(seconds, 3)}


def measure_all(job: dict, methods: list[str], lengths: list[int], allocator: dict[str, str]):
    """Yields a row for each length and method, measured with these settings of glibc's allocator."""
    rows = []
    for length in sorted(lengths):
        for method in methods:
            row = {"method": method, "length": length}
            plan = plan_of({**job, **row})
            shorter = next((row for row in reversed(rows) if row["method"] == method), {})
            reason = shorter.get("skipped")
            if plan:
                row["plan"] = plan
            # On a GPU nobody else suffers if memory runs out, so it is tried.
            if not reason and shorter and job["device"] == "cpu":
                by_length = shorter["peak_bytes"] * length // shorter["length"]
                reason = expected_shortage(plan["device_bytes"] if plan else by_length)
            row |= {"skipped": reason} if reason else run_worker(__file__, {**job, **row}, allocator)
            rows.append(row)
            print(f"{length:>7,} tokens, {METHODS[method]}: {in_words(row)}", flush=True)
            yield row


def in_words(row: dict) -> str:
    if "skipped" in row:
        return f"skipped, {row['skipped']}"
    words = f"{gigabytes(row['peak_bytes'])} GB, {row['seconds']:.1f} s"
    if "plan" in row:
        plan = row["plan"]
        cell = f"{plan['layer_interval']} layers x {plan['sequence_interval']:,} tokens, {plan['order']}"
        words += f" (cells of {cell}; expected {gigabytes(plan['device_bytes'] + row['gradient_bytes'])} GB)"
    return words


def gigabytes(num_bytes: int) -> str:
    """Three digits: 0.305, 2.57, 10.3."""
    size = num_bytes / 1e9
    return f"{size:.{3 if size < 0.9995 else 2 if size < 9.995 else 1}f}"


def report(results: dict) -> str:
    """The results as a Markdown page."""
    rows = {(row["method"], row["length"]): row for row in results["rows"]}
    lengths = sorted({length for _, length in rows})
    methods = list(dict.fromkeys(method for method, _ in rows))
    header = [f"{length:,}" for length in lengths]

    def line(name: str, method: str, cell) -> list[str]:
        """One line of a table, with a dash where nothing was measured."""
        found = [rows.get((method, length), {}) for length in lengths]
        return [name, *(cell(row) if "peak_bytes" in row else "–" for row in found)]

    def ratio(row: dict) -> str:
        reference = rows.get((REFERENCE, row["length"]), {}).get("peak_bytes")
        return f"{row['peak_bytes'] / reference:.3f}" if reference else "–"

    def expected(row: dict) -> str:
        return gigabytes(row["plan"]["device_bytes"] + row["gradient_bytes"])

    def cell_size(row: dict) -> str:
        return f"{row['plan']['layer_interval']} × {row['plan']['sequence_interval']:,}"

    peaks = [line(METHODS[method], method, lambda row: gigabytes(row["peak_bytes"])) for method in methods]
    for method in (method for method in methods if method.startswith("MA-GC")):
        name = METHODS[method]
        peaks.append(line(f"{name} / {METHODS[REFERENCE]}", method, ratio))
        peaks.append(line(f"{name}: expected by its plan", method, expected))
        peaks.append(line(f"{name}: layers × tokens of a cell", method, cell_size))
    seconds = [line(METHODS[method], method, lambda row: f"{row['seconds']:.1f}") for method in methods]
    gradients = next((gigabytes(row["gradient_bytes"]) for row in results["rows"] if "gradient_bytes" in row), "–")
    orders = sorted({row["plan"]["order"] for row in results["rows"] if "plan" in row})
    allocator = ", and an allocator told to save memory, not time" if results["allocator"] else ""
    reasons = dict.fromkeys(row["skipped"] for row in results["rows"] if "skipped" in row)
    text = [
        "Peak memory of one training step (forward, loss, backward) above the loaded model, in GB (10^9 bytes), by "
        f"tokens in the sequence. {gradients} GB of each figure are the weights' gradients.",
        "",
        *table(["GB", *header], peaks),
        "",
        *([f"MA-GC's order is {' or '.join(orders)}.", ""] if orders else []),
        *([f"“–” was not measured: {'; '.join(reasons)}.", ""] if reasons else []),
        *([results["note"], ""] if "note" in results else []),
        f"The same steps, in seconds: one run each{allocator}. `benchmarks/speed.py` measures the speed.",
        "",
        *table(["seconds", *header], seconds),
        "",
        describe(results),
        "",
    ]
    return "\n".join(text)


def draw(results: dict, path: Path) -> None:
    """Peak memory by length, as the paper's Figure 1."""
    from figure import draw_by_length

    lines = {}
    for row in results["rows"]:
        if "peak_bytes" in row:
            lines.setdefault(row["method"], []).append((row["length"], row["peak_bytes"] / 1e9))
    draw_by_length(lines, "peak memory of a training step, GB", path)


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--default_allocator", action="store_true", help="leave glibc as it is")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker)))
        return
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    kind = "_cuda" if arguments.device == "cuda" else "_default_allocator" if arguments.default_allocator else ""
    output = arguments.output_dir / f"memory{kind}.json"
    if arguments.plot_only:
        results = json.loads(output.read_text())
    else:
        job = base_job(arguments)
        methods = arguments.methods or [m for m in METHODS if m != "MA-GC-offload" or job["device"] == "cuda"]
        results = {
            "command": command_line(__file__),
            "environment": environment(arguments.device, arguments.threads),
            "allocator": {} if arguments.default_allocator else RETURN_FREED_MEMORY,
            "job": job,
            "rows": [],
        }
        lengths = arguments.lengths or LENGTHS[arguments.device]
        for row in measure_all(job, methods, lengths, results["allocator"]):
            results["rows"].append(row)
            output.write_text(json.dumps(results, indent=1) + "\n")  # at once: the longest take long
    output.with_suffix(".md").write_text(report(results))
    print(report(results))
    draw(results, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
