"""The memory of multi-axis gradient checkpointing (MA-GC, paper §3.2 and §3.3), and the choice of its intervals.

The engine keeps checkpoints on the borders of a grid of cells, each `layer_interval` layers by `sequence_interval`
tokens, and restores one cell at a time in backward. Two orders of walking the grid:

- layer-major, the paper's: one group of layers after the other, each over the whole sequence. Kept are the input rows
  of all groups and every layer's state at each border between segments. It costs one more forward pass.
- sequence-major: one segment after the other, each through all layers. Kept are the embeddings and the states. It
  costs one more forward pass, and a second unless a cell is as tall as the stack: the rows between cells come first.

In either, states may be kept at every k-th border only. Backward then runs k segments at a time once more for the
states between: one more forward pass, and of n borders no more than about 2 sqrt(n) have their states at a time.

Symbols: S sequence length, B batch size, L layers, D width, E inner width, H heads, P head dimension, N state size;
l layers and s tokens of a cell; G groups of layers, n segments; e bytes of an element, r bytes of an element of a row.
"""

import math
import re
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch

ORDERS = ("layer-major", "sequence-major")
_MIN_SEGMENT = 256  # tokens; with smaller cells a step's time goes into starting kernels
_ALMOST_SMALLEST = 1.05  # among plans this close in memory, fewer cells are worth more than the rest
_ALMOST_LEAST_ON_HOST = 1.25  # host memory has an end too, so of equally fast plans none takes much more than another
_HOST_SHARE = 4  # with offloading and no budget, host memory counts as this many times cheaper than the device's
_SCAN_SPAN = 512  # tokens between the states that the lean scan keeps; twice that on a GPU
_SCAN_TILE = 128  # tokens; of the scan's working memory, on a GPU
_LONGEST = 2**30  # tokens, 86 days of film; beyond it no limit is searched for
_INDEXABLE = 2**31  # numbers of a tensor that kernels with 32-bit offsets can tell apart

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory_size(value: int | str) -> int:
    """Bytes of a size such as `"20GiB"`, `"512MB"`, `"1.5 GB"` or a whole number of bytes.

    KB, MB, GB and TB are powers of 1,000; KiB, MiB, GiB and TiB are powers of 1,024.

    Raises:
        ValueError: if it is no such size, or not above 0.
    """
    if isinstance(value, Integral) and not isinstance(value, bool):
        size = int(value)
    else:
        match = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*([a-z]*)\s*", value, re.I) if isinstance(value, str) else None
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(
                f"{value!r} is not a size of memory: give a number of bytes, or a number with a unit, "
                'such as "20GiB" or "512MB".'
            )
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"A size of memory must be at least 1 byte; got {value!r}.")
    return size


