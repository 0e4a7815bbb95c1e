"""MA-GC, multi-axis gradient checkpointing (arXiv:2411.19460, §3.2 and §3.3, Algorithms 1 and 2).

A Mamba-2 layer at one step needs the layer below at that step and its own state one step earlier. So the layers and
the sequence span a grid, whose cells are some layers times a segment of the sequence. A cell can be restored from its
lower and its left border: the hidden states that enter it from below, and the recurrent states that enter it from the
left. The forward pass keeps the borders alone. Backward walks the cells from the last to the first, restores one at a
time, and sends gradients on through both borders. The gradients are those of the plain run.

    layers ^   +-------+-------+-------+
           |   | cell  | cell  | cell  |      | states, every `sequence_interval` tokens
           |   +-------+-------+-------+
           |   | cell  | cell  | cell  |      - hidden states, every `layer_interval` layers
               +-------+-------+-------+
                     sequence  ->

The grid is walked in one of two orders:

- Layer-major: one row of cells after another, each a walk over the whole sequence. The hidden states below each row
  are kept, as the paper keeps them.
- Sequence-major: one walk through all rows, column by column. Hidden states are kept below the lowest row only. If a
  column has several cells, backward runs the column once more to find the hidden states between them.

In either order, a plan may keep the recurrent states of every few borders only. Backward then runs the segments
between two kept borders once more, too.

Shape suffixes: B batch, T tokens, D width.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import Cache

from ..mamba2 import LayerState, cache_layers_of, read_state, segment_bounds, with_own_storage, write_state
from .cell import Block, Border, Cell, KeptPositions, LowerEnd, UpperEnd, states_of
from .gradient_sums import GradientSums
from .offload import Offloader, SegmentReader
from .plan import CheckpointPlan
from .sharded_modules import call_through_hooks, plain_forward


class _StateBorders:
    """The states that enter every `interval`-th segment, kept for backward.

    They share two tensors, so that long-lived memory does not lie between short-lived memory.
    """

    def __init__(self, offloader: Offloader, num_segments: int, interval: int):
        self.offloader = offloader
        self.interval = interval
        self.num_borders = (num_segments - 1) // interval  # the first segment's states are no border
        # Convolutional and recurrent states, `(num_borders, num_layers, batch_size, ...)`. Autograd holds them between
        # the forward pass and backward.
        self.tensors: list[torch.Tensor] = []

    def keep(self, segment: int, states: list[LayerState]):
        """Keep the states that enter a segment, if it is one of those."""
        border, between = divmod(segment, self.interval)
        if border == 0 or between:
            return
        for kind, tensors in enumerate(zip(*states, strict=True)):
            if border == 1:
                shape = (self.num_borders, len(states), *tensors[0].shape)
                self.tensors.append(self.offloader.empty(shape, tensors[0].dtype))
            for layer, tensor in enumerate(tensors):
                self.offloader.store(self.tensors[kind][border - 1, layer], tensor)

    def fetch(self, segment: int) -> Callable[[], list[LayerState]]:
        """Begin to bring the states that enter a segment, which must be one of those, to the device."""
        kinds = [self.offloader.fetch(kept[segment // self.interval - 1]) for kept in self.tensors]
        return lambda: [LayerState(*state) for state in zip(*(wait() for wait in kinds), strict=True)]


class _RandomState:
    """Records and restores random states, so that dropout draws the same masks again in backward.

    Equal states in a row share their memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.last = None

    def record(self) -> list[torch.Tensor]:
        state = [torch.get_rng_state(), *get_device_states(torch.empty(0, device=self.device))[1]]
        if self.last is None or not all(map(torch.equal, state, self.last)):
            self.last = state
        return self.last

    def restore(self, state: list[torch.Tensor]):
        torch.set_rng_state(state[0])
        if self.device.type != "cpu":
            set_device_states([self.device.index], state[1:], device_type=self.device.type)

    @contextmanager
    def untouched(self):
        """Leave the random states as they were before."""
        before = self.record()
        try:
            yield
        finally:
            self.restore(before)


