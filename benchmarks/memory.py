"""Peak memory of a training step by the length of the sequence, for each method of gradient checkpointing.

    python benchmarks/memory.py                                      # CPU: 2,048 to 32,768 tokens; some minutes
    python benchmarks/memory.py --methods every-layer MA-GC --lengths 8192 --output_dir elsewhere
    python benchmarks/memory.py --device cuda --resume               # Mamba-2-2.7B, 2^14 to 2^19 tokens
    python benchmarks/memory.py --default_allocator                  # with glibc's own allocator settings
    python benchmarks/memory.py --plot_only                          # draw and tabulate the results again

The peak is the memory of one step (`common/training_step.py`) above the loaded model. It includes the weights'
gradients.

On a GPU the peak is the memory that PyTorch allocated, which does not depend on earlier steps. Each method has one
process, and the figures stand beside the paper's Table 3.

On a CPU the peak is the highest resident size (Linux only). Each measurement has a process of its own, which first
runs a short step to load the libraries. glibc is told to return freed memory at once and to keep one arena, or the
peak would include its free lists; `--default_allocator` shows that peak. A length is left out, "–", if the method's
peak at the length before says that the memory is too small.

Writes `memory.json`, `memory.md` and `memory.png` to `benchmarks/results`; on a GPU `memory_cuda.*`, with
`--default_allocator` `memory_default_allocator.*`.
"""

from pathlib import Path

from common.figure import draw_by_length
from common.memory_use import gigabytes
from common.methods import METHODS, REFERENCE, RowsByLength, cell_size
from common.options import base_parser, parse_step
from common.paper_figures import ACTIVATION_GB, DEVICE
from common.recording import Record, page, reasons, run_worker
from common.training_step import GPU_LENGTHS, describe, describe_row, measure_lengths, new_row, run_methods

RETURN_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LENGTHS = [2**n for n in range(11, 16)]  # on a CPU


def report(results: dict) -> str:
    """Return the results as a Markdown page."""
    found = RowsByLength(results)
    gradients = next((gigabytes(row["gradient_bytes"]) for row in results["rows"] if "gradient_bytes" in row), "–")
    of_kind = report_of_gpu if is_of_gpu(results) else report_of_cpu
    return page(*of_kind(results, found, gradients), describe(results))


def is_of_gpu(results: dict) -> bool:
    """Return whether the results are of a GPU or of a rehearsal."""
    return results["job"].get("step") == "tokens"


def size(entry: str):
    """Return a cell of a table: an entry of a row in GB."""
    return lambda row: gigabytes(row[entry]) if row.get(entry) is not None else None


def report_of_gpu(results: dict, found: RowsByLength, gradients: str) -> list:
    """Return parts of a page that counts as the paper does, without the weights' gradients, beside its figures."""
    activations = []
    for method in found.methods:
        activations.append(found.line(METHODS[method], method, size("activation_bytes")))
        paper = ACTIVATION_GB.get(method, {})
        if any(length in paper for length in found.lengths):
            values = [paper.get(length, "") for length in found.lengths]
            activations.append([f"{METHODS[method]}: paper", *("–" if v is None else str(v) for v in values)])
    more = [found.line(f"{METHODS[m]}: peak with gradients", m, size("peak_bytes")) for m in found.methods]
    more += [found.line(f"{METHODS[m]}: reserved with weights", m, size("reserved_bytes")) for m in found.methods]
    for method in (method for method in found.methods if method.startswith("MA-GC")):
        cells = {
            "expected by its plan": lambda row: gigabytes(row["plan"]["device_bytes"]),
            "layers × tokens of a cell": cell_size,
            "order": lambda row: row["plan"]["order"],
        }
        more += [found.line(f"{METHODS[method]}: {name}", method, cell) for name, cell in cells.items()]
    offloading = [method for method in found.methods if "offload" in method]
    more += [found.line(f"{METHODS[method]}: on the host", method, size("host_bytes")) for method in offloading]
    return [
        "Activation memory of one training step (forward, loss, backward), in GB (10^9 bytes), by tokens in the "
        f"sequence: the peak above the loaded model, less the {gradients} GB of the weights' gradients. Below it, "
        f"the paper's measurement on {DEVICE} (Table 3).",
        found.table("GB", activations),
        reasons(results["rows"]),
        "The rest of the memory, and MA-GC's plans:",
        found.table("GB", more),
    ]


