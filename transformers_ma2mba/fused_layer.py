"""A stock Mamba-2 layer run by mamba-ssm's fused training kernel, with its state carried in and out.

`mamba_split_conv1d_scan_combined` takes a layer from its projected input to its output at once, and keeps hardly more
than that input for backward. It can start its scan from a state, but not its convolution. So the last inputs that the
convolution saw are put before the segment's own, with step sizes of -inf before the softplus: the convolution reads
them, and to the scan they are steps of size zero, which neither decay the state nor write to it. Their outputs are cut
off. Both passes are those of the stock layer, and the kernels are mamba-ssm's as they are.

The kernel does not know padding either. Padded positions get steps of size zero, too, and gates of zero: so nothing
leaves them but the bias of the output projection, as in the stock layer.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2Mixer,
    Mamba2RMSNorm,
    MambaRMSNormGated,
    apply_mask_to_padding_states,
)
from transformers.utils import logging

from .recurrent_state import LayerState, read_state, write_state
from .sharded_modules import is_sharded, plain_forward

logger = logging.get_logger(__name__)


class _Kernels(NamedTuple):
    """What is used of mamba-ssm, or why it cannot be."""

    split_conv1d_scan: Callable | None = None
    rms_norm: Callable | None = None
    missing: str | None = None


@functools.cache
def _kernels() -> _Kernels:
    """Imported when they are first asked for: importing mamba-ssm takes seconds, and a broken installation of it fails
    in many ways."""
    try:
        from mamba_ssm.ops.triton import ssd_combined
    except Exception as error:
        return _Kernels(missing=f"mamba-ssm cannot be imported ({type(error).__name__}: {error})")
    if getattr(ssd_combined, "causal_conv1d_fwd_function", None) is None:
        return _Kernels(missing="causal-conv1d, or a release of it that this mamba-ssm knows, cannot be imported")
    try:
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
    except Exception:
        rms_norm_fn = None
    return _Kernels(ssd_combined.mamba_split_conv1d_scan_combined, rms_norm_fn)


def forwards_of(layers: list[nn.Module], device: torch.device) -> tuple[list[Callable], bool]:
    """How MA-GC is to call each layer, and whether that is the fused way: all of them, or none. Says so once."""
    reason = why_not_fused(layers, device)
    if reason is None:
        logger.info_once("MA-GC runs Mamba-2 layers with mamba-ssm's fused kernels.")
        return [FusedLayer(layer) for layer in layers], True
    if device.type == "cuda":
        logger.warning_once(f"MA-GC runs Mamba-2 layers without mamba-ssm's fused kernels: {reason}.")
    return [plain_forward(layer) for layer in layers], False


def why_not_fused(layers: list[nn.Module], device: torch.device) -> str | None:
    """Why the fused kernels cannot run these layers; None if they can."""
    # In Triton's interpreter, they run anywhere.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they run on CUDA devices, and this one is {device.type}"
    if _kernels().missing is not None:
        return _kernels().missing
    return next(filter(None, map(_why_not_this, layers)), None)


def _why_not_this(layer: nn.Module) -> str | None:
    if not isinstance(layer, Mamba2Block):
        return f"{type(layer).__name__} is not the stock layer"
    name, mixer = f"layers.{layer.layer_idx}", layer.mixer
    passed_by = "has a hook, an adapter or a class of its own, which they would pass by"
    # The hooks of a sharded layer run around the whole walk (see checkpoint_grid), not around its calls.
    if not is_sharded(layer) and not _is_plain(layer, Mamba2Block):
        return f"{name} {passed_by}"
    if not _is_plain(mixer, Mamba2Mixer):
        return f"{name}.mixer {passed_by}"
    if not _is_plain(mixer.conv1d, nn.Conv1d):
        return f"{name}.mixer.conv1d {passed_by}"
    if not _is_plain(mixer.norm, MambaRMSNormGated):
        return f"{name}.mixer.norm {passed_by}"
    if mixer.activation not in ("silu", "swish"):
        return f"their activation is silu, that of {name} is {mixer.activation}"
    if not 2 <= mixer.conv_kernel_size <= 4:
        return f"their convolution is 2 to 4 tokens wide, that of {name} is {mixer.conv_kernel_size}"
    if mixer.conv_dim % 8 or mixer.intermediate_size % 8:
        return f"they take widths in multiples of 8, and {name} has {mixer.intermediate_size} and {mixer.conv_dim}"
    if mixer.time_step_limit[0] > 0:
        return f"{name} has a least step size, {mixer.time_step_limit[0]}, and a state goes in by steps of size zero"
    if any(parameter.dtype == torch.float64 for parameter in layer.parameters()):
        return f"{name} is in float64, which they do not know"
    return None


def _is_plain(module: nn.Module, stock: type) -> bool:
    """Whether a module is of the stock class itself, which parametrized, adapted, quantized and sharded ones are not,
    and calling it runs the forward of that class and nothing else."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) is stock and "forward" not in vars(module) and not any(getattr(module, kind) for kind in hooks)


