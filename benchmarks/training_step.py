"""One training step of a stock Mamba-2 under a method of gradient checkpointing, for `memory.py` and `speed.py`.

The step is forward, loss and backward, without an optimizer. The model is Transformers' `Mamba2Model` with random
weights. There are two steps:

    embeddings   they are drawn within the step and get a gradient, as those of a video do; so the vocabulary plays no
                 part. The loss is the mean of the squares of `last_hidden_state`.
    tokens       drawn at random, through the embedding. The loss is the cross-entropy of random targets at the last
                 256 positions, where alone the (tied) head runs, and with MA-GC the final norm.

On a GPU, where the step is of tokens, memory and time are read off the same steps: `memory.py` and `speed.py` share
them. A process for each method goes from the shortest length to the longest. One step warms it up; then up to 2^16
tokens three steps are taken, beyond two, of which the first does not count. A GPU that has more is held to 80 GB.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from recording import (
    RESULTS,
    USABLE,
    PeakMemory,
    Record,
    available_bytes,
    describe_environment,
    gigabytes,
    print_rows,
    worker_rows,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Mamba2Config, Mamba2Model

# The stock methods run Transformers' own scan: their processes do not even import this package.
METHODS = {
    "none": "no checkpointing",
    "every-layer": "every layer (Transformers' own)",
    "every-sqrt": "every √L layers",
    "every-layer-ssd-scan": "every layer, with this package's scan",
    "MA-GC": "MA-GC",
    "MA-GC-minimal": 'MA-GC, memory_budget="minimal"',
    "MA-GC-offload": "MA-GC, checkpoints in host memory",
    "MA-GC-offload-2.8GB": "MA-GC, offload in 2.8 GB",
}
REFERENCE = "every-layer"
GROW_WITH_LENGTH = ["none", "every-layer", "every-sqrt", "every-layer-ssd-scan"]  # all of what they keep
# A published shape, but smaller: Mamba2Config's own default of n_groups is none of theirs.
SMALL = dict(num_hidden_layers=16, hidden_size=256, num_heads=8, n_groups=1, vocab_size=8)
# For a rehearsal on a CPU of what is measured on a GPU.
TINY = dict(
    num_hidden_layers=4,
    hidden_size=32,
    num_heads=4,
    head_dim=16,
    state_size=16,
    chunk_size=16,
    n_groups=1,
    vocab_size=384,
)
# Those that the GPU's results have, the most important first. There the stock methods have kernels to scan with.
GPU_METHODS = ["MA-GC", "none", "MA-GC-minimal", "MA-GC-offload-2.8GB", "every-layer", "every-sqrt"]
GPU_LENGTHS = [2**n for n in range(14, 20)]
TINY_LENGTHS = [64, 130]
PREDICTED = 256  # positions that a step of tokens predicts
WARM_UP_TOKENS = {"cpu": 300, "cuda": 2**14}  # more than a chunk; more than a segment
MEMORY_LIMIT = 79 * 2**30  # what PyTorch gets of a GPU of 80 GB


def base_parser(description: str) -> argparse.ArgumentParser:
    """The options that the benchmarks of training steps have."""
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
    parser.add_argument("--step", choices=["embeddings", "tokens"], help="default: tokens on a GPU, else embeddings")
    parser.add_argument("--most_steps", type=int, default=3, help="of a length, on a GPU (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--resume", action="store_true", help="measure only what an earlier run has not")
    parser.add_argument("--tiny", action="store_true", help="rehearse a GPU's run on the CPU; needs --output_dir")
    parser.add_argument("--plot_only", action="store_true", help="draw and tabulate an earlier run again")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, where `--tiny` stands for a CPU, and its figures stay out of the results."""
    parsed = parser.parse_args(arguments)
    if parsed.tiny:
        parsed.device = "cpu"
        if parsed.output_dir.resolve() == RESULTS.resolve():
            parser.error("--tiny measures nothing of worth: give it an --output_dir of its own.")
    return parsed


def goes_by_method(arguments: argparse.Namespace) -> bool:
    """Whether the run is one on a GPU, where one process measures all lengths of a method, or rehearses that."""
    return arguments.device == "cuda" or arguments.tiny


def base_job(arguments: argparse.Namespace) -> dict:
    """What every measurement of a run has in common, as a worker takes it."""
    on_gpu = arguments.device == "cuda"
    preset = arguments.preset or ("3.1b" if on_gpu else None)
    shape = TINY if arguments.tiny else SMALL
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
        "step": arguments.step or ("tokens" if goes_by_method(arguments) else "embeddings"),
        "ma_gc": {name: value for name, value in settings.items() if value is not None},
    }


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


