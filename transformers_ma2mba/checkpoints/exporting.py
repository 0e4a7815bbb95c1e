"""A checkpoint of this package in other layouts: its language model alone, or the whole as its authors publish it.

Nothing here has been tried with the authors' code or with a published file.
"""

import json
import os
import shutil
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from transformers import Mamba2ForCausalLM, PreTrainedConfig

from ..configuration_ma2mba import Ma2mbaConfig
from .building import empty_model, stored_shapes
from .mamba2_layouts import naming_configuration, original_config, original_name, read_json
from .published import (
    KNOWN_VISION_ENCODERS,
    MODEL_TYPE,
    VISION_PREFIX,
    is_unused_vision_weight,
    published_config,
    to_published,
)
from .tensor_files import PlannedTensor, TensorFolder, check_tensors, new_folder, write_pickle, write_safetensors

LAYOUTS = {
    "transformers": "the language model, for Mamba2ForCausalLM",
    "original": "the language model, as state-spaces/mamba2-* are published",
    "published": "the whole model, as its authors publish theirs",
    "vision": "the vision encoder, for CLIPVisionModel or SiglipVisionModel",
}
# Written by a tokenizer, whatever its class. `tokenizer_config.json` names the processor; both work with it alone.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

_VISION_FIELDS = ("model_type", "hidden_size", "intermediate_size", "image_size", "patch_size", "num_attention_heads")
_VISION_FIELDS += ("hidden_act", "layer_norm_eps")
# Settings that the authors' layout must give back.
_COMPARED = ("spatial_pool_rounding", "projector_hidden_act", "multimodal_projector_bias", "frame_rate")
_COMPARED += ("image_token_id", "video_token_id", "unpadded_vocab_size", "image_mean", "image_std")
_COMPARED += ("text_config.eos_token_id", *(f"vision_config.{field}" for field in _VISION_FIELDS))


