"""The memory of MA-GC (paper §3.2 and §3.3), in bytes: of a layer, and of a plan on the device and on the host.

Symbols: S sequence length, B batch size, L layers, D width, E inner width, H heads, P head dimension, N state size;
l layers and s tokens of a cell; G groups of layers, n segments; e bytes of an element, r bytes of an element of a row.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .shape import Mamba2Shape, indexable_tokens, segments_of
from .ssd_scan import NUMBERS_PER_SPAN, TILE, TILES_PER_SPAN

_ITEMSIZES = ("in_proj_itemsize", "out_proj_itemsize")


class TrainedSizes(NamedTuple):
    """What of a model is trained, as far as memory depends on it.

    Attributes:
        layer_bytes: gradients of the layer that has the most of them.
        half_bytes: as much of it as is in half precision.
        norms: whether weights of the layers' norms are trained.
        in_proj_itemsize, out_proj_itemsize: bytes of a number of what is kept of these projections' inputs, for
            gradients of their weights or of adapters; 0 if these are frozen.
        embeddings: whether the embeddings are trained.
    """

    layer_bytes: int
    half_bytes: int
    norms: bool
    in_proj_itemsize: int
    out_proj_itemsize: int
    embeddings: bool

    @classmethod
    def everything(cls, config, dtype: torch.dtype, parameter_dtype: torch.dtype) -> "TrainedSizes":
        """For a model all of which is trained, in `parameter_dtype`, with activations in `dtype`."""
        layer_bytes = Mamba2Shape.of(config).layer_parameters * parameter_dtype.itemsize
        half_bytes = layer_bytes * (parameter_dtype.itemsize < 4)
        return cls(layer_bytes, half_bytes, True, dtype.itemsize, dtype.itemsize, embeddings=True)


def trained_sizes(layers: Sequence[nn.Module], embeddings: nn.Module | None = None) -> TrainedSizes:
    """What `requires_grad` says of stock layers, adapters in them included, and of embeddings."""
    trained = [
        [(name, parameter) for name, parameter in layer.named_parameters() if parameter.requires_grad]
        for layer in layers
    ]

    def largest(parameters_of):
        return max((sum(parameter.nbytes for parameter in parameters_of(layer)) for layer in trained), default=0)

    every = [named for layer in trained for named in layer]

    def itemsize(projection):
        return max((parameter.dtype.itemsize for name, parameter in every if projection in name.split(".")), default=0)

    return TrainedSizes(
        layer_bytes=largest(lambda layer: [parameter for _, parameter in layer]),
        half_bytes=largest(lambda layer: [parameter for _, parameter in layer if parameter.dtype.itemsize < 4]),
        norms=any("norm" in name.split(".") for name, _ in every),
        in_proj_itemsize=itemsize("in_proj"),
        out_proj_itemsize=itemsize("out_proj"),
        embeddings=embeddings is not None and any(parameter.requires_grad for parameter in embeddings.parameters()),
    )


def kept_bytes_per_token(
    config,
    dtype: torch.dtype | str = torch.bfloat16,
    fused: bool = False,
    trained: TrainedSizes | None = None,
    device: torch.device | str = "cuda",
) -> int:
    """Bytes that autograd keeps of one token in one stock `Mamba2Block`, run by plain PyTorch with `ssd_scan`.

    Read off transformers' `modeling_mamba2.py`, in the order of its operations, and held to it by a test:

    - the norm: its input in float32, the normalised row and what the weight makes of it, a float32 scale;
    - `in_proj`'s output, if it is float32 itself: then the gate is a view of it;
    - the convolution's input (joined to the carried tail, so a copy), its output, and that after SiLU, which holds the
      scan's x, B and C;
    - the scan: the time step before and after softplus and after its limit, and a state every few hundred tokens;
    - the gated norm: the scan's output, the gate (a copy unless it is float32 already), SiLU of it and the product,
      all in float32, a scale for each group; the normalised product in the scan's type, and `out_proj`'s input.

    The residual adds nothing: a sum keeps neither of its terms. It is several times the paper's C_grid. Frozen weights
    keep no inputs: neither the normalised rows, nor what goes into the projections.

    With `fused`, mamba-ssm's kernels run the block (`fused_layer.py`), and keep what C_grid counts, `in_proj`'s output
    and the scan's; the norm's input and output, and a float32 scale for each norm, come on top.
    """
    shape, dtype = Mamba2Shape.of(config), floating_dtype("dtype", dtype)
    e, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    if fused:
        return e * (2 * shape.width + shape.projected + shape.inner) + 4 * (1 + shape.n_groups)
    trained = trained or TrainedSizes.everything(config, dtype, dtype)
    norm = shape.width * (4 + e * trained.norms + trained.in_proj_itemsize) + 4
    convolution = 3 * e * shape.conv_dim
    scan = 3 * wide * shape.num_heads + wide * shape.recurrent // _span_tokens(device)
    return norm + convolution + scan + _gated_norm_bytes_per_token(shape, dtype, trained)


def _gated_norm_bytes_per_token(shape: Mamba2Shape, dtype: torch.dtype, trained: TrainedSizes) -> int:
    """What the scan's gradient need not wait for: the gated norm's part of the above, and the gate's."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    gate = dtype.itemsize * shape.projected if dtype == torch.float32 else 4 * shape.inner
    rows = wide + 2 * 4 + wide * trained.norms + trained.out_proj_itemsize
    return gate + rows * shape.inner + 4 * shape.n_groups