class _FirstSegment(NamedTuple):
    """The first segment of a walk, which runs before all others."""

    reader: SegmentReader
    random_state: list[torch.Tensor]  # before the segment
    after: Border


@dataclass
class _Walk:
    """Some cells, one above the other, over a whole sequence.

    It holds everything about the walk but differentiable tensors.

    Attributes:
        cells: from the lowest.
        lower: the embedding, if the walk begins with token ids.
        upper: the final norm and the choice of positions, if the walk ends at the top of the stack.
        segments: start and stop of each.
        state_interval: segments from one whose states are kept to the next.
        output_waits: whether the output is the border of another walk, and so stored where checkpoints wait.
        attention_mask: `(batch_size, sequence_length)`, or None.
        returns_states: whether the states after the last segment are wanted.
    """

    cells: list[Cell]
    lower: LowerEnd | None
    upper: UpperEnd | None
    segments: list[tuple[int, int]]
    state_interval: int
    offloader: Offloader
    output_waits: bool
    attention_mask: torch.Tensor | None
    returns_states: bool

    def __post_init__(self):
        self.blocks: list[Block] = [block for block in (self.lower, *self.cells, self.upper) if block is not None]
        self.num_layers = self.cells[-1].layers.stop
        self.kept = None if self.upper is None else self.upper.kept
        device = self.offloader.device
        self.random = _RandomState(device)
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {device.type, "cpu"}
        }
        self.first_segment: _FirstSegment | None = None

    @property
    def trainable(self) -> list[torch.Tensor]:
        """All tensors that require a gradient, each once, even if several blocks share it."""
        return list(dict.fromkeys(itertools.chain(*(block.captured.trainable for block in self.blocks))))

    @contextmanager
    def as_captured(self):
        """Put the tensors of the forward pass back into the modules; they must be unchanged."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.captured)
            yield

    @contextmanager
    def as_in_forward(self):
        """Autocast as it was around the forward pass, without its cache.

        A cell uses each weight only once; and a weight that was cast without a gradient must not serve with one.
        """
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    def initial_states(self, tensors: Sequence[torch.Tensor]) -> list[LayerState]:
        """The states that enter the first segment, from their tensors, of which there are none without a state.

        They are detached: the walk returns their gradients, and its blocks must not find them to be leaves of theirs.
        """
        return states_of([tensor.detach() for tensor in tensors]) or [LayerState()] * self.num_layers

    def pass_segment(self, segment: int, border: Border, to_top: bool = True) -> Border:
        """Run one segment through all blocks, or all but the upper end, and keep nothing of it."""
        hidden_states, states = border.hidden_states, []
        for block in self.blocks if to_top else self.blocks[: len(self.blocks) - (self.upper is not None)]:
            before = Border(hidden_states, border.states[block.layers.start : block.layers.stop])
            hidden_states, after = block.pass_through(segment, before)
            states += after
        return Border(hidden_states, states)

    def run_first_segment(self, inputs: torch.Tensor, states: list[LayerState]):
        """Run the first segment, which shows all tensors that the blocks depend on. `run` goes on from there."""
        random_state = self.random.record()
        reader = SegmentReader(inputs.detach(), self.segments, self.offloader)
        with torch.no_grad(), self.as_in_forward():
            after = self.pass_segment(0, Border(reader.take(0, 1), states))
        self.first_segment = _FirstSegment(reader, random_state, after)

    def run(self, shape: tuple[int, int], states: list[LayerState], enter: Callable | None = None) -> Border:
        """Walk the sequence from the first segment, which has run already, to the last (Algorithm 1).

        The paper writes the loops token by token and layer by layer; here a step is a segment and a cell. The hidden
        states below each row of cells, L_ckpt (lines 6 and 7), are the inputs of the row's walk in layer-major order.

        Args:
            shape: `(batch_size, sequence_length)`.
            states: the states that enter the first segment.
            enter: called with each segment, the states that enter it and the random state before it.

        Returns:
            The output of the whole sequence, and the states after it.
        """
        (reader, random_state, after), self.first_segment = self.first_segment, None
        output = self._output(shape, after.hidden_states)
        for segment in range(len(self.segments)):  # Algorithm 1, line 2
            if segment > 0:
                random_state = self.random.record()
                after = self.pass_segment(segment, Border(reader.take(segment, segment + 1), states))  # 3, 5, 12
            if enter is not None:
                enter(segment, states, random_state)  # 9 and 10: S_ckpt
            states = after.states
            self._store(output, segment, after.hidden_states)
            del after
            self.offloader.end_segment()
        self.offloader.finish()
        return Border(output, states)

    def gradients_of_output(self, grad_output: torch.Tensor | None) -> Callable[[int], torch.Tensor | None]:
        """A function that returns a segment's part of the output's gradient; call it from the last segment on."""
        if grad_output is None:
            return lambda segment: None
        if self.kept is None:
            reader = SegmentReader(grad_output, self.segments, self.offloader)
            return lambda segment: reader.take(segment, segment - 1)

        def of_kept(segment):
            places = self.kept.places(segment)
            return grad_output[places] if len(places) else None

        return of_kept

    def _output(self, shape: tuple[int, int], hidden_states: torch.Tensor) -> torch.Tensor:
        if self.kept is not None:
            return hidden_states.new_empty(self.kept.count, hidden_states.shape[-1])
        shape = (*shape, hidden_states.shape[-1])
        return (
            self.offloader.empty(shape, hidden_states.dtype) if self.output_waits else hidden_states.new_empty(shape)
        )

    def _store(self, output: torch.Tensor, segment: int, hidden_states: torch.Tensor):
        if self.kept is not None:
            output[self.kept.places(segment)] = hidden_states
        else:
            start, stop = self.segments[segment]
            self.offloader.store(output[:, start:stop], hidden_states)


class _WalkBack:
    """The gradients of a walk, as backward goes from its last segment to its first.

    Attributes:
        sums: of all that is trained.
        grad_states: of the states after the segment that comes next, in the end of the initial states.
        restored: whether any segment had a gradient.
    """

    def __init__(self, walk: _Walk, grad_states: list[LayerState], wants_inputs: bool):
        self.walk, self.grad_states, self.wants_inputs = walk, grad_states, wants_inputs
        self.sums, self.restored = GradientSums(walk.trainable), False
        self.trains_embedding = walk.lower is not None and bool(walk.lower.captured.trainable)

    def restore_segment(
        self, segment: int, border: Border, random_state: list[torch.Tensor], grad_output: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Restore the cells of one segment, if it has a gradient, from the highest down (Algorithm 2, lines 4 to 11).

        Args:
            border: the inputs and the states that enter the segment.
            random_state: the random state before it.
            grad_output: of the segment's output, if it has any.

        Returns:
            The gradient of the inputs, if they have any.
        """
        if grad_output is None and all(tensor is None for tensor in itertools.chain(*self.grad_states)):
            return None
        self.restored = True
        walk, grad = self.walk, grad_output
        del grad_output
        below = self._find_hidden_states(segment, border, random_state)
        for cell in reversed(walk.cells):  # Algorithm 2, line 4
            layers = slice(cell.layers.start, cell.layers.stop)
            lowest, highest = cell is walk.cells[0], cell is walk.cells[-1]
            hidden_states, random_state = below.pop()  # 7: x_ckpt
            walk.random.restore(random_state)
            with walk.as_in_forward():
                if lowest and walk.lower is not None:
                    hidden_states, _ = walk.lower.run(segment, border)
                wants_hidden_states = not lowest or self.wants_inputs or self.trains_embedding
                before = Border(hidden_states, border.states[layers])  # 8: h_ckpt
                restored = cell.restore(segment, before, wants_hidden_states)  # 9
                end = None
                if highest and walk.upper is not None and grad is not None:
                    end = walk.upper.restore(segment, Border(restored.after.hidden_states))
            del hidden_states, before
            if end is not None:
                grad, _ = end.backward(Border(grad), self.sums)
                end = None  # its lower border would stay in memory
            grad, self.grad_states[layers] = restored.backward(Border(grad, self.grad_states[layers]), self.sums)  # 10
            del restored
        if walk.lower is not None and grad is not None:
            walk.lower.backward(border.hidden_states, grad, self.sums)
            return None  # token ids have none
        return grad

    def _find_hidden_states(self, segment, border, random_state) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        """The hidden states below each cell of a segment, and the random state before the cell.

        Below the lowest cell, they are the inputs of the walk.
        """
        walk = self.walk
        walk.random.restore(random_state)
        found, hidden_states = [(border.hidden_states, random_state)], border.hidden_states
        with torch.no_grad(), walk.as_in_forward():
            if walk.lower is not None and len(walk.cells) > 1:
                hidden_states, _ = walk.lower.run(segment, border)
            for cell in walk.cells[:-1]:
                states = border.states[cell.layers.start : cell.layers.stop]
                hidden_states, _ = cell.pass_through(segment, Border(hidden_states, states))
                found.append((hidden_states, walk.random.record()))
        return found


