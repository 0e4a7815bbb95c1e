"""Plans of multi-axis gradient checkpointing (MA-GC, paper §3.2 and §3.3): the choice of its order and intervals.

The engine keeps checkpoints on the borders of a grid of cells, each `layer_interval` layers by `sequence_interval`
tokens. Backward restores one cell at a time. The engine walks the grid in one of two orders:

- layer-major, the paper's order: one group of layers after the other, each over the whole sequence. The checkpoints
  are the inputs of all groups, and every layer's state at each border between segments. The order costs one more
  forward pass.
- sequence-major: one segment after the other, each through all layers. The checkpoints are the embeddings and the
  states. The order costs one more forward pass, and a second one unless a cell contains all layers, because backward
  must first restore the hidden states between the cells of a segment.

In either order, states may be kept at every k-th border only. Backward then runs k segments at a time once more to
compute the states between. This costs one more forward pass, but no more than about 2 sqrt(n) of the n borders have
their states in memory at a time.
"""

import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..mamba2 import Mamba2Shape, segments_of
from .memory_model import (
    MemorySizes,
    TrainedSizes,
    TrainingStep,
    device_and_host,
    extra_passes,
    is_count,
    memory_parts,
    state_interval_of,
)
from .memory_size import format_memory_size, parse_memory_size

ORDERS = ("layer-major", "sequence-major")
_MIN_SEGMENT = 256  # tokens; with shorter segments, a step spends its time on launching kernels
_ALMOST_SMALLEST = 1.05  # among plans that take up to this many times the least memory, the fewest cells win
_ALMOST_LEAST_ON_HOST = 1.25  # a budget limits the device only; this factor limits the host memory of its plan
_HOST_SHARE = 4  # without a budget, a byte on the device counts as much as this many bytes of host memory
_LONGEST = 2**30  # tokens, or 86 days of film, at which the search for the longest sequence ends


@dataclass(frozen=True)
class MultiAxisOptions:
    """The options of MA-GC; [`plan_checkpoints`] explains the fields.

    Raises:
        ValueError: if an option is out of its range.
    """

    layer_interval: int | str = "auto"
    sequence_interval: int | str = "auto"
    memory_budget: int | str | None = None
    offload: bool = False
    order: str = "auto"

    def __post_init__(self):
        for name in ("layer_interval", "sequence_interval"):
            value = getattr(self, name)
            if value != "auto":
                if not is_count(value):
                    raise ValueError(f'{name} must be "auto" or a whole number above 0; got {value!r}.')
                object.__setattr__(self, name, int(value))
        if self.memory_budget not in (None, "minimal"):
            object.__setattr__(self, "memory_budget", parse_memory_size(self.memory_budget))
        if not isinstance(self.offload, bool):
            raise ValueError(f"offload must be True or False; got {self.offload!r}.")
        if self.order not in ("auto", *ORDERS):
            raise ValueError(f"order must be {', '.join(map(repr, ORDERS))} or 'auto'; got {self.order!r}.")