def format_memory_size(num_bytes: float) -> str:
    """`"17.4 GiB"`, `"1.35 GiB"`, `"512 MiB"`, `"3.2 KiB"`, `"12 B"`: three digits in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 999.5 or unit == "TiB":
            break
        num_bytes /= 1024
    digits = 0 if unit == "B" or abs(num_bytes) >= 99.95 else 1 if abs(num_bytes) >= 9.995 else 2
    return f"{num_bytes:,.{digits}f} {unit}"


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


class PaperConstants(NamedTuple):
    """Elements per checkpoint (paper, Table 7)."""

    C_L: int  # hidden states of one token
    C_S: int  # states of one layer at one border
    C_grid: int  # one token in one layer of a cell that is being restored
    C_state: int  # the running state of one layer


def paper_constants(config) -> PaperConstants:
    """The constants of the paper's formula, from a configuration's dimensions (paper §3.3 and Table 7).

    C_L = D; C_S = H·P·N + (conv_kernel − 1)·conv_dim; C_grid = the width of `in_proj` + E; C_state = H·P·N + conv_dim.
    """
    shape = _Shape.of(config)
    return PaperConstants(
        C_L=shape.width,
        C_S=shape.recurrent + shape.conv_dim * (shape.conv_kernel - 1),
        C_grid=shape.projected + shape.inner,
        C_state=shape.recurrent + shape.conv_dim,
    )


def paper_memory(config, sequence_length: int, layer_interval: int, sequence_interval: int) -> float:
    """Elements that the paper's formula expects of layer-major MA-GC at batch size 1 (paper §3.3).

    LS/l·C_L + LS/s·C_S + l·s·C_grid + C_state. The last term is printed as s·C_state. Read so, the formula's smallest
    value for the 2.7B at 2^19 tokens is 24.0 GiB in bfloat16; the 17.4 GiB that go with the paper's other figures need
    the running state counted once. (Once for each of a cell's layers would make it 17.5 GiB.)
    """
    C_L, C_S, C_grid, C_state = paper_constants(config)
    points = _Shape.of(config).num_hidden_layers * sequence_length
    return (
        points / layer_interval * C_L
        + points / sequence_interval * C_S
        + layer_interval * sequence_interval * C_grid
        + C_state
    )


def indexable_tokens(config, batch_size: int) -> int:
    """How long a piece of a sequence may be for kernels with 32-bit offsets: rows times row stride stay below 2^31.

    mamba-ssm's are such kernels: given more, they fail or return wrong numbers. Its largest tensors are `in_proj`'s
    output and those of each chunk, states and products of B and C. At batch size 1 that is about 203,000 tokens for
    the 2.7B.
    """
    shape = _Shape.of(config)
    per_chunk = max(shape.recurrent, shape.n_groups * shape.chunk_size**2)
    row = max(shape.projected, math.ceil(per_chunk / shape.chunk_size))
    # What a piece may have beyond a whole number of chunks: the convolution's tail, and a last lone token.
    tokens = (_INDEXABLE - 1) // (batch_size * row) - shape.chunk_size - shape.conv_kernel
    return max(tokens - tokens % shape.chunk_size, 2)


def kept_bytes_per_token(config, dtype: torch.dtype | str = torch.bfloat16, fused: bool = False) -> int:
    """Bytes that autograd keeps of one token in one stock `Mamba2Block`, run by plain PyTorch with the lean scan.

    Read off transformers' `modeling_mamba2.py`, in the order of its operations, and held to it by a test:

    - the norm: its input in float32, the normalised row and what the weight makes of it, a float32 scale;
    - `in_proj`'s output, if it is float32 itself: then the gate is a view of it;
    - the convolution's input (joined to the carried tail, so a copy), its output, and that after SiLU, which holds the
      scan's x, B and C;
    - the scan: the time step before and after softplus and after its limit, and a state every few hundred tokens;
    - the gated norm: the scan's output, the gate (a copy unless it is float32 already), SiLU of it and the product,
      all in float32, a scale for each group; the normalised product in the scan's type, and `out_proj`'s input.

    The residual adds nothing: a sum keeps neither of its terms. It is several times the paper's C_grid.

    With `fused`, mamba-ssm's kernels run the block (`fused_layer.py`), and keep what C_grid counts, `in_proj`'s output
    and the scan's; the norm's input and output, and a float32 scale for each norm, come on top.
    """
    shape, dtype = _Shape.of(config), _floating_dtype("dtype", dtype)
    e, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    if fused:
        return e * (2 * shape.width + shape.projected + shape.inner) + 4 * (1 + shape.n_groups)
    norm = shape.width * (4 + 2 * e) + 4
    convolution = 3 * e * shape.conv_dim
    scan = 3 * wide * shape.num_heads + wide * shape.recurrent // _SCAN_SPAN
    gate = e * shape.projected if dtype == torch.float32 else 4 * shape.inner
    gated_norm = (3 * 4 + wide + e) * shape.inner + 4 * shape.n_groups
    return norm + convolution + scan + gate + gated_norm


def _working_bytes_per_token(shape: "_Shape") -> int:
    """Bytes of one token that pass through one layer and are not kept: float32 gradients of the gated norm's terms, of
    x, B, C and the time step."""
    return 4 * (4 * shape.inner + 2 * shape.n_groups * shape.state_size + 2 * shape.num_heads)


def _fused_working_bytes_per_token(shape: "_Shape", itemsize: int) -> int:
    """The same with the fused kernels: gradients of `in_proj`'s output and the convolution's, the convolution computed
    again, three rows as wide as x, and in float32 each chunk's states, their gradients and the products of B and C."""
    rows = itemsize * (shape.projected + 2 * shape.conv_dim + 3 * shape.inner)
    per_chunk = 4 * (3 * shape.recurrent + 2 * shape.n_groups * shape.chunk_size**2)
    return rows + math.ceil(per_chunk / shape.chunk_size) + 4 * 6 * shape.num_heads


def _scan_working_bytes_per_token(shape: "_Shape") -> int:
    """Bytes of one token of the span that the lean scan works on: three matrices of tokens times tile for each head,
    and five float32 tensors as wide as x."""
    return 4 * (3 * _SCAN_TILE * shape.num_heads + 5 * shape.inner)


@dataclass(frozen=True)
class CheckpointPlan:
    """Where MA-GC keeps checkpoints, and the memory that this is expected to take, in bytes.

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

    @property
    def num_layer_groups(self) -> int:
        return math.ceil(self.num_hidden_layers / self.layer_interval)

    @property
    def num_segments(self) -> int:
        return int(_segments(self.sequence_length, self.sequence_interval)[0])

    @property
    def host_bytes(self) -> int:
        """Expected in host memory: the checkpoints if they are offloaded."""
        return int(_device_and_host(self.offload, self._parts())[1])

    @property
    def device_bytes(self) -> int:
        """Expected on the device beyond weights, their gradients and the optimizer."""
        return int(_device_and_host(self.offload, self._parts())[0])

    @property
    def extra_compute(self) -> float:
        """Work beyond a plain training step, as a fraction of it: each further forward pass is a third."""
        rerun = self.state_interval > 1
        return int(_extra_passes(self.order, rerun, self.layer_interval, self.num_hidden_layers)) / 3

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
    candidates = _Candidates.of(
        sizes=_Sizes.of(config, dtype, parameter_dtype, bool(fused), bool(from_ids), int(batch_size)),
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
        options = dict(batch_size=batch_size, dtype=dtype, parameter_dtype=parameter_dtype)
        options |= dict(fused=fused, from_ids=from_ids)
        fixed = dict(layer_interval=layer_interval, sequence_interval=sequence_interval, order=order)
        raise ValueError(_why_none_fits(config, sequence_length, budget, offload, options, fixed))
    return plan


def smallest_plan(config, sequence_length: int, **options: Any) -> CheckpointPlan:
    """The plan that is expected to take the least device memory, however slow; options as for `plan_checkpoints`."""
    # The slowest class has no fewer plans than the fastest: all of them compete, by memory alone.
    defaults = dict(batch_size=1, offload=False, layer_interval="auto", sequence_interval="auto", order="auto")
    options = {**defaults, **options}
    sizes = _Sizes.of(
        config,
        options.pop("dtype", torch.bfloat16),
        options.pop("parameter_dtype", None),
        options.pop("fused", False),
        options.pop("from_ids", False),
        options["batch_size"],
    )
    return _Candidates.of(sizes, sequence_length, min_segment=1, **options).smallest()


def longest_sequence(config, memory_budget: int | str, **options: Any) -> int | None:
    """How many tokens fit a budget of device memory; options as for `plan_checkpoints`.

    Returns:
        A length for which a plan fits, a multiple of the configuration's `chunk_size` if it is longer than that; 0 if
        not one chunk fits, and None if the length is not what limits (beyond 2^30 tokens).
    """
    budget = parse_memory_size(memory_budget)
    chunk = _Shape.of(config).chunk_size

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


class _Shape(NamedTuple):
    """The dimensions of a Mamba-2 that its memory depends on."""

    num_hidden_layers: int
    width: int
    inner: int
    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    use_bias: bool
    use_conv_bias: bool
    residual_in_fp32: bool
    vocab_size: int

    @classmethod
    def of(cls, config) -> "_Shape":
        config = getattr(config, "text_config", None) or config
        names = [name for name in cls._fields if name not in ("width", "inner")]
        missing = [name for name in (*names, "hidden_size", "expand") if not hasattr(config, name)]
        if missing:
            raise ValueError(
                f"{type(config).__name__} is not the configuration of a Mamba-2 model: it has no {missing[0]}."
            )
        values = {name: getattr(config, name) for name in names}
        return cls(width=config.hidden_size, inner=int(config.expand * config.hidden_size), **values)

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.n_groups * self.state_size

    @property
    def projected(self) -> int:
        """Output width of `in_proj`: gate, convolution, time step."""
        return self.inner + self.conv_dim + self.num_heads

    @property
    def recurrent(self) -> int:
        """Elements of one layer's recurrent state."""
        return self.num_heads * self.head_dim * self.state_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one block."""
        in_proj = self.projected * (self.width + self.use_bias)
        conv = self.conv_dim * (self.conv_kernel + self.use_conv_bias)
        out_proj = self.width * (self.inner + self.use_bias)
        return self.width + in_proj + conv + 3 * self.num_heads + self.inner + out_proj


class _Sizes(NamedTuple):
    """Bytes of the things that a plan counts, for one sample."""

    num_hidden_layers: int
    chunk_size: int
    indexable: int  # tokens that kernels can tell apart
    embedding: int  # one token of the first row
    row: int  # one token of a row between blocks
    state: int  # one layer's state at a border
    kept: int  # one token in one layer
    working: int  # one token in the layer that runs
    scan_working: int  # one token of the span in the scan that runs
    fresh_gradient: int  # one layer's parameter gradients as they come
    gradient_rest: int  # what their sum, which is the gradient, has beside it in half precision
    embedding_gradient: int  # both of these, of embeddings that are looked up in the grid

    @classmethod
    def of(cls, config, dtype, parameter_dtype, fused, from_ids, batch_size) -> "_Sizes":
        shape = _Shape.of(config)
        dtype = _floating_dtype("dtype", dtype)
        parameter_dtype = dtype if parameter_dtype is None else _floating_dtype("parameter_dtype", parameter_dtype)
        number, half = parameter_dtype.itemsize, parameter_dtype.itemsize < 4
        wide = torch.promote_types(dtype, torch.float32)
        return cls(
            num_hidden_layers=shape.num_hidden_layers,
            chunk_size=shape.chunk_size,
            indexable=indexable_tokens(config, batch_size),
            # A token id has eight bytes, and no gradient.
            embedding=8 if from_ids else shape.width * dtype.itemsize,
            row=shape.width * (wide if shape.residual_in_fp32 else dtype).itemsize,
            # Transformers' layout: as many inputs of the convolution as its kernel is wide, one of them unused.
            state=shape.recurrent * wide.itemsize + shape.conv_dim * shape.conv_kernel * dtype.itemsize,
            kept=kept_bytes_per_token(config, dtype, fused),
            working=(
                _fused_working_bytes_per_token(shape, dtype.itemsize) if fused else _working_bytes_per_token(shape)
            ),
            scan_working=0 if fused else _scan_working_bytes_per_token(shape),
            fresh_gradient=shape.layer_parameters * number,
            gradient_rest=shape.layer_parameters * number * half,
            embedding_gradient=shape.vocab_size * shape.width * number * (1 + half) * from_ids,
        )


def _floating_dtype(name: str, dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype!r}.")
    return found


# What follows computes with whole arrays of candidate intervals as well as with single ones.


def _segments(sequence_length, sequence_interval):
    """How many segments there are, and the tokens of the longest."""
    segments = -(-sequence_length // sequence_interval)
    # A single token would take the decoding path, which cannot be differentiated: it joins the segment before.
    lone = (sequence_length % sequence_interval == 1) & (segments > 1)
    return segments - lone, np.minimum(sequence_interval, sequence_length) + lone


def _extra_passes(order, rerun, layer_interval, num_hidden_layers):
    """Forward passes beyond the first; `rerun` if not all borders have their states kept."""
    return 1 + rerun + (order == "sequence-major") * (layer_interval < num_hidden_layers)


def _state_interval(segments, rerun):
    """Segments between states that are kept: all, or so that about as many are kept as are made again at a time."""
    return np.maximum(np.ceil(np.sqrt(segments)).astype(int), 2) if rerun else np.ones_like(segments)


def _memory_parts(
    sizes: _Sizes, order, rerun, offload, sequence_length, batch_size, layer_interval, sequence_interval
):
    """The parts of a plan's memory, by the names of the fields of `CheckpointPlan`."""
    L = sizes.num_hidden_layers
    segments, tokens = _segments(sequence_length, sequence_interval)
    state_interval = _state_interval(segments, rerun)
    groups = -(-L // layer_interval)
    whole = batch_size * sequence_length
    piece = batch_size * tokens
    states = batch_size * sizes.state
    # Parameter gradients are summed, and gradients of states handed on, by the layers of one walk over the sequence.
    walked_layers = layer_interval if order == "layer-major" else L
    # Gradients of the states on both sides, and the states between kept ones.
    segment = (2 * (segments > 1) + state_interval - 1) * walked_layers * states
    staged = 2 * walked_layers * states * (segments > 1)
    if order == "layer-major":
        hidden_borders = whole * (sizes.embedding + (groups - 1) * sizes.row)
        rows = 2 * whole * sizes.row  # gradients of a group's output and input
        staged = staged + 6 * piece * sizes.row  # in and out, two of each: rows, and gradients
    else:
        hidden_borders = whole * sizes.embedding
        rows = whole * sizes.embedding  # the embeddings' gradient
        segment = segment + piece * groups * (groups > 1) * sizes.row
        staged = staged + 4 * piece * sizes.embedding
    running = piece * sizes.working + np.minimum(tokens, 2 * _SCAN_SPAN) * sizes.scan_working
    sums = layer_interval * sizes.fresh_gradient + walked_layers * sizes.gradient_rest + sizes.embedding_gradient
    return {
        "hidden_border_bytes": hidden_borders,
        "state_border_bytes": batch_size * L * ((segments - 1) // state_interval) * sizes.state,
        "row_bytes": rows,
        "segment_bytes": segment + staged * offload,
        # The scan keeps its start states in a layout of its own, and end states stay until the cell has been left.
        "cell_bytes": layer_interval * (piece * sizes.kept + 2 * states) + running + 2 * piece * sizes.row,
        "accumulator_bytes": sums,
    }


def _device_and_host(offload, parts):
    waiting = parts["hidden_border_bytes"] + parts["state_border_bytes"] + parts["row_bytes"]
    passing = parts["segment_bytes"] + parts["cell_bytes"] + parts["accumulator_bytes"]
    return (passing, waiting) if offload else (waiting + passing, 0)


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
        L = sizes.num_hidden_layers
        layers = _smallest_for_each_count(L) if layer_interval == "auto" else np.array([min(layer_interval, L)])
        longest = min(sequence_length, sizes.indexable)
        if sequence_interval == "auto":
            # Multiples of the scan's chunk (paper §3.2), the whole sequence being one at any length.
            units = _smallest_for_each_count(-(-sequence_length // sizes.chunk_size))
            smallest = min(max(min_segment, 2), longest)
            tokens = np.unique(np.minimum(units * sizes.chunk_size, longest))
            tokens = tokens[tokens >= smallest]
        else:
            # Every segment of one token would have to join another.
            tokens = np.array([min(max(sequence_interval, 2), longest)])
        l, s = (axis.ravel() for axis in np.meshgrid(layers, tokens))  # noqa: E741  the paper's names
        segments = _segments(sequence_length, s)[0]
        # On the host states are cheap, and those made again would have to be on the device.
        reruns = (False,) if offload or segments.max() < 4 else (False, True)
        variants = [(name, rerun) for name in (ORDERS if order == "auto" else (order,)) for rerun in reruns]
        grid = (offload, sequence_length, batch_size, l, s)
        parts = [_memory_parts(sizes, *variant, *grid) for variant in variants]
        memory = [_device_and_host(offload, part) for part in parts]
        return cls(
            shared=dict(offload=offload, sequence_length=sequence_length, batch_size=batch_size, num_hidden_layers=L),
            variants=variants,
            variant=np.repeat(np.arange(len(variants)), len(l)),
            layer_interval=np.tile(l, len(variants)),
            sequence_interval=np.tile(s, len(variants)),
            state_interval=np.concatenate([_state_interval(segments, rerun) for _, rerun in variants]),
            parts={name: np.concatenate([part[name] + 0 * l for part in parts]) for name in parts[0]},
            device=np.concatenate([device + 0 * l for device, _ in memory]),
            host=np.concatenate([host + 0 * l for _, host in memory]),
            passes=np.concatenate([_extra_passes(*variant, l, L) for variant in variants]),
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
    "format_memory_size",
    "indexable_tokens",
    "kept_bytes_per_token",
    "longest_sequence",
    "paper_constants",
    "paper_memory",
    "parse_memory_size",
    "plan_checkpoints",
    "smallest_plan",
]
