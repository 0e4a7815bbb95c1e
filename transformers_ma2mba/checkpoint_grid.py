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
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers import Cache

from .checkpoint_plan import CheckpointPlan
from .gradient_sums import GradientSums
from .host_copies import HostCopies, Pieces
from .recurrent_state import LayerState, carried_cache, own, read_state, write_state
from .sharded_modules import call_through_hooks, plain_forward


def segment_bounds(sequence_length: int, sequence_interval: int) -> list[tuple[int, int]]:
    """Cuts a sequence into segments. None is a single token, which the stock layer would take for a step of decoding:
    it goes with its neighbour."""
    starts = list(range(0, sequence_length, max(sequence_interval, 2)))
    if len(starts) > 1 and sequence_length - starts[-1] == 1:
        del starts[-1]
    return list(itertools.pairwise([*starts, sequence_length]))


class _StateBorders:
    """The states that enter every `interval`-th segment, waiting for backward.

    They share two tensors, so that allocators are not left with what lives long between what lives short.
    """

    def __init__(self, copies: HostCopies, num_segments: int, interval: int):
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


@contextmanager
def _without_hooks(parameters: list[nn.Parameter]):
    """Holds back the gradient hooks of parameters: they are for the gradient, not for each cell's share of it."""
    hooks = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooks:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, held in hooks:
            parameter._backward_hooks = held