def hold_to_limit(device: torch.device) -> None:
    """Leaves PyTorch no more of a GPU than one of 80 GB has."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_LIMIT / total))


class Step:
    """A model on its device; calling it runs one step and returns its seconds. `loss` is that of the last one."""

    def __init__(self, job: dict):
        torch.set_num_threads(job["threads"])
        torch.manual_seed(0)
        self.device, self.dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
        self.loss = None
        hold_to_limit(self.device)
        self.model = self.make_model(job)

    def __call__(self, length: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        loss = self.forward(length)
        loss.backward()
        self.synchronize()
        seconds = time.perf_counter() - start
        self.loss = loss.item()
        return seconds

    def make_model(self, job: dict) -> nn.Module:
        raise NotImplementedError

    def forward(self, length: int) -> torch.Tensor:
        """The loss of a sequence."""
        raise NotImplementedError

    def random_tokens(self, length: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`(1, length)` to read, and targets for the last of them."""
        input_ids = torch.randint(vocabulary, (1, length), device=self.device)
        return input_ids, torch.randint(vocabulary, (min(PREDICTED, length),), device=self.device)

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradient_bytes(self) -> int:
        """Of the weights."""
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)

    def has_finite_gradients(self) -> bool:
        return all(bool(p.grad.isfinite().all()) for p in self.model.parameters() if p.grad is not None)


class TrainingStep(Step):
    """A stock model under the job's method."""

    def make_model(self, job: dict) -> nn.Module:
        self.kind, self.options = job.get("step", "embeddings"), {}
        self.keeps_rows = job["method"].startswith("MA-GC")
        config = Mamba2Config.from_dict(job["shape"])
        torch.set_default_dtype(self.dtype)
        with self.device:
            model = Mamba2Model(config).train()
        torch.set_default_dtype(torch.float32)
        method = job["method"]
        if method.startswith("every-layer"):
            model.activation_checkpointing_enable()
        if method == "every-sqrt":
            size = round(config.num_hidden_layers**0.5)
            layers = list(model.layers)
            groups = [LayerGroup(layers[first : first + size]) for first in range(0, len(layers), size)]
            model.layers = nn.ModuleList(groups)
        if method == "every-layer-ssd-scan":
            from transformers_ma2mba.kernel_choice import hold

            hold(model)
            self.options["ssd_scan"] = True
        if method.startswith("MA-GC"):
            from transformers_ma2mba.multi_axis_checkpointing import enable_multi_axis_checkpointing

            enable_multi_axis_checkpointing(model, **ma_gc_settings(job))
        return model

    def forward(self, length: int) -> torch.Tensor:
        if self.kind == "embeddings":
            size = (1, length, self.model.config.hidden_size)
            inputs_embeds = torch.randn(size, device=self.device, dtype=self.dtype, requires_grad=True)
            return self.model(inputs_embeds=inputs_embeds, **self.options).last_hidden_state.square().mean()
        input_ids, targets = self.random_tokens(length, self.model.config.vocab_size)
        if self.keeps_rows:
            positions_to_keep = torch.zeros(1, length, dtype=torch.bool, device=self.device)
            positions_to_keep[:, -len(targets) :] = True
            outputs = self.model(input_ids=input_ids, positions_to_keep=positions_to_keep, **self.options)
            rows = outputs.last_hidden_state
        else:
            rows = self.model(input_ids=input_ids, **self.options).last_hidden_state[0, -len(targets) :]
        return F.cross_entropy(F.linear(rows, self.model.embeddings.weight).float(), targets)


def steps_at(length: int, most_steps: int) -> int:
    """How many are taken on a GPU; the first does not count if there are several."""
    return min(most_steps, 3 if length <= 2**16 else 2)


def measure_lengths(job: dict, make_step: Callable[[dict], Step] = TrainingStep) -> Iterator[dict]:
    """A row for each length, from the shortest; the first that does not fit is the last."""
    lengths = sorted(job["lengths"])
    step, longest, peak_bytes = None, lengths[0], 0
    try:
        step = make_step(job)
        capacity = math.inf
        if step.device.type == "cuda":
            total = min(MEMORY_LIMIT, torch.cuda.get_device_properties(0).total_memory)
            capacity = total - torch.cuda.memory_allocated()
        warm_up = WARM_UP_TOKENS[job["device"]]
        step(min(warm_up, lengths[0]) if capacity < math.inf else warm_up)
    except torch.OutOfMemoryError:
        yield {"length": lengths[0], "skipped": "out of memory"}
        return
    for length in lengths:
        # A try at a quarter too much costs nothing but time; a plan need not grow with the length.
        expected = peak_bytes * length / longest
        if expected > 1.25 * capacity and job["method"] in GROW_WITH_LENGTH:
            yield {"length": length, "skipped": f"expected to take {expected / 1e9:.0f} GB"}
            return
        row = {"length": length}
        plan = plan_of({**job, **row})
        if plan:
            row["plan"] = plan
        step.model.zero_grad(set_to_none=True)
        peak, seconds = PeakMemory(step.device), []
        try:
            for _ in range(steps_at(length, job["most_steps"])):
                step.model.zero_grad(set_to_none=True)
                peak.forget()  # what kernels tried when they were first called
                seconds.append(step(length))
        except torch.OutOfMemoryError:
            yield {**row, "skipped": "out of memory"}
            return
        row |= peak.read()
        longest, peak_bytes = length, row["peak_bytes"]
        row["gradient_bytes"] = step.gradient_bytes()
        row["activation_bytes"] = peak_bytes - row["gradient_bytes"]
        counted = seconds[1:] or seconds
        typical = statistics.median(counted)
        row |= {"seconds": round(typical, 4), "step_seconds": [round(s, 4) for s in counted], "loss": step.loss}
        yield {**row, "tokens_per_second": round(length / typical, 1)}


