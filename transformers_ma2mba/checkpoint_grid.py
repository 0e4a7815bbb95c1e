"""MA-GC, multi-axis gradient checkpointing (arXiv:2411.19460, §3.2 and §3.3, Algorithms 1 and 2).

A Mamba-2 layer at one step needs the layer below at that step and its own state one step earlier. So the layers and
the sequence span a grid: a cell is some layers times a segment of the sequence, and it can be restored from its two
borders, the hidden states that enter it from below and the recurrent states that enter it from the left. The forward
pass keeps the borders alone; backward walks the cells from the last to the first, restores one, and sends its
gradients on through both borders. They are those of the plain run.

    layers ^   +-------+-------+-------+
           |   | cell  | cell  | cell  |      | states, every `sequence_interval` tokens
           |   +-------+-------+-------+
           |   | cell  | cell  | cell  |      - hidden states, every `layer_interval` layers
               +-------+-------+-------+
                     sequence  ->

Two orders. Layer-major walks one row of the grid after another and keeps the hidden states below each row, as the
paper does. Sequence-major walks column by column and keeps hidden states below the lowest row only; if the cells are
not as tall as the stack, backward runs each column once more to find those between. In either, a plan may keep only
every few borders' recurrent states: backward then runs the segments between once more, too.

Shape suffixes: B batch, T tokens, D width.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import Cache

from .captured_tensors import CapturedTensors, unknown_leaves, without_hooks
from .checkpoint_plan import CheckpointPlan
from .gradient_sums import GradientSums
from .offload import Offloader, SegmentReader
from .recurrent_state import LayerState, cache_for, cache_layers_of, read_state, with_own_storage, write_state
from .shape import segment_bounds
from .sharded_modules import call_through_hooks, has_forward_hooks, plain_forward

_NEW_TENSOR = (
    "{} depend on a tensor that wants a gradient and that the forward pass did not use on the first segment of the "
    "sequence: a hook or closure must use the same ones at each call."
)


class _StateBorders:
    """The states that enter every `interval`-th segment, waiting for backward.

    They share two tensors, so that allocators are not left with what lives long between what lives short.
    """

    def __init__(self, copies: Offloader, num_segments: int, interval: int):
        self.copies = copies
        self.interval = interval
        self.num_borders = (num_segments - 1) // interval  # the first segment's states are no border
        # Convolutional and recurrent, `(num_borders, num_layers, batch_size, ...)`. After the forward pass autograd
        # has them; an empty list gives them up.
        self.tensors: list[torch.Tensor] = []

    def keep(self, segment: int, states: list[LayerState]):
        """Keeps what enters a segment, if it is one of those."""
        border, between = divmod(segment, self.interval)
        if border == 0 or between:
            return
        for kind, tensors in enumerate(zip(*states, strict=True)):
            if border == 1:
                shape = (self.num_borders, len(states), *tensors[0].shape)
                self.tensors.append(self.copies.empty(shape, tensors[0].dtype))
            for layer, tensor in enumerate(tensors):
                self.copies.store(self.tensors[kind][border - 1, layer], tensor)

    def fetch(self, segment: int) -> Callable[[], list[LayerState]]:
        """Begins to bring the states that enter a segment, which must be one of those, to the device."""
        kinds = [self.copies.fetch(kept[segment // self.interval - 1]) for kept in self.tensors]
        return lambda: [LayerState(*state) for state in zip(*(wait() for wait in kinds), strict=True)]


class _RandomState:
    """The random states before each cell, so that dropout draws the same mask again. A cell that draws nothing shares
    the state of the one before."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = None

    def record(self):
        state = [torch.get_rng_state(), *get_device_states(torch.empty(0, device=self.device))[1]]
        if self.last is None or not all(map(torch.equal, state, self.last)):
            self.last = state
        return self.last

    def restore(self, state):
        torch.set_rng_state(state[0])
        if self.device.type != "cpu":
            set_device_states([self.device.index], state[1:], device_type=self.device.type)

    @contextmanager
    def untouched(self):
        """Leaves the random states as they were before."""
        before = self.record()
        try:
            yield
        finally:
            self.restore(before)