def report_of_cpu(results: dict, found: RowsByLength, gradients: str) -> list:
    """Return parts of a page with the weights' gradients in its figures."""
    peaks = [found.line(METHODS[method], method, size("peak_bytes")) for method in found.methods]
    for method in (method for method in found.methods if method.startswith("MA-GC")):
        name = METHODS[method]
        peaks.append(found.ratios(f"{name} / {METHODS[REFERENCE]}", method, REFERENCE, "peak_bytes", digits=3))
        cells = {
            "expected by its plan": lambda row: gigabytes(row["plan"]["device_bytes"] + row["gradient_bytes"]),
            "layers × tokens of a cell": cell_size,
        }
        peaks += [found.line(f"{name}: {what}", method, cell) for what, cell in cells.items()]
    seconds = [found.line(METHODS[method], method, lambda row: f"{row['seconds']:.1f}") for method in found.methods]
    orders = sorted({row["plan"]["order"] for row in results["rows"] if "plan" in row})
    allocator = ", and an allocator told to save memory, not time" if results["allocator"] else ""
    return [
        "Peak memory of one training step (forward, loss, backward) above the loaded model, in GB (10^9 bytes), by "
        f"tokens in the sequence. {gradients} GB of each figure are the weights' gradients.",
        found.table("GB", peaks),
        f"MA-GC's order is {' or '.join(orders)}." if orders else "",
        reasons(results["rows"]),
        results.get("note", ""),
        f"The same steps, in seconds: one run each{allocator}. `benchmarks/speed.py` measures the speed.",
        found.table("seconds", seconds),
    ]


def draw(results: dict, path: Path) -> None:
    """Draw peak memory by length, as the paper's Figure 1; on a GPU activation memory, with its Table 3 dashed."""
    on_gpu = is_of_gpu(results)
    lines, paper = {}, {}
    for row in results["rows"]:
        if "peak_bytes" in row:
            num_bytes = row["activation_bytes"] if on_gpu else row["peak_bytes"]
            lines.setdefault(row["method"], []).append((row["length"], num_bytes / 1e9))
    if on_gpu:
        shown = {length for points in lines.values() for length, _ in points}
        for method in (method for method in ACTIVATION_GB if method in lines):
            figures = ACTIVATION_GB[method].items()
            paper[method] = [(length, value) for length, value in figures if value is not None and length in shown]
    kind = "activation memory of a training step, GB; dashed: the paper's"
    title = kind if on_gpu else "peak memory of a training step, GB"
    draw_by_length({method: sorted(points) for method, points in lines.items()}, title, path, paper)


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--default_allocator", action="store_true", help="leave glibc's settings as they are")
    arguments = parse_step(parser, measure_lengths, GPU_LENGTHS, LENGTHS)
    allocator = {} if arguments.default_allocator else RETURN_FREED_MEMORY

    def measure(record: Record, job: dict, methods: list[str]) -> None:
        for length in arguments.lengths:
            for method in methods:
                if record.has(method=method, length=length):
                    continue
                row = new_row(record, job, method, length)
                if "skipped" not in row:
                    worker_job = {**job, "method": method, "lengths": [length], "most_steps": 1}
                    row |= run_worker(__file__, worker_job, allocator)
                record.add(row)
                print(f"{length:>7,} tokens, {METHODS[method]}: {describe_row(row)}", flush=True)

    name = "memory_default_allocator" if arguments.default_allocator else "memory"
    run_methods(arguments, __file__, name, "speed", {"allocator": allocator}, measure, report, draw)


if __name__ == "__main__":
    main()
