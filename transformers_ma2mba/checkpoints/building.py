"""A new model from a published Mamba-2 and a published vision encoder (paper §4.1), written tensor by tensor."""

import os
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_ma2mba import Ma2mbaConfig
from ..modeling_ma2mba import Ma2mbaForVideoQA
from ..processing_ma2mba import Ma2mbaProcessor
from .loading import with_special_tokens
from .mamba2_layouts import TOKENIZERS, LanguageModel, naming_configuration, open_language_model
from .tensor_files import PlannedTensor, TensorInfo, check_tensors, new_folder, write_safetensors
from .vision_encoders import VisionEncoder, open_vision_encoder

_PLACEHOLDERS = ("<image>", "<video>")
_ROWS_MULTIPLE = 16  # of the published models


def build_model(
    language_model: str | os.PathLike,
    vision_model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_shard_size: int = 5 * 10**9,
) -> Ma2mbaConfig:
    """Write a new checkpoint of a language model, a vision encoder, and a projector that is still to be trained.

    The weights pass through memory one by one. The features are those of the encoder's penultimate layer, as in the
    paper. If the vocabulary has no rows left for `<image>` and `<video>`, it gets new ones.

    Args:
        language_model: the folder of a Mamba-2 in the original layout, Transformers' or Codestral's.
        vision_model: the folder of a CLIP or SigLIP in Transformers' layout, with or without its text tower.
        output: a new or empty folder. It gets its files when all of them are written.
        tokenizer: a folder or hub name; None means that the language model's folder has one.
        dtype: the dtype of all weights; None means that of the language model's matrices.
        seed: of the projector's weights, which the model's own rule initialises.
        max_shard_size: size limit of a weight file in bytes.

    Raises:
        ValueError: if a folder does not hold what is needed; the message says what, and what to do.
        OSError: if a file cannot be read or written.
    """
    language, vision = open_language_model(language_model), open_vision_encoder(vision_model)
    text_tokenizer = load_tokenizer(tokenizer or language_model, TOKENIZERS[language.layout])
    config = _joint_config(language, vision, text_tokenizer)
    dtype = dtype or language.dtype
    processor = Ma2mbaProcessor.from_model_config(config, text_tokenizer)
    model = empty_model(config, dtype)
    with new_folder(output) as folder:
        write_safetensors(folder, _plan(model, language, vision, dtype, seed), max_shard_size)
        save_around_weights(folder, model, processor)
    return config


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((Path(folder) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


def load_tokenizer(name: str | os.PathLike, advice: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: a folder or hub name.
        advice: half a sentence that says which one is needed.

    Raises:
        ValueError: if there is none.
    """
    needed = f"{advice}: name its folder with --tokenizer."
    if os.path.isdir(name) and not has_tokenizer(name):
        raise ValueError(f"There is no tokenizer in {str(name)!r}. {needed}")
    try:
        return with_special_tokens(AutoTokenizer.from_pretrained(name))
    except Exception as error:  # its class depends on Transformers and on the wrong file
        reason = next(iter(str(error).splitlines()), repr(error))
        raise ValueError(f"The tokenizer in {str(name)!r} cannot be loaded ({reason}). {needed}") from error


def _joint_config(language: LanguageModel, vision: VisionEncoder, tokenizer: PreTrainedTokenizerBase) -> Ma2mbaConfig:
    """Join the configurations of both parts, with ids for the placeholders and enough rows for them."""
    text_config = language.config
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the language model has {text_config.vocab_size} rows: "
            f"they do not belong together. {TOKENIZERS[language.layout]}."
        )
    tokenizer.add_tokens([token for token in _PLACEHOLDERS if token not in tokenizer.get_vocab()], special_tokens=True)
    image_token_id, video_token_id = tokenizer.convert_tokens_to_ids(list(_PLACEHOLDERS))
    if len(tokenizer) > text_config.vocab_size:
        text_config.vocab_size = -(-len(tokenizer) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(text_config, name, getattr(tokenizer, name))
    with naming_configuration(vision.tensors.folder):  # that of the language model has been checked
        return Ma2mbaConfig(
            vision_config=vision.config,
            text_config=text_config,
            image_mean=vision.image_mean,
            image_std=vision.image_std,
            image_token_id=image_token_id,
            video_token_id=video_token_id,
            tie_word_embeddings=text_config.tie_word_embeddings,
        )


def empty_model(config: Ma2mbaConfig, dtype: torch.dtype) -> Ma2mbaForVideoQA:
    """Make a model without data, for names, shapes and rules."""
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.architectures = [Ma2mbaForVideoQA.__name__]
    with torch.device("meta"):
        return Ma2mbaForVideoQA(config)


def stored_shapes(model: Ma2mbaForVideoQA) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a checkpoint of the model has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def initialised(model: Ma2mbaForVideoQA, path: str, seed: int) -> dict[str, torch.Tensor]:
    """Initialise one module of an empty model by the model's own rule, in float32.

    Args:
        path: the module's path in the model.

    Returns:
        the weights, by their names in the model.
    """
    module = model.get_submodule(path).float().to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.apply(model._init_weights)
    return {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}


def _plan(model, language: LanguageModel, vision: VisionEncoder, dtype, seed: int) -> dict[str, PlannedTensor]:
    """Plan all tensors of the new model."""
    rows = model.config.text_config.vocab_size
    readers, found = {}, {}
    for name in language.stored_names:
        target = name.replace("backbone.", "model.language_model.", 1)
        shape = language.info(name).shape
        readers[target] = partial(language.read, name)
        if name in ("backbone.embeddings.weight", "lm_head.weight") and rows > shape[0]:
            readers[target] = partial(_with_new_rows, model, readers[target], rows, seed)
            shape = (rows, *shape[1:])
        found[target] = shape
    for name in vision.stored_names:
        readers[f"model.vision_tower.{name}"] = partial(vision.read, name)
        found[f"model.vision_tower.{name}"] = vision.info(name).shape
    for name, tensor in initialised(model, "model.multi_modal_projector", seed).items():
        readers[name] = partial(torch.Tensor.clone, tensor)
        found[name] = tuple(tensor.shape)
    expected = stored_shapes(model)
    check_tensors("both folders", expected, found, "This is a mistake in transformers_ma2mba: please report it.")
    return {name: PlannedTensor(TensorInfo(shape, dtype), readers[name]) for name, shape in expected.items()}


def _with_new_rows(model: Ma2mbaForVideoQA, read, rows: int, seed: int) -> torch.Tensor:
    """Append rows to the embeddings or the head, initialised as the language model's rule does."""
    old = read()
    generator = torch.Generator().manual_seed(seed)
    std = model.config.text_config.initializer_range
    new = torch.empty(rows - len(old), old.shape[1]).normal_(std=std, generator=generator)
    return torch.cat([old, new.to(old.dtype)])


def save_around_weights(folder: Path, model: Ma2mbaForVideoQA, processor: Ma2mbaProcessor) -> None:
    """Save configuration, generation configuration and processor beside weights that are already written."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
