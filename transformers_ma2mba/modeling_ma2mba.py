"""Video-Ma²mba (arXiv:2411.19460, §3.4): every frame through CLIP, pooled, projected, into a stock Mamba-2.

Shape suffixes: B batch, T tokens, F frames, P patches of a frame, N tokens of a frame, C width of the vision encoder,
D width of the language model, K supervised positions, V vocabulary.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.mamba2.modeling_mamba2 import Mamba2Output
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_ma2mba import Ma2mbaConfig
from .gradient_checkpointing import (
    CapturedTensors,
    can_be_in_pieces,
    causal_lm_loss,
    checkpointing_options,
    disable_multi_axis_checkpointing,
    enable_multi_axis_checkpointing,
    has_forward_hooks,
    is_multi_axis_checkpointed,
    is_sharded,
    max_over_processes,
    processes_in_step,
)
from .mamba2 import (
    cache_layers_of,
    has_special_projection,
    hold,
    indexable_tokens,
    refuse_bypassed_adapters,
    segment_bounds,
)

# Transformers installs these hooks in the first call that returns hidden states. torch.compile cannot trace that call.
_install_capturing_hooks = torch.compiler.disable(maybe_install_capturing_hooks)
_TWO_INPUTS = "Give either pixel_values_videos or vision_features_videos, and not both."


@dataclass
class Ma2mbaModelOutput(ModelOutput):
    """Output of [`Ma2mbaModel`].

    last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
        Hidden states after the final norm.
    cache_params (`Cache`, *optional*, returned with `use_cache=True`):
        The recurrent state of every layer at the last position; its size does not depend on the sequence.
    hidden_states (`tuple[torch.Tensor]`, *optional*, returned with `output_hidden_states=True`):
        Output of each layer.
    """

    last_hidden_state: torch.Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class Ma2mbaForVideoQAOutput(ModelOutput):
    """Output of [`Ma2mbaForVideoQA`].

    loss (`torch.Tensor` of shape `()`, *optional*, returned with `labels`):
        Next-token cross-entropy over the supervised positions.
    logits (`torch.Tensor` of shape `(batch_size, num_logits, vocab_size)`, *optional*):
        Without labels, at the positions that `logits_to_keep` selects. With labels, the predictions of the supervised
        tokens only, in order; zeros fill up the rows that have fewer of them. With labels in a training step under
        multi-axis gradient checkpointing, None: such a step computes the logits of a few positions at a time.
    cache_params, hidden_states: as in [`Ma2mbaModelOutput`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class Ma2mbaMultiModalProjector(nn.Module):
    """Two linear layers with a GELU between them, into the language model's width (paper §3.4)."""

    def __init__(self, config: Ma2mbaConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, width, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=config.multimodal_projector_bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project `(..., vision_width)` features to `(..., hidden_size)`."""
        return self.linear_2(self.act(self.linear_1(features)))


def pool_patches(features_FPC: torch.Tensor, mode: str, stride: int, rounding: str = "up") -> torch.Tensor:
    """Pool a square grid of patch features (paper §3.4).

    Args:
        features_FPC: `(num_frames, patches_per_side ** 2, vision_width)`, row by row.
        mode: `"bilinear"`, `"average"` or `"max"`.
        stride: the pooling factor along each side.
        rounding: `"up"` or `"down"`, for a side that the stride does not divide.

    Returns:
        `(num_frames, pooled_patches_per_side ** 2, vision_width)`, row by row.
    """
    num_frames, num_patches, channels = features_FPC.shape
    side = math.isqrt(num_patches)
    grid = features_FPC.transpose(1, 2).reshape(num_frames, channels, side, side)
    if mode == "bilinear":
        pooled_side = {"up": math.ceil, "down": math.floor}[rounding](side / stride)
        grid = F.interpolate(grid, size=(pooled_side, pooled_side), mode="bilinear", align_corners=False)
    else:
        pool = {"average": F.avg_pool2d, "max": F.max_pool2d}[mode]
        grid = pool(grid, kernel_size=stride, stride=stride, ceil_mode=rounding == "up")
    return grid.flatten(2).transpose(1, 2)


def _cast_for(linear: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Cast inputs to the type of a layer's weight. A quantized layer holds integers, and casts its inputs itself."""
    return inputs.to(linear.weight.dtype) if linear.weight.is_floating_point() else inputs


def _prepare_4bit_layer(layer: nn.Module):
    """Keep bitsandbytes from changing a 4-bit layer at its first call.

    It converts the bias to the type of the product: do so now, because fingerprints depend on it. On a CPU with
    AVX512-BF16 it also rearranges the weight in evaluation. It then fails for Mamba-2's widths, which need not be
    multiples of 32, and later training steps get no gradients.
    """
    layer.support_avx512bf16_for_cpu = False
    if layer.bias is not None and layer.compute_dtype is not None:
        layer.bias.data = layer.bias.data.to(layer.compute_dtype)


class Ma2mbaPreTrainedModel(PreTrainedModel):
    """Base class: loading, tied weights and gradient checkpointing."""

    config: Ma2mbaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Mamba2Block", "CLIPEncoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["cache_params"]
    _is_stateful = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def tie_weights(self, *args, **kwargs):
        """Tie the head to the embeddings, freeze the unused layers of the vision encoder, and prepare 4-bit layers.

        Raises:
            ValueError: if the head is quantized, but tied to the embeddings.
        """
        super().tie_weights(*args, **kwargs)
        head = self.get_output_embeddings()
        tied = head is not None and head.weight is self.get_input_embeddings().weight
        if tied and type(head).__module__.startswith("bitsandbytes"):
            raise ValueError(
                "lm_head cannot be quantized, because its weight is that of the embeddings: add 'lm_head' to "
                "llm_int8_skip_modules, which replaces the default."
            )
        # Building and loading both end here. Loading makes new parameters, all of which require gradients.
        for module in self.modules():
            if isinstance(module, Ma2mbaModel):
                module.freeze_unused_vision_layers()
            elif type(module).__name__ == "Linear4bit":
                _prepare_4bit_layer(module)

    def unused_modules(self) -> list[str]:
        """Name the modules of the vision encoder whose output nothing uses: those above `vision_feature_layer`.

        Their adapters would never get a gradient: give the names to PEFT's `LoraConfig` as `exclude_modules`.
        """
        trunks = [module for module in self.modules() if isinstance(module, Ma2mbaModel)]
        unused = {inner for trunk in trunks for layer in trunk._unused_vision_layers() for inner in layer.modules()}
        return [name for name, module in self.named_modules() if module in unused]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, every_n_layers=1, offload=False):
        """Switch on MA-GC, multi-axis gradient checkpointing (paper §3.2): exact gradients, activation memory O(S).

        Backward also restores the vision encoder, `config.frames_per_vision_pass` frames at a time.
        `activation_checkpointing_enable` calls this method with the same arguments.

        Args:
            gradient_checkpointing_kwargs: the options of [`enable_multi_axis_checkpointing`]. By default each sequence
                length gets a plan.
            every_n_layers: must be 1; [`Trainer`] takes it out of the kwargs.
            offload: the same as the option; [`Trainer`] takes it out of the kwargs, too.

        Raises:
            ValueError: if a key is unknown, or a value makes no sense.
        """
        enable_multi_axis_checkpointing(
            self, **checkpointing_options(gradient_checkpointing_kwargs, every_n_layers, offload)
        )

    def gradient_checkpointing_disable(self):
        """Switch MA-GC off: the forward pass is the plain one again."""
        disable_multi_axis_checkpointing(self)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether MA-GC is on."""
        return is_multi_axis_checkpointed(self)

    is_gradient_checkpointing = is_activation_checkpointing  # PEFT asks by the old name


class Ma2mbaModel(Ma2mbaPreTrainedModel):
    """Vision encoder, projector and Mamba-2 language model, without the language-model head."""

    def __init__(self, config: Ma2mbaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = Ma2mbaMultiModalProjector(config)
        # The attention implementation is the vision encoder's: Mamba-2 has no attention, and rejects the setting.
        self.language_model = AutoModel.from_config(config.text_config, attn_implementation="eager")
        hold(self)
        self.post_init()

    def __setstate__(self, state):
        super().__setstate__(state)
        hold(self)  # a copy may be compiled before it is first called

    def freeze_unused_vision_layers(self):
        """Freeze the layers of the vision encoder above `vision_feature_layer`, whose output nothing uses.

        They never get a gradient, and DDP and ZeRO would wait for one.
        """
        for module in self._unused_vision_layers():
            module.requires_grad_(False)

    def _unused_vision_layers(self) -> list[nn.Module]:
        layers = self.vision_tower.encoder.layers
        used = self.config.vision_feature_layer % (len(layers) + 1)
        others = (self.vision_tower.post_layernorm, getattr(self.vision_tower, "head", None))
        return [*layers[used:], *(module for module in others if module is not None)]

    def get_input_embeddings(self):
        """The embeddings of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the embeddings of the language model."""
        self.language_model.set_input_embeddings(value)

    def _check_pixels(self, pixels: torch.Tensor, name: str):
        size = self.config.vision_config.image_size
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"{name} must have shape (frames, 3, {size}, {size}), all videos of the batch one after the other; "
                f"got {tuple(pixels.shape)}."
            )
        if tuple(pixels.shape[-2:]) != (size, size):
            raise ValueError(
                f"{name} has frames of {pixels.shape[-2]} x {pixels.shape[-1]} px, but this checkpoint's vision "
                f"encoder takes {size} x {size} px: set the video processor's `size` to match the checkpoint."
            )
        if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
            raise ValueError(f"{name} must be uint8, or floating point if already normalised; got {pixels.dtype}.")

    def get_vision_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode a few frames with the vision tower and pool the patches; the projector follows (paper §3.4).

        Args:
            pixels: `(num_frames, 3, image_size, image_size)`, uint8, or floats that are already normalised.

        Returns:
            `(num_frames, tokens_per_frame, vision_width)`, in the data type of the vision tower.
        """
        self._check_pixels(pixels, "pixels")
        device = self.vision_tower.device
        if device.type == "meta":
            device = pixels.device  # the weights are offloaded, and the hook that fetches them moves the pixels
        if pixels.dtype == torch.uint8:
            mean = torch.tensor(self.config.image_mean, device=device).view(3, 1, 1)
            std = torch.tensor(self.config.image_std, device=device).view(3, 1, 1)
            pixels = (pixels.to(device).float() / 255 - mean) / std
        outputs = self.vision_tower(pixels.to(device, self.vision_tower.dtype), output_hidden_states=True)
        features_FPC = outputs.hidden_states[self.config.vision_feature_layer]
        # CLIP puts a class token before the patches, SigLIP does not.
        features_FPC = features_FPC[:, features_FPC.shape[1] - self.config.patches_per_side**2 :]
        pooling = (getattr(self.config, f"spatial_pool_{option}") for option in ("mode", "stride", "rounding"))
        return pool_patches(features_FPC, *pooling)

    def _project(self, features_FNC: torch.Tensor) -> torch.Tensor:
        """Project the vision tower's features of a few frames to `(F, N, D)` tokens (paper §3.4)."""
        return self.multi_modal_projector(_cast_for(self.multi_modal_projector.linear_1, features_FNC))

    def _encode_frames(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode `(F, 3, height, width)` pixels of a few frames as `(F, N, D)` tokens (paper §3.4)."""
        return self._project(self.get_vision_features(pixels))

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode frames as tokens, a few frames at a time.

        Args:
            pixel_values_videos: `(num_frames, 3, image_size, image_size)`, the frames of all videos one after the
                other; uint8, or floats that are already normalised.

        Returns:
            An output whose `pooler_output` has shape `(num_frames, tokens_per_frame, hidden_size)`.
        """
        self._check_pixels(pixel_values_videos, "pixel_values_videos")
        return self._encode_in_pieces(pixel_values_videos)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images as tokens, each as a video of one frame; shapes as in `get_video_features`."""
        self._check_pixels(pixel_values, "pixel_values")
        return self._encode_in_pieces(pixel_values)

    def _checkpointed(self, encode, frames: torch.Tensor, captured: CapturedTensors | None) -> torch.Tensor:
        """Run `encode` such that backward runs it again, with the captured tensors.

        A compiled graph holds tensors of its own.
        """
        options = {}
        if captured is not None and not torch.compiler.is_compiling():
            options["context_fn"] = lambda: (nullcontext(), captured)
        return checkpoint(encode, frames, use_reentrant=False, **options)

    @torch.compiler.disable(recursive=False)  # the loop only: one graph of a few frames serves films of any length
    def _in_pieces(self, encode, frames: torch.Tensor, frames_per_piece=None) -> BaseModelOutputWithPooling:
        """Run `_encode_frames` or `_project` on a few frames at a time."""
        if self.training and torch.is_grad_enabled() and is_multi_axis_checkpointed(self):
            encode = partial(self._checkpointed, encode, captured=self._vision_as_it_is())
        pieces = [encode(piece) for piece in frames.split(frames_per_piece or self.config.frames_per_vision_pass)]
        return BaseModelOutputWithPooling(pooler_output=pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def _encode_in_pieces(self, pixels: torch.Tensor, frames_per_piece=None) -> BaseModelOutputWithPooling:
        _install_capturing_hooks(self.vision_tower)
        return self._in_pieces(self._encode_frames, pixels, frames_per_piece)

    def _project_kept_features(self, features_PNC: torch.Tensor, picture_indices_F: torch.Tensor):
        """Project each picture once, and repeat it for all frames that show it."""
        self._check_features(features_PNC, picture_indices_F)
        device = self.multi_modal_projector.linear_1.weight.device
        if device.type != "meta":  # else the weights are offloaded, and the hook that fetches them moves the inputs
            features_PNC = features_PNC.to(device)
        features_PND = self._in_pieces(self._project, features_PNC).pooler_output
        return BaseModelOutputWithPooling(pooler_output=features_PND[picture_indices_F.to(features_PND.device)])

    def _vision_as_it_is(self) -> CapturedTensors | None:
        """The tensors that the vision modules have now. None for sharded modules, whose tensors come and go."""
        if any(map(is_sharded, self.modules())):
            return None
        modules = {"vision_tower": self.vision_tower, "multi_modal_projector": self.multi_modal_projector}
        # Transformers takes hidden states out of the tower by hooks, which come with its first call.
        return CapturedTensors(modules, with_hooks=False)

    def _check_features(self, features: torch.Tensor, picture_indices: torch.Tensor):
        shape = (self.config.tokens_per_frame, self.config.vision_config.hidden_size)
        if features.ndim != 3 or tuple(features.shape[1:]) != shape or not features.is_floating_point():
            raise ValueError(
                f"vision_features_videos must be floats of shape (pictures, {shape[0]}, {shape[1]}), as from "
                f"`get_vision_features`; got {features.dtype} of shape {tuple(features.shape)}."
            )
        if (
            picture_indices is None
            or picture_indices.ndim != 1
            or picture_indices.dtype not in (torch.int32, torch.int64)
        ):
            got = "none" if picture_indices is None else f"{picture_indices.dtype} of {tuple(picture_indices.shape)}"
            raise ValueError(f"picture_indices_videos must be integers (int64) of shape (frames,); got {got}.")
        if len(picture_indices) and not 0 <= picture_indices.min() <= picture_indices.max() < len(features):
            raise ValueError(
                f"picture_indices_videos must lie between 0 and {len(features) - 1}, as there are {len(features)} "
                f"pictures; got {int(picture_indices.min())} to {int(picture_indices.max())}."
            )

    def _place_features(self, inputs_embeds_BTD, input_ids_BT, features_FND, token_id, name):
        """Replace the embeddings of the placeholders by vision tokens, in order."""
        if input_ids_BT is None:
            placeholder = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds_BTD.device))
            mask_BT = (inputs_embeds_BTD == placeholder).all(-1)
        else:
            mask_BT = input_ids_BT == token_id
        positions = mask_BT.nonzero(as_tuple=True)
        num_features = features_FND.shape[0] * features_FND.shape[1]
        if len(positions[0]) != num_features:
            raise ValueError(
                f"The text has {len(positions[0])} {name} placeholders, but {features_FND.shape[0]} frames of "
                f"{features_FND.shape[1]} tokens need {num_features}: make both with the same processor call."
            )
        features = features_FND.flatten(0, 1).to(inputs_embeds_BTD.device, inputs_embeds_BTD.dtype)
        return inputs_embeds_BTD.index_put(positions, features)

    def _count_idle_pieces(self, pixels: list[torch.Tensor], features: list[torch.Tensor], device) -> tuple[int, int]:
        """The numbers of blank pieces, of pixels and of kept features, that this process must run.

        In DDP, all processes wait until every trained parameter has a gradient on each of them; a batch without
        pictures gives none. Where modules are sharded, all processes must call them equally often.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 0
        own = [
            sum(math.ceil(len(frames) / self.config.frames_per_vision_pass) for frames in kind)
            for kind in (pixels, features)
        ]
        needed = list(own)
        if self.training and torch.is_grad_enabled():
            calls = {self.vision_tower: own[0], self.multi_modal_projector: sum(own)}
            for module, count in calls.items():
                if count == 0 and any(parameter.requires_grad for parameter in module.parameters()):
                    needed[0] = max(needed[0], 1)
        if any(map(is_sharded, [*self.vision_tower.modules(), *self.multi_modal_projector.modules()])):
            needed = max_over_processes(needed, processes_in_step(self), device)
        return needed[0] - own[0], needed[1] - own[1]

    def _encode_blank_frames(self, count: int) -> torch.Tensor:
        """Run blank frames through the vision modules; returns 0, with gradients of zero for their parameters."""
        size = self.config.vision_config.image_size
        frames = torch.zeros(count, 3, size, size, dtype=torch.uint8)
        return 0.0 * self._encode_in_pieces(frames, frames_per_piece=1).pooler_output.sum()

    def _project_blank_features(self, count: int) -> torch.Tensor:
        """The same for the projector alone."""
        device = self.multi_modal_projector.linear_1.weight.device
        features = torch.zeros(count, 1, self.config.vision_config.hidden_size, device=device)
        return 0.0 * self._in_pieces(self._project, features, frames_per_piece=1).pooler_output.sum()

    def _zeros_of_unused_layers(self) -> list[torch.Tensor]:
        """Zeros with gradients of zero for adapters in layers whose output nothing uses: DDP would wait for one."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return []
        layers = [layer for layer in self._unused_vision_layers() if not any(map(is_sharded, layer.modules()))]
        parameters = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
        return [0.0 * parameter.sum() for parameter in parameters]

    def _encode_visuals(self, pixel_values, pixel_values_videos, features, picture_indices, device):
        """Encode images and videos.

        Returns:
            Outputs under `"image"` and `"video"`, and zeros with the gradients that this process owes to the others.
        """
        if pixel_values_videos is not None and features is not None:
            raise ValueError(_TWO_INPUTS)
        encoded, zeros = {}, []
        pixels = [frames for frames in (pixel_values, pixel_values_videos) if frames is not None]
        kept = [] if features is None else [features]
        num_encoded, num_projected = self._count_idle_pieces(pixels, kept, device)
        # Pixels first, with their idle pieces: all processes call sharded modules in the same order.
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values)
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos)
        if num_encoded:
            zeros.append(self._encode_blank_frames(num_encoded))
        if features is not None:
            encoded["video"] = self._project_kept_features(features, picture_indices)
        if num_projected:
            zeros.append(self._project_blank_features(num_projected))
        return encoded, zeros

    def _tokens_per_pass(self, batch_size: int) -> int:
        return min(self.config.tokens_per_pass, indexable_tokens(self.config, batch_size))

    def _language_model_in_segments(self, inputs_embeds_BTD, cache_params, use_cache, attention_mask, **options):
        """Run a long sequence segment by segment, and carry the state.

        The result is that of a single pass. Neither memory nor the offsets in kernels grow with the sequence.
        """
        text_config = self.config.text_config
        state = cache_params if cache_params is not None else DynamicCache(config=text_config)
        cache_layers_of(state, self.language_model.layers)  # raises if two layers share a place
        batch_size, sequence_length, _ = inputs_embeds_BTD.shape
        if attention_mask is not None:
            attention_mask = attention_mask[:, -sequence_length:]
        rows = None
        for start, stop in segment_bounds(sequence_length, self._tokens_per_pass(batch_size)):
            segment = self.language_model(
                inputs_embeds=inputs_embeds_BTD[:, start:stop],
                attention_mask=attention_mask[:, start:stop] if attention_mask is not None else None,
                cache_params=state,
                use_cache=True,
                return_dict=True,
                **options,
            ).last_hidden_state
            if rows is None:
                rows = segment.new_empty(*inputs_embeds_BTD.shape[:2], segment.shape[-1])
            rows[:, start:stop] = segment
        if use_cache is None:
            use_cache = text_config.use_cache and not self.training
        return Mamba2Output(last_hidden_state=rows, cache_params=state if use_cache else None)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_features_videos: torch.Tensor | None = None,
        picture_indices_videos: torch.Tensor | None = None,
        positions_to_keep: torch.Tensor | None = None,
        **kwargs,
    ) -> Ma2mbaModelOutput:
        """Run vision encoder, projector and language model.

        Args:
            positions_to_keep: `(batch_size, sequence_length)`, True for the wanted positions. With it,
                `last_hidden_state` is `(num_positions, hidden_size)`, sample by sample.

        All other arguments are those of [`Ma2mbaForVideoQA`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, and not both.")
        hold(self)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        encoded, zeros = self._encode_visuals(
            pixel_values, pixel_values_videos, vision_features_videos, picture_indices_videos, inputs_embeds.device
        )
        encoded = {**(mm_encoder_outputs or {}), **encoded}
        for name, output in encoded.items():
            token_id = self.config.image_token_id if name == "image" else self.config.video_token_id
            inputs_embeds = self._place_features(inputs_embeds, input_ids, output.pooler_output, token_id, name)
        for zero in (*zeros, *self._zeros_of_unused_layers()):
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds)

        options = dict(use_cache=use_cache, attention_mask=attention_mask, ssd_scan=True)
        refuse_bypassed_adapters(self.language_model.layers)
        if self.training and has_special_projection(self.language_model.layers):
            options["whole_layers"] = False
        # Only the grid can skip positions: the stock forward pass cannot, and hooks expect all of them.
        in_grid = is_multi_axis_checkpointed(self.language_model)
        skips_positions = in_grid and not has_forward_hooks(self.language_model)
        in_one_segment = inputs_embeds.shape[1] <= self._tokens_per_pass(len(inputs_embeds))
        if torch.is_grad_enabled() or output_hidden_states or in_one_segment:
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                cache_params=cache_params,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                **({"positions_to_keep": positions_to_keep} if skips_positions else {}),
                **options,
            )
        else:
            outputs = self._language_model_in_segments(inputs_embeds, cache_params, **options)
        last_hidden_state = outputs.last_hidden_state
        if positions_to_keep is not None and last_hidden_state.ndim == 3:
            last_hidden_state = last_hidden_state[positions_to_keep]
        return Ma2mbaModelOutput(
            last_hidden_state=last_hidden_state,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
        )


class Ma2mbaForVideoQA(Ma2mbaPreTrainedModel, GenerationMixin):
    """Video-Ma²mba: questions about videos and images, answered by a Mamba-2 language model."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embeddings.weight"}

    def __init__(self, config: Ma2mbaConfig):
        super().__init__(config)
        self.model = Ma2mbaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # Transformers would look for one in the name of this class
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # If True, `generate` would make `past_key_values`, as the class name does not contain "mamba". The language
        # model makes its own cache in the first step and returns it as `cache_params`.
        return False

    def get_video_features(self, pixel_values_videos: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`Ma2mbaModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, **kwargs)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See [`Ma2mbaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        vision_features_videos: torch.Tensor | None = None,
        picture_indices_videos: torch.Tensor | None = None,
        text_tokens_only: bool = False,
        **kwargs,
    ) -> Ma2mbaForVideoQAOutput:
        """Predict the next token at each position, or the loss of such predictions.

        Args:
            input_ids: `(batch_size, sequence_length)`, with `config.tokens_per_frame` placeholders a frame.
            pixel_values: `(num_images, 3, image_size, image_size)`, the images of the whole batch in order.
            pixel_values_videos: `(num_frames, 3, image_size, image_size)`, the frames of the whole batch in order.
                Videos of different lengths stand one after the other; the placeholders tell the samples apart. Both
                kinds of pixels are uint8, or floats that are already normalised.
            attention_mask: `(batch_size, sequence_length)`, 0 for padding, which stands on the left.
            labels: `(batch_size, sequence_length)`, token ids, -100 where nothing is to be learned. Only supervised
                positions go through the head. In a training step under multi-axis gradient checkpointing they go in
                pieces, and the output's `logits` are None.
            logits_to_keep: the number of last positions that get logits (0: all), or their indices; see
                `slice_logits_to_keep`. Without effect if labels are given.
            cache_params: the recurrent state that the sequence continues; updated in place.
            mm_encoder_outputs: outputs of `get_image_features` and `get_video_features` under `"image"` and
                `"video"`, in place of pixels.
            vision_features_videos: `(num_pictures, tokens_per_frame, vision_width)`, in place of pixels: what
                `get_vision_features` gives for the different pictures of all videos of the batch.
            picture_indices_videos: `(num_frames,)`, the picture that each frame shows, for all videos in order.
            text_tokens_only: whether the logits of both placeholders, and of the vocabulary's padding beyond
                `config.unpadded_vocab_size`, are -inf, as in `generate`. Without effect if labels are given: the
                published models were trained with the padding in the softmax.

        Raises:
            ValueError: if frames and placeholders do not match, or frames have another size than the vision encoder's.
        """
        supervised_BT = None
        if labels is not None:  # the position before each supervised token
            supervised_BT = F.pad(labels[:, 1:] != -100, (0, 1))
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache_params=cache_params,
            use_cache=use_cache if labels is None or use_cache is not None else False,
            output_hidden_states=output_hidden_states,
            mm_encoder_outputs=mm_encoder_outputs,
            vision_features_videos=vision_features_videos,
            picture_indices_videos=picture_indices_videos,
            positions_to_keep=supervised_BT,
        )
        loss = None
        if labels is None:
            hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
            logits = self.lm_head(_cast_for(self.lm_head, hidden_states)).float()
            if text_tokens_only:
                padding = slice(self.config.unpadded_vocab_size or logits.shape[-1], None)
                for rows in (self.config.image_token_id, self.config.video_token_id, padding):
                    logits[..., rows] = -torch.inf
        else:
            loss, logits = self._supervised_loss(outputs.last_hidden_state, labels, supervised_BT, **kwargs)
        return Ma2mbaForVideoQAOutput(
            loss=loss, logits=logits, cache_params=outputs.cache_params, hidden_states=outputs.hidden_states
        )

    def _supervised_loss(self, hidden_states_KD, labels_BT, supervised_BT, **kwargs):
        """Loss and logits of the positions that predict a supervised token.

        A checkpointed training step takes the loss in pieces, and has no logits.
        """
        targets_K = labels_BT.roll(-1, dims=1)[supervised_BT]
        checkpointed = self.training and torch.is_grad_enabled() and is_multi_axis_checkpointed(self)
        if checkpointed and can_be_in_pieces(self, kwargs):
            return causal_lm_loss(self.lm_head, hidden_states_KD, None, shift_labels=targets_K, **kwargs), None
        logits_KV = self.lm_head(_cast_for(self.lm_head, hidden_states_KD)).float()
        if len(logits_KV) == 0:
            loss = logits_KV.sum()  # nothing to learn, and no NaN to spread
        else:
            loss = self.loss_function(
                logits=logits_KV,
                labels=None,
                shift_labels=targets_K.to(logits_KV.device),
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        # One row per sample, since the Trainer gathers predictions along the batch.
        rows = logits_KV.split(supervised_BT.sum(1).tolist())
        return loss, nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Resize the vocabulary; every one of `new_num_tokens` is then a token, and the rows beyond are padding."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None and self.config.unpadded_vocab_size is not None:
            self.config.unpadded_vocab_size = new_num_tokens
        return embeddings

    @wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())  # `generate` reads its signature
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """Prepare a step of `generate`, which may choose text only: see `text_tokens_only` of [`forward`]."""
        return {"text_tokens_only": True, **super().prepare_inputs_for_generation(*args, **kwargs)}

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        # `generate` encodes pixels before it expands the batch for beams and samples. Kept features are projected here
        # for the same reason: the expansion of other inputs would repeat each picture, and not each film.
        features, indices = (
            model_kwargs.pop(name, None) for name in ("vision_features_videos", "picture_indices_videos")
        )
        model_kwargs = super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        if features is not None:
            if "video" in model_kwargs["mm_encoder_outputs"]:
                raise ValueError(_TWO_INPUTS)
            model_kwargs["mm_encoder_outputs"]["video"] = self.model._project_kept_features(features, indices)
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # `generate` expands tensors for beams and for several samples, but not a state to continue from.
        state = model_kwargs.get("cache_params")
        if state is not None and expand_size > 1:
            state.reorder_cache(torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(expand_size))
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


__all__ = ["Ma2mbaForVideoQA", "Ma2mbaForVideoQAOutput", "Ma2mbaModel", "Ma2mbaModelOutput", "Ma2mbaPreTrainedModel"]