@dataclass
class _Walk:
    """Some layers over a whole sequence: everything about it that is no differentiable tensor."""

    layers: list[nn.Module]
    forwards: list[Callable]  # how each layer, and last the final norm, is called
    first: int  # index of the lowest layer in the model
    groups: list[range]  # cells, from the lowest, as indices into `layers`
    segments: list[tuple[int, int]]
    state_interval: int  # segments from one that has its states kept to the next
    copies: Offloader
    output_waits: bool = False  # for another walk, and so where checkpoints wait
    embedding: nn.Module | None = None
    final_norm: nn.Module | None = None
    attention_mask: torch.Tensor | None = None
    positions_to_keep: torch.Tensor | None = None
    final_state: bool = False
    layer_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        self.device = self.copies.device
        self.caches = [cache_for(layer) for layer in self.layers]
        self.captured = [self._capture(group) for group in self.groups]
        self.embedded = CapturedTensors({} if self.embedding is None else {"embeddings": self.embedding})
        self.masks = [None] * len(self.segments)
        if self.attention_mask is not None:
            padded = (self.attention_mask != 1).any(0).tolist()
            self.masks = [
                self.attention_mask[:, start:stop] if any(padded[start:stop]) else None
                for start, stop in self.segments
            ]
        self.kept_rows = None
        if self.positions_to_keep is not None:
            # Where each row goes in the output, and where in its segment it comes from. Found on the CPU: a device
            # would have to be waited for at every segment.
            samples, tokens = self.positions_to_keep.cpu().nonzero(as_tuple=True)
            self.num_rows = len(samples)
            self.kept_rows = []
            for start, stop in self.segments:
                (places,) = ((tokens >= start) & (tokens < stop)).nonzero(as_tuple=True)
                chosen = (places, samples[places], tokens[places] - start)
                self.kept_rows.append([index.to(self.device, non_blocking=True) for index in chosen])
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {self.device.type, "cpu"}
        }
        self.random = _RandomState(self.device)
        self.first_segment, self.ran = None, False
        modules = [*self.layers, *([] if self.final_norm is None else [self.final_norm])]
        self.hooked = any(has_forward_hooks(inner) for module in modules for inner in module.modules())

    def _capture(self, group: range) -> CapturedTensors:
        modules = {f"layers.{self.first + index}": self.layers[index] for index in group}
        if group.stop == len(self.layers) and self.final_norm is not None:
            modules["norm_f"] = self.final_norm
        return CapturedTensors(modules)

    def name_of(self, group: range) -> str:
        return f"layers.{self.first + group.start} to layers.{self.first + group.stop - 1}"

    @property
    def trainable(self) -> list[torch.Tensor]:
        """All that wants a gradient, each once, whichever cells it is of."""
        captured = [*self.captured, self.embedded]
        return list(dict.fromkeys(itertools.chain(*(tensors.trainable for tensors in captured))))

    @contextmanager
    def as_captured(self):
        """Has the modules hold the tensors of the forward pass, which must be as they were."""
        with ExitStack() as stack:
            for tensors in (*self.captured, self.embedded):
                stack.enter_context(tensors)
            yield

    @contextmanager
    def as_in_forward(self):
        """Autocast as it was around the forward pass. Without its cache: in a cell each weight is used but once, and
        one that was cast while no gradient was wanted must not come back when it is."""
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    def enter(self, inputs):
        """The rows that enter the lowest layer: a segment of the inputs, looked up if they are token ids."""
        return inputs if self.embedding is None else self.embedding(inputs)

    def run_cell(self, group: range, segment: int, hidden_states_BTD, states: list[LayerState]):
        """One cell, from its borders to the opposite ones."""
        for index, state in zip(group, states, strict=True):
            write_state(self.caches[index].layers[-1], state)
        for index in group:
            hidden_states_BTD = self.forwards[index](
                hidden_states_BTD,
                cache_params=self.caches[index],
                attention_mask=self.masks[segment],
                **self.layer_kwargs,
            )
        states = []
        for index in group:
            layer = self.caches[index].layers[-1]
            states.append(read_state(layer))
            write_state(layer, LayerState())
        return hidden_states_BTD, states

    def finish(self, segment: int, hidden_states_BTD):
        """What a segment gives after the last layer of the walk: the wanted rows, normed if that layer is the last."""
        if self.kept_rows is not None:
            _, samples, tokens = self.kept_rows[segment]
            hidden_states_BTD = hidden_states_BTD[samples, tokens]
        if self.final_norm is not None:
            hidden_states_BTD = self.forwards[-1](hidden_states_BTD)
        return hidden_states_BTD

    def run_first_segment(self, hidden_states, states: list[LayerState]):
        """Runs the first segment before all others, and captures on the way whatever it depends on. `run` goes on from
        there."""
        random_state = self.random.record()
        pieces = SegmentReader(hidden_states.detach(), self.segments, self.copies)
        states = [LayerState(*(tensor if tensor is None else tensor.detach() for tensor in state)) for state in states]
        with torch.no_grad(), self.as_in_forward():
            rows = self.enter(pieces.take(0, 1))
            rows, following = self.run_segment(0, rows, states, finish=True, recorded=True)
        self.first_segment = (pieces, random_state, rows, following)

    def run_segment(self, segment: int, rows, states: list[LayerState], finish=False, recorded=False):
        """A segment through all cells, of which nothing is kept."""
        following = []
        for position, group in enumerate(self.groups):
            last = finish and group.stop == len(self.layers)
            rows, after = self.pass_cell(position, segment, rows, states[group.start : group.stop], last, recorded)
            following += after
        return rows, following

    def pass_cell(self, position: int, segment: int, rows, states: list[LayerState], finish=False, recorded=False):
        """One cell, of which nothing is kept.

        Where hooks look on, autograd records it: what they take out is not to look as if it wanted no gradient. Where
        it is recorded, whatever else it depends on is captured.
        """
        group, captured = self.groups[position], self.captured[position]
        recorded = recorded or self.hooked
        if recorded:
            rows = rows.detach().requires_grad_(self.hooked)

        def run():
            after, states_after = self.run_cell(group, segment, rows, states)
            return self.finish(segment, after) if finish else after, *itertools.chain(*states_after)

        known = len(captured.trainable)
        after, *states_after = captured.find_others(run, self.name_of(group), [rows]) if recorded else run()
        if self.ran and len(captured.trainable) > known:
            raise RuntimeError(_NEW_TENSOR.format(self.name_of(group)))
        return after, _as_states(states_after)

    def run(self, shape, states: list[LayerState], each_segment=None):
        """The whole walk, one segment after the other, the first of which has run already.

        Args:
            shape: `(batch_size, sequence_length)`.
            states: those that entered the first segment.
            each_segment: called with each segment's index, the states that enter it and the random state before it.

        Returns:
            The output, and the states after the last segment.
        """
        (pieces, random_state, rows, following), self.first_segment = self.first_segment, None
        self.ran = True
        output = self._output(shape, rows)
        for segment, (start, stop) in enumerate(self.segments):
            if segment > 0:
                random_state = self.random.record()
                rows = self.enter(pieces.take(segment, segment + 1))
                rows, following = self.run_segment(segment, rows, states, finish=True)
            if each_segment is not None:
                each_segment(segment, states, random_state)
            states = following
            if self.kept_rows is None:
                self.copies.store(output[:, start:stop], rows)
            else:
                output[self.kept_rows[segment][0]] = rows
            self.copies.end_segment()
        self.copies.finish()
        return output, states

    def _output(self, shape, rows):
        if self.kept_rows is not None:
            return rows.new_empty(self.num_rows, rows.shape[-1])
        if self.output_waits:
            return self.copies.empty((*shape, rows.shape[-1]), rows.dtype)
        return rows.new_empty(*shape, rows.shape[-1])


