"""A checkpoint in the authors' layout, written in this package's, tensor by tensor.

It also reads checkpoints whose `model_type` says "mamba2", which the Auto classes leave to Transformers' own model. No
published file has been tried.
"""

import os
import warnings
from functools import partial
from pathlib import Path

import torch

from ..configuration_ma2mba import Ma2mbaConfig
from ..modeling_ma2mba import Ma2mbaForVideoQA
from ..processing_ma2mba import Ma2mbaProcessor
from .building import empty_model, has_tokenizer, initialised, load_tokenizer, save_around_weights, stored_shapes
from .mamba2_layouts import drop_tied_head, matrix_dtype, naming_configuration, read_json
from .published import (
    VISION_PREFIX,
    is_frame_selector_head,
    is_published_config,
    is_unused_vision_weight,
    published_config,
    published_tokenizer,
    to_ours,
)
from .tensor_files import PlannedTensor, TensorFolder, TensorInfo, check_tensors, new_folder, write_safetensors
from .vision_encoders import open_vision_encoder

_EMBEDDINGS = "model.language_model.embeddings.weight"
_ADVICE = "Is config.json that of these weights, and is no file missing?"


def convert_published(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    vision_model: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Ma2mbaConfig:
    """Write a checkpoint of the authors' in this package's layout.

    Args:
        source: its folder, with `mm_*` keys in `config.json`.
        output: a new or empty folder. It gets its files when all of them are written.
        vision_model: the folder of the vision encoder; None means `mm_vision_tower` in `config.json`. Its weights are
            read if the checkpoint has none.
        tokenizer: a folder or hub name; None means that of the checkpoint, or the one that `config.json` names.
        dtype: the dtype of all weights; None leaves each weight as it is.
        max_shard_size: size limit of a weight file in bytes.

    Raises:
        ValueError: if the folder holds another model, or weights that do not fit; the message says what to do.
        OSError: if a file cannot be read or written.
    """
    folder = Path(source)
    settings = read_json(folder / "config.json")
    if not is_published_config(settings):
        raise ValueError(f"{str(source)!r} holds no Video-Ma²mba in its authors' layout, which has mm_* keys.")
    if vision_model is not None:
        settings["mm_vision_tower"] = str(vision_model)
    with naming_configuration(folder):
        config = published_config(settings)
    text_tokenizer = load_tokenizer(
        tokenizer or (folder if has_tokenizer(folder) else published_tokenizer(settings)),
        "The authors use that of EleutherAI/gpt-neox-20b",
    )
    processor = Ma2mbaProcessor.from_model_config(config, text_tokenizer)
    readers, infos, trunk_dtype = _read_published(folder, config)
    model = empty_model(config, dtype or trunk_dtype)
    _add_vision(model, settings["mm_vision_tower"], readers, infos)
    shapes = stored_shapes(model)
    check_tensors(str(source), shapes, {name: info.shape for name, info in infos.items()}, _ADVICE)
    planned = {
        name: PlannedTensor(TensorInfo(infos[name].shape, dtype or infos[name].dtype), readers[name])
        for name in shapes
    }
    with new_folder(output) as target:
        write_safetensors(target, planned, max_shard_size)
        save_around_weights(target, model, processor)
    return config


def _read_published(folder: Path, config: Ma2mbaConfig) -> tuple[dict, dict, torch.dtype]:
    """Find the weights that the model has a place for.

    Returns:
        by our names, how to read the weights; likewise their shapes and dtypes; the dtype of the language model.
    """
    tensors, names, heads = TensorFolder(folder), {}, []
    for stored in tensors:
        if is_frame_selector_head(stored):
            heads.append(stored)
        else:
            name = to_ours(stored) or stored
            if names.setdefault(name, stored) != stored:
                raise ValueError(f"The weights in {str(folder)!r} have one tensor twice: {names[name]} and {stored}.")
    if heads:
        warnings.warn(
            f"The heads of a frame selector have no place in this model and are left out: {', '.join(sorted(heads))}.",
            stacklevel=3,
        )
    if config.tie_word_embeddings:
        drop_tied_head(folder, tensors, names, _EMBEDDINGS)
    matrix = "model.language_model.layers.0.mixer.in_proj.weight"
    if matrix not in names:
        raise ValueError(f"The weights in {str(folder)!r} have no backbone.layers.0.mixer.in_proj.weight. {_ADVICE}")
    readers = {name: partial(tensors.__getitem__, stored) for name, stored in names.items()}
    infos = {name: tensors.info(stored) for name, stored in names.items()}
    return readers, infos, matrix_dtype(tensors, names[matrix])


def _add_vision(model: Ma2mbaForVideoQA, vision_tower: str, readers: dict, infos: dict) -> None:
    """Complete the vision encoder: from its own folder if it is absent, and at random where nothing uses it."""
    expected = [name for name in stored_shapes(model) if name.startswith(VISION_PREFIX)]
    unused = [name for name in expected if is_unused_vision_weight(name, model.config)]
    for name in [name for name in infos if is_unused_vision_weight(name, model.config) and name not in expected]:
        del infos[name], readers[name]
    dtype = model.config.dtype
    if not any(name in infos for name in expected if name not in unused):
        if not os.path.isdir(vision_tower):
            raise ValueError(
                "The checkpoint has no weights of the vision encoder, since it was not trained: download "
                f"{vision_tower} and name its folder with --vision_model."
            )
        encoder = open_vision_encoder(vision_tower)
        for name in expected:
            own = name.removeprefix(VISION_PREFIX)
            if own in encoder.stored_names:
                readers[name] = partial(encoder.read, own)
                infos[name] = TensorInfo(encoder.info(own).shape, dtype)
    for name in unused:
        if name not in infos:
            weights = initialised(model, name.rpartition(".")[0], seed=0)
            readers[name] = partial(torch.Tensor.clone, weights[name])
            infos[name] = TensorInfo(tuple(weights[name].shape), dtype)
