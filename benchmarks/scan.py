"""The Mamba-2 scan of this package beside Transformers' own PyTorch form: time and memory, forward and backward.

    python benchmarks/scan.py                        # two threads, every size
    python benchmarks/scan.py --sizes demo --repeats 50
    python benchmarks/scan.py --tile 32 128          # our times with other tiles
    python benchmarks/scan.py --plot_only            # tabulate the results again

Both forms take turns in one process; a time is the median of its runs. For the memory each form has a process of its
own, and the figure is the peak above the inputs: the resident size, or on a GPU allocated memory. The inputs are
slices of a convolution's output, as the mixer gives them, and the decay is that of an untrained model. Writes
`scan.json` to `benchmarks/results`.
"""

import math
import statistics
import time
from collections.abc import Iterator

import torch
from common.memory_use import PeakMemory
from common.recording import describe_run, new_parser, parse, publish, require_row, table
from transformers.models.mamba2 import modeling_mamba2
from transformers.utils import logging

from transformers_ma2mba.mamba2 import ssd_scan as module

# batch size, tokens, heads, channels of a head, state size, groups, chunk
SIZES = {
    "130m, 2048 tokens": (1, 2048, 24, 64, 128, 1, 256),
    "130m, 8192 tokens": (1, 8192, 24, 64, 128, 1, 256),
    "130m, 300 tokens": (1, 300, 24, 64, 128, 1, 256),
    "two groups, batch 2": (2, 1024, 16, 64, 64, 2, 256),
    "demo, 4 heads": (8, 58, 4, 32, 32, 1, 32),
    "demo, 8 heads": (8, 58, 8, 32, 32, 1, 32),
}
SCANS = {"stock": modeling_mamba2.mamba2_chunk_scan, "ours": module.ssd_scan}


def make_inputs(size: str, device: str) -> dict:
    """Return arguments of the scan, all with gradients, and the gradient of its output under `"dy"`."""
    batch_size, length, heads, head_dim, state_size, groups, chunk_size = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    widths = [heads * head_dim, groups * state_size, groups * state_size]
    convolved = torch.randn(batch_size, sum(widths), length + 3, generator=generator)[..., :length].to(device)
    hidden_states, B, C = torch.nn.functional.silu(convolved).transpose(1, 2).split(widths, -1)
    steps = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1), generator=generator))
    inputs = dict(
        hidden_states=hidden_states.view(batch_size, length, heads, head_dim),
        dt=torch.randn(batch_size, length, heads, generator=generator).mul(0.5),
        A=-torch.arange(1.0, heads + 1),
        B=B.view(batch_size, length, groups, state_size),
        C=C.view(batch_size, length, groups, state_size),
        D=torch.ones(heads),
        dt_bias=steps + torch.log(-torch.expm1(-steps)),
    )
    inputs = {name: tensor.to(device).detach().requires_grad_() for name, tensor in inputs.items()}
    dy = torch.randn(inputs["hidden_states"].shape, generator=generator).to(device)
    return inputs | dict(chunk_size=chunk_size, dt_softplus=True, dy=dy)


def forward_backward(scan, dy, **inputs) -> tuple[float, float]:
    """Return the seconds of the forward and of the backward."""
    tensors = [tensor for tensor in inputs.values() if isinstance(tensor, torch.Tensor)]

    def now() -> float:
        if dy.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    y = scan(**inputs)
    middle = now()
    torch.autograd.grad(y, tensors, dy)
    return middle - start, now() - middle


