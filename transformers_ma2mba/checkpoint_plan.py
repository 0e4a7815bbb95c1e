"""Plans of multi-axis gradient checkpointing (MA-GC, paper §3.2 and §3.3): the choice of its order and intervals.

The engine keeps checkpoints on the borders of a grid of cells, each `layer_interval` layers by `sequence_interval`
tokens, and restores one cell at a time in backward. Two orders of walking the grid:

- layer-major, the paper's: one group of layers after the other, each over the whole sequence. Kept are the input rows
  of all groups and every layer's state at each border between segments. It costs one more forward pass.
- sequence-major: one segment after the other, each through all layers. Kept are the embeddings and the states. It
  costs one more forward pass, and a second unless a cell is as tall as the stack: the rows between cells come first.

In either, states may be kept at every k-th border only. Backward then runs k segments at a time once more for the
states between: one more forward pass, and of n borders no more than about 2 sqrt(n) have their states at a time.
"""

import math
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch

from .memory_model import (
    MemorySizes,
    TrainedSizes,
    device_and_host,
    extra_passes,
    memory_parts,
    state_interval_of,
)
from .memory_size import format_memory_size, parse_memory_size
from .shape import Mamba2Shape, segments_of

ORDERS = ("layer-major", "sequence-major")
_MIN_SEGMENT = 256  # tokens; with smaller cells a step's time goes into starting kernels
_ALMOST_SMALLEST = 1.05  # among plans this close in memory, fewer cells are worth more than the rest
_ALMOST_LEAST_ON_HOST = 1.25  # host memory has an end too, so of equally fast plans none takes much more than another
_HOST_SHARE = 4  # with offloading and no budget, host memory counts as this many times cheaper than the device's
_LONGEST = 2**30  # tokens, 86 days of film; beyond it no limit is searched for


def check_interval(name: str, value: int | str) -> int | str:
    """The interval itself, if it is `"auto"` or a whole number above 0.

    Raises:
        ValueError: if it is anything else.
    """
    if value == "auto" or (isinstance(value, Integral) and not isinstance(value, bool) and value > 0):
        return value if isinstance(value, str) else int(value)
    raise ValueError(f'{name} must be "auto" or a whole number above 0; got {value!r}.')


def check_memory_budget(value: int | str | None) -> int | str | None:
    """A budget in bytes, or `"minimal"` or None themselves.

    Raises:
        ValueError: if it is none of these.
    """
    return value if value is None or value == "minimal" else parse_memory_size(value)


