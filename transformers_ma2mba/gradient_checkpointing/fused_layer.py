"""A stock Mamba-2 layer run by mamba-ssm's fused training kernel, with its state carried in and out.

`mamba_split_conv1d_scan_combined` computes a layer's output from its projected input at once, and keeps hardly more
than that input for backward. Its scan can start from a state, but its convolution cannot. So `FusedLayer` puts the
convolution's previous inputs before the segment's own, with step sizes of -inf before the softplus: the convolution
reads them, and the scan sees steps of size zero, which neither decay the state nor write to it. Their outputs are cut
off. Both passes equal those of the stock layer, and mamba-ssm's kernels are used as they are.

The kernel does not support padding either. Padded positions also get steps of size zero, and gates of zero, so that
their only output is the bias of the output projection, as in the stock layer.
"""

from collections.abc import Callable

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

from ..mamba2 import LayerState, kernel_choice, read_state, write_state
from .sharded_modules import is_sharded, plain_forward

logger = logging.get_logger(__name__)


def forwards_of(layers: list[nn.Module], device: torch.device) -> tuple[list[Callable], bool]:
    """Choose how MA-GC calls each layer, and say so once.

    Returns:
        A callable for each layer, and whether these are `FusedLayer`s: all of them are, or none.
    """
    reason = why_not_fused(layers, device)
    if reason is None:
        logger.info_once("MA-GC runs Mamba-2 layers with mamba-ssm's fused kernels.")
        return [FusedLayer(layer) for layer in layers], True
    if kernel_choice.runs_kernels(device):
        logger.warning_once(f"MA-GC runs Mamba-2 layers without mamba-ssm's fused kernels: {reason}.")
    return [plain_forward(layer) for layer in layers], False


def why_not_fused(layers: list[nn.Module], device: torch.device) -> str | None:
    """Return the reason why the fused kernels cannot run these layers on a device; None if they can."""
    if not kernel_choice.runs_kernels(device):
        return f"they run on CUDA devices, and this one is {device.type}"
    missing = kernel_choice.mamba_ssm_kernels().missing
    return missing or next(filter(None, map(_why_not_this, layers)), None)


def _why_not_this(layer: nn.Module) -> str | None:
    if not isinstance(layer, Mamba2Block):
        return f"{type(layer).__name__} is not the stock layer"
    name, mixer = f"layers.{layer.layer_idx}", layer.mixer
    stock = {"": Mamba2Block, "mixer": Mamba2Mixer, "mixer.conv1d": nn.Conv1d, "mixer.norm": MambaRMSNormGated}
    for path, stock_class in stock.items():
        module = layer.get_submodule(path)
        # The hooks of a sharded layer run around MA-GC's whole run (see checkpoint_grid), not around each call.
        sharded = module is layer and is_sharded(layer)
        if not sharded and not _is_plain(module, stock_class):
            where = f"{name}.{path}".rstrip(".")
            return f"{where} has a hook, an adapter or a class of its own, which they would bypass"
    if mixer.activation not in ("silu", "swish"):
        return f"their activation is silu, and that of {name} is {mixer.activation}"
    if not 2 <= mixer.conv_kernel_size <= 4:
        return f"their convolution is 2 to 4 tokens wide, and that of {name} is {mixer.conv_kernel_size}"
    if mixer.conv_dim % 8 or mixer.intermediate_size % 8:
        return f"they need widths in multiples of 8, and {name} has {mixer.intermediate_size} and {mixer.conv_dim}"
    if mixer.time_step_limit[0] > 0:
        return f"{name} has a least step size, {mixer.time_step_limit[0]}, and they carry a state in by steps of zero"
    if any(parameter.dtype == torch.float64 for parameter in layer.parameters()):
        return f"{name} is in float64, which they do not support"
    return None


