"""Memory of multi-axis gradient checkpointing (MA-GC, paper §3.2 and §3.3), in bytes: of a layer and of a plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..mamba2 import ELEMENTS_PER_SPAN, TILE, TILES_PER_SPAN, Mamba2Shape, indexable_tokens, segments_of


class TrainedSizes(NamedTuple):
    """Sizes of the trained parameters, as far as memory depends on them.

    Attributes:
        layer_bytes: gradients of the layer that has the most of them.
        half_bytes: gradients in half precision of the layer that has the most of these.
        norms: whether weights of the layers' norms are trained.
        in_proj_itemsize, out_proj_itemsize: bytes of an element of the input that autograd keeps for the gradients of
            the projection's weights or adapters; 0 if the projection is frozen.
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
        """Sizes of a model whose parameters, in `parameter_dtype`, are all trained, with activations in `dtype`."""
        layer_bytes = Mamba2Shape.of(config).layer_parameters * parameter_dtype.itemsize
        half_bytes = layer_bytes * (parameter_dtype.itemsize < 4)
        return cls(layer_bytes, half_bytes, True, dtype.itemsize, dtype.itemsize, embeddings=True)


def trained_sizes(layers: Sequence[nn.Module], embeddings: nn.Module | None = None) -> TrainedSizes:
    """Read the sizes off `requires_grad` of stock layers, including adapters in them, and of the embeddings."""
    trained = [
        [(name, parameter) for name, parameter in layer.named_parameters() if parameter.requires_grad]
        for layer in layers
    ]

    def largest(below):
        sizes = (sum(p.nbytes for _, p in layer if p.dtype.itemsize < below) for layer in trained)
        return max(sizes, default=0)

    every = [named for layer in trained for named in layer]

    def itemsize(projection):
        return max((parameter.dtype.itemsize for name, parameter in every if projection in name.split(".")), default=0)

    return TrainedSizes(
        layer_bytes=largest(below=math.inf),
        half_bytes=largest(below=4),
        norms=any("norm" in name.split(".") for name, _ in every),
        in_proj_itemsize=itemsize("in_proj"),
        out_proj_itemsize=itemsize("out_proj"),
        embeddings=embeddings is not None and any(parameter.requires_grad for parameter in embeddings.parameters()),
    )


def floating_dtype(name: str, dtype: torch.dtype | str) -> torch.dtype:
    """Check a type of activations or parameters.

    Args:
        name: the argument's name, for the error message.
        dtype: a torch dtype, or its name with or without `"torch."`.

    Returns:
        The torch dtype.

    Raises:
        ValueError: if it is not float16, bfloat16, float32 or float64.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64; got {dtype!r}.")
    return found


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number above 0."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class TrainingStep:
    """The training step that a plan is made for; [`plan_checkpoints`] explains the fields.

    Raises:
        ValueError: if a length, a size or a type is out of range.
    """

    sequence_length: int
    batch_size: int = 1
    dtype: torch.dtype | str = torch.bfloat16
    parameter_dtype: torch.dtype | str | None = None
    fused: bool = False
    from_ids: bool = False
    trained: TrainedSizes | None = None
    whole_output: bool = False
    accumulating: bool = False
    sharded: bool = False
    device: torch.device | str = "cuda"

    def __post_init__(self):
        for name in ("sequence_length", "batch_size"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name} must be a whole number above 0; got {getattr(self, name)!r}.")
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.parameter_dtype is None:
            object.__setattr__(self, "parameter_dtype", self.dtype)
        for name in ("dtype", "parameter_dtype"):
            object.__setattr__(self, name, floating_dtype(name, getattr(self, name)))

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the activations."""
        return self.dtype.itemsize

    @property
    def wide_itemsize(self) -> int:
        """Bytes of an element of the tensors that are in float32 or wider: states, norms and the scan."""
        return torch.promote_types(self.dtype, torch.float32).itemsize

    @property
    def autocast(self) -> bool:
        """Whether autocast converts the weights to the activations' type."""
        return self.parameter_dtype.itemsize > self.itemsize

    @property
    def scan_kind(self) -> str:
        """The kind of device that `ssd_scan` distinguishes: `"cpu"` or `"other"`."""
        return "cpu" if torch.device(self.device).type == "cpu" else "other"

    def trained_in(self, config) -> TrainedSizes:
        """Sizes of the trained parameters of a model with this configuration."""
        trained = self.trained or TrainedSizes.everything(config, self.dtype, self.parameter_dtype)
        if not self.autocast:
            return trained
        # Autocast converts the projections' inputs to the type of the product, whatever the type of the weights is.
        return trained._replace(
            in_proj_itemsize=min(trained.in_proj_itemsize, self.itemsize),
            out_proj_itemsize=min(trained.out_proj_itemsize, self.itemsize),
        )