@dataclass(frozen=True)
class CheckpointPlan:
    """Where MA-GC keeps checkpoints, and the memory that this is expected to take, in bytes.

    What must be free when a step begins is `device_bytes` and the gradients of all that is trained, unless these are
    there already. The parts are those of the step's worst moment. At that moment layer-major may have no gradients yet
    of layers that backward has not reached; they are counted all the same, as buffers of DDP or gradients that are
    accumulated are there from the start. The loss, and a head on top of the model, come on top.

    Attributes:
        order: `"layer-major"` or `"sequence-major"`.
        layer_interval, sequence_interval: layers and tokens of a cell.
        state_interval: segments from one border that has its states kept to the next; 1 if all do.
        offload: whether checkpoints wait in host memory.
        sequence_length, batch_size, num_hidden_layers: what it was planned for.
        hidden_border_bytes: rows of hidden states, kept until backward.
        state_border_bytes: states of all layers between segments, kept until backward.
        row_bytes: full-length rows beside these: gradients of outputs and inputs.
        segment_bytes: what the segment being walked has along: its restored rows, carried states and their gradients,
            states of borders that have none kept, and with `offload` what is under way between host and device.
        cell_bytes: all that autograd keeps of the one cell that is being restored, and its layers' working memory.
        accumulator_bytes: parameter gradients that are being summed, beyond the gradients themselves.
        gathered_bytes: where parameters are sharded over processes, those of the layers of one walk over the sequence
            and their gradients.
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
    def num_layer_groups(self) -> int:
        return math.ceil(self.num_hidden_layers / self.layer_interval)

    @property
    def num_segments(self) -> int:
        return int(segments_of(self.sequence_length, self.sequence_interval)[0])

    @property
    def host_bytes(self) -> int:
        """Expected in host memory: the checkpoints if they are offloaded."""
        return int(device_and_host(self.offload, self._parts())[1])

    @property
    def device_bytes(self) -> int:
        """Expected on the device beyond weights, their gradients and the optimizer."""
        return int(device_and_host(self.offload, self._parts())[0])

    @property
    def extra_compute(self) -> float:
        """Work beyond a plain training step, as a fraction of it: each further forward pass is a third."""
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
    memory_budget: int | str | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | str = torch.bfloat16,
    offload: bool = False,
    layer_interval: int | str = "auto",
    sequence_interval: int | str = "auto",
    order: str = "auto",
    parameter_dtype: torch.dtype | str | None = None,
    fused: bool = False,
    from_ids: bool = False,
    trained: TrainedSizes | None = None,
    whole_output: bool = False,
    accumulating: bool = False,
    sharded: bool = False,
    device: torch.device | str = "cuda",
) -> CheckpointPlan:
    """Chooses MA-GC's order and intervals for a sequence (paper §3.2 and §3.3, by this engine's own sizes).

    Without a budget: of the plans with the least computation, one whose expected device memory is within 5% of the
    smallest, with as few cells as that allows and no segment below 256 tokens; with `offload`, a byte in host memory
    counts as a quarter of one on the device, or checkpoints would be many without end. With a budget: the fastest plan
    that fits, which is the one with the least computation, and among those the one with the fewest cells; with
    `offload` only among those whose host memory is within 25% of the smallest. With `"minimal"` for a budget: the
    smallest plan of all, however much it computes.

    Args:
        config: a `Ma2mbaConfig`, or any configuration whose `text_config`, or which itself, is a `Mamba2Config`.
        sequence_length: tokens of each sample.
        memory_budget: device memory for activations, such as `"20GiB"` or a number of bytes: what `device_bytes` of
            the plan may reach. Weights, gradients and optimizer come on top. Or `"minimal"`, or None.
        dtype: of the activations, a torch dtype or its name.
        offload: whether checkpoints may wait in host memory.
        layer_interval, sequence_interval: a cell's layers and tokens, kept as given (no more than there are, nor than
            kernels can index), or `"auto"`, which takes multiples of the configuration's `chunk_size`.
        order: `"layer-major"`, `"sequence-major"` or `"auto"`.
        parameter_dtype: of the parameters, if other than `dtype`.
        fused: whether mamba-ssm's kernels run the layers.
        from_ids: whether the sequence is token ids, whose embeddings are looked up segment by segment.
        trained: what of the model is trained, from [`trained_sizes`]; everything unless given.
        whole_output: whether the output of the stack has a gradient at all positions, as that of a stock Mamba-2 does,
            and not for a few supervised rows alone, as in `Ma2mbaForVideoQA`. It is on the device even with `offload`.
        accumulating: whether there are gradients already, to which those of this step are added.
        sharded: whether parameters are sharded over processes (ZeRO-3, FSDP2): then the layers of one walk over the
            sequence, all of them if that is sequence-major, are whole on each device while they run.
        device: where it runs; on a CPU, the scan works on fewer tokens at a time.

    Raises:
        ValueError: if an argument is out of its range, or no plan fits the budget; then the message says what the
            smallest plan needs, and what would help.
    """
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number above 0; got {value!r}.")
    if order not in ("auto", *ORDERS):
        raise ValueError(f"order must be {', '.join(map(repr, ORDERS))} or 'auto'; got {order!r}.")
    budget = check_memory_budget(memory_budget)
    needs = dict(dtype=dtype, parameter_dtype=parameter_dtype, fused=bool(fused), from_ids=bool(from_ids))
    needs |= dict(trained=trained, whole_output=bool(whole_output), accumulating=bool(accumulating))
    needs |= dict(sharded=bool(sharded), device=device)
    candidates = _Candidates.of(
        sizes=MemorySizes.of(config, **needs, batch_size=int(batch_size)),
        sequence_length=int(sequence_length),
        batch_size=int(batch_size),
        offload=bool(offload),
        layer_interval=check_interval("layer_interval", layer_interval),
        sequence_interval=check_interval("sequence_interval", sequence_interval),
        order=order,
        min_segment=_MIN_SEGMENT if budget is None else 1,
    )
    if budget is None:
        return candidates.smallest_of_fastest()
    if budget == "minimal":
        return candidates.smallest_in_all()
    plan = candidates.fastest_within(budget)
    if plan is None:
        options = dict(batch_size=batch_size, **needs)
        fixed = dict(layer_interval=layer_interval, sequence_interval=sequence_interval, order=order)
        raise ValueError(_why_none_fits(config, sequence_length, budget, offload, options, fixed))
    return plan


def smallest_plan(config, sequence_length: int, **options: Any) -> CheckpointPlan:
    """The plan that is expected to take the least device memory, however slow; options as for `plan_checkpoints`."""
    # The slowest class has no fewer plans than the fastest: all of them compete, by memory alone.
    grid = dict(offload=False, layer_interval="auto", sequence_interval="auto", order="auto")
    grid |= {name: options.pop(name) for name in grid.keys() & options.keys()}
    sizes = MemorySizes.of(config, **options)
    batch_size = options.get("batch_size", 1)
    return _Candidates.of(sizes, sequence_length, batch_size=batch_size, min_segment=1, **grid).smallest()


def longest_sequence(config, memory_budget: int | str, **options: Any) -> int | None:
    """How many tokens fit a budget of device memory; options as for `plan_checkpoints`.

    Returns:
        A length for which a plan fits, a multiple of the configuration's `chunk_size` if it is longer than that; 0 if
        not one chunk fits, and None if the length is not what limits (beyond 2^30 tokens).
    """
    budget = parse_memory_size(memory_budget)
    chunk = Mamba2Shape.of(config).chunk_size

    def fits(chunks: int) -> bool:
        return smallest_plan(config, chunks * chunk, **options).device_bytes <= budget

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


def _why_none_fits(config, sequence_length, budget, offload, options, fixed) -> str:
    needed = smallest_plan(config, sequence_length, offload=offload, **options, **fixed).device_bytes
    sentences = [
        f"No plan for {options['batch_size']:,} x {sequence_length:,} tokens fits a memory budget of "
        f"{format_memory_size(budget)}: the smallest needs {format_memory_size(needed)}."
    ]

    def alternative(what, **changed):
        arguments = {**options, "offload": offload, **fixed, **changed}
        needed = smallest_plan(config, sequence_length, **arguments).device_bytes
        if needed > budget:
            sentences.append(f"{what} would still need {format_memory_size(needed)}.")
        else:
            plan = plan_checkpoints(config, sequence_length, budget, **arguments)
            host = f" and {format_memory_size(plan.host_bytes)} of host memory" if plan.host_bytes else ""
            sentences.append(f"{what} would fit, with {format_memory_size(plan.device_bytes)}{host}.")

    if not offload:
        alternative("offload=True", offload=True)
    if set(fixed.values()) != {"auto"}:
        alternative('Intervals and order left at "auto"', **dict.fromkeys(fixed, "auto"))
    length = longest_sequence(config, budget, offload=offload, **options, **fixed)
    sentences.append(
        f"Up to {length:,} tokens fit with these settings." if length else "No shorter sequence fits either."
    )
    return " ".join(sentences)


def _smallest_for_each_count(total: int) -> np.ndarray:
    """Interval lengths of which one is, for each possible number of intervals, the shortest that gives it."""
    root = math.isqrt(total) + 1
    counts = np.arange(1, root + 1)
    return np.unique(np.minimum(np.concatenate([counts, -(-total // counts)]), total))


class _Candidates(NamedTuple):
    """All plans worth comparing, as equally long arrays."""

    shared: dict[str, Any]
    variants: list[tuple[str, bool]]  # order, and whether segments are run again for states between kept ones
    variant: np.ndarray
    layer_interval: np.ndarray
    sequence_interval: np.ndarray
    state_interval: np.ndarray
    parts: dict[str, np.ndarray]
    device: np.ndarray
    host: np.ndarray
    passes: np.ndarray
    cells: np.ndarray

    @classmethod
    def of(
        cls, sizes, sequence_length, batch_size, offload, layer_interval, sequence_interval, order, min_segment
    ) -> "_Candidates":
        L = sizes.shape.num_hidden_layers
        layers = _smallest_for_each_count(L) if layer_interval == "auto" else np.array([min(layer_interval, L)])
        longest = min(sequence_length, sizes.indexable)
        if sequence_interval == "auto":
            # Multiples of the scan's chunk (paper §3.2), the whole sequence being one at any length.
            units = _smallest_for_each_count(-(-sequence_length // sizes.shape.chunk_size))
            smallest = min(max(min_segment, 2), longest)
            tokens = np.unique(np.minimum(units * sizes.shape.chunk_size, longest))
            tokens = tokens[tokens >= smallest]
        else:
            # Every segment of one token would have to join another.
            tokens = np.array([min(max(sequence_interval, 2), longest)])
        l, s = (axis.ravel() for axis in np.meshgrid(layers, tokens))  # noqa: E741  the paper's names
        segments = segments_of(sequence_length, s)[0]
        # On the host states are cheap, and those made again would have to be on the device.
        reruns = (False,) if offload or segments.max() < 4 else (False, True)
        variants = [(name, rerun) for name in (ORDERS if order == "auto" else (order,)) for rerun in reruns]
        grid = (offload, sequence_length, batch_size, l, s)
        parts = [memory_parts(sizes, *variant, *grid) for variant in variants]
        memory = [device_and_host(offload, part) for part in parts]
        return cls(
            shared=dict(offload=offload, sequence_length=sequence_length, batch_size=batch_size, num_hidden_layers=L),
            variants=variants,
            variant=np.repeat(np.arange(len(variants)), len(l)),
            layer_interval=np.tile(l, len(variants)),
            sequence_interval=np.tile(s, len(variants)),
            state_interval=np.concatenate([state_interval_of(segments, rerun) for _, rerun in variants]),
            parts={name: np.concatenate([part[name] + 0 * l for part in parts]) for name in parts[0]},
            device=np.concatenate([device + 0 * l for device, _ in memory]),
            host=np.concatenate([host + 0 * l for _, host in memory]),
            passes=np.concatenate([extra_passes(*variant, l, L) for variant in variants]),
            cells=np.tile(-(-L // l) * segments, len(variants)),
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
        """Least computation, then fewest cells, then least memory, then the paper's order."""
        indices = np.flatnonzero(eligible)
        best = np.lexsort((self.device[indices], self.cells[indices], self.passes[indices]))[0]
        return self._plan(indices[best])

    def smallest(self) -> CheckpointPlan:
        return self._plan(int(self.device.argmin()))

    def smallest_in_all(self) -> CheckpointPlan:
        return self._plan(int((self.device + self.host / _HOST_SHARE).argmin()))

    def smallest_of_fastest(self) -> CheckpointPlan:
        fast = self.passes == self.passes.min()
        memory = self.device + self.host / _HOST_SHARE
        return self._fastest(fast & (memory <= _ALMOST_SMALLEST * memory[fast].min()))

    def fastest_within(self, budget: int) -> CheckpointPlan | None:
        fits = self.device <= budget
        if not fits.any():
            return None
        fits &= self.passes == self.passes[fits].min()
        return self._fastest(fits & (self.host <= _ALMOST_LEAST_ON_HOST * self.host[fits].min()))


__all__ = [
    "CheckpointPlan",
    "check_interval",
    "check_memory_budget",
    "longest_sequence",
    "plan_checkpoints",
    "smallest_plan",
]
