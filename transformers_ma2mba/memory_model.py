"""The memory of MA-GC (paper §3.2 and §3.3): what a layer keeps, and what a plan has on the device and on the host.

Two models. The paper's is its formula and its Table 7; that of this engine counts, in bytes, what the engine keeps.

Symbols: S sequence length, B batch size, L layers, D width, E inner width, H heads, P head dimension, N state size;
l layers and s tokens of a cell; G groups of layers, n segments; e bytes of an element, r bytes of an element of a row.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

_SCAN_SPAN = 512  # tokens between the states that the lean scan keeps; twice that on a GPU
_SCAN_TILE = 128  # tokens; of the scan's working memory, on a GPU
_INDEXABLE = 2**31  # numbers of a tensor that kernels with 32-bit offsets can tell apart


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
    shape = Mamba2Shape.of(config)
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
    points = Mamba2Shape.of(config).num_hidden_layers * sequence_length
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
    shape = Mamba2Shape.of(config)
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
    shape, dtype = Mamba2Shape.of(config), floating_dtype("dtype", dtype)
    e, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    if fused:
        return e * (2 * shape.width + shape.projected + shape.inner) + 4 * (1 + shape.n_groups)
    norm = shape.width * (4 + 2 * e) + 4
    convolution = 3 * e * shape.conv_dim
    scan = 3 * wide * shape.num_heads + wide * shape.recurrent // _SCAN_SPAN
    gate = e * shape.projected if dtype == torch.float32 else 4 * shape.inner
    gated_norm = (3 * 4 + wide + e) * shape.inner + 4 * shape.n_groups
    return norm + convolution + scan + gate + gated_norm


def _working_bytes_per_token(shape: "Mamba2Shape") -> int:
    """Bytes of one token that pass through one layer and are not kept: float32 gradients of the gated norm's terms, of
    x, B, C and the time step."""
    return 4 * (4 * shape.inner + 2 * shape.n_groups * shape.state_size + 2 * shape.num_heads)


def _fused_working_bytes_per_token(shape: "Mamba2Shape", itemsize: int) -> int:
    """The same with the fused kernels: gradients of `in_proj`'s output and the convolution's, the convolution computed
    again, three rows as wide as x, and in float32 each chunk's states, their gradients and the products of B and C."""
    rows = itemsize * (shape.projected + 2 * shape.conv_dim + 3 * shape.inner)
    per_chunk = 4 * (3 * shape.recurrent + 2 * shape.n_groups * shape.chunk_size**2)
    return rows + math.ceil(per_chunk / shape.chunk_size) + 4 * 6 * shape.num_heads


def _scan_working_bytes_per_token(shape: "Mamba2Shape") -> int:
    """Bytes of one token of the span that the lean scan works on: three matrices of tokens times tile for each head,
    and five float32 tensors as wide as x."""
    return 4 * (3 * _SCAN_TILE * shape.num_heads + 5 * shape.inner)


class Mamba2Shape(NamedTuple):
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
    def of(cls, config) -> "Mamba2Shape":
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


class MemorySizes(NamedTuple):
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
    def of(cls, config, dtype, parameter_dtype, fused, from_ids, batch_size) -> "MemorySizes":
        shape = Mamba2Shape.of(config)
        dtype = floating_dtype("dtype", dtype)
        parameter_dtype = dtype if parameter_dtype is None else floating_dtype("parameter_dtype", parameter_dtype)
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


def floating_dtype(name: str, dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype!r}.")
    return found


# What follows computes with whole arrays of candidate intervals as well as with single ones.


def segments_of(sequence_length, sequence_interval):
    """How many segments there are, and the tokens of the longest."""
    segments = -(-sequence_length // sequence_interval)
    # A single token would take the decoding path, which cannot be differentiated: it joins the segment before.
    lone = (sequence_length % sequence_interval == 1) & (segments > 1)
    return segments - lone, np.minimum(sequence_interval, sequence_length) + lone


def extra_passes(order, rerun, layer_interval, num_hidden_layers):
    """Forward passes beyond the first; `rerun` if not all borders have their states kept."""
    return 1 + rerun + (order == "sequence-major") * (layer_interval < num_hidden_layers)


def state_interval_of(segments, rerun):
    """Segments between states that are kept: all, or so that about as many are kept as are made again at a time."""
    return np.maximum(np.ceil(np.sqrt(segments)).astype(int), 2) if rerun else np.ones_like(segments)


def memory_parts(
    sizes: MemorySizes, order, rerun, offload, sequence_length, batch_size, layer_interval, sequence_interval
):
    """The parts of a plan's memory, by the names of the fields of `CheckpointPlan`."""
    L = sizes.num_hidden_layers
    segments, tokens = segments_of(sequence_length, sequence_interval)
    state_interval = state_interval_of(segments, rerun)
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


def device_and_host(offload, parts):
    """Bytes that the parts of a plan's memory come to, on the device and on the host."""
    waiting = parts["hidden_border_bytes"] + parts["state_border_bytes"] + parts["row_bytes"]
    passing = parts["segment_bytes"] + parts["cell_bytes"] + parts["accumulator_bytes"]
    return (passing, waiting) if offload else (waiting + passing, 0)
