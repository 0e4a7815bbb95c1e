"""CLIP and SigLIP vision encoders in Transformers' layout, alone or in a repository with their text tower."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from .mamba2_layouts import read_json
from .published import vision_encoder_config
from .tensor_files import StoredWeights, TensorFolder, check_tensors

_NORMALISATION = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}
# Parts of a repository besides its vision encoder, and a buffer that early files stored.
_OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_BUFFER = "embeddings.position_ids"


@dataclass(frozen=True)
class VisionEncoder(StoredWeights):
    """A stored vision encoder.

    Args:
        config: its configuration.
        image_mean, image_std: the normalisation of its pixels, per channel.
    """

    config: PreTrainedConfig
    image_mean: Sequence[float]
    image_std: Sequence[float]


def open_vision_encoder(folder: str | os.PathLike) -> VisionEncoder:
    """Open a CLIP or SigLIP vision encoder, and check its weights against its configuration.

    Raises:
        ValueError: if the folder holds another model, or weights that do not fit.
    """
    folder = Path(folder)
    tensors = TensorFolder(folder)
    config = vision_encoder_config(str(folder))
    names = {_tower_name(name): name for name in tensors if not name.startswith(_OTHER_PARTS)}
    names.pop(_BUFFER, None)
    if config.model_type == "siglip_vision_model" and not any(name.startswith("head.") for name in names):
        config.vision_use_head = False  # a pooling head, of which the model makes no use
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in AutoModel.from_config(config).state_dict().items()}
    found = {name: tensors.info(stored).shape for name, stored in names.items()}
    check_tensors(str(folder), expected, found, "A CLIP or SigLIP in Transformers' layout is needed.")
    mean, std = _NORMALISATION[config.model_type]
    if (folder / "preprocessor_config.json").is_file():
        preprocessing = read_json(folder / "preprocessor_config.json")
        mean, std = (
            [value] * 3 if isinstance(value, int | float) else value or usual
            for value, usual in ((preprocessing.get("image_mean"), mean), (preprocessing.get("image_std"), std))
        )
    return VisionEncoder(tensors, names, config, mean, std)


def _tower_name(stored: str) -> str:
    """Return the name in Transformers' vision encoder, which has no prefix since version 5."""
    return stored.removeprefix("vision_model.")
