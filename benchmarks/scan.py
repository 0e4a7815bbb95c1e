"""The Mamba-2 scan of this package beside Transformers' own PyTorch form: time and memory, forward and backward.

    python benchmarks/scan.py                        # two threads, every size
    python benchmarks/scan.py --sizes demo --repeats 50
    python benchmarks/scan.py --tile 32 128          # other tiles as well

Both forms take turns in one process for the times, of which the median counts. For the memory each has a process of
its own: the highest resident size (on a GPU, allocated memory) above that which the process had with its inputs. The
inputs are as the mixer gives them: slices of what a convolution over time returns, decay as an untrained model has it.
Writes `benchmarks/results/scan.json`.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.models.mamba2 import modeling_mamba2
from transformers.utils import logging

from transformers_ma2mba import ssd_scan as module

RESULTS = Path(__file__).parent / "results" / "scan.json"
# batch size, tokens, heads, channels of a head, state size, groups, chunk
SIZES = {
    "130m, 2048 tokens": (1, 2048, 24, 64, 128, 1, 256),
    "130m, 8192 tokens": (1, 8192, 24, 64, 128, 1, 256),
    "130m, 300 tokens": (1, 300, 24, 64, 128, 1, 256),
    "two groups, batch 2": (2, 1024, 16, 64, 64, 2, 256),
    "demo, 4 heads": (8, 58, 4, 32, 32, 1, 32),
    "demo, 8 heads": (8, 58, 8, 32, 32, 1, 32),
}


def make_inputs(size: str, device: str) -> dict:
    """Arguments of the scan, all with gradients, and the gradient of its output under `"dy"`."""
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
    """Seconds of the forward and of the backward."""
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
    """Our scan with another tile, and as many tokens at a time as before."""

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
    return round(statistics.median(seconds) * 1e3, 2)


def measure_times(size: str, device: str, repeats: int) -> dict:
    """Medians of both forms, which take turns."""
    inputs = make_inputs(size, device)
    scans = {"stock": modeling_mamba2.mamba2_chunk_scan, "ours": module.ssd_scan}
    taken = {name: [] for name in scans}
    start = time.perf_counter()
    while len(taken["ours"]) <= repeats or time.perf_counter() - start < 1:
        for name, scan in scans.items():
            taken[name].append(forward_backward(scan, **inputs))
    row = {"repeats": len(taken["ours"]) - 1}
    for name, pairs in taken.items():
        pairs = pairs[1:]  # the first allocates
        row[name] = {
            "forward_ms": milliseconds([forward for forward, _ in pairs]),
            "backward_ms": milliseconds([backward for _, backward in pairs]),
            "ms": milliseconds([sum(pair) for pair in pairs]),
            "least_ms": round(min(sum(pair) for pair in pairs) * 1e3, 2),
        }
    return row


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (at most) of this process; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure_memory(name: str, size: str, device: str) -> int:
    """Bytes that one forward and backward take above the inputs, in this process."""
    scan = {"stock": modeling_mamba2.mamba2_chunk_scan, "ours": module.ssd_scan}[name]
    # Libraries load and allocate at their first use.
    SIZES["small"] = (1, 8, 2, 2, 2, 1, 8)
    forward_backward(scan, **make_inputs("small", device))
    inputs = make_inputs(size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(scan, **inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size counts from here
    before = resident("VmRSS")
    forward_backward(scan, **inputs)
    return resident("VmHWM") - before


def measure_apart(name: str, size: str, arguments) -> int:
    command = [sys.executable, __file__, "--device", arguments.device, "--threads", str(arguments.threads)]
    command += ["--measure-memory", name, size]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.processor()}, {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[""], help="parts of their names (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="at least (default: %(default)s)")
    parser.add_argument("--tile", nargs="+", type=int, default=[], help="only compare our times with these tiles")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--measure-memory", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()  # that the kernels are missing is known here
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory:
        print(measure_memory(*arguments.measure_memory, arguments.device))
        return
    chosen = [size for size in SIZES if any(part in size for part in arguments.sizes)]

    if arguments.tile:
        for size in chosen:
            inputs = make_inputs(size, arguments.device)
            taken = {tile: [] for tile in arguments.tile}
            for _ in range(arguments.repeats + 1):
                for tile in arguments.tile:
                    taken[tile].append(sum(forward_backward(with_tile(tile), **inputs)))
            print(
                f"{size}: " + ", ".join(f"tile {tile} {milliseconds(taken[tile][1:])} ms" for tile in arguments.tile)
            )
        return

    rows = {}
    print(f"{'':22}{'stock':>10}{'ours':>10}{'times':>8}{'stock':>12}{'ours':>10}{'share':>8}")
    for size in chosen:
        row = measure_times(size, arguments.device, arguments.repeats)
        for name in ("stock", "ours"):
            row[name]["peak_bytes"] = measure_apart(name, size, arguments)
        stock, ours = row["stock"], row["ours"]
        row["times_as_fast"] = round(stock["ms"] / ours["ms"], 2)
        # Small sizes fit into memory that the process had free: nothing to compare.
        row["share_of_peak"] = round(ours["peak_bytes"] / stock["peak_bytes"], 3) if stock["peak_bytes"] else None
        rows[size] = row
        print(
            f"{size:22}{stock['ms']:>7.1f} ms{ours['ms']:>7.1f} ms{row['times_as_fast']:>8.2f}"
            f"{stock['peak_bytes'] / 1e6:>9.1f} MB{ours['peak_bytes'] / 1e6:>7.1f} MB"
            f"{row['share_of_peak'] or 0:>8.3f}",
            flush=True,
        )
    fields = ("batch_size", "tokens", "heads", "head_dim", "state_size", "groups", "chunk_size")
    results = {
        "sizes": {size: dict(zip(fields, SIZES[size], strict=True)) | row for size, row in rows.items()},
        "device": device_name(arguments.device),
        "threads": arguments.threads,
        "dtype": "float32",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "command": f"python {' '.join(sys.argv)}",
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
