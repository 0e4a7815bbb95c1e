"""The composite configuration: a vision encoder, a stock Mamba-2 language model, and the projector between them."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

# The three published sizes combine Mamba-2 370M, 1.3B and 2.7B with CLIP ViT-L/14-336 (paper §4.1). The paper's names
# count the tied embedding twice, once as embedding and once as head: 0.73B, 1.76B and 3.14B parameters.
PRESETS = {
    "0.7b": {"num_hidden_layers": 48, "hidden_size": 1024, "num_heads": 32},
    "1.8b": {"num_hidden_layers": 48, "hidden_size": 2048, "num_heads": 64},
    "3.1b": {"num_hidden_layers": 64, "hidden_size": 2560, "num_heads": 80},
}

CLIP_VIT_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

_MAMBA2 = {
    "vocab_size": 50288,  # 50,277 tokens of GPT-NeoX-20B, padded to a multiple of 16 as in the published weights
    "state_size": 128,
    "head_dim": 64,
    "conv_kernel": 4,
    "expand": 2,
    "n_groups": 1,
    "chunk_size": 256,
    "bos_token_id": 0,  # <|endoftext|>
    "eos_token_id": 0,
    "pad_token_id": 1,  # <|padding|>
    "tie_word_embeddings": True,
}


@strict
class Ma2mbaConfig(PreTrainedConfig):
    r"""Configuration of Video-Ma²mba (arXiv:2411.19460, §3.4 and §4.1); the defaults are its largest model, 3.1B.

    Args:
        vision_config (`CLIPVisionConfig` or `SiglipVisionConfig`, or a dict of either, *optional*):
            The vision encoder; defaults to CLIP ViT-L/14 at 336 px.
        text_config (`Mamba2Config` or dict, *optional*):
            The language model; defaults to Mamba-2 2.7B.
        vision_feature_layer (`int`, defaults to -2):
            The hidden state that supplies the features, as an index into the vision encoder's `hidden_states`.
        spatial_pool_mode (`str`, defaults to `"bilinear"`):
            The pooling of patch features before the projector: `"bilinear"`, `"average"` or `"max"`.
        spatial_pool_stride (`int`, defaults to 2):
            Pooling factor along each side of the patch grid.
        spatial_pool_rounding (`str`, defaults to `"up"`):
            The rounding of a pooled side, `"up"` or `"down"`, where the stride does not divide the side. The authors'
            code rounds up in bilinear pooling and down in the other modes.
        projector_hidden_act (`str`, defaults to `"gelu"`):
            Activation function between the projector's two layers.
        multimodal_projector_bias (`bool`, defaults to `True`):
            Whether the projector's layers have a bias.
        frame_rate (`float`, defaults to 1.0):
            Frames per second of film that the model receives.
        frames_per_vision_pass (`int`, defaults to 16):
            Number of frames in the vision encoder at a time. It bounds the memory and does not change the result.
        tokens_per_pass (`int`, defaults to 8192):
            Number of tokens in the language model at a time outside of training. It bounds the memory, too.
        image_mean, image_std (`list[float]`, *optional*):
            Normalisation of uint8 pixels, per channel, on the model's device; defaults to CLIP's.
        image_token_id, video_token_id (`int`, default to 50277 and 50278):
            Placeholders of one image token and one video token. The defaults are unused rows of the padded vocabulary,
            so that published language models keep their embedding unchanged.
        unpadded_vocab_size (`int`, *optional*):
            Number of the tokenizer's tokens, placeholders included. The language model's rows from this one on are
            padding, and are never generated. None: every row is a token.

    Raises:
        huggingface_hub.errors.StrictDataclassError: if a field has a wrong type or is out of range, or the patch grid
            is empty.
    """

    model_type = "ma2mba"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="clip_vision_model", init_kwargs=CLIP_VIT_LARGE_336
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="mamba2", init_kwargs={**_MAMBA2, **PRESETS["3.1b"]}
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -2
    spatial_pool_mode: Literal["bilinear", "average", "max"] = "bilinear"
    spatial_pool_stride: int = 2
    spatial_pool_rounding: Literal["up", "down"] = "up"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    frame_rate: int | float = 1.0
    frames_per_vision_pass: int = 16
    tokens_per_pass: int = 8192
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    image_token_id: int = 50277
    video_token_id: int = 50278
    unpadded_vocab_size: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)  # it names a file in the checkpoint's folder, which saving does not copy
        super().__post_init__(**kwargs)
        self.image_mean = list(OPENAI_CLIP_MEAN if self.image_mean is None else self.image_mean)
        self.image_std = list(OPENAI_CLIP_STD if self.image_std is None else self.image_std)

    # `@strict` calls each method whose name starts with `validate_` when all fields are set.

    def validate_architecture(self):
        """Check the pooling, the patch grid and the feature layer."""
        if self.spatial_pool_stride < 1:
            raise ValueError(f"spatial_pool_stride must be at least 1, got {self.spatial_pool_stride}.")
        if self.patches_per_side < 1:
            raise ValueError(
                f"vision_config has patches of {self.vision_config.patch_size} px in frames of "
                f"{self.vision_config.image_size} px: a frame must hold at least one patch."
            )
        if self.pooled_patches_per_side < 1:
            raise ValueError(
                f"spatial_pool_stride is {self.spatial_pool_stride}, but frames have {self.patches_per_side} patches "
                "along each side: pooling that rounds down leaves none."
            )
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ValueError(
                f"vision_feature_layer is {self.vision_feature_layer}, but the vision encoder has {layers} layers "
                f"and so hidden states 0 to {layers}."
            )

    def validate_processing(self):
        """Check the frame rate and the sizes of the pieces in which frames and tokens are processed."""
        if not 0 < self.frame_rate < math.inf:
            raise ValueError(f"frame_rate must be a number of frames per second above 0, got {self.frame_rate}.")
        for name, least in (("frames_per_vision_pass", 1), ("tokens_per_pass", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    def validate_normalisation(self):
        """Check the mean and the standard deviation of pixels."""
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have 3 values, one per channel, got {getattr(self, name)}.")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be above 0 in every channel, got {self.image_std}.")

    def validate_vocabulary(self):
        """Check the number of tokens, and the placeholder tokens of images and videos."""
        if self.unpadded_vocab_size is not None and not 1 <= self.unpadded_vocab_size <= self.text_config.vocab_size:
            raise ValueError(
                f"unpadded_vocab_size is {self.unpadded_vocab_size}, but the language model has rows for 1 to "
                f"{self.text_config.vocab_size} tokens."
            )
        for name in ("image_token_id", "video_token_id"):
            if not 0 <= getattr(self, name) < self.text_config.vocab_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, outside of the vocabulary of {self.text_config.vocab_size}."
                )
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"image_token_id and video_token_id must differ, both are {self.image_token_id}.")

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "Ma2mbaConfig":
        """Create a configuration from the content of `config.json`.

        Raises:
            ValueError: if it is of another model type.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"This configuration is of a {found!r} model, not of a {cls.model_type!r} one: load it by AutoConfig, "
                "and its model by AutoModel."
            )
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_preset(cls, preset: str, **kwargs) -> "Ma2mbaConfig":
        """Create the configuration of a published size: `"0.7b"`, `"1.8b"` or `"3.1b"` (paper §4.1).

        Args:
            preset: the size's name.
            kwargs: other fields of the configuration.

        Raises:
            ValueError: if there is no such size.
        """
        if preset not in PRESETS:
            raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
        return cls(text_config={**_MAMBA2, **PRESETS[preset]}, **kwargs)

    @property
    def patches_per_side(self) -> int:
        """Number of patches along each side of a frame."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """Number of placeholders for one frame or image: 144 for CLIP at 336 px, 196 for SigLIP at 384 px."""
        return self.pooled_patches_per_side**2

    @property
    def pooled_patches_per_side(self) -> int:
        """Number of patches along each side of a frame after pooling."""
        rounded = {"up": math.ceil, "down": math.floor}[self.spatial_pool_rounding]
        return rounded(self.patches_per_side / self.spatial_pool_stride)


__all__ = ["Ma2mbaConfig"]