@dataclass(frozen=True)
class CheckpointPlan:
    """The places of MA-GC's checkpoints, and the memory that they are expected to take, in bytes.

    A step needs `device_bytes` of free memory, and memory for the gradients of all trained parameters unless these
    gradients exist already. The parts below add up to the step's peak. In layer-major order, the gradients of
    layers that backward has not reached may not exist at the peak. The plan counts them all the same, because DDP's
    buffers and accumulated gradients exist from the start. The loss, and a head on top of the model, are not included.

    Attributes:
        order: `"layer-major"` or `"sequence-major"`.
        layer_interval: number of layers in a cell.
        sequence_interval: number of tokens in a cell.
        state_interval: number of segments between two borders whose states are kept; 1 if all are kept.
        offload: whether checkpoints wait in host memory.
        sequence_length: number of tokens of each sample.
        batch_size: number of samples.
        num_hidden_layers: number of layers of the model.
        hidden_border_bytes: hidden states on borders, kept until backward.
        state_border_bytes: states of all layers on borders between segments, kept until backward.
        row_bytes: gradients of hidden states over the whole sequence.
        segment_bytes: the current segment's restored hidden states, its carried states and their gradients, the states
            of borders without kept states, and with `offload` the tensors in transfer between host and device.
        cell_bytes: all that autograd keeps of the cell that is being restored, and its layers' working memory.
        accumulator_bytes: sums of parameter gradients, beyond the gradients themselves.
        gathered_bytes: where parameters are sharded over processes, the gathered parameters and gradients of the
            layers of one walk over the sequence.
    """

    order: str
    layer_interval: int
    sequence_interval: int
    state_interval: int
    offload: bool
    sequence_length: int
    batch_size: int
    num_hidden_layers: int
    hidden_border_bytes: int
    state_border_bytes: int
    row_bytes: int
    segment_bytes: int
    cell_bytes: int
    accumulator_bytes: int
    gathered_bytes: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all samples, padding included."""
        return self.batch_size * self.sequence_length

    @property
    def num_layer_groups(self) -> int:
        """Number of cells along the layers."""
        return math.ceil(self.num_hidden_layers / self.layer_interval)

    @property
    def num_segments(self) -> int:
        """Number of cells along the sequence."""
        return int(segments_of(self.sequence_length, self.sequence_interval)[0])

    @property
    def host_bytes(self) -> int:
        """Expected host memory: the checkpoints and full-length gradients if they are offloaded, else 0."""
        return int(device_and_host(self.offload, self._parts())[1])

    @property
    def device_bytes(self) -> int:
        """Expected device memory beyond weights, their gradients and the optimizer."""
        return int(device_and_host(self.offload, self._parts())[0])

    @property
    def extra_compute(self) -> float:
        """Computation beyond a plain training step, as a fraction of it; a further forward pass is a third."""
        rerun = self.state_interval > 1
        return int(extra_passes(self.order, rerun, self.layer_interval, self.num_hidden_layers)) / 3

    def _parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_bytes")}

    def __str__(self) -> str:
        layers, tokens = self.layer_interval, self.sequence_interval
        groups, segments = self.num_layer_groups, self.num_segments
        kept = " (host)" if self.offload else ""
        table = {
            f"hidden states kept{kept}": self.hidden_border_bytes,
            f"recurrent states kept{kept}": self.state_border_bytes,
            f"full-length gradient rows{kept}": self.row_bytes,
            "one segment under way": self.segment_bytes,
            "one cell": self.cell_bytes,
            "gradient sums": self.accumulator_bytes,
            **({"gathered weights and gradients": self.gathered_bytes} if self.gathered_bytes else {}),
            "device in all": self.device_bytes,
            "host in all": self.host_bytes,
        }
        lines = [
            f"MA-GC plan for {self.batch_size:,} x {self.sequence_length:,} tokens, {self.num_hidden_layers} layers",
            f"  {'order':<32}{self.order:>30}",
            f"  {'cell':<32}{f'{layers} layers x {tokens:,} tokens':>30}",
            f"  {'grid':<32}{f'{groups} x {segments:,} = {groups * segments:,} cells':>30}",
            *([f"  {'states kept':<32}{f'every {self.state_interval} segments':>30}"] * (self.state_interval > 1)),
            *(f"  {name:<32}{format_memory_size(size):>30}" for name, size in table.items()),
            f"  {'extra compute':<32}{f'+{self.extra_compute:.0%}':>30}",
        ]
        return "\n".join(lines)


def plan_checkpoints(
    config,
    sequence_length: int,
    memory_budget: int | str | None = MultiAxisOptions.memory_budget,
    batch_size: int = TrainingStep.batch_size,
    dtype: torch.dtype | str = TrainingStep.dtype,
    offload: bool = MultiAxisOptions.offload,
    layer_interval: int | str = MultiAxisOptions.layer_interval,
    sequence_interval: int | str = MultiAxisOptions.sequence_interval,
    order: str = MultiAxisOptions.order,
    parameter_dtype: torch.dtype | str | None = TrainingStep.parameter_dtype,
    fused: bool = TrainingStep.fused,
    from_ids: bool = TrainingStep.from_ids,
    trained: TrainedSizes | None = TrainingStep.trained,
    whole_output: bool = TrainingStep.whole_output,
    accumulating: bool = TrainingStep.accumulating,
    sharded: bool = TrainingStep.sharded,
    device: torch.device | str = TrainingStep.device,
) -> CheckpointPlan:
    """Choose MA-GC's order and intervals for a sequence (paper §3.2 and §3.3, with this engine's own sizes).

    Args:
        config: a `Mamba2Config`, or a configuration with a `Mamba2Config` for its `text_config`, as a `Ma2mbaConfig`.
        sequence_length: number of tokens of each sample.
        memory_budget: limit of the plan's `device_bytes`, a size such as `"20GiB"` or a number of bytes. Weights,
            gradients and optimizer come on top.

            - With a limit, the plan is the fastest that fits: it has the least computation and, among equals, the
              fewest cells. With `offload`, its host memory is also within 25% of the smallest.
            - `None` chooses among the plans with the least computation that take at most 5% more device memory than
              the smallest of them. The plan has the fewest cells, and no segment below 256 tokens. With `offload`, a
              byte of host memory counts as a quarter of a byte on the device, which bounds the number of checkpoints.
            - `"minimal"` chooses the plan with the least memory, whatever its computation.
        batch_size: number of samples.
        dtype: type of the activations, a torch dtype or its name.
        offload: whether checkpoints wait for backward in host memory.
        layer_interval: number of layers in a cell, at most all of them, or `"auto"`.
        sequence_interval: number of tokens in a cell, at most as many as kernels can index, or `"auto"`, which chooses
            a multiple of the configuration's `chunk_size`.
        order: `"layer-major"` (the paper's Algorithms 1 and 2), `"sequence-major"` or `"auto"`.
        parameter_dtype: type of the parameters; None means `dtype`.
        fused: whether mamba-ssm's kernels run the layers.
        from_ids: whether the sequence is token ids, whose embeddings are looked up segment by segment.
        trained: sizes of the trained parameters, from [`trained_sizes`]; None means that all are trained.
        whole_output: whether the stack's output has a gradient at all positions, as in a stock Mamba-2. Otherwise it
            has one at a few supervised positions only, as in `Ma2mbaForVideoQA`. The output's gradient is on the
            device even with `offload`.
        accumulating: whether there are gradients already, to which this step adds its own.
        sharded: whether parameters are sharded over processes (ZeRO-3, FSDP2). The layers of one walk over the
            sequence are then whole on each device while they run; in sequence-major order these are all layers.
        device: the device of the step. On a CPU, the scan works on fewer tokens at a time.

    Raises:
        ValueError: if an argument is out of its range, or no plan fits the budget. The message then says how much the
            smallest plan needs, and which change would help.
    """
    kinds = dict(fused=bool(fused), from_ids=bool(from_ids), whole_output=bool(whole_output))
    kinds |= dict(accumulating=bool(accumulating), sharded=bool(sharded))
    step = TrainingStep(sequence_length, batch_size, dtype, parameter_dtype, trained=trained, device=device, **kinds)
    options = MultiAxisOptions(layer_interval, sequence_interval, memory_budget, bool(offload), order)
    return plan_step(config, step, options)


def plan_step(config, step: TrainingStep, options: MultiAxisOptions) -> CheckpointPlan:
    """Choose the plan of [`plan_checkpoints`] for one training step.

    Raises:
        ValueError: if no plan fits the budget.
    """
    budget = options.memory_budget
    candidates = _Candidates.of(config, step, options, min_segment=_MIN_SEGMENT if budget is None else 2)
    if budget is None:
        return candidates.smallest_of_fastest()
    if budget == "minimal":
        return candidates.smallest_in_all()
    plan = candidates.fastest_within(budget)
    if plan is None:
        raise ValueError(_why_none_fits(config, step, options))
    return plan


def smallest_plan(config, step: TrainingStep, options: MultiAxisOptions) -> CheckpointPlan:
    """Choose the plan with the least device memory, whatever its computation and the budget."""
    # The slowest plans include the smallest, so all candidates compete by memory alone.
    return _Candidates.of(config, step, options, min_segment=2).smallest()


def longest_sequence(config, step: TrainingStep, options: MultiAxisOptions) -> int | None:
    """Find the longest sequence for which a plan fits the budget of `options`, a number of bytes.

    Args:
        config: as for [`plan_checkpoints`].
        step: the training step; its `sequence_length` has no effect.
        options: the options of MA-GC.

    Returns:
        Number of tokens, a multiple of the configuration's `chunk_size`; 0 if not one chunk fits, and None if even
        2^30 tokens fit, because then the length does not limit the memory.
    """
    chunk = Mamba2Shape.of(config).chunk_size

    def fits(chunks: int) -> bool:
        longer = replace(step, sequence_length=chunks * chunk)
        return smallest_plan(config, longer, options).device_bytes <= options.memory_budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
        if high * chunk > _LONGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * chunk


def _why_none_fits(config, step: TrainingStep, options: MultiAxisOptions) -> str:
    budget = options.memory_budget
    needed = smallest_plan(config, step, options).device_bytes
    sentences = [
        f"No plan for {step.batch_size:,} x {step.sequence_length:,} tokens fits a memory budget of "
        f"{format_memory_size(budget)}: the smallest needs {format_memory_size(needed)}."
    ]
    automatic = replace(options, layer_interval="auto", sequence_interval="auto", order="auto")
    alternatives = {"offload=True": replace(options, offload=True), 'Intervals and order left at "auto"': automatic}
    for change, changed in alternatives.items():
        if changed == options:
            continue
        needed = smallest_plan(config, step, changed).device_bytes
        if needed > budget:
            sentences.append(f"{change} would still need {format_memory_size(needed)}.")
        else:
            plan = plan_step(config, step, changed)
            host = f" and {format_memory_size(plan.host_bytes)} of host memory" if plan.host_bytes else ""
            sentences.append(f"{change} would fit, with {format_memory_size(plan.device_bytes)}{host}.")
    length = longest_sequence(config, step, options)
    sentences.append(
        f"Up to {length:,} tokens fit with these settings." if length else "No shorter sequence fits either."
    )
    return " ".join(sentences)


def _smallest_for_each_count(total: int) -> np.ndarray:
    """List the interval lengths worth trying: for each possible number of intervals, the shortest that gives it."""
    root = math.isqrt(total) + 1
    counts = np.arange(1, root + 1)
    return np.unique(np.minimum(np.concatenate([counts, -(-total // counts)]), total))


class _Candidates(NamedTuple):
    """All plans worth comparing; the arrays have one element for each plan."""

    shared: dict[str, Any]  # fields that have the same value in all plans
    variants: list[tuple[str, bool]]  # order, and whether backward runs segments again for states between kept ones
    variant: np.ndarray  # indices into `variants`
    layer_interval: np.ndarray
    sequence_interval: np.ndarray
    state_interval: np.ndarray
    parts: dict[str, np.ndarray]
    device: np.ndarray
    host: np.ndarray
    passes: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(cls, config, step: TrainingStep, options: MultiAxisOptions, min_segment: int) -> "_Candidates":
        """List the candidates; an automatic interval is at least `min_segment` tokens, or the whole sequence."""
        sizes, length, offload = MemorySizes.of(config, step), step.sequence_length, options.offload
        chunk, num_layers = sizes.shape.chunk_size, sizes.shape.num_hidden_layers
        layers = _smallest_for_each_count(num_layers)
        if options.layer_interval != "auto":
            layers = np.array([min(options.layer_interval, num_layers)])
        longest = min(length, sizes.indexable)
        if options.sequence_interval == "auto":
            # Multiples of the scan's chunk (paper §3.2), and the whole sequence at any length.
            tokens = np.unique(np.minimum(_smallest_for_each_count(-(-length // chunk)) * chunk, longest))
            tokens = tokens[tokens >= min(min_segment, longest)]
        else:
            # No segment is a single token, so that the interval is at least 2.
            tokens = np.array([min(max(options.sequence_interval, 2), longest)])
        layers, tokens = (axis.ravel() for axis in np.meshgrid(layers, tokens))
        segments = segments_of(length, tokens)[0]
        # Offloaded states are cheap, and states that are computed again would be on the device.
        reruns = (False,) if offload or segments.max() < 4 else (False, True)
        orders = ORDERS if options.order == "auto" else (options.order,)
        variants = list(itertools.product(orders, reruns))
        parts = [memory_parts(sizes, *variant, offload, layers, tokens) for variant in variants]
        parts = {name: np.concatenate([part[name] + 0 * layers for part in parts]) for name in parts[0]}
        device, host = device_and_host(offload, parts)
        return cls(
            shared=dict(
                num_hidden_layers=num_layers, sequence_length=length, batch_size=step.batch_size, offload=offload
            ),
            variants=variants,
            variant=np.repeat(np.arange(len(variants)), len(layers)),
            layer_interval=np.tile(layers, len(variants)),
            sequence_interval=np.tile(tokens, len(variants)),
            state_interval=np.concatenate([state_interval_of(segments, rerun) for _, rerun in variants]),
            parts=parts,
            device=device,
            host=host + 0 * device,
            passes=np.concatenate([extra_passes(*variant, layers, num_layers) for variant in variants]),
            cells=np.tile(-(-num_layers // layers) * segments, len(variants)),
        )

    def _plan(self, index: int) -> CheckpointPlan:
        return CheckpointPlan(
            order=self.variants[self.variant[index]][0],
            layer_interval=int(self.layer_interval[index]),
            sequence_interval=int(self.sequence_interval[index]),
            state_interval=int(self.state_interval[index]),
            **self.shared,
            **{name: int(values[index]) for name, values in self.parts.items()},
        )

    def _fastest(self, eligible: np.ndarray) -> CheckpointPlan:
        """Choose by computation, then number of cells, then device memory, then the paper's order."""
        indices = np.flatnonzero(eligible)
        best = np.lexsort((self.device[indices], self.cells[indices], self.passes[indices]))[0]
        return self._plan(indices[best])

    def smallest(self) -> CheckpointPlan:
        """Choose the plan with the least device memory."""
        return self._plan(int(self.device.argmin()))

    def smallest_in_all(self) -> CheckpointPlan:
        """Choose the plan with the least memory, host memory included at its lower weight."""
        return self._plan(int((self.device + self.host / _HOST_SHARE).argmin()))

    def smallest_of_fastest(self) -> CheckpointPlan:
        """Choose, among the plans with the least computation, one with almost the least memory and few cells."""
        fast = self.passes == self.passes.min()
        memory = self.device + self.host / _HOST_SHARE
        return self._fastest(fast & (memory <= _ALMOST_SMALLEST * memory[fast].min()))

    def fastest_within(self, budget: int) -> CheckpointPlan | None:
        """Choose the fastest plan whose device memory is within the budget; None if there is none."""
        fits = self.device <= budget
        if not fits.any():
            return None
        fits &= self.passes == self.passes[fits].min()
        return self._fastest(fits & (self.host <= _ALMOST_LEAST_ON_HOST * self.host[fits].min()))
