"""The blocks of MA-GC's grid (arXiv:2411.19460, §3.2): its cells, and the two ends of the stack.

A cell is some layers times a segment of the sequence. Hidden states enter it from below and recurrent states from the
left; hidden states leave it above and recurrent states on the right. The embedding below the lowest cell and the final
norm above the highest one are blocks as well, without a recurrent state.

A block runs in two ways. `pass_through` keeps nothing for backward. `restore` runs the block once more, with a graph,
and gives a [`RestoredBlock`], whose `backward` sends gradients through it.

Shape suffixes: B batch, T tokens, D width.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..mamba2 import LayerState, cache_for, read_state, with_own_storage, write_state
from .captured_tensors import CapturedTensors, unknown_leaves, without_hooks
from .gradient_sums import GradientSums
from .sharded_modules import has_forward_hooks


class Border(NamedTuple):
    """The tensors on one side of a block, its lower left or its upper right, or their gradients.

    hidden_states: `(batch_size, tokens, hidden_size)`; token ids below the embedding; None for a missing gradient.
    states: one for each layer of the block, in order.
    """

    hidden_states: torch.Tensor | None
    states: Sequence[LayerState] = ()

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None]) -> "Border":
        """The border whose `tensors` these are."""
        hidden_states, *states = tensors
        return cls(hidden_states, states_of(states))

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """The hidden states, and two tensors for each layer."""
        return [self.hidden_states, *itertools.chain(*self.states)]


def states_of(tensors: Sequence[torch.Tensor | None]) -> list[LayerState]:
    """The states whose tensors these are, two for each layer."""
    return [LayerState(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


class Block:
    """A part of the grid, and all tensors that it computes with.

    Args:
        name: for error messages.
        modules: by the path that error messages use.

    Attributes:
        captured: the modules' tensors as they are in the forward pass, and after the first `pass_through` those that
            hooks bring in.
    """

    layers = range(0)  # of the walk

    def __init__(self, name: str, modules: dict[str, nn.Module]):
        self.name, self.captured = name, CapturedTensors(modules)
        self.hooked = any(has_forward_hooks(inner) for module in modules.values() for inner in module.modules())
        self.explored = False

    def run(self, segment: int, border: Border) -> Border:
        """Compute the upper right border of a segment from the lower left one."""
        raise NotImplementedError

    def pass_through(self, segment: int, border: Border) -> Border:
        """Run the block and keep nothing for backward.

        In the first call autograd records the computation, in order to find all tensors that the block depends on. If
        the block has hooks, autograd records every call: the tensors that hooks see then require gradients, as they
        do without checkpointing.

        Raises:
            RuntimeError: if a later call depends on a tensor that requires a gradient and that the first one did not
                use, or any call depends on one that was computed elsewhere.
        """
        if self.explored and not self.hooked:
            return self.run(segment, border)
        hidden_states = border.hidden_states.detach().requires_grad_(self.hooked)
        border = border._replace(hidden_states=hidden_states)
        known = len(self.captured.trainable)
        tensors = self.captured.find_others(lambda: self.run(segment, border).tensors, self.name, [hidden_states])
        if self.explored and len(self.captured.trainable) > known:
            raise RuntimeError(self._changed())
        self.explored = True
        return Border.of(tensors)

    def restore(self, segment: int, border: Border, wants_hidden_states: bool = True) -> "RestoredBlock":
        """Run the block with a graph (Algorithm 2, line 9).

        Args:
            border: the lower left border.
            wants_hidden_states: whether the hidden states of the border get a gradient; states always do.
        """
        hidden_states = border.hidden_states.detach().requires_grad_(wants_hidden_states)
        states = [
            LayerState(*(None if tensor is None else tensor.detach().requires_grad_() for tensor in state))
            for state in border.states
        ]
        with torch.enable_grad():
            # By a view, as PyTorch's FLOP counter cannot follow a leaf through a call of `grad`.
            after = self.run(segment, Border(hidden_states.view_as(hidden_states), states))
        return RestoredBlock(self, Border(hidden_states, states), after)

    def check_leaves(self, outputs: Sequence[torch.Tensor], known: Sequence[torch.Tensor]):
        """Check that outputs depend on known leaves only.

        Raises:
            RuntimeError: if outputs depend on a leaf that requires a gradient and is unknown.
        """
        if unknown_leaves(outputs, known, self.name):
            raise RuntimeError(self._changed())

    def _changed(self) -> str:
        return (
            f"{self.name} depend on a tensor that requires a gradient and that the forward pass did not use on the "
            f"first segment of the sequence: a hook or closure must use the same ones at each call."
        )


@dataclass
class RestoredBlock:
    """A block that has run with a graph.

    Attributes:
        before: its lower left border, leaves of the graph.
        after: its upper right border, roots of the graph; None once `backward` has run.
    """

    block: Block
    before: Border
    after: Border | None

    def backward(self, gradient: Border, sums: GradientSums) -> Border:
        """Send gradients through the block (Algorithm 2, line 10), and give up the graph.

        Args:
            gradient: of the upper right border; None for what has no gradient.
            sums: get the block's share of the parameters' gradients.

        Returns:
            The gradient of the lower left border.
        """
        pairs = [
            (tensor, grad.to(tensor.dtype))
            for tensor, grad in zip(self.after.tensors, gradient.tensors, strict=True)
            if grad is not None and tensor.requires_grad
        ]
        self.after = None
        parameters = self.block.captured.trainable
        wanted = [tensor if tensor is not None and tensor.requires_grad else None for tensor in self.before.tensors]
        inputs = [tensor for tensor in wanted if tensor is not None] + parameters
        if not pairs or not inputs:
            return Border.of([None] * len(wanted))
        outputs, grad_outputs = zip(*pairs, strict=True)
        del pairs
        self.block.check_leaves(outputs, inputs)
        with without_hooks(parameters):
            gradients = iter(torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True))
        del outputs, grad_outputs
        hidden_states, *states = [None if tensor is None else next(gradients) for tensor in wanted]
        for parameter in parameters:
            sums.add(parameter, next(gradients))
        # Views would keep the gradients of the whole cell in memory.
        return Border.of([hidden_states, *(None if grad is None else with_own_storage(grad) for grad in states)])


class Cell(Block):
    """Some layers over one segment at a time.

    Args:
        layers: its layers, as indices into the walk.
        first: the index in the model of the walk's lowest layer.
        modules: all layers of the walk.
        forwards: how each of these is called, with `cache_params` and `attention_mask`.
        masks: `(batch_size, tokens)` for each segment, 0 for padding; None without padding.
        layer_kwargs: for each call of a layer.
    """

    def __init__(
        self,
        layers: range,
        first: int,
        modules: Sequence[nn.Module],
        forwards: Sequence[Callable],
        masks: Sequence[torch.Tensor | None],
        layer_kwargs: dict,
    ):
        name = f"layers.{first + layers.start} to layers.{first + layers.stop - 1}"
        super().__init__(name, {f"layers.{first + index}": modules[index] for index in layers})
        self.layers, self.masks, self.layer_kwargs = layers, masks, layer_kwargs
        self.forwards = [forwards[index] for index in layers]
        self.caches = [cache_for(modules[index]) for index in layers]

    def run(self, segment: int, border: Border) -> Border:
        """Run the layers over a segment.

        Args:
            border: hidden states, `(batch_size, tokens, hidden_size)`, and for each layer the states before the
                segment, `(batch_size, conv_dim, conv_kernel)` and `(batch_size, num_heads, head_dim, state_size)`.

        Returns:
            The hidden states above the cell and the states after the segment, in the same shapes.
        """
        hidden_states_BTD, states = border.hidden_states, []
        for forward, cache, before in zip(self.forwards, self.caches, border.states, strict=True):
            write_state(cache.layers[-1], before)
            hidden_states_BTD = forward(
                hidden_states_BTD, cache_params=cache, attention_mask=self.masks[segment], **self.layer_kwargs
            )
            states.append(read_state(cache.layers[-1]))
            write_state(cache.layers[-1], LayerState())
        return Border(hidden_states_BTD, states)


class LowerEnd(Block):
    """Embeds the token ids that enter the lowest cell."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__("embeddings", {"embeddings": embedding})
        self.embedding = embedding

    def run(self, segment: int, border: Border) -> Border:
        """Look up `(batch_size, tokens)` ids."""
        return Border(self.embedding(border.hidden_states))

    def backward(self, token_ids: torch.Tensor, gradient: torch.Tensor, sums: GradientSums):
        """Add the gradient of the rows that were looked up, which needs nothing restored.

        Args:
            token_ids: `(batch_size, tokens)`.
            gradient: `(batch_size, tokens, hidden_size)`.
        """
        for weight in self.captured.trainable:
            sums.add_rows(weight, token_ids, gradient, self.embedding.padding_idx)