def kept_bytes_per_token(config, step: TrainingStep) -> int:
    """Bytes that autograd keeps of one token in one stock `Mamba2Block`, whose scan is `ssd_scan`.

    The count follows the operations of transformers' `modeling_mamba2.py`, in their order; a test checks it:

    - the norm: its input in float32, the normalised hidden states and their product with the weight, a float32 scale;
    - `in_proj`'s output if it is in float32, because the gate is then a view of it;
    - the convolution's input, which is a copy because it is joined to the carried tail, its output before SiLU, and
      its output after SiLU, which contains the scan's x, B and C;
    - the scan: the time step before softplus, after it and after its limit, and one state per span;
    - the gated norm, in float32: the scan's output, the gate (a copy unless it is in float32 already), SiLU of the
      gate, the product, and a scale for each group; then the normalised product in the scan's type, and `out_proj`'s
      input.

    The residual adds nothing, because autograd keeps neither term of a sum. A frozen weight keeps no input: neither
    the normalised hidden states nor the projections' inputs. The total is several times the paper's C_grid.

    A `fused` step runs mamba-ssm's kernels (`fused_layer.py`). These keep the two tensors of C_grid, `in_proj`'s
    output and the scan's output, and besides the norm's input and output and a float32 scale for each norm.
    """
    shape, itemsize, wide = Mamba2Shape.of(config), step.itemsize, step.wide_itemsize
    if step.fused:
        return itemsize * (2 * shape.width + shape.projected + shape.inner) + 4 * (1 + shape.n_groups)
    trained = step.trained_in(config)
    norm = shape.width * (4 + itemsize * trained.norms + trained.in_proj_itemsize) + 4
    convolution = 3 * itemsize * shape.conv_dim
    scan = 3 * wide * shape.num_heads + wide * shape.recurrent // (TILE[step.scan_kind] * TILES_PER_SPAN)
    return norm + convolution + scan + _gated_norm_bytes_per_token(shape, step, trained)


def _gated_norm_bytes_per_token(shape: Mamba2Shape, step: TrainingStep, trained: TrainedSizes) -> int:
    """Bytes that autograd keeps for the gated norm and its gate; they are freed before the scan's backward."""
    gate = step.itemsize * shape.projected if step.dtype == torch.float32 else 4 * shape.inner
    inner = step.wide_itemsize * (1 + trained.norms) + 2 * 4 + trained.out_proj_itemsize
    return gate + inner * shape.inner + 4 * shape.n_groups


def _working_bytes_per_token(shape: Mamba2Shape, step: TrainingStep, trained: TrainedSizes) -> tuple[int, int]:
    """Bytes of one token that a layer's backward adds to the kept ones, in the gated norm and in the scan.

    A number is negative if backward has freed more by then than it has added. `ssd_scan`'s own memory comes on top.

    - In the gated norm: four float32 tensors as wide as x, in place of `out_proj`'s input and the normalised product.
    - In the scan: the gradients of its output, the gate, x, B, C and the time step, in place of the gated norm's kept
      tensors.
    - With fused kernels, at either moment: the gradients of `in_proj`'s output and of the convolution's output, the
      recomputed convolution, three tensors as wide as x, and in float32 each chunk's states, their gradients and the
      products of B and C.
    """
    itemsize, wide = step.itemsize, step.wide_itemsize
    if step.fused:
        tensors = itemsize * (shape.projected + 2 * shape.conv_dim + 3 * shape.inner)
        per_chunk = 4 * (3 * shape.recurrent + 2 * shape.n_groups * shape.chunk_size**2)
        working = tensors + math.ceil(per_chunk / shape.chunk_size) + 4 * 6 * shape.num_heads
        return working, working
    norm = (4 * 4 - trained.out_proj_itemsize - wide * trained.norms) * shape.inner
    gradients = (wide + itemsize) * shape.inner + itemsize * shape.conv_dim + 2 * wide * shape.num_heads
    return norm, gradients - _gated_norm_bytes_per_token(shape, step, trained)