def measure_by_method(
    record: Record,
    job: dict,
    methods: list[str],
    lengths: list[int],
    most_steps: int,
    script: str = __file__,
    **options,
) -> None:
    """Measures what the record lacks, in one process for each method. `options` are for `worker_rows`."""
    for method in methods:
        missing = [length for length in sorted(lengths) if not record.has(method=method, length=length)]
        worker_job = {**job, "method": method, "lengths": missing, "most_steps": most_steps}
        for row in worker_rows(script, worker_job, **options) if missing else ():
            length = missing.pop(0)
            record.add({"method": method, "length": length, **row})
            print(f"{length:>9,} tokens, {METHODS.get(method, method)}: {row_in_words(row)}", flush=True)
            if "skipped" in row:
                for length in missing:
                    record.add({"method": method, "length": length, "skipped": "a shorter sequence did not fit"})


def row_in_words(row: dict) -> str:
    """What was measured, for the terminal."""
    if "seconds" not in row:
        return row.get("skipped") or f"failed, {row['failed']}"
    words = f"{gigabytes(row['peak_bytes'])} GB above the weights, {row['seconds']:.2f} s"
    if "plan" in row:
        plan = row["plan"]
        cell = f"{plan['layer_interval']} layers x {plan['sequence_interval']:,} tokens, {plan['order']}"
        words += f" (cells of {cell}; expected {gigabytes(plan['device_bytes'] + row.get('gradient_bytes', 0))} GB)"
    return words


def ma_gc_settings(job: dict) -> dict:
    """Arguments of `enable_multi_axis_checkpointing`."""
    _, *words = job["method"].removeprefix("MA-GC").split("-")
    settings = {**job["ma_gc"], "offload": "offload" in words}
    budgets = [word for word in words if word != "offload"]
    return {**settings, "memory_budget": budgets[0]} if budgets else settings


def planning_options(job: dict) -> dict:
    """What a plan depends on beside the settings: on a GPU the kernels run the layers, if they are installed."""
    from transformers_ma2mba.fused_layer import why_not_fused

    on_gpu = job["device"] == "cuda"
    fused = on_gpu and why_not_fused([], torch.device("cuda")) is None
    from_ids = job.get("step") == "tokens"
    return {"dtype": job["dtype"], "fused": fused, "from_ids": from_ids, "device": job["device"]}


def plan_of(job: dict) -> dict | None:
    """What MA-GC plans for the job, and expects of it; None for the other methods."""
    if not job["method"].startswith("MA-GC"):
        return None
    from transformers_ma2mba import plan_checkpoints

    config = Mamba2Config.from_dict(job["shape"])
    plan = plan_checkpoints(config, job["length"], **planning_options(job), **ma_gc_settings(job))
    names = ("order", "layer_interval", "sequence_interval", "state_interval", "device_bytes", "host_bytes")
    return {name: getattr(plan, name) for name in names}


def fitting_settings(job: dict, length: int) -> dict:
    """Settings of MA-GC with offload, on top of the job's, whose plan should fit the GPU beside weights and gradients,
    and the host: the fastest, or else the smallest, with longer segments if their states would fill the host.

    Raises:
        ValueError: if none fits.
    """
    from transformers_ma2mba import plan_checkpoints

    config = Mamba2Config.from_dict(job["shape"])
    tries = [{}, {"memory_budget": "minimal"}]
    tries += [{"memory_budget": "minimal", "sequence_interval": 2**n} for n in range(14, 18)]
    with torch.device("meta"):
        weights = sum(p.numel() for p in Mamba2Model(config).parameters()) * getattr(torch, job["dtype"]).itemsize
    device = MEMORY_LIMIT if job["device"] == "cuda" else math.inf
    for one in tries:
        settings = {**job["ma_gc"], "offload": True, **one}
        plan = plan_checkpoints(config, length, **planning_options(job), **settings)
        # Gradients twice: those that are loaded, and those that backward adds to them.
        if 3 * weights + plan.device_bytes <= 0.97 * device and plan.host_bytes <= USABLE * available_bytes():
            return settings
    raise ValueError(f"no plan for {length:,} tokens fits; the last expects {plan.device_bytes / 1e9:.0f} GB")


def describe(results: dict) -> str:
    """The conditions of a run, for below its table."""
    job = results["job"]
    shape = Mamba2Config.from_dict(job["shape"])
    tokens = job.get("step") == "tokens"
    loss = f", loss at the last {PREDICTED} positions of random tokens" if tokens else ""
    return (
        f"Stock `Mamba2Model`, {shape.num_hidden_layers} layers, width {shape.hidden_size}, {job['dtype']}, batch "
        f"size 1, random weights{loss}. {describe_environment(results)}"
    )


if __name__ == "__main__":
    print_rows(measure_lengths(parse(base_parser(__doc__)).worker))