class KeptPositions:
    """The positions of a sequence whose hidden states are wanted.

    Args:
        positions_to_keep: `(batch_size, sequence_length)`, True for the wanted ones.
        segments: start and stop of each.

    Attributes:
        count: the number of wanted positions.
    """

    def __init__(self, positions_to_keep: torch.Tensor, segments: list[tuple[int, int]], device: torch.device):
        # Found on the CPU: a device would have to be waited for at every segment.
        samples, tokens = positions_to_keep.cpu().nonzero(as_tuple=True)
        self.count = len(samples)
        self.indices = []  # for each segment: places in the output, samples, tokens of the segment
        for start, stop in segments:
            (places,) = ((tokens >= start) & (tokens < stop)).nonzero(as_tuple=True)
            chosen = (places, samples[places], tokens[places] - start)
            self.indices.append([index.to(device, non_blocking=True) for index in chosen])

    def select(self, segment: int, hidden_states_BTD: torch.Tensor) -> torch.Tensor:
        """The wanted rows of a segment, `(num_positions, hidden_size)`."""
        _, samples, tokens = self.indices[segment]
        return hidden_states_BTD[samples, tokens]

    def places(self, segment: int) -> torch.Tensor:
        """Where the rows of a segment are in the output, `(num_positions,)`."""
        return self.indices[segment][0]


class UpperEnd(Block):
    """Selects the wanted positions above the highest cell, and norms them.

    Args:
        norm: the final norm, or None.
        forward: how the norm is called.
        kept: the wanted positions; None for all.
    """

    def __init__(self, norm: nn.Module | None, forward: Callable | None, kept: KeptPositions | None):
        super().__init__("norm_f", {} if norm is None else {"norm_f": norm})
        self.forward, self.kept = forward, kept

    def run(self, segment: int, border: Border) -> Border:
        """Compute `(batch_size, tokens, hidden_size)`, or `(num_positions, hidden_size)` of the wanted ones."""
        hidden_states = border.hidden_states
        if self.kept is not None:
            hidden_states = self.kept.select(segment, hidden_states)
        return Border(hidden_states if self.forward is None else self.forward(hidden_states))