class MemorySizes(NamedTuple):
    """Sizes from which [`memory_parts`] computes a plan's memory: bytes for one sample."""

    shape: Mamba2Shape
    step: TrainingStep
    indexable: int  # tokens of the longest segment that kernels can index
    embedding: int  # one token of the stack's input
    embedding_gradient: int  # one token of the input's gradient
    hidden_state: int  # one token of the hidden states between layers
    output_gradient: int  # one token of the output's gradient; 0 if only a few positions have one
    state: int  # one layer's state at a border
    kept: int  # one token in one layer, kept by autograd
    first_kept: int  # added to `kept` in the first segment
    norm_working: int  # one token in the running layer, added by backward in the gated norm
    scan_working: int  # one token in the running layer, added by backward in the scan
    first_scan_working: int  # added to `scan_working` in the first segment
    scan_itemsize: int  # an element in `ssd_scan`; 0 if fused kernels run the scan
    cast: int  # one layer's weights as converted by autocast
    gathered: int  # one layer's weights and gradients if parameters are sharded, else 0
    fresh_gradient: int  # one layer's parameter gradients, as one cell computes them
    gradient_rest: int  # one layer's gradient sums, beyond the gradients themselves
    embedding_rest: int  # the same for the embeddings, if they are looked up in the grid

    @classmethod
    def of(cls, config, step: TrainingStep) -> "MemorySizes":
        """Compute the sizes for one training step.

        Args:
            config: a `Mamba2Config`, or one with a `Mamba2Config` for its `text_config`.
            step: the step's batch, types and trained parameters.

        Raises:
            ValueError: if the configuration is not that of a Mamba-2 model.
        """
        shape, trained = Mamba2Shape.of(config), step.trained_in(config)
        itemsize, wide, parameter_itemsize = step.itemsize, step.wide_itemsize, step.parameter_dtype.itemsize
        norm_working, scan_working = _working_bytes_per_token(shape, step, trained)
        # The first segment has no state to join to the convolution's input, which is then a view of `in_proj`'s
        # output. In float32 autograd keeps that output already, for the gate.
        projected, joined = itemsize * shape.projected, itemsize * shape.conv_dim
        first = (-joined, projected) if step.dtype == torch.float32 else (projected - joined, 0)
        first_kept, first_scan_working = (0, 0) if step.fused else first
        # Embeddings are summed in float32 if they are in half precision.
        embedding_sum = 4 * (parameter_itemsize < 4) + parameter_itemsize * step.accumulating
        return cls(
            shape=shape,
            step=step,
            indexable=indexable_tokens(config, step.batch_size),
            # A token id has eight bytes, and no gradient.
            embedding=8 if step.from_ids else shape.width * itemsize,
            embedding_gradient=0 if step.from_ids else shape.width * itemsize,
            hidden_state=shape.width * (wide if shape.residual_in_fp32 else itemsize),
            output_gradient=shape.width * itemsize * step.whole_output,
            # Transformers keeps `conv_kernel` inputs of the convolution, one of them unused.
            state=shape.recurrent * wide + shape.conv_dim * shape.conv_kernel * itemsize,
            kept=kept_bytes_per_token(config, step),
            first_kept=first_kept,
            norm_working=norm_working,
            scan_working=scan_working,
            first_scan_working=first_scan_working,
            scan_itemsize=0 if step.fused else wide,
            cast=shape.layer_parameters * itemsize * step.autocast,
            gathered=(shape.layer_parameters * parameter_itemsize + trained.layer_bytes) * step.sharded,
            fresh_gradient=trained.layer_bytes,
            # A compensation for each sum in half precision, and the sums themselves if gradients exist already.
            gradient_rest=trained.half_bytes + trained.layer_bytes * step.accumulating,
            embedding_rest=shape.vocab_size * shape.width * embedding_sum * trained.embeddings * step.from_ids,
        )


# The functions below take arrays of candidate intervals as well as single numbers.


