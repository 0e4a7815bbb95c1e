"""Stand-ins for the stock Mamba-2 classes: layers in a grid (paper §3.2), and the loss in pieces."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, Mamba2ForCausalLM, Mamba2Model
from transformers.masking_utils import create_recurrent_attention_mask
from transformers.models.mamba2.modeling_mamba2 import Mamba2CausalLMOutput, Mamba2Output

from ..mamba2 import hold, refuse_bypassed_adapters
from .fused_layer import forwards_of
from .grid import run_checkpointed
from .loss_in_pieces import can_be_in_pieces, causal_lm_loss
from .sharded_modules import has_forward_hooks, is_sharded, processes_in_step
from .swapped_class import Swappable


class MultiAxisMamba2Model(Swappable, Mamba2Model):
    """A `Mamba2Model` whose training steps run its layers in a grid."""

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        cache_params=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        attention_mask=None,
        positions_to_keep=None,
        **kwargs,
    ):
        """`Mamba2Model.forward` with one more argument.

        Args:
            positions_to_keep: `(batch_size, sequence_length)`, True for the wanted positions. With it,
                `last_hidden_state` is `(num_positions, hidden_size)`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        settings = vars(self).get("_multi_axis_checkpointing")
        in_grid = settings is not None and self.training and torch.is_grad_enabled()
        if in_grid:
            settings.passes += 1
        if in_grid and output_hidden_states:
            in_grid = False
            groups = processes_in_step(self)
            if groups:
                settings.agree(groups, self.norm_f.weight.device, None, None)
        if in_grid:
            outputs = self._forward_in_grid(
                input_ids, inputs_embeds, cache_params, use_cache, attention_mask, positions_to_keep, **kwargs
            )
        else:
            # Not by `super()`: accelerate's hooks may hold this method bound, and call it once the class is restored.
            outputs = Mamba2Model.forward(
                self,
                input_ids,
                inputs_embeds=inputs_embeds,
                cache_params=cache_params,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                attention_mask=attention_mask,
                **kwargs,
            )
            if positions_to_keep is not None:
                outputs["last_hidden_state"] = outputs.last_hidden_state[positions_to_keep]
        return outputs if return_dict or (return_dict is None and self.config.return_dict) else outputs.to_tuple()

    @classmethod
    def around(cls, swapped: type, forward: Callable) -> Callable:
        """A subclass's own forward pass, which must call this class's: otherwise no grid would run."""

        @functools.wraps(forward)
        def around(self, *args, **kwargs):
            settings = vars(self).get("_multi_axis_checkpointing")
            passes = settings and settings.passes
            outputs = forward(self, *args, **kwargs)
            if settings and self.training and torch.is_grad_enabled() and settings.passes == passes:
                raise RuntimeError(
                    f"{type(self).__name__} has a forward of its own that does not call super().forward, which does "
                    f"multi-axis gradient checkpointing: call it, or disable gradient checkpointing."
                )
            return outputs

        return around

    # Outside of torch.compile's graphs, as each length has a plan of its own.
    @torch.compiler.disable
    def _forward_in_grid(
        self, input_ids, inputs_embeds, cache_params, use_cache, attention_mask, positions_to_keep, **kwargs
    ) -> Mamba2Output:
        hold(self)
        if kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None:
            raise ValueError("Multi-axis gradient checkpointing cannot keep packed sequences apart: pad them instead.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        inputs, embedding = inputs_embeds, None
        if inputs_embeds is None:
            # The walk looks ids up segment by segment, if looking up is all that the embedding does.
            embedding = self.embeddings if _only_looks_up(self.embeddings) and not _any_sharded(self) else None
            inputs = self.embeddings(input_ids) if embedding is None else input_ids
        if use_cache and cache_params is None:
            cache_params = DynamicCache(config=self.config)
        for layer in self.layers:
            if getattr(layer, "gradient_checkpointing", False):
                layer.gradient_checkpointing = False  # Transformers' own, switched on by Trainer: once is enough
        refuse_bypassed_adapters(self.layers)
        _refuse_what_sees_the_whole_sequence(self.layers)
        mask = create_recurrent_attention_mask(
            config=self.config, inputs_embeds=inputs, attention_mask=attention_mask, past_key_values=cache_params
        )
        forwards, fused = forwards_of(list(self.layers), self.norm_f.weight.device)
        if fused and mask is not None and bool(((mask != 0) & (mask != 1)).any()):
            forwards, fused = None, False  # the kernels know masks of 0 and 1 only
        hidden_states = run_checkpointed(
            list(self.layers),
            inputs,
            self._multi_axis_checkpointing.plan(self, inputs, fused, whole_output=positions_to_keep is None),
            forwards=forwards,
            embedding=embedding,
            attention_mask=mask,
            cache_params=cache_params,
            final_norm=self.norm_f,
            positions_to_keep=positions_to_keep,
            **{"ssd_scan": True, **kwargs},
        )
        return Mamba2Output(last_hidden_state=hidden_states, cache_params=cache_params if use_cache else None)


class MultiAxisMamba2ForCausalLM(Swappable, Mamba2ForCausalLM):
    """A `Mamba2ForCausalLM` whose training steps take the loss in pieces."""

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        cache_params=None,
        labels=None,
        output_hidden_states=None,
        return_dict=None,
        use_cache=None,
        attention_mask=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """`Mamba2ForCausalLM.forward`, except in training steps with labels.

        There the head runs on a few supervised positions at a time, and the output's `logits` are None.
        """
        inputs = dict(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            output_hidden_states=output_hidden_states,
            use_cache=use_cache,
            attention_mask=attention_mask,
        )
        in_grid = "_multi_axis_checkpointing" in vars(self.backbone) and self.training and torch.is_grad_enabled()
        whole = isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0
        if not in_grid or labels is None or whole or not can_be_in_pieces(self, kwargs):
            return Mamba2ForCausalLM.forward(
                self, labels=labels, return_dict=return_dict, logits_to_keep=logits_to_keep, **inputs, **kwargs
            )
        ignored = kwargs.get("ignore_index", -100)
        targets = kwargs.pop("shift_labels", None)
        if targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=ignored)
        if not has_forward_hooks(self.backbone):  # hooks expect all positions
            inputs["positions_to_keep"] = targets != ignored
        outputs = self.backbone(**inputs, return_dict=True)
        rows = outputs.last_hidden_state
        if "positions_to_keep" in inputs:
            targets = targets[inputs["positions_to_keep"]]
        loss = causal_lm_loss(self.lm_head, rows, None, shift_labels=targets.to(rows.device), **kwargs)
        outputs = Mamba2CausalLMOutput(
            loss=loss, cache_params=outputs.cache_params, hidden_states=outputs.hidden_states
        )
        return outputs if return_dict or (return_dict is None and self.config.return_dict) else outputs.to_tuple()