class _MultiAxisCheckpoint(torch.autograd.Function):
    """A walk of which only the borders are kept. Gradients of the parameters leave from its backward, summed over the
    cells, so that hooks on them (DDP, ZeRO, FSDP) see each exactly once."""

    @staticmethod
    def forward(ctx, walk: _Walk, hidden_states, *tensors):
        """
        Args:
            walk: its first segment has run.
            hidden_states: `(batch_size, sequence_length, width)`, or token ids.
            tensors: the initial states, two a layer if there are any, and then all that is trained.
        """
        tensors = tensors[: len(tensors) - len(walk.trainable)]
        states = _as_states(tensors) or [LayerState()] * len(walk.layers)
        borders = _StateBorders(walk.copies, len(walk.segments), walk.state_interval)
        random_states = []

        def keep(segment, states, random_state):
            random_states.append(random_state)
            borders.keep(segment, states)

        with walk.as_in_forward():
            output, final = walk.run(hidden_states.shape[:2], states, keep)

        ctx.walk, ctx.borders, ctx.random_states, ctx.num_initial = walk, borders, random_states, len(tensors)
        # The mask is the last, so that autograd sees whether it was written into.
        mask = () if walk.attention_mask is None else (walk.attention_mask,)
        ctx.save_for_backward(*tensors, hidden_states, *borders.tensors, *mask)
        borders.tensors = []
        ctx.set_materialize_grads(False)
        return output, *(with_own_storage(tensor) for state in final for tensor in state if walk.final_state)

    @staticmethod
    def backward(ctx, grad_output, *grad_final):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Multi-axis gradient checkpointing gives first derivatives only: call backward() without "
                "create_graph=True, or disable gradient checkpointing."
            )
        walk, copies = ctx.walk, ctx.walk.copies
        # Asked for once: whoever packed them may give each but once, or copy it every time.
        saved = list(ctx.saved_tensors)
        if walk.attention_mask is not None:
            saved.pop()
        initial, (hidden_states, *ctx.borders.tensors) = saved[: ctx.num_initial], saved[ctx.num_initial :]
        del saved
        wants_rows = ctx.needs_input_grad[1]
        grad_rows = None
        if wants_rows:
            # Where the rows themselves are: on the host, if they have been waiting there.
            on_host = copies.active and not hidden_states.is_cuda
            make = copies.empty if on_host else hidden_states.new_empty
            grad_rows = make(hidden_states.shape, dtype=hidden_states.dtype)
        pieces = None
        if grad_output is not None and walk.kept_rows is None:
            pieces = SegmentReader(grad_output, walk.segments, copies)
        sums, nothing_restored = GradientSums(walk.trainable), True
        grad_states = list(grad_final) or [None] * (2 * len(walk.layers))

        with walk.random.untouched(), walk.as_captured():
            for segment, inputs, states in _segments_backwards(ctx, hidden_states, initial):
                if pieces is not None:
                    grad = pieces.take(segment, segment - 1)
                else:
                    grad = _gradient_of_kept_rows(walk, segment, grad_output)
                if grad is not None or any(gradient is not None for gradient in grad_states):
                    nothing_restored = False
                    random_state = ctx.random_states[segment]
                    grad, grad_states = _restore_segment(
                        walk, segment, inputs, states, random_state, grad, grad_states, sums, wants_rows
                    )
                if wants_rows:
                    start, stop = walk.segments[segment]
                    if grad is None:
                        grad = inputs.new_zeros(inputs.shape)
                    copies.store(grad_rows[:, start:stop], grad.to(grad_rows.dtype))
                copies.end_segment()
        copies.finish()
        totals = sums.totals()
        if nothing_restored:
            # No row is wanted. The plain run gives zeros then, and other processes wait for them.
            totals = [torch.zeros_like(tensor) for tensor in walk.trainable]
        return None, grad_rows, *grad_states[: ctx.num_initial], *totals