def _is_plain(module: nn.Module, stock: type) -> bool:
    """Whether a call of a module runs the forward of the stock class and nothing else.

    Parametrized, adapted, quantized and sharded modules have another class.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(module) is stock and "forward" not in vars(module) and not any(getattr(module, kind) for kind in hooks)


class FusedLayer:
    """A stock `Mamba2Block` whose mixer runs in the fused kernel; calls have the block's signature.

    A call replaces the state in `cache_params`, like [`CarriedLayer`], and gradients flow through the old state and
    the new one.

    Padded positions have the same outputs as in the stock layer. But they leave the recurrent state unchanged, where
    the stock layer lets it decay by a step of size softplus(dt_bias). Therefore:

    - after left padding from an empty state, outputs, states and gradients are the same: nothing decays;
    - after right padding, the outputs are the same, and the final recurrent state is that after the last real token;
    - where padding follows a non-empty state, the real tokens after it continue that state undecayed. Their
      convolution sees the padding as in the stock layer.

    Packed sequences go through the stock layer.
    """

    def __init__(self, layer: Mamba2Block):
        self.layer = layer
        # Bound now: while a sharded layer's hooks run, its `forward` is that of MA-GC's whole run.
        self.plain_forward = plain_forward(layer)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        cache_params: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden_states: `(batch_size, sequence_length, hidden_size)`.
            cache_params: the states of all layers; this layer's is replaced.
            attention_mask: `(batch_size, sequence_length)`, 0 for padding.
            kwargs: for the stock layer, if sequences are packed.

        Returns:
            `(batch_size, sequence_length, hidden_size)`.
        """
        if kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None:
            return self.plain_forward(
                hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
            )
        residual = hidden_states.float() if self.layer.residual_in_fp32 else hidden_states
        return residual + self._mix(self._norm(hidden_states), cache_params, attention_mask)

    def _norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = self.layer.norm
        hidden_states = hidden_states.to(norm.weight.dtype)
        rms_norm = kernel_choice.mamba_ssm_kernels().rms_norm
        if rms_norm is None or not _is_plain(norm, Mamba2RMSNorm):
            return norm(hidden_states)
        # One kernel, which keeps only its input for backward.
        return rms_norm(hidden_states, norm.weight, None, eps=norm.variance_epsilon)

    def _mix(
        self, hidden_states: torch.Tensor, cache_params: Cache | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        mixer, dtype = self.layer.mixer, hidden_states.dtype
        cached = None if cache_params is None else cache_params.layers[mixer.layer_idx]
        before = LayerState() if cached is None else read_state(cached)
        # Backward keeps the mask itself, which all layers share.
        projected = mixer.in_proj(apply_mask_to_padding_states(hidden_states, attention_mask))
        prefix_length = 0
        if cached is not None or attention_mask is not None:
            sizes = (mixer.intermediate_size, mixer.num_heads, mixer.conv_kernel_size)
            prefix_length = mixer.conv_kernel_size - 1 if before.conv is not None else 0
            # Nobody else refers to a plain projection's output, and autograd does not keep it. The output of adapters
            # and hooks may be kept. With a bias, some releases of PyTorch return a view, which cannot be marked dirty.
            may_overwrite = _is_plain(mixer.in_proj, nn.Linear) and projected._base is None
            projected, conv_after = _KernelInput.apply(projected, before.conv, attention_mask, *sizes, may_overwrite)

        # The kernel keeps no input for the output projection, but computes it again for the gradient of its weight. A
        # frozen projection needs neither.
        with_projection = _is_plain(mixer.out_proj, nn.Linear) and mixer.out_proj.weight.requires_grad
        output = kernel_choice.mamba_ssm_kernels().split_conv1d_scan(
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
    """Prepare the kernel's input: the state of the convolution, the projected segment, and padding shut out.

    It is one Function because autograd's own operations would write a gradient as large as the projection for the few
    inputs that become the next state, and copy the projection once more for padding.
    """

    @staticmethod
    def forward(ctx, projected, conv, attention_mask, intermediate_size, num_heads, conv_kernel_size, may_overwrite):
        """Put a prefix before the segment, and shut the gates and steps of padding.

        The prefix is all but the oldest input in the convolution's state, with gates of zero and steps of size zero.
        Padded positions get the same gates and steps, and keep their inputs of the convolution.

        Args:
            projected: `(batch_size, tokens, projection_size)`. Without a state, padding is written into this tensor if
                `may_overwrite`, or else into a copy.
            conv: the convolution's state, `(batch_size, conv_dim, conv_kernel)`, or None for no prefix.
            attention_mask: `(batch_size, tokens)`, 0 for padding, or None.

        Returns:
            The kernel's input, `(batch_size, conv_kernel - 1 + tokens, projection_size)` with a prefix, and the
            convolution's state after it.
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
        # A copy: a view would keep the whole projection in memory.
        last = F.pad(last, (conv_kernel_size - last.shape[-1], 0)).clone(memory_format=torch.contiguous_format)
        ctx.shape = result.shape
        ctx.set_materialize_grads(False)
        return result, last

    @staticmethod
    def backward(ctx, grad, grad_last):
        (attention_mask,) = ctx.saved_tensors
        if grad is None:  # the loss depends on the state alone
            grad = grad_last.new_zeros(ctx.shape)
        # In place, because nobody else refers to the gradient, which the kernel made.
        if grad_last is not None:
            count = min(ctx.conv_kernel_size, grad.shape[1])
            grad[:, -count:, ctx.convolved] += grad_last[..., -count:].transpose(1, 2)
        grad_conv = None
        if ctx.prefix_length and ctx.needs_input_grad[1]:
            grad_conv = F.pad(grad[:, : ctx.prefix_length, ctx.convolved].transpose(1, 2), (1, 0)).to(ctx.conv_dtype)
        grad = grad[:, ctx.prefix_length :]
        if attention_mask is not None:
            # Overwritten values have no gradient. The kernel gives a shut gate a large one, because there the norm
            # divides by the root of epsilon.
            _fill_padding(grad, attention_mask, ctx.intermediate_size, ctx.num_heads, dt=0.0)
        return grad, grad_conv, None, None, None, None, None


def _fill_padding(projected, attention_mask, intermediate_size, num_heads, dt):
    """Write gates of zero and the given step sizes where the mask is 0.

    Shapes: projected `(batch_size, tokens, projection_size)`, mask `(batch_size, tokens)`.
    """
    padded = (attention_mask == 0)[..., None]
    projected[..., :intermediate_size].masked_fill_(padded, 0.0)
    projected[..., -num_heads:].masked_fill_(padded, dt)
