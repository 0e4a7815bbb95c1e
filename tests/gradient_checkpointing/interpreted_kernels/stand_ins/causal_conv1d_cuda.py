"""Stands in for causal-conv1d's compiled extension: the same convolution in plain PyTorch.

Its gradients are written out, because the extension is called below autograd.

Shapes: x, dout, dx `(batch_size, channels, length)`, weight `(channels, width)`, bias `(channels,)`.
"""

import torch
import torch.nn.functional as F


def _shifted(x, steps):
    """Shift to later steps, with zeros at the start."""
    return F.pad(x, (steps, 0))[..., : x.shape[-1]]


def _convolve(x, weight, bias):
    width = weight.shape[1]
    y = sum(weight[:, [tap]] * _shifted(x, width - 1 - tap) for tap in range(width))
    return y if bias is None else y + bias[:, None]


def causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu_activation):
    assert seq_idx is None and initial_states is None and final_states_out is None
    y = _convolve(x.float(), weight.float(), None if bias is None else bias.float())
    out.copy_(F.silu(y) if silu_activation else y)


def causal_conv1d_bwd(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, silu_activation
):
    assert seq_idx is None and initial_states is None and dfinal_states is None and dinitial_states is None
    x, wide_weight, dy = x.float(), weight.float(), dout.float()
    width = weight.shape[1]
    if silu_activation:
        y = _convolve(x, wide_weight, None if bias is None else bias.float())
        gate = torch.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    for tap in range(width):
        dweight[:, tap] += (dy * _shifted(x, width - 1 - tap)).sum((0, 2))
    if dbias is not None:
        dbias += dy.sum((0, 2))
    dx.copy_(_convolve(dy.flip(-1), wide_weight, None).flip(-1))