def extra_passes(order, rerun, layer_interval, num_hidden_layers):
    """Count the forward passes beyond the first.

    Args:
        order: `"layer-major"` or `"sequence-major"`.
        rerun: whether some borders have no states kept, so that backward runs segments again for them.
        layer_interval: layers of a cell, a number or an array.
        num_hidden_layers: layers of the stack.
    """
    return 1 + rerun + (order == "sequence-major") * (layer_interval < num_hidden_layers)


def state_interval_of(segments, rerun):
    """Choose how many segments lie between two borders whose states are kept.

    It is 1 if all borders have their states kept. With `rerun` it is about the square root of the number of segments:
    then about as many states are kept as are computed again at a time.
    """
    return np.maximum(np.ceil(np.sqrt(segments)).astype(int), 2) if rerun else np.ones_like(segments)


def _scan_working_bytes(sizes: MemorySizes, tokens):
    """Working memory of `ssd_scan`'s backward for a segment of `tokens` tokens.

    It holds one span at a time. For each token of the span it holds three tensors as wide as x, and B, C and their
    gradients. The tiles' inner part adds three matrices of tokens times tile for each head. In their place, the part
    across tiles adds four tensors as wide as x and three states for each tile.
    """
    shape, batch_size, tile = sizes.shape, sizes.step.batch_size, TILE[sizes.step.scan_kind]
    span = np.minimum(tokens, tile * TILES_PER_SPAN)
    # Samples that the scan takes at a time.
    samples = ELEMENTS_PER_SPAN[sizes.step.scan_kind] // (shape.num_heads * max(shape.head_dim, tile) * span)
    samples = np.clip(samples, 1, batch_size)
    inputs = 3 * shape.inner + shape.n_groups * (4 * shape.state_size + tile)
    within = 3 * tile * shape.num_heads
    across = 4 * shape.inner + 3 * shape.recurrent // tile
    return sizes.scan_itemsize * samples * span * (inputs + max(within, across))


def _cell_bytes(sizes: MemorySizes, tokens, layers, borders, first=False):
    """Peak memory of a cell's backward pass, which is reached in its highest layer.

    Args:
        tokens: tokens of the cell's segment.
        layers: layers of the cell.
        borders: borders whose states are held twice: the scan keeps its start states in a layout of its own, and the
            end states stay until backward leaves the cell.
        first: whether the segment is the first, which has no state before it.
    """
    batch_size = sizes.step.batch_size
    segment_tokens, states = batch_size * tokens, batch_size * sizes.state
    kept = segment_tokens * (sizes.kept + first * sizes.first_kept) + borders * states + sizes.cast
    scan = segment_tokens * (sizes.scan_working + first * sizes.first_scan_working)
    scan = scan + _scan_working_bytes(sizes, tokens)
    output_and_gradient = 2 * segment_tokens * sizes.hidden_state
    return layers * kept + np.maximum(segment_tokens * sizes.norm_working, scan) + output_and_gradient


def _largest_cell_bytes(sizes: MemorySizes, layer_interval, sequence_interval):
    """Peak memory of the backward pass of the cell that takes the most: one of the first segment, or a later one."""
    segments, tokens = segments_of(sizes.step.sequence_length, sequence_interval)
    several = np.greater(segments, 1)
    first = _cell_bytes(sizes, tokens, layer_interval, borders=1 * several, first=True)
    # With two segments, the later one may be shorter.
    later = np.minimum(tokens, np.maximum(sizes.step.sequence_length - sequence_interval, 1))
    return np.where(several, np.maximum(first, _cell_bytes(sizes, later, layer_interval, borders=2)), first)


def _gradient_sum_bytes(sizes: MemorySizes, several, tokens, layer_interval, walked_layers):
    """Memory of the layers' parameter gradients while they are summed over cells, beyond the gradients themselves.

    Args:
        several: whether there is more than one segment. Gradients from a single segment need no sum, unless there are
            gradients already.
        tokens: tokens of the longest segment.
        layer_interval: layers of a cell.
        walked_layers: layers of one walk over the sequence.
    """
    # A cell computes its gradients from its highest layer down, and frees each layer's kept tensors meanwhile.
    freed = sizes.step.batch_size * tokens * sizes.kept
    fresh = sizes.fresh_gradient + (layer_interval - 1) * np.maximum(sizes.fresh_gradient - freed, 0)
    return (several | sizes.step.accumulating) * fresh + several * walked_layers * sizes.gradient_rest