def _span_tokens(device: torch.device | str) -> int:
    return TILE[_kind(device)] * TILES_PER_SPAN


def _kind(device: torch.device | str) -> str:
    return "cpu" if torch.device(device).type == "cpu" else "other"


def _working_bytes_per_token(shape: Mamba2Shape, dtype: torch.dtype, trained: TrainedSizes) -> tuple[int, int]:
    """Bytes of one token beyond those that one layer keeps, at two moments of its backward; less than none, if by then
    more has been given up.

    - In the gated norm: four float32 rows, in place of `out_proj`'s input and the normalised product.
    - In the scan: gradients of its output, of the gate, of x, B and C and of the time step, in place of what the gated
      norm has kept.
    """
    e, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    norm = (4 * 4 - trained.out_proj_itemsize - wide * trained.norms) * shape.inner
    gradients = (wide + e) * shape.inner + e * shape.conv_dim + 2 * wide * shape.num_heads
    return norm, gradients - _gated_norm_bytes_per_token(shape, dtype, trained)


def _fused_working_bytes_per_token(shape: Mamba2Shape, itemsize: int) -> int:
    """The same with the fused kernels: gradients of `in_proj`'s output and the convolution's, the convolution computed
    again, three rows as wide as x, and in float32 each chunk's states, their gradients and the products of B and C."""
    rows = itemsize * (shape.projected + 2 * shape.conv_dim + 3 * shape.inner)
    per_chunk = 4 * (3 * shape.recurrent + 2 * shape.n_groups * shape.chunk_size**2)
    return rows + math.ceil(per_chunk / shape.chunk_size) + 4 * 6 * shape.num_heads


def _scan_working_bytes(sizes: "MemorySizes", batch_size: int, tokens):
    """What `ssd_scan`'s backward works with, for a piece of so many tokens of each sample.

    It goes span by span, from the last. Of each token it takes three rows as wide as x, and B, C and their gradients;
    then, within a tile, three matrices of tokens times tile for each head; then, from tile to tile, four rows more and
    three states of each tile. These last ones are still there when the span before begins.
    """
    shape, tile = sizes.shape, TILE[sizes.kind]
    longest = tile * TILES_PER_SPAN
    span = np.minimum(tokens, longest)
    rows = NUMBERS_PER_SPAN[sizes.kind] // (shape.num_heads * max(shape.head_dim, tile) * span)
    rows = np.clip(rows, 1, batch_size)
    behind = np.clip(tokens - tokens % tile - span, 0, longest)
    # If it is all one span, with no tokens left over, that of the rows before is still there.
    behind = np.where((tokens <= longest) & (tokens % tile == 0) & (2 * rows <= batch_size), span, behind)
    inputs = 3 * shape.inner + shape.n_groups * (4 * shape.state_size + tile)
    within = 3 * tile * shape.num_heads
    across = 4 * shape.inner + 3 * shape.recurrent // tile
    return sizes.scan_itemsize * rows * (span * inputs + np.maximum(span * within + behind * across, span * across))