def export_model(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    layout: str,
    *,
    vision_tower: str | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a checkpoint in another layout, tensor by tensor and bit by bit.

    Args:
        checkpoint: the folder of a saved [`Ma2mbaForVideoQA`].
        output: a new or empty folder. It gets its files when all of them are written.
        layout: one of `LAYOUTS`.
        vision_tower: for the authors' layout, the hub name or folder of the vision encoder, which their configuration
            names. Known for CLIP ViT-L/14-336 and SigLIP so400m-384.
        max_shard_size: size limit of a safetensors file in bytes.

    Raises:
        ValueError: if the folder holds no such model, or the layout has no place for a setting of it.
        OSError: if a file cannot be read or written.
    """
    source = Path(checkpoint)
    if layout not in LAYOUTS:
        raise ValueError(f"There is no layout {layout!r}; choose one of {', '.join(LAYOUTS)}.")
    kind = read_json(source / "config.json").get("model_type")
    if kind != "ma2mba":
        raise ValueError(f"{str(source)!r} holds a {kind!r} model; export takes a saved Ma2mbaForVideoQA.")
    with naming_configuration(source):
        config = Ma2mbaConfig.from_pretrained(source)
    # The model goes by its own setting, and a language model alone by that of its part.
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    tensors = TensorFolder(source)
    expected = stored_shapes(empty_model(config, config.dtype or torch.float32))
    found = {name: tensors.info(name).shape for name in tensors}
    check_tensors(str(source), expected, found, "Was it saved by save_pretrained?")
    planned = {name: PlannedTensor(tensors.info(name), partial(tensors.__getitem__, name)) for name in tensors}
    with new_folder(output) as folder:
        if layout == "published":
            _write_published(folder, config, planned, vision_tower, max_shard_size)
        elif layout == "vision":
            _write_vision(folder, config, planned, max_shard_size)
            return
        else:
            language = {_stock_name(name): tensor for name, tensor in planned.items() if _stock_name(name)}
            if layout == "original":
                _write_original(folder, config.text_config, language)
            else:
                _write_transformers(folder, source, config, language, max_shard_size)
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _stock_name(name: str) -> str | None:
    """Return the name in `Mamba2ForCausalLM` of one of our parameters, or None if it has none."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "backbone.", 1)
    return name if name.startswith("lm_head.") else None


def _write_transformers(folder: Path, source: Path, config: Ma2mbaConfig, language: dict, max_shard_size: int):
    text_config = config.text_config
    text_config.architectures = [Mamba2ForCausalLM.__name__]
    text_config.dtype = language["backbone.layers.0.mixer.in_proj.weight"].info.dtype
    text_config.save_pretrained(folder)
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    write_safetensors(folder, language, max_shard_size)


def _write_vision(folder: Path, config: Ma2mbaConfig, planned: dict, max_shard_size: int):
    prefix, vision_config = "model.vision_tower.", config.vision_config
    tensors = {name.removeprefix(prefix): tensor for name, tensor in planned.items() if name.startswith(prefix)}
    vision_config.architectures = [type(empty_model(config, torch.float32).model.vision_tower).__name__]
    vision_config.dtype = next(iter(tensors.values())).info.dtype
    vision_config.save_pretrained(folder)
    write_safetensors(folder, tensors, max_shard_size)


def _write_original(folder: Path, text_config: PreTrainedConfig, language: dict):
    _write_json(folder / "config.json", original_config(text_config))
    tied = {"lm_head.weight": "backbone.embedding.weight"} if text_config.tie_word_embeddings else {}
    tensors = {original_name(name): tensor for name, tensor in language.items()}
    write_pickle(folder / "pytorch_model.bin", tensors, tied)


def _write_published(folder: Path, config: Ma2mbaConfig, planned: dict, vision_tower: str | None, max_shard_size: int):
    config.unpadded_vocab_size = config.unpadded_vocab_size or config.text_config.vocab_size  # None: all are tokens
    settings = _published_settings(config, vision_tower)
    _write_json(folder / "config.json", settings)
    read_back = published_config(settings)
    last_norm = f"{VISION_PREFIX}post_layernorm."
    is_siglip = config.vision_config.model_type == "siglip_vision_model"
    tensors = {
        to_published(name): tensor
        for name, tensor in planned.items()
        # The authors delete the unused layers and the head of SigLIP, and keep its last norm.
        if not (is_siglip and is_unused_vision_weight(name, config)) or name.startswith(last_norm)
    }
    lost = _lost(config, read_back)
    if lost:
        raise ValueError(f"The authors' layout has no place for these settings of the model: {'; '.join(lost)}.")
    write_safetensors(folder, tensors, max_shard_size)


def _published_settings(config: Ma2mbaConfig, vision_tower: str | None) -> dict:
    """Return the authors' configuration, the inverse of `published_config`."""
    text, vision = config.text_config, config.vision_config
    tokens, multiple = config.image_token_id, 16  # the tokenizer ends where the placeholders begin
    if -(-tokens // multiple) * multiple != text.vocab_size:
        tokens, multiple = text.vocab_size, 1
    return {
        "model_type": MODEL_TYPE,
        **original_config(text),
        "vocab_size": tokens,
        "pad_vocab_size_multiple": multiple,
        "mm_vision_tower": vision_tower or _known_vision_tower(config),
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": config.spatial_pool_mode,
        "mm_spatial_pool_stride": config.spatial_pool_stride,
        "mm_patch_merge_type": "flat",
        "vision_encode_chunk_size": config.frames_per_vision_pass,
        **({"torch_dtype": str(config.dtype).removeprefix("torch.")} if config.dtype else {}),
    }


def _known_vision_tower(config: Ma2mbaConfig) -> str:
    vision = config.vision_config
    for name, known in KNOWN_VISION_ENCODERS.items():
        if all(getattr(known, field) == getattr(vision, field) for field in _VISION_FIELDS):
            return name
    raise ValueError(
        "The authors' configuration names a vision encoder, and this model's is not one of "
        f"{', '.join(KNOWN_VISION_ENCODERS)}: name it with --vision_tower."
    )


def _lost(config: Ma2mbaConfig, read_back: Ma2mbaConfig) -> list[str]:
    """List the settings that the authors' layout would change."""
    lost = [
        f"{path} = {found!r} would become {becomes!r}"
        for path in _COMPARED
        if (found := attrgetter(path)(config)) != (becomes := attrgetter(path)(read_back))
    ]
    layers = config.vision_config.num_hidden_layers, read_back.vision_config.num_hidden_layers
    used = [c.vision_feature_layer % (n + 1) for c, n in zip((config, read_back), layers, strict=True)]
    if used[0] != used[1]:
        lost.append(f"the features of hidden state {used[0]} would become those of {used[1]}")
    return lost


def _write_json(path: Path, content: dict):
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