def memory_parts(sizes: MemorySizes, order, rerun, offload, layer_interval, sequence_interval) -> dict:
    """Compute the parts of a plan's memory.

    Args:
        sizes: sizes for the model and the training step.
        order: `"layer-major"` or `"sequence-major"`.
        rerun: whether some borders have no states kept, so that backward runs segments again for them.
        offload: whether checkpoints wait in host memory.
        layer_interval: layers of a cell, a number or an array of shape `(num_candidates,)`.
        sequence_interval: tokens of a cell, of the same shape.

    Returns:
        Bytes by the names of the fields of [`CheckpointPlan`], each a number or an array of shape `(num_candidates,)`.
    """
    num_layers, batch_size = sizes.shape.num_hidden_layers, sizes.step.batch_size
    segments, tokens = segments_of(sizes.step.sequence_length, sequence_interval)
    several = np.greater(segments, 1)
    state_interval = state_interval_of(segments, rerun)
    groups = -(-num_layers // layer_interval)
    all_tokens, segment_tokens = batch_size * sizes.step.sequence_length, batch_size * tokens
    states = batch_size * sizes.state
    # The layers of one walk over the sequence sum their parameter gradients, and pass on gradients of states.
    walked_layers = layer_interval if order == "layer-major" else num_layers
    # States' gradients at one border, or at both borders of the running cell, and the states between kept ones.
    segment = (several * (walked_layers + layer_interval) + (state_interval - 1) * walked_layers) * states
    staged = 2 * walked_layers * states * several
    embedding_gradients = all_tokens * sizes.embedding_gradient
    if order == "layer-major":
        hidden_borders = all_tokens * (sizes.embedding + (groups - 1) * sizes.hidden_state)
        # The gradient of the highest group's input. A lower group also has that of its output, but one border less.
        gradients = np.where(groups > 1, all_tokens * sizes.hidden_state, embedding_gradients)
        staged = staged + 6 * segment_tokens * sizes.hidden_state  # two each of inputs, outputs and gradients
    else:
        hidden_borders = all_tokens * sizes.embedding
        gradients = embedding_gradients
        segment = segment + segment_tokens * (groups - 1) * sizes.hidden_state
        staged = staged + 4 * segment_tokens * sizes.embedding
    # The loss computes the output's gradient on the device.
    output_gradients = all_tokens * sizes.output_gradient
    if offload:
        segment = segment + staged + output_gradients
    else:
        gradients = gradients + output_gradients
    state_borders = states * ((segments - 1) // state_interval)  # of one layer
    cell = _largest_cell_bytes(sizes, layer_interval, sequence_interval)
    # The embeddings' gradients are summed only during the backward of the lowest group. The checkpoints of the groups
    # above are freed by then, and so is the cell if there is a single segment. The sum takes their place.
    freed = np.where(several, 0, cell)
    if order == "layer-major" and not offload:
        lowest = all_tokens * (sizes.embedding + sizes.hidden_state * (groups > 1)) + embedding_gradients
        lowest = lowest + output_gradients * (groups == 1) + layer_interval * state_borders
        freed = freed + hidden_borders + gradients + num_layers * state_borders - lowest
    embedding_sum = np.maximum(sizes.embedding_rest - freed, 0)
    layer_sums = _gradient_sum_bytes(sizes, several, tokens, layer_interval, walked_layers)
    return {
        "hidden_border_bytes": hidden_borders,
        "state_border_bytes": num_layers * state_borders,
        "row_bytes": gradients,
        "segment_bytes": segment,
        "cell_bytes": cell,
        "accumulator_bytes": layer_sums + embedding_sum,
        "gathered_bytes": walked_layers * sizes.gathered,
    }


def device_and_host(offload, parts):
    """Add up the parts of a plan's memory: bytes on the device and in host memory."""
    waiting = parts["hidden_border_bytes"] + parts["state_border_bytes"] + parts["row_bytes"]
    passing = sum(parts[name] for name in ("segment_bytes", "cell_bytes", "accumulator_bytes", "gathered_bytes"))
    return (passing, waiting) if offload else (waiting + passing, 0)
