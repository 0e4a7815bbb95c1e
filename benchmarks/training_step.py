"""One training step of a stock Mamba-2 under a method of gradient checkpointing, for `memory.py` and `speed.py`.

The step is forward, loss and backward, without an optimizer. The model is Transformers' `Mamba2Model` with random
weights. Embeddings are drawn within the step and get a gradient, as those of a video do; so the vocabulary plays no
part. The loss is the mean of the squares of `last_hidden_state`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Mamba2Config, Mamba2Model

RESULTS = Path(__file__).parent / "results"
# The stock methods run Transformers' own scan: their processes do not even import this package.
METHODS = {
    "none": "no checkpointing",
    "every-layer": "every layer (Transformers' own)",
    "every-sqrt": "every √L layers",
    "every-layer-lean": "every layer, with this package's scan",
    "MA-GC": "MA-GC",
    "MA-GC-minimal": 'MA-GC, memory_budget="minimal"',
    "MA-GC-offload": "MA-GC, checkpoints in host memory",
}
REFERENCE = "every-layer"
# A published shape, but smaller: Mamba2Config's own default of n_groups is none of theirs.
SMALL = dict(num_hidden_layers=16, hidden_size=256, num_heads=8, n_groups=1, vocab_size=8)
USABLE = 0.9  # of the memory that is free


def base_parser(description: str) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", help="shape of 0.7b, 1.8b or 3.1b (default: 3.1b on a GPU, else a small one)")
    parser.add_argument("--num_hidden_layers", type=int, help="instead of the shape's")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, help="in tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on the CPU (default: %(default)s)")
    parser.add_argument("--layer_interval", type=int, help="of MA-GC (default: planned)")
    parser.add_argument("--sequence_interval", type=int, help="of MA-GC (default: planned)")
    parser.add_argument("--order", choices=["layer-major", "sequence-major"], help="of MA-GC (default: planned)")
    parser.add_argument("--memory_budget", help='that MA-GC plans for, such as "20GiB" (default: none)')
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--plot_only", action="store_true", help="draw and tabulate an earlier run again")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def base_job(arguments: argparse.Namespace) -> dict:
    """What every measurement of a run has in common, as a worker takes it."""
    on_gpu = arguments.device == "cuda"
    preset = arguments.preset or ("3.1b" if on_gpu else None)
    shape = SMALL
    if preset is not None:
        from transformers_ma2mba import Ma2mbaConfig

        shape = Ma2mbaConfig.from_preset(preset).text_config.to_dict()
    if arguments.num_hidden_layers:
        shape = {**shape, "num_hidden_layers": arguments.num_hidden_layers}
    settings = {name: getattr(arguments, name) for name in ("layer_interval", "sequence_interval", "order")}
    settings["memory_budget"] = arguments.memory_budget
    return {
        "device": arguments.device,
        "dtype": "bfloat16" if on_gpu else "float32",
        "threads": arguments.threads,
        "shape": shape,
        "ma_gc": {name: value for name, value in settings.items() if value is not None},
    }


def run_worker(script: str, job: dict, extra_environment: dict[str, str] | None = None) -> dict:
    """What `script` measures in a process of its own; `{"skipped": "out of memory"}` if it was killed for that."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), **(extra_environment or {})}
    environment["TRANSFORMERS_VERBOSITY"] = "error"  # each process would say that mamba-ssm is not installed
    command = [sys.executable, script, "--worker", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode == -9:  # the kernel's out-of-memory killer
        return {"skipped": "out of memory"}
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def expected_shortage(expected_bytes: int) -> str | None:
    """Why a measurement on the CPU should not be tried, if so: other processes would be killed as well."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    if expected_bytes <= USABLE * free:
        return None
    return f"expected to take {expected_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB free"


class LayerGroup(nn.Module):
    """Consecutive layers that backward restores together."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def run(self, hidden_states, **kwargs):
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states

    def forward(self, hidden_states, **kwargs):
        return checkpoint(self.run, hidden_states, use_reentrant=False, **kwargs)


class TrainingStep:
    """A model under the job's method; calling it runs one step and returns its seconds."""

    def __init__(self, job: dict):
        torch.set_num_threads(job["threads"])
        torch.manual_seed(0)
        self.device, self.dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
        self.options = {}
        config = Mamba2Config.from_dict(job["shape"])
        torch.set_default_dtype(self.dtype)
        with self.device:
            self.model = Mamba2Model(config).train()
        torch.set_default_dtype(torch.float32)
        method = job["method"]
        if method.startswith("every-layer"):
            self.model.activation_checkpointing_enable()
        if method == "every-sqrt":
            size = round(config.num_hidden_layers**0.5)
            layers = list(self.model.layers)
            groups = [LayerGroup(layers[first : first + size]) for first in range(0, len(layers), size)]
            self.model.layers = nn.ModuleList(groups)
        if method == "every-layer-lean":
            from transformers_ma2mba.ssd_scan import install_scan_dispatcher

            install_scan_dispatcher()
            self.options["lean_scan"] = True
        if method.startswith("MA-GC"):
            from transformers_ma2mba.multi_axis_checkpointing import enable_multi_axis_checkpointing

            enable_multi_axis_checkpointing(self.model, **ma_gc_settings(job))

    def __call__(self, length: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        size = (1, length, self.model.config.hidden_size)
        inputs_embeds = torch.randn(size, device=self.device, dtype=self.dtype, requires_grad=True)
        last_hidden_state = self.model(inputs_embeds=inputs_embeds, **self.options).last_hidden_state
        last_hidden_state.square().mean().backward()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradient_bytes(self) -> int:
        """Of the weights."""
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)


def ma_gc_settings(job: dict) -> dict:
    """Arguments of `enable_multi_axis_checkpointing`."""
    settings = {**job["ma_gc"], "offload": job["method"] == "MA-GC-offload"}
    return {**settings, "memory_budget": "minimal"} if job["method"] == "MA-GC-minimal" else settings


def plan_of(job: dict) -> dict | None:
    """What MA-GC plans for the job, and expects of it; None for the other methods."""
    if not job["method"].startswith("MA-GC"):
        return None
    from transformers_ma2mba import plan_checkpoints

    config = Mamba2Config.from_dict(job["shape"])
    plan = plan_checkpoints(config, job["length"], dtype=job["dtype"], **ma_gc_settings(job))
    names = ("order", "layer_interval", "sequence_interval", "device_bytes", "host_bytes")
    return {name: getattr(plan, name) for name in names}


def environment(device: str, threads: int) -> dict:
    """What the figures depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    where = {"device": torch.cuda.get_device_name() if device == "cuda" else cpu, "cpu": cpu, "threads": threads}
    where |= {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    packages = ["torch", "transformers"]
    if device == "cuda":
        packages += ["mamba-ssm", "causal-conv1d"]
    for package in packages:
        try:
            where[package] = version(package)
        except ModuleNotFoundError:
            where[package] = None
    return where


def describe(results: dict) -> str:
    """The conditions of a run, for below its table."""
    where, job = results["environment"], results["job"]
    shape = Mamba2Config.from_dict(job["shape"])
    on = where["device"] if job["device"] == "cuda" else f"{where['cpu']}, {where['threads']} threads"
    packages = [f"{name} {where[name]}" for name in ("torch", "transformers", "mamba-ssm") if where.get(name)]
    return (
        f"Stock `Mamba2Model`, {shape.num_hidden_layers} layers, width {shape.hidden_size}, {job['dtype']}, batch "
        f"size 1, random weights. {on}; Python {where['python']}, {', '.join(packages)}; {where['date']}; "
        f"`{results['command']}`."
    )


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, its first column to the left."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def command_line(script: str) -> str:
    return " ".join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]).replace(" --plot_only", "")
