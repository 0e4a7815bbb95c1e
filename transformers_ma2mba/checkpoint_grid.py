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
not as tall as the stack, backward runs each column once more to find those between.

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
from .recurrent_state import LayerState, carried_cache, own, read_state, write_state
from .sharded_modules import call_through_hooks, is_sharded


def segment_bounds(sequence_length: int, sequence_interval: int) -> list[tuple[int, int]]:
    """Cuts a sequence into segments. None is a single token, which the stock layer would take for a step of decoding:
    it goes with its neighbour."""
    starts = list(range(0, sequence_length, max(sequence_interval, 2)))
    if len(starts) > 1 and sequence_length - starts[-1] == 1:
        del starts[-1]
    return list(itertools.pairwise([*starts, sequence_length]))


class _Borders:
    """Where the borders of a walk wait for backward: on its device, or in pinned host memory, copied on a stream of
    their own while the device computes. Host memory is where tensors of the CPU are anyway.

    The states of all segments share two tensors, so that allocators are not left with what lives long between what
    lives short.
    """

    def __init__(self, device: torch.device, offload: bool, num_segments: int):
        self.device = device
        self.offload = offload and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.offload else None
        self.num_segments = num_segments
        self.rows: list[torch.Tensor] = []  # if offloaded: `(batch_size, tokens, width)` of each segment
        self.states: list[torch.Tensor] = []  # conv and recurrent, `(num_segments - 1, num_layers, batch_size, ...)`
        self.copies = []

    def tensors(self) -> list[torch.Tensor]:
        """All that is kept, and all that `from_tensors` needs."""
        return [*self.states, *self.rows]

    def from_tensors(self, tensors):
        """Takes back the tensors that autograd has had in its care; an empty list gives them up."""
        num_states = 2 if self.num_segments > 1 and tensors else 0
        self.states, self.rows = tensors[:num_states], tensors[num_states:]

    def keep(self, segment: int, rows: torch.Tensor | None, states: list[LayerState]):
        """Keeps what enters a segment: its rows if they are given, and its states but for the first segment."""
        with self._copying():
            if rows is not None:
                self.rows.append(self._new(rows.shape, rows.dtype).copy_(rows, non_blocking=True))
                self._used(rows)
            if segment > 0:
                for kind, tensors in enumerate(zip(*states, strict=True)):
                    if segment == 1:
                        shape = (self.num_segments - 1, len(states), *tensors[0].shape)
                        self.states.append(self._new(shape, tensors[0].dtype))
                    for layer, tensor in enumerate(tensors):
                        self.states[kind][segment - 1, layer].copy_(tensor, non_blocking=True)
                        self._used(tensor)
        if self.offload:
            # The device may run ahead of the copies by one segment and no further, since what is being copied stays.
            self.copies.append(self.stream.record_event())
            if len(self.copies) > 1:
                self.copies.pop(0).synchronize()

    def fetch(self, segment: int) -> Callable[[], tuple[torch.Tensor | None, list[LayerState]]]:
        """Starts to bring a segment's borders back to the device; what it returns waits for them."""
        with self._copying(wait=False):
            rows = self.rows[segment].to(self.device, non_blocking=True) if self.rows else None
            kinds = [kept[segment - 1].to(self.device, non_blocking=True) for kept in self.states if segment > 0]
        event = self.stream.record_event() if self.offload else None

        def wait():
            if event is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(event)
                for tensor in (*kinds, *([rows] if rows is not None else [])):
                    tensor.record_stream(current)
            return rows, [LayerState(*state) for state in zip(*kinds, strict=True)]

        return wait

    def _new(self, shape, dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu" if self.offload else self.device, pin_memory=self.offload)

    @contextmanager
    def _copying(self, wait=True):
        """On the stream for copies, if there is one, once what is to be copied has been computed."""
        if not self.offload:
            yield
            return
        if wait:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def _used(self, tensor):
        if self.offload and tensor.is_cuda:
            tensor.record_stream(self.stream)


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
    device: torch.device
    offload: bool
    final_norm: nn.Module | None = None
    attention_mask: torch.Tensor | None = None
    rows_to_keep: torch.Tensor | None = None
    final_state: bool = False
    layer_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        self.cache = carried_cache(self.first + len(self.layers))
        self.parameters = [
            [parameter for layer in self.layers[group.start : group.stop] for parameter in layer.parameters()]
            for group in self.groups
        ]
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
            # Where each row goes in the output: the number of kept rows before it, sample by sample.
            keep = self.rows_to_keep.to(self.device)
            places = keep.flatten().cumsum(0).sub(1).view_as(keep)
            self.num_rows = int(keep.sum())
            self.kept_rows = [
                (keep[:, start:stop], places[:, start:stop][keep[:, start:stop]]) for start, stop in self.segments
            ]
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
            hidden_states_BTD = hidden_states_BTD[self.kept_rows[segment][0]]
        if self.final_norm is not None:
            hidden_states_BTD = self.forwards[-1](hidden_states_BTD)
        return hidden_states_BTD

    def run(self, hidden_states_BTD, states: list[LayerState], each_segment=None):
        """The whole walk, one segment after the other; returns the output and the final states.

        `each_segment(index, rows, states)` is called before each segment with what enters it.
        """
        everything = range(len(self.layers))
        batch_size, sequence_length, _ = hidden_states_BTD.shape
        output = None
        for segment, (start, stop) in enumerate(self.segments):
            rows = hidden_states_BTD[:, start:stop].to(self.device)
            if each_segment is not None:
                each_segment(segment, rows, states)
            rows, states = self.run_cell(everything, segment, rows, states)
            rows = self.finish(segment, rows)
            if self.kept_rows is None:
                if output is None:
                    output = rows.new_empty(batch_size, sequence_length, rows.shape[-1])
                output[:, start:stop] = rows
            else:
                if output is None:
                    output = rows.new_empty(self.num_rows, rows.shape[-1])
                output[self.kept_rows[segment][1]] = rows
        return output, states


class _MultiAxisCheckpoint(torch.autograd.Function):
    """A walk of which only the borders are kept. Gradients of the parameters leave from its backward, summed over the
    cells, so that hooks on them (DDP, ZeRO, FSDP) see each exactly once."""

    @staticmethod
    def forward(ctx, walk: _Walk, hidden_states_BTD, *tensors):
        initial, has_state = _split_states(walk, tensors)
        borders = _Borders(walk.device, walk.offload, len(walk.segments))
        # Rows that are in host memory already need not be brought there.
        moves_rows = borders.offload and hidden_states_BTD.device.type != "cpu"
        random_states = []

        def keep(segment, rows, states):
            random_states.append(walk.random.record())
            borders.keep(segment, rows if moves_rows else None, states)

        with walk.as_in_forward():
            output, final = walk.run(hidden_states_BTD, initial, keep)

        ctx.walk, ctx.borders, ctx.random_states = walk, borders, random_states
        ctx.num_initial = 2 * len(initial) if has_state else 0
        ctx.rows_like = hidden_states_BTD.new_empty(0), hidden_states_BTD.shape
        inputs = [*tensors[: ctx.num_initial], *([] if moves_rows else [hidden_states_BTD])]
        ctx.num_inputs = len(inputs)
        ctx.save_for_backward(*inputs, *borders.tensors())
        borders.from_tensors([])  # autograd has them
        ctx.set_materialize_grads(False)
        return output, *(own(tensor) for state in final for tensor in state if walk.final_state)

    @staticmethod
    def backward(ctx, grad_output, *grad_final):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Multi-axis gradient checkpointing gives first derivatives only: call backward() without "
                "create_graph=True, or disable gradient checkpointing."
            )
        walk, borders = ctx.walk, ctx.borders
        inputs, kept = ctx.saved_tensors[: ctx.num_inputs], ctx.saved_tensors[ctx.num_inputs :]
        borders.from_tensors(kept)
        initial = inputs[: ctx.num_initial]
        wants_rows = ctx.needs_input_grad[1]
        empty, shape = ctx.rows_like
        grad_rows = empty.new_empty(shape) if wants_rows else None
        sums = _GradientSums(walk.all_parameters)
        grad_states = list(grad_final) or [None] * (2 * len(walk.layers))

        with walk.random.untouched():
            upcoming = borders.fetch(len(walk.segments) - 1)
            for segment in reversed(range(len(walk.segments))):
                start, stop = walk.segments[segment]
                rows, states = upcoming()
                if segment > 0:
                    upcoming = borders.fetch(segment - 1)  # while this segment is computed
                else:
                    states = [LayerState(*pair) for pair in zip(initial[::2], initial[1::2], strict=True)]
                if rows is None:
                    rows = inputs[-1][:, start:stop].to(walk.device)
                grad = _rows_of_segment(walk, segment, grad_output)
                random_state = ctx.random_states[segment]
                grad, grad_states = _restore_segment(
                    walk, segment, rows, states, random_state, grad, grad_states, sums, wants_rows
                )
                if wants_rows:
                    grad_rows[:, start:stop] = 0 if grad is None else grad
        borders.from_tensors([])
        return None, grad_rows, *grad_states[: ctx.num_initial], *sums.totals()