@dataclass
class _Walk:
    """Some layers over a whole sequence: everything about it that is no differentiable tensor."""

    layers: list[nn.Module]
    forwards: list[Callable]  # how each layer, and last the final norm, is called
    first: int  # index of the lowest layer in the model, and so in its cache
    groups: list[range]  # cells, from the lowest, as indices into `layers`
    segments: list[tuple[int, int]]
    state_interval: int  # segments from one that has its states kept to the next
    copies: HostCopies
    output_waits: bool = False  # for another walk, and so where checkpoints wait
    embedding: nn.Module | None = None
    final_norm: nn.Module | None = None
    attention_mask: torch.Tensor | None = None
    rows_to_keep: torch.Tensor | None = None
    final_state: bool = False
    layer_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        self.device = self.copies.device
        self.cache = carried_cache(self.first + len(self.layers))
        self.parameters = [
            [parameter for layer in self.layers[group.start : group.stop] for parameter in layer.parameters()]
            for group in self.groups
        ]
        if self.embedding is not None:
            self.parameters[0] += self.embedding.parameters()
        if self.final_norm is not None:
            self.parameters[-1] += self.final_norm.parameters()
        # A parameter of several layers has its place in each of their groups, and in the list of all of them once.
        self.parameters = [
            list(dict.fromkeys(parameter for parameter in parameters if parameter.requires_grad))
            for parameters in self.parameters
        ]
        self.all_parameters = list(dict.fromkeys(itertools.chain(*self.parameters)))
        self.masks = [None] * len(self.segments)
        if self.attention_mask is not None:
            padded = (self.attention_mask == 0).any(0).tolist()
            self.masks = [
                self.attention_mask[:, start:stop] if any(padded[start:stop]) else None
                for start, stop in self.segments
            ]
        self.kept_rows = None
        if self.rows_to_keep is not None:
            # Where each row goes in the output, and where in its segment it comes from. Found on the CPU: a device
            # would have to be waited for at every segment.
            samples, tokens = self.rows_to_keep.cpu().nonzero(as_tuple=True)
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

    @contextmanager
    def as_in_forward(self):
        """Autocast as it was around the forward pass. Without its cache: in a cell each weight is used but once, and
        one that was cast while no gradient was wanted must not come back when it is."""
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    def run_cell(self, group: range, segment: int, hidden_states_BTD, states: list[LayerState]):
        """One cell, from its borders to the opposite ones."""
        for index, state in zip(group, states, strict=True):
            write_state(self.cache.layers[self.first + index], state)
        if group.start == 0 and self.embedding is not None:
            hidden_states_BTD = self.embedding(hidden_states_BTD)
        for index in group:
            hidden_states_BTD = self.forwards[index](
                hidden_states_BTD,
                cache_params=self.cache,
                attention_mask=self.masks[segment],
                **self.layer_kwargs,
            )
        states = []
        for index in group:
            layer = self.cache.layers[self.first + index]
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

    def run(self, hidden_states, states: list[LayerState], each_segment=None):
        """The whole walk, one segment after the other; returns the output and the final states.

        `each_segment(index, states)` is called before each segment with the states that enter it.
        """
        everything = range(len(self.layers))
        pieces = Pieces(hidden_states, self.segments, self.copies)
        output = None
        for segment, (start, stop) in enumerate(self.segments):
            rows = pieces.take(segment, segment + 1)
            if each_segment is not None:
                each_segment(segment, states)
            rows, states = self.run_cell(everything, segment, rows, states)
            rows = self.finish(segment, rows)
            if output is None:
                output = self._output(hidden_states.shape[:2], rows)
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
        initial, has_state = _split_states(walk, tensors)
        borders = _StateBorders(walk.copies, len(walk.segments), walk.state_interval)
        random_states = []

        def keep(segment, states):
            random_states.append(walk.random.record())
            borders.keep(segment, states)

        with walk.as_in_forward():
            output, final = walk.run(hidden_states, initial, keep)

        ctx.walk, ctx.borders, ctx.random_states = walk, borders, random_states
        ctx.num_initial = 2 * len(initial) if has_state else 0
        ctx.save_for_backward(*tensors[: ctx.num_initial], hidden_states, *borders.tensors)
        borders.tensors = []
        ctx.set_materialize_grads(False)
        return output, *(own(tensor) for state in final for tensor in state if walk.final_state)

    @staticmethod
    def backward(ctx, grad_output, *grad_final):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Multi-axis gradient checkpointing gives first derivatives only: call backward() without "
                "create_graph=True, or disable gradient checkpointing."
            )
        walk, copies = ctx.walk, ctx.walk.copies
        hidden_states = ctx.saved_tensors[ctx.num_initial]
        wants_rows = ctx.needs_input_grad[1]
        grad_rows = None
        if wants_rows:
            # Where the rows themselves are: on the host, if they have been waiting there.
            on_host = copies.active and not hidden_states.is_cuda
            make = copies.empty if on_host else hidden_states.new_empty
            grad_rows = make(hidden_states.shape, dtype=hidden_states.dtype)
        pieces = None
        if grad_output is not None and walk.kept_rows is None:
            pieces = Pieces(grad_output, walk.segments, copies)
        sums = GradientSums(walk.all_parameters)
        grad_states = list(grad_final) or [None] * (2 * len(walk.layers))

        with walk.random.untouched():
            for segment, rows, states in _segments_backwards(ctx):
                if pieces is not None:
                    grad = pieces.take(segment, segment - 1)
                else:
                    grad = _gradient_of_kept_rows(walk, segment, grad_output)
                random_state = ctx.random_states[segment]
                grad, grad_states = _restore_segment(
                    walk, segment, rows, states, random_state, grad, grad_states, sums, wants_rows
                )
                if wants_rows:
                    start, stop = walk.segments[segment]
                    if grad is None:
                        grad = rows.new_zeros(rows.shape)
                    copies.store(grad_rows[:, start:stop], grad.to(grad_rows.dtype))
                copies.end_segment()
        copies.finish()
        return None, grad_rows, *grad_states[: ctx.num_initial], *sums.totals()


def _segments_backwards(ctx):
    """Each segment from the last to the first, its rows, and the states that enter it."""
    walk, borders = ctx.walk, ctx.borders
    initial, (hidden_states, *borders.tensors) = (
        ctx.saved_tensors[: ctx.num_initial],
        ctx.saved_tensors[ctx.num_initial :],
    )
    first = [LayerState(*pair) for pair in zip(initial[::2], initial[1::2], strict=True)]
    first = first or [LayerState()] * len(walk.layers)

    def fetch_states(segment):
        return borders.fetch(segment) if segment > 0 else lambda: first

    pieces = Pieces(hidden_states, walk.segments, walk.copies)
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
                rows = pieces.take(segment, segment + 1)
                _, following = walk.run_cell(range(len(walk.layers)), segment, rows, states[-1])
            states.append([LayerState(*map(own, state)) for state in following])
        for segment in reversed(range(start, last + 1)):
            yield segment, pieces.take(segment, segment - 1), states.pop()
    borders.tensors = []


