"""The recurrent state of a prefix: all that a Mamba-2 layer remembers of the tokens before.

A layer's state is a pair: the last `conv_kernel` inputs of its convolution, `(batch_size, conv_dim, conv_kernel)`, and
the state of its scan, `(batch_size, num_heads, head_dim, state_size)`. Its size does not depend on the length of the
prefix. Transformers keeps both in a `Cache`. The cache layers here do not overwrite tensors that autograd still needs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer


class LayerState(NamedTuple):
    """The recurrent state of one layer; both tensors are None before the first token.

    conv: `(batch_size, conv_dim, conv_kernel)`, the last inputs of the convolution.
    recurrent: `(batch_size, num_heads, head_dim, state_size)`, the state of the scan.
    """

    conv: torch.Tensor | None = None
    recurrent: torch.Tensor | None = None


class CarriedLayer(LinearAttentionLayer):
    """A cache layer that replaces its state at each update, where the stock layer overwrites it.

    So gradients flow through a sequence of forward calls, and the tensors that an earlier call saved for its backward
    stay unchanged.
    """

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **kwargs):
        """Append `(batch_size, conv_dim, tokens)` inputs of the convolution; return them behind the old state."""
        if self.has_previous_state[state_idx]:
            conv_states = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        kept = conv_states[..., -conv_kernel_size:]
        kept = F.pad(kept, (conv_kernel_size - kept.shape[-1], 0))
        write_state(self, LayerState(kept, self.recurrent_states[state_idx]))
        return conv_states

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        """Replace the state of the scan by `(batch_size, num_heads, head_dim, state_size)`, and return it."""
        write_state(self, LayerState(self.conv_states[state_idx], recurrent_states))
        return recurrent_states


def carried_cache(num_layers: int) -> Cache:
    """An empty cache whose states may be differentiated."""
    return Cache(layers=[CarriedLayer() for _ in range(num_layers)])


def cache_for(layer: nn.Module) -> Cache:
    """An empty cache for a single layer, whatever its `layer_idx`; `layers[-1]` holds the state."""
    return Cache(layers=[CarriedLayer()] * (cache_index(layer) + 1))


def cache_index(layer: nn.Module) -> int:
    """The index of a layer's state in a model's cache.

    If layers were pruned or doubled, it differs from the layer's place in the stack.

    Raises:
        ValueError: if the layer does not say.
    """
    for module in (getattr(layer, "mixer", None), layer):
        index = getattr(module, "layer_idx", None)
        if index is not None:
            return index
    raise ValueError(f"{type(layer).__name__} has no layer_idx, the index of its state in a cache.")


def cache_layers_of(cache: Cache, layers: Sequence[nn.Module]) -> list[LinearAttentionLayer]:
    """The cache layers that hold the states of a stack of layers, in the order of the stack.

    Raises:
        ValueError: if two layers share a cache layer, or one has none.
    """
    indices = [cache_index(layer) for layer in layers]
    for place, index in enumerate(indices):
        if index in indices[:place]:
            raise ValueError(
                f"layers.{indices.index(index)} and layers.{place} both keep their state under layer_idx {index} of a "
                f"cache: give each block's mixer a layer_idx of its own."
            )
        if index >= len(cache.layers):
            raise ValueError(
                f"layers.{place} keeps its state under layer_idx {index} of a cache, but this cache ends at "
                f"{len(cache.layers) - 1}: renumber the blocks' mixers, or make a longer cache."
            )
    return [cache.layers[index] for index in indices]


def read_state(layer: LinearAttentionLayer) -> LayerState:
    """The state that a layer of a cache holds; pairs of None if nothing has gone through it."""
    if not layer.has_previous_state[0]:
        return LayerState()
    conv = layer.conv_states[0]
    if layer.record_past:  # then it is longer than a state
        conv = conv[..., -layer.conv_kernel_size[0] :]
    return LayerState(conv, layer.recurrent_states[0])


def write_state(layer: LinearAttentionLayer, state: LayerState):
    """Put a state into a layer of a cache: the tensors themselves, not copies of them."""
    layer.conv_states[0], layer.recurrent_states[0] = state
    layer.is_conv_states_initialized[0] = layer.has_previous_state[0] = state.conv is not None
    layer.is_recurrent_states_initialized[0] = state.recurrent is not None
    if state.conv is not None:
        layer.conv_kernel_size[0] = state.conv.shape[-1]
        layer.dtype, layer.device = state.conv.dtype, state.conv.device


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if it is a view: keeping a slice keeps all that it was cut from."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


# Caches in inference


def empty_cache(num_layers: int) -> Cache:
    """An empty cache of Transformers' own layers, which overwrite their states."""
    return Cache(layers=[LinearAttentionLayer() for _ in range(num_layers)])


def copy_cache(cache: Cache, rows: Sequence[int] | None = None) -> Cache:
    """Copy a cache, such that continuing from the copy leaves the original unchanged.

    Args:
        rows: the samples to copy, in this order, each any number of times; all of them by default.
    """

    def copy(tensor):
        if rows is None:
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor.index_select(0, torch.tensor(rows, device=tensor.device))

    copied = empty_cache(len(cache.layers))
    for layer, target in zip(cache.layers, copied.layers, strict=True):
        state = read_state(layer)
        if state.conv is not None:
            write_state(target, LayerState(*map(copy, state)))
    return copied


def join_caches(caches: Sequence[Cache]) -> Cache:
    """Copy the samples of several caches, in order, into one. The caches are all empty, or none is."""
    joined = empty_cache(len(caches[0].layers))
    for target, *layers in zip(joined.layers, *(cache.layers for cache in caches), strict=True):
        states = [read_state(layer) for layer in layers]
        if states[0].conv is not None:
            write_state(target, LayerState(*map(torch.cat, zip(*states, strict=True))))
    return joined