class _GradientSums:
    """Gradients of parameters, summed over cells. Half precision would lose small shares in a large sum, so that is
    kept in float32."""

    def __init__(self, parameters):
        self.sums = dict.fromkeys(parameters)
        self.borrowed = set()  # sums that are still autograd's tensor, which may be another gradient too

    def add(self, parameter, gradient):
        if gradient is None:
            return
        total = self.sums[parameter]
        if total is None:
            total = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            if total is gradient:
                self.borrowed.add(parameter)
        elif parameter in self.borrowed:
            total = total + gradient
            self.borrowed.remove(parameter)
        else:
            total += gradient
        self.sums[parameter] = total

    def totals(self):
        if not any(total is not None for total in self.sums.values()):
            # Nothing that is wanted depends on the walk. The plain run gives zeros, and other processes wait for them.
            return [torch.zeros_like(parameter) for parameter in self.sums]
        return [None if total is None else total.to(parameter.dtype) for parameter, total in self.sums.items()]


def _split_states(walk: _Walk, tensors) -> tuple[list[LayerState], bool]:
    """Initial states out of the Function's inputs, which end with the parameters."""
    tensors = tensors[: len(tensors) - len(walk.all_parameters)]
    if not tensors:
        return [LayerState()] * len(walk.layers), False
    return [LayerState(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)], True


