"""Peak memory of a training step by the length of the sequence, for each method of gradient checkpointing.

    python benchmarks/memory.py                                      # CPU: 2,048 to 32,768 tokens; some minutes
    python benchmarks/memory.py --methods every-layer MA-GC --lengths 8192 --output_dir elsewhere
    python benchmarks/memory.py --device cuda --resume               # Mamba-2-2.7B, 2^14 to 2^19 tokens
    python benchmarks/memory.py --default_allocator                  # as processes are, with what glibc holds back
    python benchmarks/memory.py --plot_only                          # draw and tabulate the results again

The peak is what one step (`training_step.py`) takes above the loaded model, so the weights' gradients are in it.

On a GPU it is the memory that PyTorch allocated, which depends on nothing that was before; a method has one process,
and the paper's Table 3 stands beside the figures. On a CPU it is the highest resident size (Linux only); each
measurement has a process of its own, and a short step before, so that libraries have been loaded. For every method
glibc is told to give freed memory back at once and to keep one arena, or the peak would be that of its free lists,
which `--default_allocator` shows. A length is left out, "–", where the method's peak at the length before says that
memory would not do.

Writes `memory.json`, `memory.md` and `memory.png` to `benchmarks/results`; on a GPU `memory_cuda.*`, with
`--default_allocator` `memory_default_allocator.*`.
"""

from pathlib import Path

from paper_figures import ACTIVATION_GB, DEVICE
from recording import Record, expected_shortage, gigabytes, reasons, run_benchmark, run_worker, table
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
    row_in_words,
)
from training_step import __file__ as WORKER

RETURN_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LENGTHS = [2**n for n in range(11, 16)]  # on a CPU


def measure_all(record: Record, job: dict, methods: list[str], lengths: list[int], allocator: dict[str, str]) -> None:
    """Adds a row for each length and method, on a CPU with these settings of glibc's allocator."""
    for length in sorted(lengths):
        for method in methods:
            if record.has(method=method, length=length):
                continue
            row = {"method": method, "length": length}
            plan = plan_of({**job, **row})
            rows = [row for row in record.results["rows"] if row["method"] == method and row["length"] < length]
            shorter = max(rows, key=lambda row: row["length"], default={})
            reason = shorter.get("skipped")
            if not reason and shorter:
                by_length = shorter["peak_bytes"] * length // shorter["length"]
                reason = expected_shortage(plan["device_bytes"] if plan else by_length)
            if reason:
                row |= {"skipped": reason, **({"plan": plan} if plan else {})}
            else:
                row |= run_worker(WORKER, {**job, "method": method, "lengths": [length], "most_steps": 1}, allocator)
            record.add(row)
            print(f"{length:>7,} tokens, {METHODS[method]}: {row_in_words(row)}", flush=True)


def report(results: dict) -> str:
    """The results as a Markdown page."""
    return report_of_gpu(results) if results["job"].get("step") == "tokens" else report_of_cpu(results)