def _split_states(walk: _Walk, tensors) -> tuple[list[LayerState], bool]:
    """Initial states out of the Function's inputs, which end with the parameters."""
    tensors = tensors[: len(tensors) - len(walk.all_parameters)]
    if not tensors:
        return [LayerState()] * len(walk.layers), False
    return [LayerState(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)], True


def _gradient_of_kept_rows(walk: _Walk, segment: int, grad_output):
    """The gradient of the rows that a segment gave to the output; None where there are none."""
    places = walk.kept_rows[segment][0] if grad_output is not None else ()
    return grad_output[places] if len(places) else None


def _restore_segment(walk, segment, rows, states, random_state, grad, grad_states, sums, wants_rows):
    """Restores the cells of one segment from the highest to the lowest, and empties `grad_states` on the way.

    Returns:
        The gradients of `rows` and, layer by layer, of `states`; None where there is none.
    """
    if grad is None and all(gradient is None for gradient in grad_states):
        return None, grad_states  # nothing that is wanted depends on this segment
    walk.random.restore(random_state)
    borders = [(rows, random_state)]
    with torch.no_grad(), walk.as_in_forward():
        for group in walk.groups[:-1]:
            rows, _ = walk.run_cell(group, segment, rows, states[group.start : group.stop])
            borders.append((rows, walk.random.record()))

    grad_before = [None] * (2 * len(walk.layers))
    for position, group in reversed(list(enumerate(walk.groups))):
        rows, random_state = borders.pop()
        walk.random.restore(random_state)
        rows = rows.detach().requires_grad_(wants_rows or position > 0)
        before = [
            LayerState(*(tensor if tensor is None else tensor.detach().requires_grad_() for tensor in state))
            for state in states[group.start : group.stop]
        ]
        with torch.enable_grad(), walk.as_in_forward():
            after, states_after = walk.run_cell(group, segment, rows, before)
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
        parameters = walk.parameters[position]
        inputs = [*([rows] if rows.requires_grad else []), *tensors_before, *parameters]
        del after, states_after, grad_after
        if not pairs or not inputs:
            grad = None
            continue
        outputs, grad_outputs = zip(*pairs, strict=True)
        del pairs
        with _without_hooks(parameters):
            gradients = iter(torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True))
        del outputs, grad_outputs
        grad = next(gradients) if rows.requires_grad else None
        if tensors_before:
            grad_before[share] = [
                own(g) if g is not None else None for g in itertools.islice(gradients, len(tensors_before))
            ]
        for parameter in parameters:
            sums.add(parameter, next(gradients))
    return grad, grad_before


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
    rows_to_keep: torch.Tensor | None = None,
    **layer_kwargs,
) -> torch.Tensor:
    """Runs a stack of layers over a sequence, keeping for backward only what the plan says.

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
        rows_to_keep: `(batch_size, sequence_length)`, True for rows that are wanted; None for all.

    Returns:
        `(batch_size, sequence_length, hidden_size)`, or `(num_rows, hidden_size)` with `rows_to_keep`.

    Raises:
        ValueError: if a single token is to continue a state.
    """
    sequence_length = hidden_states.shape[1]
    states = [LayerState()] * len(layers)
    if cache_params is not None:
        states = [read_state(layer) for layer in cache_params.layers]
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
    device = next(layers[0].parameters()).device if plan.offload else hidden_states.device
    copies = HostCopies(device, plan.offload)
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
                rows_to_keep=rows_to_keep if last else None,
                final_state=cache_params is not None,
                layer_kwargs=layer_kwargs,
            )
            tensors = [hidden_states, *states, *walk.all_parameters]
            if not any(tensor.requires_grad for tensor in tensors):  # frozen layers below the first that is trained
                with torch.no_grad():
                    states = _split_states(walk, tensors[1:])[0]
                    hidden_states, states = walk.run(hidden_states, states)
                    return hidden_states, *(itertools.chain(*states) if walk.final_state else ())
            return _MultiAxisCheckpoint.apply(walk, *tensors)

        initial = [tensor for state in states[group.start : group.stop] for tensor in state if tensor is not None]
        hidden_states, *final = call_through_hooks(modules, run, hidden_states, *initial)
        for index, *state in zip(group, final[::2], final[1::2], strict=False):  # `final` is empty without a cache
            write_state(cache_params.layers[index], LayerState(*state))
    return hidden_states


def _intervals(length: int, interval: int):
    return (range(start, min(start + interval, length)) for start in range(0, length, interval))
