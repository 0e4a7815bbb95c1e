"""One training step of a stock Mamba-2 under a method of gradient checkpointing, and its measurement.

The step is forward, loss and backward, without an optimizer. The model is Transformers' `Mamba2Model` with random
weights. There are two kinds of step:

    embeddings   The input is drawn within the step and gets a gradient, as a video's embeddings do, so the vocabulary
                 plays no part. The loss is the mean square of `last_hidden_state`.
    tokens       The input is random tokens. The loss is the cross-entropy of random targets at the last 256 positions.
                 The (tied) head runs at these positions only; with MA-GC the final norm does, too.

On a GPU, where steps are of tokens, memory and time come from the same steps, so `memory.py` and `speed.py` share
rows. Each method has a process of its own, which goes from the shortest length to the longest. One step warms it up.
Up to 2^16 tokens it then takes three steps, beyond two; the first of them does not count. A larger GPU is limited to
80 GB.
"""

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Mamba2Config, Mamba2Model

from common.memory_use import PeakMemory, expected_shortage, gigabytes
from common.methods import CPU_METHODS, GPU_METHODS, METHODS
from common.options import base_job, goes_by_method
from common.plans import MEMORY_LIMIT, ma_gc_settings, plan_of
from common.recording import Record, describe_environment, run_benchmark, worker_rows

# Their memory grows in proportion to the length.
GROW_WITH_LENGTH = ["none", "every-layer", "every-sqrt", "every-layer-ssd-scan"]
GPU_LENGTHS = [2**n for n in range(14, 20)]
PREDICTED = 256  # positions that a step of tokens predicts
WARM_UP_TOKENS = {"cpu": 300, "cuda": 2**14}  # more than a chunk; more than a segment


class LayerGroup(nn.Module):
    """Consecutive layers that backward restores together."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def run(self, hidden_states, **kwargs):
        """Run the layers."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states

    def forward(self, hidden_states, **kwargs):
        """Run the layers under a checkpoint."""
        return checkpoint(self.run, hidden_states, use_reentrant=False, **kwargs)


def limit_gpu_memory(device: torch.device) -> None:
    """Leave PyTorch no more of a GPU than it has on one of 80 GB."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_LIMIT / total))


class Step:
    """A model on its device. A call runs one step and returns its seconds; `loss` is the loss of the last step."""

    def __init__(self, job: dict):
        torch.set_num_threads(job["threads"])
        torch.manual_seed(0)
        self.device, self.dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
        self.loss = None
        limit_gpu_memory(self.device)
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
        """Return the job's model on the device."""
        raise NotImplementedError

    def forward(self, length: int) -> torch.Tensor:
        """Return the loss of a random sequence."""
        raise NotImplementedError

    def random_tokens(self, length: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input ids, `(1, length)`, and targets of the last `PREDICTED` positions."""
        input_ids = torch.randint(vocabulary, (1, length), device=self.device)
        return input_ids, torch.randint(vocabulary, (min(PREDICTED, length),), device=self.device)

    def synchronize(self):
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradient_bytes(self) -> int:
        """Return the bytes of the weights' gradients."""
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)

    def has_finite_gradients(self) -> bool:
        """Return whether all gradients of the weights are finite."""
        return all(bool(p.grad.isfinite().all()) for p in self.model.parameters() if p.grad is not None)


class TrainingStep(Step):
    """A step of a stock model under the job's method."""

    def make_model(self, job: dict) -> nn.Module:
        self.kind, self.options = job.get("step", "embeddings"), {}
        method = job["method"]
        self.keeps_positions = method.startswith("MA-GC")
        config = Mamba2Config.from_dict(job["shape"])
        torch.set_default_dtype(self.dtype)
        with self.device:
            model = Mamba2Model(config).train()
        torch.set_default_dtype(torch.float32)
        if method.startswith("every-layer"):
            model.activation_checkpointing_enable()
        if method == "every-sqrt":
            size = round(config.num_hidden_layers**0.5)
            layers = list(model.layers)
            groups = [LayerGroup(layers[first : first + size]) for first in range(0, len(layers), size)]
            model.layers = nn.ModuleList(groups)
        if method == "every-layer-ssd-scan":
            from transformers_ma2mba.mamba2.kernel_choice import hold

            hold(model)
            self.options["ssd_scan"] = True
        if method.startswith("MA-GC"):
            from transformers_ma2mba import enable_multi_axis_checkpointing

            enable_multi_axis_checkpointing(model, **ma_gc_settings(job))
        return model

    def forward(self, length: int) -> torch.Tensor:
        if self.kind == "embeddings":
            size = (1, length, self.model.config.hidden_size)
            inputs_embeds = torch.randn(size, device=self.device, dtype=self.dtype, requires_grad=True)
            return self.model(inputs_embeds=inputs_embeds, **self.options).last_hidden_state.square().mean()
        input_ids, targets = self.random_tokens(length, self.model.config.vocab_size)
        if self.keeps_positions:
            positions_to_keep = torch.zeros(1, length, dtype=torch.bool, device=self.device)
            positions_to_keep[:, -len(targets) :] = True
            outputs = self.model(input_ids=input_ids, positions_to_keep=positions_to_keep, **self.options)
            rows = outputs.last_hidden_state
        else:
            rows = self.model(input_ids=input_ids, **self.options).last_hidden_state[0, -len(targets) :]
        return F.cross_entropy(F.linear(rows, self.model.embeddings.weight).float(), targets)