def report_of_gpu(results: dict) -> str:
    """As the paper counts: without the weights' gradients, its figures below those measured."""
    rows = {(row["method"], row["length"]): row for row in results["rows"]}
    lengths = sorted({length for _, length in rows})
    methods = [method for method in METHODS if any((method, length) in rows for length in lengths)]
    header = [f"{length:,}" for length in lengths]

    def line(name: str, method: str, cell) -> list[str]:
        found = [rows.get((method, length), {}) for length in lengths]
        return [name, *(cell(row) if "seconds" in row else "–" for row in found)]

    def size(entry: str):
        return lambda row: gigabytes(row[entry]) if row.get(entry) is not None else "–"

    def cell_size(row: dict) -> str:
        return f"{row['plan']['layer_interval']} × {row['plan']['sequence_interval']:,}"

    activations = []
    for method in methods:
        activations.append(line(METHODS[method], method, size("activation_bytes")))
        paper = ACTIVATION_GB.get(method, {})
        if any(length in paper for length in lengths):
            values = [paper.get(length, "") for length in lengths]
            activations.append([f"{METHODS[method]}: paper", *("–" if v is None else str(v) for v in values)])
    more = [line(f"{METHODS[m]}: peak with gradients", m, size("peak_bytes")) for m in methods]
    more += [line(f"{METHODS[m]}: reserved with weights", m, size("reserved_bytes")) for m in methods]
    for method in (method for method in methods if method.startswith("MA-GC")):
        name = METHODS[method]
        expected = line(f"{name}: expected by its plan", method, lambda row: gigabytes(row["plan"]["device_bytes"]))
        cells = line(f"{name}: layers × tokens of a cell", method, cell_size)
        more += [expected, cells, line(f"{name}: order", method, lambda row: row["plan"]["order"])]
    offloading = [method for method in methods if "offload" in method]
    more += [line(f"{METHODS[method]}: on the host", method, size("host_bytes")) for method in offloading]
    gradients = next((gigabytes(row["gradient_bytes"]) for row in results["rows"] if "gradient_bytes" in row), "–")
    text = [
        "Activation memory of one training step (forward, loss, backward), in GB (10^9 bytes), by tokens in the "
        f"sequence: the peak above the loaded model, less the {gradients} GB of the weights' gradients. Below it, "
        f"what the paper measured on {DEVICE} (Table 3).",
        "",
        *table(["GB", *header], activations),
        "",
        *reasons(results["rows"]),
        "What goes with it:",
        "",
        *table(["GB", *header], more),
        "",
        describe(results),
        "",
    ]
    return "\n".join(text)


def report_of_cpu(results: dict) -> str:
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
    text = [
        "Peak memory of one training step (forward, loss, backward) above the loaded model, in GB (10^9 bytes), by "
        f"tokens in the sequence. {gradients} GB of each figure are the weights' gradients.",
        "",
        *table(["GB", *header], peaks),
        "",
        *([f"MA-GC's order is {' or '.join(orders)}.", ""] if orders else []),
        *reasons(results["rows"]),
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
    """Peak memory by length, as the paper's Figure 1; on a GPU as its Table 3, with the paper's figures dashed."""
    from figure import draw_by_length

    on_gpu = results["job"].get("step") == "tokens"
    lines, paper = {}, {}
    for row in results["rows"]:
        if "peak_bytes" in row:
            size = row["activation_bytes"] if on_gpu else row["peak_bytes"]
            lines.setdefault(row["method"], []).append((row["length"], size / 1e9))
    if on_gpu:
        shown = {length for points in lines.values() for length, _ in points}
        for method in (method for method in ACTIVATION_GB if method in lines):
            figures = ACTIVATION_GB[method].items()
            paper[method] = [(length, size) for length, size in figures if size is not None and length in shown]
    title = (
        "activation memory of a training step, GB; dashed: the paper's"
        if on_gpu
        else "peak memory of a training step, GB"
    )
    draw_by_length({method: sorted(points) for method, points in lines.items()}, title, path, paper)


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--default_allocator", action="store_true", help="leave glibc as it is")
    arguments = parse(parser)
    job, by_method = base_job(arguments), goes_by_method(arguments)
    allocator = {} if arguments.default_allocator or by_method else RETURN_FREED_MEMORY

    def measure(record: Record):
        if by_method:
            if arguments.resume:
                record.borrow(arguments.output_dir / "speed_cuda.json")
            lengths = arguments.lengths or (TINY_LENGTHS if arguments.tiny else GPU_LENGTHS)
            measure_by_method(record, job, arguments.methods or GPU_METHODS, lengths, arguments.most_steps)
        else:
            methods = arguments.methods or [method for method in METHODS if "offload" not in method]
            measure_all(record, job, methods, arguments.lengths or LENGTHS, allocator)

    head = {"job": job} if by_method else {"allocator": allocator, "job": job}
    kind = "_cuda" if by_method else "_default_allocator" if arguments.default_allocator else ""
    run_benchmark(arguments, __file__, f"memory{kind}", head, measure, report, draw)


if __name__ == "__main__":
    main()