class MemorySizes(NamedTuple):
    """Bytes of the things that a plan counts, for one sample."""

    shape: Mamba2Shape
    kind: str  # of device: "cpu" or "other"
    indexable: int  # tokens that kernels can tell apart
    embedding: int  # one token of the first row
    embedding_gradient: int  # one token of its gradient
    row: int  # one token of a row between blocks
    output: int  # one token of the last row's gradient, if that has all tokens
    state: int  # one layer's state at a border
    kept: int  # one token in one layer
    first: tuple[int, int]  # of the first segment: what is kept more of it, and how much more its scan works with
    norm_working: int  # one token in the layer that runs, beyond what is kept: in its gated norm,
    working: int  # or in its scan,
    scan_itemsize: int  # where numbers have so many bytes; 0 if kernels run it
    cast: int  # one layer's weights as autocast makes them
    gathered: int  # one layer's weights and their gradients, if they are sharded over processes
    fresh_gradient: int  # one layer's parameter gradients as they come
    gradient_rest: int  # what their sum has in memory of its own
    accumulating: bool  # whether there are gradients already that the sums are added to
    embedding_rest: int  # the same for embeddings that are looked up in the grid

    @classmethod
    def of(
        cls,
        config,
        dtype: torch.dtype | str = torch.bfloat16,
        parameter_dtype: torch.dtype | str | None = None,
        fused: bool = False,
        from_ids: bool = False,
        batch_size: int = 1,
        *,
        trained: TrainedSizes | None = None,
        whole_output: bool = False,
        accumulating: bool = False,
        sharded: bool = False,
        device: torch.device | str = "cuda",
    ) -> "MemorySizes":
        shape = Mamba2Shape.of(config)
        dtype = floating_dtype("dtype", dtype)
        parameter_dtype = dtype if parameter_dtype is None else floating_dtype("parameter_dtype", parameter_dtype)
        trained = trained or TrainedSizes.everything(config, dtype, parameter_dtype)
        autocast = parameter_dtype.itemsize > dtype.itemsize
        if autocast:  # it makes inputs of the type that they are to be multiplied in, whatever the weights are
            kept = {name: min(getattr(trained, name), dtype.itemsize) for name in _ITEMSIZES}
            trained = trained._replace(**kept)
        wide = torch.promote_types(dtype, torch.float32)
        if fused:
            norm_working = working = _fused_working_bytes_per_token(shape, dtype.itemsize)
        else:
            norm_working, working = _working_bytes_per_token(shape, dtype, trained)
        number, half = parameter_dtype.itemsize, parameter_dtype.itemsize < 4
        summed = (4 * half + number * accumulating) * trained.embeddings * from_ids
        # Without a state to join it to, the convolution's input is a view of `in_proj`'s output, as the gate may be.
        projected, joined = dtype.itemsize * shape.projected, dtype.itemsize * shape.conv_dim
        first = (-joined, projected) if dtype == torch.float32 else (projected - joined, 0)
        return cls(
            shape=shape,
            kind=_kind(device),
            indexable=indexable_tokens(config, batch_size),
            # A token id has eight bytes, and no gradient.
            embedding=8 if from_ids else shape.width * dtype.itemsize,
            embedding_gradient=0 if from_ids else shape.width * dtype.itemsize,
            row=shape.width * (wide if shape.residual_in_fp32 else dtype).itemsize,
            output=shape.width * dtype.itemsize * whole_output,
            # Transformers' layout: as many inputs of the convolution as its kernel is wide, one of them unused.
            state=shape.recurrent * wide.itemsize + shape.conv_dim * shape.conv_kernel * dtype.itemsize,
            kept=kept_bytes_per_token(config, dtype, fused, trained, device),
            first=(0, 0) if fused else first,
            norm_working=norm_working,
            working=working,
            scan_itemsize=0 if fused else wide.itemsize,
            cast=shape.layer_parameters * dtype.itemsize * autocast,
            gathered=(shape.layer_parameters * number + trained.layer_bytes) * sharded,
            fresh_gradient=trained.layer_bytes,
            gradient_rest=trained.half_bytes + trained.layer_bytes * accumulating,
            accumulating=accumulating,
            embedding_rest=shape.vocab_size * shape.width * summed,
        )


def floating_dtype(name: str, dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype!r}.")
    return found


# What follows computes with whole arrays of candidate intervals as well as with single ones.


def extra_passes(order, rerun, layer_interval, num_hidden_layers):
    """Forward passes beyond the first; `rerun` if not all borders have their states kept."""
    return 1 + rerun + (order == "sequence-major") * (layer_interval < num_hidden_layers)


def state_interval_of(segments, rerun):
    """Segments between states that are kept: all, or so that about as many are kept as are made again at a time."""
    return np.maximum(np.ceil(np.sqrt(segments)).astype(int), 2) if rerun else np.ones_like(segments)


