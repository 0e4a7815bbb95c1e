"""The recurrent state of a prefix: all that a Mamba-2 layer remembers of what came before.

A layer's state is a pair: the last `conv_kernel` inputs of its convolution, `(batch_size, conv_dim, conv_kernel)`, and
the state of its scan, `(batch_size, num_heads, head_dim, state_size)`. Its size does not depend on the length of the
prefix. Transformers keeps both in a `Cache`; the layers here do so without writing over what autograd still needs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer


class LayerState(NamedTuple):
    """What one layer remembers of a prefix; both None before the first token."""

    conv: torch.Tensor | None = None
    recurrent: torch.Tensor | None = None


class CarriedLayer(LinearAttentionLayer):
    """One layer's state, replaced by each update where the stock layer overwrites it: gradients flow through a
    sequence of forward calls, and what an earlier call saved for its backward stays as it was."""

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, **kwargs):
        if self.has_previous_state[state_idx]:
            conv_states = torch.cat([self.conv_states[state_idx], conv_states], dim=-1)
        kept = conv_states[..., -conv_kernel_size:]
        kept = F.pad(kept, (conv_kernel_size - kept.shape[-1], 0))
        write_state(self, LayerState(kept, self.recurrent_states[state_idx]))
        return conv_states

    def update_recurrent_state(self, recurrent_states, state_idx=0, **kwargs):
        write_state(self, LayerState(self.conv_states[state_idx], recurrent_states))
        return recurrent_states


def carried_cache(num_layers: int) -> Cache:
    """An empty cache whose states may be differentiated."""
    return Cache(layers=[CarriedLayer() for _ in range(num_layers)])


def read_state(layer: LinearAttentionLayer) -> LayerState:
    """The state that a layer of a cache holds; pairs of None if nothing has gone through it."""
    if not layer.has_previous_state[0]:
        return LayerState()
    conv = layer.conv_states[0]
    if layer.record_past:  # then it is longer than a state
        conv = conv[..., -layer.conv_kernel_size[0] :]
    return LayerState(conv, layer.recurrent_states[0])


def write_state(layer: LinearAttentionLayer, state: LayerState):
    """Puts a state into a layer of a cache: the tensors themselves, not copies of them."""
    layer.conv_states[0], layer.recurrent_states[0] = state
    layer.is_conv_states_initialized[0] = layer.has_previous_state[0] = state.conv is not None
    layer.is_recurrent_states_initialized[0] = state.recurrent is not None
    if state.conv is not None:
        layer.conv_kernel_size[0] = state.conv.shape[-1]
        layer.dtype, layer.device = state.conv.dtype, state.conv.device


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if it is a view: keeping a slice keeps all that it was cut from."""
    if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