def _refuse_what_sees_the_whole_sequence(layers: nn.ModuleList):
    """Refuse layers that cannot run segment by segment.

    Raises:
        ValueError: for adapters that count positions, and for layers in PyTorch's checkpoint wrapper.
    """
    for path, module in layers.named_modules(prefix="layers"):
        if any(
            type(variant).__name__.startswith("ALora") for variant in vars(module).get("lora_variant", {}).values()
        ):
            raise ValueError(
                f"{path} has an activated LoRA adapter, which counts positions of the whole sequence, but multi-axis "
                f"gradient checkpointing runs layers segment by segment: disable one of them."
            )
        if hasattr(module, "_checkpoint_wrapped_module"):
            raise ValueError(
                f"{path} is in PyTorch's checkpoint wrapper: take the wrapper off, or disable multi-axis gradient "
                f"checkpointing."
            )


def _only_looks_up(embedding: nn.Module) -> bool:
    """Whether a module is a plain embedding: no hooks, no adapter, no sparse gradients."""
    hooks = has_forward_hooks(embedding) or embedding._backward_hooks or embedding._backward_pre_hooks
    module = torch.nn.modules.module
    hooks = hooks or module._global_backward_hooks or module._global_backward_pre_hooks or "forward" in vars(embedding)
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    return plain and not (hooks or embedding.sparse or embedding.scale_grad_by_freq)


def _any_sharded(model: nn.Module) -> bool:
    return any(map(is_sharded, model.modules()))