def _cell_bytes(sizes: MemorySizes, batch_size, tokens, layers, more_kept, more_working, borders):
    """What a cell takes at the worst moment of its backward, when its highest layer runs.

    The scan keeps its start states in a layout of its own, and end states stay until the cell has been left: up to two
    `borders`. Beside these there are the cell's output and its gradient.
    """
    piece = batch_size * tokens
    kept = piece * (sizes.kept + more_kept) + borders * batch_size * sizes.state + sizes.cast
    scan = piece * (sizes.working + more_working) + _scan_working_bytes(sizes, batch_size, tokens)
    return layers * kept + np.maximum(piece * sizes.norm_working, scan) + 2 * piece * sizes.row


def memory_parts(
    sizes: MemorySizes, order, rerun, offload, sequence_length, batch_size, layer_interval, sequence_interval
):
    """The parts of a plan's memory, by the names of the fields of `CheckpointPlan`."""
    L = sizes.shape.num_hidden_layers
    segments, tokens = segments_of(sequence_length, sequence_interval)
    several = np.greater(segments, 1)
    state_interval = state_interval_of(segments, rerun)
    groups = -(-L // layer_interval)
    whole = batch_size * sequence_length
    piece = batch_size * tokens
    states = batch_size * sizes.state
    embeddings_gradient = whole * sizes.embedding_gradient
    # Parameter gradients are summed, and gradients of states handed on, by the layers of one walk over the sequence.
    walked_layers = layer_interval if order == "layer-major" else L
    # Gradients of the states on one side, or for the cell that runs on both, and the states between kept ones.
    segment = (several * (walked_layers + layer_interval) + (state_interval - 1) * walked_layers) * states
    staged = 2 * walked_layers * states * several
    if order == "layer-major":
        hidden_borders = whole * (sizes.embedding + (groups - 1) * sizes.row)
        # The gradient of the highest group's input. Lower ones have that of their output as well, and one border less.
        rows = np.where(groups > 1, whole * sizes.row, embeddings_gradient)
        staged = staged + 6 * piece * sizes.row  # in and out, two of each: rows, and gradients
    else:
        hidden_borders = whole * sizes.embedding
        rows = embeddings_gradient
        segment = segment + piece * (groups - 1) * sizes.row
        staged = staged + 4 * piece * sizes.embedding
    # The gradient of the last row comes from the loss, and so on the device.
    output = whole * sizes.output
    rows, staged = (rows, staged + output) if offload else (rows + output, staged)
    state_borders = batch_size * ((segments - 1) // state_interval) * sizes.state
    # The first segment has no states to start from. Of two segments the later may be the shorter.
    first = _cell_bytes(sizes, batch_size, tokens, layer_interval, *sizes.first, borders=1 * several)
    later = np.minimum(tokens, np.maximum(sequence_length - sequence_interval, 1))
    others = _cell_bytes(sizes, batch_size, later, layer_interval, 0, 0, borders=2)
    cell = np.where(several, np.maximum(first, others), first)
    # While a cell's gradients come, from its highest layer down, what is kept goes. Of a single segment, they are the
    # gradients themselves, unless there are some already.
    fresh = sizes.fresh_gradient + (layer_interval - 1) * np.maximum(sizes.fresh_gradient - piece * sizes.kept, 0)
    sums = (several | sizes.accumulating) * fresh + several * walked_layers * sizes.gradient_rest
    # The embeddings' sum is there with the lowest group only, when what waited for those above it is gone. And of a
    # single segment, when its cell is gone too.
    lowest = whole * (sizes.embedding + sizes.row * (groups > 1)) + embeddings_gradient
    lowest = lowest + output * (groups == 1) + layer_interval * state_borders
    gone = hidden_borders + rows + L * state_borders - lowest if order == "layer-major" and not offload else 0
    gone = gone + np.where(several, 0, cell)
    embedding_sum = np.maximum(sizes.embedding_rest - gone, 0)
    return {
        "hidden_border_bytes": hidden_borders,
        "state_border_bytes": L * state_borders,
        "row_bytes": rows,
        "segment_bytes": segment + staged * offload,
        "cell_bytes": cell,
        "accumulator_bytes": sums + embedding_sum,
        "gathered_bytes": walked_layers * sizes.gathered,
    }


def device_and_host(offload, parts):
    """Bytes that the parts of a plan's memory come to, on the device and on the host."""
    waiting = parts["hidden_border_bytes"] + parts["state_border_bytes"] + parts["row_bytes"]
    passing = sum(parts[name] for name in ("segment_bytes", "cell_bytes", "accumulator_bytes", "gathered_bytes"))
    return (passing, waiting) if offload else (waiting + passing, 0)