class FusedLayer:
    """A stock `Mamba2Block`, called like it, with its mixer in the fused kernel. The state in `cache_params` is
    replaced, as in [`CarriedLayer`], and gradients flow through both the old and the new one.

    Padded positions give the outputs that they give in the stock layer. They leave the recurrent state as it is, where
    the stock layer lets it decay by a step of size softplus(dt_bias). So:

    - left padding that starts from an empty state has nothing to decay: outputs, states and gradients are the same;
    - right padding changes no output: only the final recurrent state differs, which is that after the last real token;
    - real tokens after padding that follows a state, be it given or left by real tokens, continue that state
      undecayed. Their convolution sees the padding as in the stock layer.

    For packed sequences, it calls the layer as it is.
    """

    def __init__(self, layer: Mamba2Block):
        self.layer = layer
        # Bound now: while a sharded layer's hooks run, its `forward` is that of the whole walk.
        self.plain_forward = plain_forward(layer)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        cache_params: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`(batch_size, sequence_length, hidden_size)`, as `hidden_states`; `attention_mask`, `(batch_size,
        sequence_length)`, is 0 for padding, and keywords are for the plain layer."""
        if kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None:
            return self.plain_forward(
                hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
            )
        residual = hidden_states.float() if self.layer.residual_in_fp32 else hidden_states
        return residual + self._mix(self._norm(hidden_states), cache_params, attention_mask)

    def _norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = self.layer.norm
        hidden_states = hidden_states.to(norm.weight.dtype)
        if _kernels().rms_norm is None or not _is_plain(norm, Mamba2RMSNorm):
            return norm(hidden_states)
        # One kernel, which keeps its input alone for backward.
        return _kernels().rms_norm(hidden_states, norm.weight, None, eps=norm.variance_epsilon)

    def _mix(
        self, hidden_states: torch.Tensor, cache_params: Cache | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        mixer, dtype = self.layer.mixer, hidden_states.dtype
        cached = None if cache_params is None else cache_params.layers[mixer.layer_idx]
        before = LayerState() if cached is None else read_state(cached)
        # The mask is kept for backward as it is: all layers share it.
        projected = mixer.in_proj(apply_mask_to_padding_states(hidden_states, attention_mask))
        prefix_length = 0
        if cached is not None or attention_mask is not None:
            sizes = (mixer.intermediate_size, mixer.num_heads, mixer.conv_kernel_size)
            prefix_length = mixer.conv_kernel_size - 1 if before.conv is not None else 0
            # What a plain projection returns is nobody else's, and autograd does not keep it. What adapters and hooks
            # return may be kept. With a bias, some releases of PyTorch return a view, which cannot be marked dirty.
            may_overwrite = _is_plain(mixer.in_proj, nn.Linear) and projected._base is None
            projected, conv_after = _KernelInput.apply(projected, before.conv, attention_mask, *sizes, may_overwrite)

        # The kernel keeps no input for the output projection, but makes it again to find the gradient of its weight.
        # A frozen one needs neither.
        with_projection = _is_plain(mixer.out_proj, nn.Linear) and mixer.out_proj.weight.requires_grad
        output = _kernels().split_conv1d_scan(
            projected,
            mixer.conv1d.weight.squeeze(1),
            mixer.conv1d.bias,
            mixer.dt_bias,
            -torch.exp(mixer.A_log.float()),
            D=mixer.D,
            chunk_size=mixer.chunk_size,
            initial_states=before.recurrent,
            dt_limit=mixer.time_step_limit,
            return_final_states=cached is not None,
            activation=mixer.activation,
            rmsnorm_weight=mixer.norm.weight,
            rmsnorm_eps=mixer.norm.variance_epsilon,
            outproj_weight=mixer.out_proj.weight if with_projection else None,
            outproj_bias=mixer.out_proj.bias if with_projection else None,
            headdim=mixer.head_dim,
            ngroups=mixer.n_groups,
            norm_before_gate=False,
        )
        if cached is not None:
            output, recurrent_after = output
            write_state(cached, LayerState(conv_after, recurrent_after))
        output = output[:, prefix_length:]
        return output if with_projection else mixer.out_proj(output.to(dtype))


class _KernelInput(torch.autograd.Function):
    """Puts the convolution's last inputs before a segment's projected inputs, takes its last inputs from these, and
    shuts out padding.

    One Function, as autograd's own steps would write a gradient as large as the projection for the few inputs taken,
    and copy the projection once more for padding.
    """

    @staticmethod
    def forward(ctx, projected, conv, attention_mask, intermediate_size, num_heads, conv_kernel_size, may_overwrite):
        """`(batch_size, tokens, projection_size)`, a convolution state, `(batch_size, conv_dim, conv_kernel)`, and a
        mask, `(batch_size, tokens)`, 0 for padding, to `(batch_size, conv_kernel - 1 + tokens, projection_size)` and
        the state after. Either of the state and the mask may be None.

        Without a state, nothing is put before. What is, is all but its oldest input, with gates that are shut and no
        time to write in. Padding gets the same gates and times, and keeps its inputs of the convolution; without a
        state, it gets them in `projected` itself if `may_overwrite`, or else in a copy.
        """
        ctx.intermediate_size, ctx.num_heads = intermediate_size, num_heads
        ctx.convolved = slice(intermediate_size, projected.shape[-1] - num_heads)
        ctx.conv_kernel_size, ctx.prefix_length = conv_kernel_size, 0
        ctx.save_for_backward(attention_mask)
        if conv is not None:
            prefix = F.pad(conv[..., 1:].transpose(1, 2).to(projected.dtype), (intermediate_size, 0))
            prefix = F.pad(prefix, (0, num_heads), value=-torch.inf)
            ctx.prefix_length, ctx.conv_dtype = prefix.shape[1], conv.dtype
            result = torch.cat([prefix, projected], dim=1)
        elif attention_mask is None:
            result = projected.view_as(projected)
        elif may_overwrite:
            ctx.mark_dirty(projected)
            result = projected
        else:
            result = projected.clone()
        if attention_mask is not None:
            _fill_padding(result[:, ctx.prefix_length :], attention_mask, intermediate_size, num_heads, dt=-torch.inf)
        last = result[:, -conv_kernel_size:, ctx.convolved].transpose(1, 2)
        # Memory of its own: a view would keep all that is projected.
        last = F.pad(last, (conv_kernel_size - last.shape[-1], 0)).clone(memory_format=torch.contiguous_format)
        ctx.shape = result.shape
        ctx.set_materialize_grads(False)
        return result, last

    @staticmethod
    def backward(ctx, grad, grad_last):
        (attention_mask,) = ctx.saved_tensors
        if grad is None:  # nothing but the state is wanted
            grad = grad_last.new_zeros(ctx.shape)
        # In place: it is the kernel's own, and nobody else has it.
        if grad_last is not None:
            count = min(ctx.conv_kernel_size, grad.shape[1])
            grad[:, -count:, ctx.convolved] += grad_last[..., -count:].transpose(1, 2)
        grad_conv = None
        if ctx.prefix_length and ctx.needs_input_grad[1]:
            grad_conv = F.pad(grad[:, : ctx.prefix_length, ctx.convolved].transpose(1, 2), (1, 0)).to(ctx.conv_dtype)
        grad = grad[:, ctx.prefix_length :]
        if attention_mask is not None:
            # What was written over has no gradient. That of a shut gate is not zero in the kernel, but large: there
            # the norm divides by the root of epsilon.
            _fill_padding(grad, attention_mask, ctx.intermediate_size, ctx.num_heads, dt=0.0)
        return grad, grad_conv, None, None, None, None, None


def _fill_padding(projected, attention_mask, intermediate_size, num_heads, dt):
    """Writes gates of zero and the given time steps into `(batch_size, tokens, projection_size)` where the mask,
    `(batch_size, tokens)`, is 0."""
    padded = (attention_mask == 0)[..., None]
    projected[..., :intermediate_size].masked_fill_(padded, 0.0)
    projected[..., -num_heads:].masked_fill_(padded, dt)