def _segments_backwards(ctx, hidden_states, initial):
    """Each segment from the last to the first, its inputs, and the states that enter it."""
    walk, borders = ctx.walk, ctx.borders
    first = _as_states(initial) or [LayerState()] * len(walk.layers)

    def fetch_states(segment):
        return borders.fetch(segment) if segment > 0 else lambda: first

    pieces = SegmentReader(hidden_states, walk.segments, walk.copies)
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
                rows = walk.enter(pieces.take(segment, segment + 1))
                _, following = walk.run_segment(segment, rows, states[-1])
            states.append([LayerState(*map(with_own_storage, state)) for state in following])
        for segment in reversed(range(start, last + 1)):
            yield segment, pieces.take(segment, segment - 1), states.pop()
    borders.tensors = []


def _as_states(tensors) -> list[LayerState]:
    return [LayerState(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


def _gradient_of_kept_rows(walk: _Walk, segment: int, grad_output):
    """The gradient of the rows that a segment gave to the output; None where there are none."""
    places = walk.kept_rows[segment][0] if grad_output is not None else ()
    return grad_output[places] if len(places) else None


def _restore_segment(walk, segment, inputs, states, random_state, grad, grad_states, sums, wants_rows):
    """Restores the cells of one segment from the highest to the lowest, and empties `grad_states` on the way.

    Returns:
        The gradients of `inputs` and, layer by layer, of `states`; None where there is none.
    """
    walk.random.restore(random_state)
    borders = [(inputs, random_state)]
    with torch.no_grad(), walk.as_in_forward():
        for position, group in enumerate(walk.groups[:-1]):
            rows = borders[-1][0] if group.start else walk.enter(inputs)
            rows, _ = walk.pass_cell(position, segment, rows, states[group.start : group.stop])
            borders.append((rows, walk.random.record()))

    grad_before = [None] * (2 * len(walk.layers))
    for position, group in reversed(list(enumerate(walk.groups))):
        rows, random_state = borders.pop()
        walk.random.restore(random_state)
        if position == 0:
            rows = walk.enter(rows)
        wants_this = position > 0 or wants_rows or bool(walk.embedded.trainable)
        rows = rows.detach().requires_grad_(wants_this)
        before = [
            LayerState(*(tensor if tensor is None else tensor.detach().requires_grad_() for tensor in state))
            for state in states[group.start : group.stop]
        ]
        with torch.enable_grad(), walk.as_in_forward():
            # By a view, as PyTorch's counter of FLOPs cannot follow a leaf through a call of `grad`.
            after, states_after = walk.run_cell(group, segment, rows.view_as(rows), before)
            if position == len(walk.groups) - 1 and grad is not None:
                after = walk.finish(segment, after)
        share = slice(2 * group.start, 2 * group.stop)
        grad_after = [grad, *grad_states[share]]
        grad_states[share] = [None] * (2 * len(group))  # used up: the gradients of `before` take their place
        pairs = [
            (tensor, gradient.to(tensor.dtype))
            for tensor, gradient in zip([after, *itertools.chain(*states_after)], grad_after, strict=True)
            if gradient is not None and tensor.requires_grad
        ]
        tensors_before = [tensor for state in before for tensor in state if tensor is not None]
        parameters = walk.captured[position].trainable
        wanted = [*([rows] if rows.requires_grad else []), *tensors_before, *parameters]
        del after, states_after, grad_after
        if not pairs or not wanted:
            grad = None
            continue
        outputs, grad_outputs = zip(*pairs, strict=True)
        del pairs
        where = walk.name_of(group)
        if unknown_leaves(outputs, wanted, where):
            raise RuntimeError(_NEW_TENSOR.format(where))
        with without_hooks(parameters):
            gradients = iter(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True))
        del outputs, grad_outputs
        grad = next(gradients) if rows.requires_grad else None
        if tensors_before:
            grad_before[share] = [
                with_own_storage(g) if g is not None else None
                for g in itertools.islice(gradients, len(tensors_before))
            ]
        for parameter in parameters:
            sums.add(parameter, next(gradients))
        del gradients  # or they would wait for those of the next cell
    if walk.embedded.trainable and grad is not None:
        (weight,) = walk.embedded.trainable
        sums.add_rows(weight, inputs, grad, walk.embedding.padding_idx)
        grad = None  # token ids have none
    return grad, grad_before


# The walk stays out of graphs, and all that it calls: what backward restores must be what ran in forward.
@torch.compiler.disable
def run_checkpointed(
    layers: list[nn.Module],
    hidden_states: torch.Tensor,
    plan: CheckpointPlan,
    *,
    forwards: list[Callable] | None = None,
    embedding: nn.Module | None = None,
    attention_mask: torch.Tensor | None = None,
    cache_params: Cache | None = None,
    final_norm: nn.Module | None = None,
    positions_to_keep: torch.Tensor | None = None,
    **layer_kwargs,
) -> torch.Tensor:
    """Runs a stack of layers over a sequence, keeping for backward only what the plan says.

    Hooks in the layers see a segment at a time.

    Args:
        layers: the whole stack, called as `layer(hidden_states, cache_params=, attention_mask=)`.
        hidden_states: `(batch_size, sequence_length, hidden_size)`, or with `embedding` what that takes.
        forwards: what to call in place of each layer, of which it uses the parameters.
        embedding: makes the lowest layer's rows of `(batch_size, sequence_length)` token ids, a segment at a time: no
            more than the ids is kept of them. For layers that are not sharded.
        attention_mask: `(batch_size, sequence_length)`, 0 for padding, or None.
        cache_params: the state that the sequence continues, differentiable if it requires gradients, and that the
            final state replaces; None for neither.
        final_norm: applied to each row that leaves the stack.
        positions_to_keep: `(batch_size, sequence_length)`, True for rows that are wanted; None for all.

    Returns:
        `(batch_size, sequence_length, hidden_size)`, or `(num_rows, hidden_size)` with `positions_to_keep`.

    Raises:
        ValueError: if a single token is to continue a state, or the cache has no place for a layer's own.
        RuntimeError: if tangents are given, of forward-mode differentiation, or a layer depends on a tensor that wants
            a gradient and that was computed elsewhere.
    """
    sequence_length = hidden_states.shape[1]
    if hidden_states.is_floating_point() and forward_ad.unpack_dual(hidden_states).tangent is not None:
        raise RuntimeError(
            "Multi-axis gradient checkpointing has no forward-mode derivatives: disable it to have them."
        )
    states, cached = [LayerState()] * len(layers), []
    if cache_params is not None:
        cached = cache_layers_of(cache_params, layers)
        states = [read_state(layer) for layer in cached]
        if len({state.conv is None for state in states}) > 1:
            raise ValueError(
                "The cache has states of some layers and not of others: give a full one, or an empty one."
            )
        if sequence_length == 1 and states[0].conv is not None:
            raise ValueError(
                "Multi-axis gradient checkpointing cannot train on a single token that continues a state: "
                "Transformers overwrites the state in such a step. Give two tokens or more, or call model.eval()."
            )
    layer_groups = list(_intervals(len(layers), plan.layer_interval))
    walks = layer_groups if plan.order == "layer-major" else [range(len(layers))]
    # Bound now: while the hooks of a sharded module run, its `forward` is the whole walk.
    forwards = [plain_forward(layer) for layer in layers] if forwards is None else forwards
    if final_norm is not None:
        forwards = [*forwards, plain_forward(final_norm)]
    # With offload, rows may wait in host memory from the start. A replica of DataParallel shows no parameters.
    device = next(layers[0].parameters(), hidden_states).device if plan.offload else hidden_states.device
    copies = Offloader(device, plan.offload)
    if embedding is None:
        hidden_states = copies.to_host(hidden_states)
    for group in walks:
        last = group.stop == len(layers)
        chosen = layers[group.start : group.stop]
        modules = [*chosen, final_norm] if last and final_norm is not None else chosen

        def run(hidden_states, *states, group=group, chosen=chosen, last=last):
            # Built here, inside the hooks: only now do sharded modules have their whole parameters.
            walk = _Walk(
                chosen,
                [*forwards[group.start : group.stop], *forwards[len(layers) :]],
                group.start,
                list(_intervals(len(chosen), plan.layer_interval)),
                segment_bounds(sequence_length, plan.sequence_interval),
                plan.state_interval,
                copies,
                output_waits=not last,
                embedding=embedding if group.start == 0 else None,
                final_norm=final_norm if last else None,
                attention_mask=attention_mask,
                positions_to_keep=positions_to_keep if last else None,
                final_state=cache_params is not None,
                layer_kwargs=layer_kwargs,
            )
            walk.run_first_segment(hidden_states, _as_states(states) or [LayerState()] * len(chosen))
            tensors = [hidden_states, *states, *walk.trainable]
            if not any(tensor.requires_grad for tensor in tensors):  # frozen layers below the first that is trained
                with torch.no_grad(), walk.as_in_forward():
                    states = _as_states(states) or [LayerState()] * len(chosen)
                    hidden_states, states = walk.run(hidden_states.shape[:2], states)
                    return hidden_states, *(itertools.chain(*states) if walk.final_state else ())
            return _MultiAxisCheckpoint.apply(walk, *tensors)

        initial = [tensor for state in states[group.start : group.stop] for tensor in state if tensor is not None]
        hidden_states, *final = call_through_hooks(modules, run, hidden_states, *initial)
        for index, *state in zip(group, final[::2], final[1::2], strict=False):  # `final` is empty without a cache
            write_state(cached[index], LayerState(*state))
    return hidden_states


def _intervals(length: int, interval: int):
    return (range(start, min(start + interval, length)) for start in range(0, length, interval))