def with_tile(tile: int):
    """Return our scan with another tile and the same number of tokens in a span."""

    def scan(**inputs):
        kept = module.TILE, module.TILES_PER_SPAN
        tokens = module.TILE["cpu"] * module.TILES_PER_SPAN
        module.TILE, module.TILES_PER_SPAN = {kind: tile for kind in module.TILE}, max(tokens // tile, 1)
        try:
            return module.ssd_scan(**inputs)
        finally:
            module.TILE, module.TILES_PER_SPAN = kept

    return scan


def milliseconds(seconds: list[float]) -> float:
    """Return the median."""
    return round(statistics.median(seconds) * 1e3, 2)


def measure_times(size: str, device: str, repeats: int) -> dict:
    """Return the median times of both forms, which take turns."""
    inputs = make_inputs(size, device)
    taken = {name: [] for name in SCANS}
    start = time.perf_counter()
    while len(taken["ours"]) <= repeats or time.perf_counter() - start < 1:
        for name, scan in SCANS.items():
            taken[name].append(forward_backward(scan, **inputs))
    row = {"repeats": len(taken["ours"]) - 1}
    for name, pairs in taken.items():
        pairs = pairs[1:]  # the first run allocates
        row[name] = {
            "forward_ms": milliseconds([forward for forward, _ in pairs]),
            "backward_ms": milliseconds([backward for _, backward in pairs]),
            "ms": milliseconds([sum(pair) for pair in pairs]),
            "least_ms": round(min(sum(pair) for pair in pairs) * 1e3, 2),
        }
    return row


def measure_memory(job: dict) -> Iterator[dict]:
    """Yield the peak memory of one forward and backward above the inputs."""
    torch.set_num_threads(job["threads"])
    scan = SCANS[job["scan"]]
    # The first use loads libraries and allocates their memory.
    SIZES["small"] = (1, 8, 2, 2, 2, 1, 8)
    forward_backward(scan, **make_inputs("small", job["device"]))
    inputs = make_inputs(job["size"], job["device"])
    peak = PeakMemory(torch.device(job["device"]))
    forward_backward(scan, **inputs)
    yield peak.read()


def measure_size(size: str, arguments) -> dict:
    """Return the row of a size."""
    row = measure_times(size, arguments.device, arguments.repeats)
    job = {"threads": arguments.threads, "device": arguments.device, "size": size}
    for name in SCANS:
        row[name] |= require_row(__file__, {**job, "scan": name})
    stock, ours = row["stock"], row["ours"]
    row["times_as_fast"] = round(stock["ms"] / ours["ms"], 2)
    # A small size may fit into memory that the process has free, and then there is nothing to compare.
    row["share_of_peak"] = round(ours["peak_bytes"] / stock["peak_bytes"], 3) if stock["peak_bytes"] else None
    fields = ("batch_size", "tokens", "heads", "head_dim", "state_size", "groups", "chunk_size")
    return dict(zip(fields, SIZES[size], strict=True)) | row


def compare_tiles(size: str, arguments) -> None:
    """Print the times of our scan with each tile."""
    inputs = make_inputs(size, arguments.device)
    taken = {tile: [] for tile in arguments.tile}
    for _ in range(arguments.repeats + 1):
        for tile in arguments.tile:
            taken[tile].append(sum(forward_backward(with_tile(tile), **inputs)))
    print(f"{size}: " + ", ".join(f"tile {tile} {milliseconds(times[1:])} ms" for tile, times in taken.items()))


def report(results: dict) -> str:
    """Return the results as a Markdown table."""
    lines = []
    for size, row in results["sizes"].items():
        stock, ours = row["stock"], row["ours"]
        times = [f"{stock['ms']:,.1f} ms", f"{ours['ms']:,.1f} ms", f"{row['times_as_fast']:.1f}"]
        peaks = [f"{stock['peak_bytes'] / 1e6:,.1f} MB", f"{ours['peak_bytes'] / 1e6:,.1f} MB"]
        share = row["share_of_peak"]
        lines.append([size, *times, *peaks, "–" if share is None else f"{share:.2f}"])
    header = ["size", "Transformers'", "this package's", "times as fast"]
    return "\n".join(table([*header, "peak, Transformers'", "peak, this package's", "as a share"], lines))


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=[""], help="parts of their names (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="at least (default: %(default)s)")
    parser.add_argument("--tile", nargs="+", type=int, default=[], help="only compare our times with these tiles")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    logging.set_verbosity_error()  # or Transformers would warn that the kernels are missing
    arguments = parse(parser, measure_memory)
    torch.set_num_threads(arguments.threads)
    chosen = [size for size in SIZES if any(part in size for part in arguments.sizes)]
    if arguments.tile:
        for size in chosen:
            compare_tiles(size, arguments)
        return

    def measure() -> dict:
        return {
            **describe_run(__file__, arguments.device, arguments.threads),
            "sizes": {size: measure_size(size, arguments) for size in chosen},
            "dtype": "float32",
        }

    publish(arguments, "scan", measure, report)


if __name__ == "__main__":
    main()