class _MultiAxisCheckpoint(torch.autograd.Function):
    """A walk that keeps only its borders for backward.

    Its backward returns the gradients of the parameters, summed over the cells, so that hooks on parameters (DDP,
    ZeRO, FSDP) see each gradient exactly once.
    """

    @staticmethod
    def forward(ctx, walk: _Walk, inputs: torch.Tensor, *tensors: torch.Tensor):
        """Walk the sequence and keep the borders.

        Args:
            walk: its first segment has run.
            inputs: `(batch_size, sequence_length, hidden_size)`, or token ids.
            tensors: the initial states, two for each layer if there are any, and then all that is trained.
        """
        tensors = tensors[: len(tensors) - len(walk.trainable)]
        borders = _StateBorders(walk.offloader, len(walk.segments), walk.state_interval)
        random_states = []

        def enter(segment, states, random_state):
            random_states.append(random_state)
            borders.keep(segment, states)

        with walk.as_in_forward():
            output, final = walk.run(inputs.shape[:2], walk.initial_states(tensors), enter)

        ctx.walk, ctx.borders, ctx.random_states, ctx.num_initial = walk, borders, random_states, len(tensors)
        # The mask is the last, so that autograd sees whether it was written into.
        mask = () if walk.attention_mask is None else (walk.attention_mask,)
        ctx.save_for_backward(*tensors, inputs, *borders.tensors, *mask)
        borders.tensors = []
        ctx.set_materialize_grads(False)
        return output, *(with_own_storage(tensor) for state in final for tensor in state if walk.returns_states)

    @staticmethod
    def backward(ctx, grad_output, *grad_final):
        """Walk back, and restore one cell at a time (Algorithm 2)."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Multi-axis gradient checkpointing gives first derivatives only: call backward() without "
                "create_graph=True, or disable gradient checkpointing."
            )
        walk, offloader = ctx.walk, ctx.walk.offloader
        # Asked for once: saved-tensor hooks may allow each tensor only once, or copy it every time.
        saved = list(ctx.saved_tensors)
        if walk.attention_mask is not None:
            saved.pop()
        initial, (inputs, *ctx.borders.tensors) = saved[: ctx.num_initial], saved[ctx.num_initial :]
        del saved
        wants_inputs = ctx.needs_input_grad[1]
        grad_inputs = None
        if wants_inputs:
            # In host memory if the inputs have been waiting there.
            on_host = offloader.active and not inputs.is_cuda
            make = offloader.empty if on_host else inputs.new_empty
            grad_inputs = make(inputs.shape, dtype=inputs.dtype)
        grad_of = walk.gradients_of_output(grad_output)
        back = _WalkBack(walk, states_of(grad_final) or [LayerState()] * walk.num_layers, wants_inputs)  # line 1

        with walk.random.untouched(), walk.as_captured():
            for segment, border in _borders_backwards(ctx, inputs, initial):  # line 2
                grad = back.restore_segment(segment, border, ctx.random_states[segment], grad_of(segment))  # 3 to 11
                if wants_inputs:
                    start, stop = walk.segments[segment]
                    if grad is None:
                        grad = border.hidden_states.new_zeros(border.hidden_states.shape)
                    offloader.store(grad_inputs[:, start:stop], grad.to(grad_inputs.dtype))
                del grad
                offloader.end_segment()
        offloader.finish()
        totals = back.sums.totals()
        if not back.restored:
            # No position is wanted. The plain run gives zeros then, and other processes wait for them.
            totals = [torch.zeros_like(tensor) for tensor in walk.trainable]
        return None, grad_inputs, *itertools.islice(itertools.chain(*back.grad_states), ctx.num_initial), *totals


def _borders_backwards(ctx, inputs: torch.Tensor, initial: list[torch.Tensor]) -> Iterator[tuple[int, Border]]:
    """Yield each segment from the last to the first, with its inputs and the states that enter it."""
    walk, borders = ctx.walk, ctx.borders

    def fetch_states(segment):
        return borders.fetch(segment) if segment > 0 else lambda: walk.initial_states(initial)

    reader = SegmentReader(inputs, walk.segments, walk.offloader)
    starts = range(0, len(walk.segments), borders.interval)
    upcoming = fetch_states(starts[-1])
    for start in reversed(starts):
        states = [upcoming()]
        if start > 0:
            upcoming = fetch_states(start - borders.interval)  # while these segments are computed
        last = min(start + borders.interval, len(walk.segments)) - 1
        for segment in range(start, last):
            walk.random.restore(ctx.random_states[segment])
            with torch.no_grad(), walk.as_in_forward():
                after = walk.pass_segment(segment, Border(reader.take(segment, segment + 1), states[-1]), to_top=False)
            states.append([LayerState(*map(with_own_storage, state)) for state in after.states])
        for segment in reversed(range(start, last + 1)):
            yield segment, Border(reader.take(segment, segment - 1), states.pop())
    borders.tensors = []


# The walk and all that it calls stay out of graphs: backward must restore exactly the computation of the forward pass.
@torch.compiler.disable
def run_checkpointed(
    layers: list[nn.Module],
    hidden_states: torch.Tensor,
    plan: CheckpointPlan,
    *,
    forwards: list[Callable] | None = None,
    embedding: nn.Embedding | None = None,
    attention_mask: torch.Tensor | None = None,
    cache_params: Cache | None = None,
    final_norm: nn.Module | None = None,
    positions_to_keep: torch.Tensor | None = None,
    **layer_kwargs: Any,
) -> torch.Tensor:
    """Run a stack of layers over a sequence and keep for backward only the checkpoints of the plan.

    Hooks in the layers see one segment at a time.

    Args:
        layers: the whole stack, called as `layer(hidden_states, cache_params=, attention_mask=)`.
        hidden_states: `(batch_size, sequence_length, hidden_size)`, or with `embedding` token ids.
        forwards: a function for each layer to call in its place, which uses the layer's parameters.
        embedding: embeds `(batch_size, sequence_length)` token ids segment by segment, so that only the ids are kept.
            For layers that are not sharded.
        attention_mask: `(batch_size, sequence_length)`, 0 for padding, or None.
        cache_params: the state that the sequence continues, differentiable if it requires gradients; the final state
            replaces it. None for neither.
        final_norm: applied to each row that leaves the stack.
        positions_to_keep: `(batch_size, sequence_length)`, True for the wanted positions; None for all.
        layer_kwargs: for each call of a layer.

    Returns:
        `(batch_size, sequence_length, hidden_size)`, or `(num_positions, hidden_size)` with `positions_to_keep`.

    Raises:
        ValueError: if a single token is to continue a state, or the cache has no place for a layer's own.
        RuntimeError: if tangents of forward-mode differentiation are given, or a layer depends on a tensor that
            requires a gradient and that was computed elsewhere.
    """
    if hidden_states.is_floating_point() and forward_ad.unpack_dual(hidden_states).tangent is not None:
        raise RuntimeError(
            "Multi-axis gradient checkpointing has no forward-mode derivatives: disable it to have them."
        )
    sequence_length = hidden_states.shape[1]
    cached = [] if cache_params is None else cache_layers_of(cache_params, layers)
    states = [read_state(layer) for layer in cached]
    _check_states(states, sequence_length)
    segments = segment_bounds(sequence_length, plan.sequence_interval)
    # Bound now: while the hooks of a sharded module run, its `forward` is the whole walk.
    forwards = [plain_forward(layer) for layer in layers] if forwards is None else forwards
    norm_forward = None if final_norm is None else plain_forward(final_norm)
    # With offload, hidden states may be in host memory from the start. A replica of DataParallel shows no parameters.
    device = next(layers[0].parameters(), hidden_states).device if plan.offload else hidden_states.device
    offloader = Offloader(device, plan.offload)
    if embedding is None:
        hidden_states = offloader.to_host(hidden_states)
    masks = _segment_masks(attention_mask, segments)
    kept = None if positions_to_keep is None else KeptPositions(positions_to_keep, segments, device)

    for row in _intervals(len(layers), plan.layer_interval if plan.order == "layer-major" else len(layers)):
        modules, is_top = layers[row.start : row.stop], row.stop == len(layers)
        called = [*modules, final_norm] if is_top and final_norm is not None else modules

        def run(hidden_states, *tensors, row=row, modules=modules, is_top=is_top):
            # Built here, inside the hooks: only now do sharded modules have their whole parameters.
            has_end = is_top and (final_norm is not None or kept is not None)
            row_forwards = forwards[row.start : row.stop]
            walk = _Walk(
                [
                    Cell(cell, row.start, modules, row_forwards, masks, layer_kwargs)
                    for cell in _intervals(len(modules), plan.layer_interval)
                ],
                lower=LowerEnd(embedding) if embedding is not None and row.start == 0 else None,
                upper=UpperEnd(final_norm, norm_forward, kept) if has_end else None,
                segments=segments,
                state_interval=plan.state_interval,
                offloader=offloader,
                output_waits=not is_top,
                attention_mask=attention_mask,
                returns_states=cache_params is not None,
            )
            walk.run_first_segment(hidden_states, walk.initial_states(tensors))
            if any(tensor.requires_grad for tensor in (hidden_states, *tensors, *walk.trainable)):
                return _MultiAxisCheckpoint.apply(walk, hidden_states, *tensors, *walk.trainable)
            with torch.no_grad(), walk.as_in_forward():  # frozen layers below the first one that is trained
                output, final = walk.run(hidden_states.shape[:2], walk.initial_states(tensors))
                return output, *(itertools.chain(*final) if walk.returns_states else ())

        initial = [tensor for state in states[row.start : row.stop] for tensor in state if tensor is not None]
        hidden_states, *final = call_through_hooks(called, run, hidden_states, *initial)
        for layer, state in zip(cached[row.start : row.stop], states_of(final), strict=True):
            write_state(layer, state)
    return hidden_states


def _check_states(states: list[LayerState], sequence_length: int):
    if len({state.conv is None for state in states}) > 1:
        raise ValueError("The cache has states of some layers and not of others: give a full one, or an empty one.")
    if sequence_length == 1 and states and states[0].conv is not None:
        raise ValueError(
            "Multi-axis gradient checkpointing cannot train on a single token that continues a state: "
            "Transformers overwrites the state in such a step. Give two tokens or more, or call model.eval()."
        )


def _segment_masks(attention_mask: torch.Tensor | None, segments) -> list[torch.Tensor | None]:
    """The mask of each segment that has padding, and None for the others."""
    if attention_mask is None:
        return [None] * len(segments)
    padded = (attention_mask != 1).any(0).tolist()
    return [attention_mask[:, start:stop] if any(padded[start:stop]) else None for start, stop in segments]


def _intervals(length: int, interval: int) -> list[range]:
    return [range(start, min(start + interval, length)) for start in range(0, length, interval)]
