"""At four million tokens, only copies see the whole sequence, and no kernel gets more than it can index.

From 2^31 elements on, kernels with 32-bit offsets fail, or return wrong results without an error. The model has two
layers of the 2.7B's shape, and its tensors have no data: the sizes are real, and no memory is needed.
"""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Mamba2Model
from transformers.models.mamba2 import modeling_mamba2

from transformers_ma2mba import Ma2mbaConfig, enable_multi_axis_checkpointing
from transformers_ma2mba.gradient_checkpointing import fused_layer
from transformers_ma2mba.gradient_checkpointing import grid as checkpoint_grid
from transformers_ma2mba.gradient_checkpointing import mamba2_in_grid as multi_axis_mamba2
from transformers_ma2mba.mamba2 import kernel_choice
from transformers_ma2mba.mamba2.kernel_choice import Kernels

LENGTH = 2**22
LIMIT = 2**31
# The operations allowed on a whole sequence: allocation, views, and copies, for which PyTorch has 64-bit offsets.
COPYING = {"new_empty", "empty", "empty_like", "detach", "slice", "copy_", "_to_copy", "device"}


def extent(tensor):
    """The largest offset of an element, plus one: in a contiguous layout, rows times row stride."""
    return 1 + sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


class Widest(TorchDispatchMode):
    """Record for each operation the largest extent of its tensors."""

    def __init__(self):
        super().__init__()
        self.extents = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.extents[name] = max([self.extents.get(name, 0), *map(extent, tensors)])
        return result


class NoRandomState:
    """Replaces the engine's, which compares random states: tensors without data cannot be compared."""

    def __init__(self, device):
        pass

    record = restore = lambda *_: None

    @contextmanager
    def untouched(self):
        yield


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for kernels, which record the extents of their inputs and return tensors of the right shape."""
    seen = {}

    def record(name, *tensors):
        seen.setdefault(name, []).append(max(extent(tensor) for tensor in tensors if tensor is not None))

    def split_conv1d_scan(zxbcdt, *weights, D, initial_states, headdim, outproj_weight, **kwargs):
        record("split_conv1d_scan", zxbcdt, initial_states)
        weight = sum(weight.sum() for weight in (*weights, D) if torch.is_tensor(weight)) + zxbcdt.sum()
        conv_dim = weights[0].shape[0]
        inner = len(D) * headdim
        states = zxbcdt.new_zeros(len(zxbcdt), len(D), headdim, (conv_dim - inner) // 2, dtype=torch.float32)
        states = states + weight + (initial_states if initial_states is not None else 0)
        return zxbcdt[..., : outproj_weight.shape[0]] + outproj_weight.sum() * weight, states

    def rms_norm(hidden_states, weight, bias, eps):
        record("rms_norm", hidden_states)
        return hidden_states * weight

    def conv1d(hidden_states, weight, bias=None, activation=None, **kwargs):
        record("conv1d", hidden_states)
        return hidden_states * weight.sum() + bias.sum()

    def chunk_scan(hidden_states, dt, A, B, C, chunk_size, initial_states=None, **kwargs):
        record("chunk_scan", hidden_states, dt, B, C, initial_states)
        states = hidden_states.new_zeros(*hidden_states.shape[:1], *hidden_states.shape[2:], B.shape[-1])
        states = states.float() + dt.sum() + C.sum() + (initial_states if initial_states is not None else 0)
        return hidden_states + states.sum().to(hidden_states.dtype), states

    monkeypatch.setattr(kernel_choice, "mamba_ssm_kernels", lambda: Kernels(None, split_conv1d_scan, rms_norm))
    monkeypatch.setattr(modeling_mamba2, "causal_conv1d_fn", conv1d)
    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", chunk_scan)
    monkeypatch.setattr(checkpoint_grid, "_RandomState", NoRandomState)
    return seen


@pytest.mark.parametrize("order", ["layer-major", "sequence-major"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_no_kernel_gets_more_than_it_can_index(kernels, monkeypatch, fused, order):
    """MA-GC cuts a sequence for which a user sets one segment; for planned segments, see test_checkpoint_plan."""

    def forwards_of(layers, device):
        return [fused_layer.FusedLayer(layer) if fused else layer for layer in layers], fused

    monkeypatch.setattr(multi_axis_mamba2, "forwards_of", forwards_of)
    config = Ma2mbaConfig.from_preset("3.1b").text_config
    config.num_hidden_layers = 2
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = Mamba2Model(config).train()
            enable_multi_axis_checkpointing(model, layer_interval=1, sequence_interval=LENGTH, order=order)
            hidden_states = torch.empty(1, LENGTH, config.hidden_size, requires_grad=True)
            assert extent(hidden_states) > LIMIT
            with Widest() as widest:
                output = model(inputs_embeds=hidden_states).last_hidden_state
                output.backward(torch.empty_like(output))
    finally:
        torch.set_default_dtype(torch.float32)
    assert hidden_states.grad.shape == hidden_states.shape

    assert set(kernels) == ({"split_conv1d_scan", "rms_norm"} if fused else {"conv1d", "chunk_scan"})
    assert all(0 < max(extents) < LIMIT for extents in kernels.values())
    assert max(map(max, kernels.values())) > LIMIT / 2  # the segments are not needlessly short
    too_wide = {name for name, extent in widest.extents.items() if extent >= LIMIT}
    assert too_wide <= COPYING
    assert {"mm", "mul"} & set(widest.extents) - too_wide  # the operations were recorded