def steps_at(length: int, most_steps: int) -> int:
    """Return the number of steps on a GPU; the first does not count if there are several."""
    return min(most_steps, 3 if length <= 2**16 else 2)


def measure_lengths(job: dict, make_step: Callable[[dict], Step] = TrainingStep) -> Iterator[dict]:
    """Yield a row for each length, from the shortest; the first length that does not fit ends the method."""
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
        # A length that seems to need up to a quarter too much is tried, which costs only time. MA-GC's plans need not
        # grow with the length.
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
                peak.forget()  # the first call of a kernel tries several configurations
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
    record: Record, job: dict, methods: list[str], lengths: list[int], most_steps: int, script: str, **options
) -> None:
    """Measure the rows that the record lacks, in one process for each method.

    Args:
        lengths: in tokens, the shortest first.
        most_steps: the limit of steps of a length.
        script: the script whose worker measures.
        options: for [`worker_rows`].
    """
    for method in methods:
        missing = [length for length in lengths if not record.has(method=method, length=length)]
        worker_job = {**job, "method": method, "lengths": missing, "most_steps": most_steps}
        for row in worker_rows(script, worker_job, **options) if missing else ():
            length = missing.pop(0)
            record.add({"method": method, "length": length, **row})
            print(f"{length:>9,} tokens, {METHODS.get(method, method)}: {describe_row(row)}", flush=True)
            if "skipped" in row:
                for length in missing:
                    record.add({"method": method, "length": length, "skipped": "a shorter sequence did not fit"})


def run_methods(
    arguments: Namespace,
    script: str,
    name: str,
    twin: str,
    head: dict,
    measure_on_cpu: Callable[[Record, dict, list[str]], None],
    report: Callable[[dict], str],
    draw: Callable[[dict, Path], None],
) -> None:
    """Run `memory.py` or `speed.py`: all lengths of a method in one process on a GPU, `measure_on_cpu` on a CPU.

    Args:
        name: the name of the results on a CPU; on a GPU it is the script's with `_cuda`.
        twin: the other benchmark, whose rows on a GPU `--resume` takes over.
        head: entries of the results on a CPU, beside the job.
        measure_on_cpu: adds rows of a job and its methods to a record.
    """
    job, by_method = base_job(arguments), goes_by_method(arguments)

    def measure(record: Record) -> None:
        if not by_method:
            measure_on_cpu(record, job, arguments.methods or CPU_METHODS)
            return
        if arguments.resume:
            record.borrow(arguments.output_dir / f"{twin}_cuda.json")
        methods = arguments.methods or GPU_METHODS
        measure_by_method(record, job, methods, arguments.lengths, arguments.most_steps, script)

    if by_method:
        name, head = f"{Path(script).stem}_cuda", {}
    run_benchmark(arguments, script, name, {**head, "job": job}, measure, report, draw)


def new_row(record: Record, job: dict, method: str, length: int) -> dict:
    """Return a row of a CPU with its plan, if any, and the reason to skip it if the memory is too small.

    Without a plan, memory is expected to grow in proportion to the length.
    """
    row = {"method": method, "length": length}
    plan = plan_of({**job, **row})
    if plan:
        row["plan"] = plan
    rows = [row for row in record.results["rows"] if row["method"] == method and row["length"] < length]
    shorter = max(rows, key=lambda row: row["length"], default={})
    reason = shorter.get("skipped")
    if not reason and "peak_bytes" in shorter:
        in_proportion = shorter["peak_bytes"] * length // shorter["length"]
        reason = expected_shortage(plan["device_bytes"] if plan else in_proportion)
    return {**row, "skipped": reason} if reason else row


def describe_row(row: dict) -> str:
    """Return a row in words, for the terminal."""
    if "seconds" not in row:
        return row.get("skipped") or f"failed, {row['failed']}"
    words = f"{gigabytes(row['peak_bytes'])} GB above the weights, {row['seconds']:.2f} s"
    if "plan" in row:
        plan = row["plan"]
        cell = f"{plan['layer_interval']} layers x {plan['sequence_interval']:,} tokens, {plan['order']}"
        words += f" (cells of {cell}; expected {gigabytes(plan['device_bytes'] + row.get('gradient_bytes', 0))} GB)"
    return words


def describe(results: dict) -> str:
    """Return the conditions of a run, for below its table."""
    job = results["job"]
    shape = Mamba2Config.from_dict(job["shape"])
    tokens = job.get("step") == "tokens"
    loss = f", loss at the last {PREDICTED} positions of random tokens" if tokens else ""
    return (
        f"Stock `Mamba2Model`, {shape.num_hidden_layers} layers, width {shape.hidden_size}, {job['dtype']}, batch "
        f"size 1, random weights{loss}. {describe_environment(results)}"
    )