def _rows_of_segment(walk: _Walk, segment: int, grad_output):
    """The gradient of what a segment gave to the output; None where there is none."""
    if grad_output is None:
        return None
    if walk.kept_rows is None:
        start, stop = walk.segments[segment]
        return grad_output[:, start:stop]
    places = walk.kept_rows[segment][1]
    return grad_output[places] if len(places) else None


def _restore_segment(walk, segment, rows, states, random_state, grad, grad_states, sums, wants_rows):
    """Restores the cells of one segment from the highest to the lowest, and empties `grad_states` on the way.

    Returns:
        The gradients of `rows` and, layer by layer, of `states`; None where there is none.
    """
    if grad is None and all(gradient is None for gradient in grad_states):
        return None, grad_states  # nothing that is wanted depends on this segment
    states = states or [LayerState()] * len(walk.layers)
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
    attention_mask: torch.Tensor | None = None,
    cache_params: Cache | None = None,
    final_norm: nn.Module | None = None,
    rows_to_keep: torch.Tensor | None = None,
    **layer_kwargs,
) -> torch.Tensor:
    """Runs a stack of layers over a sequence, keeping for backward only what the plan says.

    Args:
        layers: the whole stack, called as `layer(hidden_states, cache_params=, attention_mask=)`.
        hidden_states: `(batch_size, sequence_length, hidden_size)`.
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
    _, sequence_length, _ = hidden_states.shape
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
    device = hidden_states.device
    if plan.offload:
        device = next(layers[0].parameters()).device
        if plan.order == "sequence-major":
            # The embeddings wait in host memory, and so does their gradient: a walk needs a segment at a time.
            hidden_states = hidden_states.cpu()
    for group in walks:
        last = group.stop == len(layers)
        chosen = layers[group.start : group.stop]
        # Where a module is sharded, its hooks run around the whole walk and not around each cell.
        modules = [*chosen, final_norm] if last and final_norm is not None else chosen
        forwards = [module.forward if is_sharded(module) else module for module in modules]

        def run(hidden_states, *states, group=group, chosen=chosen, forwards=forwards, last=last):
            # Built here, inside the hooks: only now do sharded modules have their whole parameters.
            walk = _Walk(
                chosen,
                forwards,
                group.start,
                list(_intervals(len(chosen), plan.layer_interval)),
                segment_bounds(sequence_length, plan.sequence_interval),
                device,
                plan.offload,
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
