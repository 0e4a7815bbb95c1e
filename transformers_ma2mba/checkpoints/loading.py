"""Loading the authors' layout through the Auto classes, as it is on the Hub or in a folder.

`auto` registers these classes. Each turns into a class of ours when it has loaded: the result is a plain
[`Ma2mbaConfig`], [`Ma2mbaForVideoQA`] or [`Ma2mbaProcessor`], and saves our layout.

No published file was at hand when this was written; see [`published`][transformers_ma2mba.checkpoints.published].
"""

import copy
import errno
import json
import logging
import re
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file

from ..configuration_ma2mba import Ma2mbaConfig
from ..modeling_ma2mba import Ma2mbaForVideoQA
from ..processing_ma2mba import Ma2mbaProcessor
from .published import (
    MODEL_TYPE,
    PREFIXES,
    VISION_PREFIX,
    is_frame_selector_head,
    is_unused_vision_weight,
    published_config,
    published_tokenizer,
    to_published,
)
from .tensor_files import WEIGHT_FILES, TensorFolder

# The options of `from_pretrained` that hold for every repository, and those for the checkpoint's alone.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_PLACE_OPTIONS = ("revision", "subfolder")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_LISTED = 20


class PublishedMa2mbaConfig(Ma2mbaConfig):
    """Our configuration, read from the authors' layout, with the places of the parts that may lie elsewhere.

    Args:
        mm_vision_tower (`str`): the hub name or folder of the vision encoder, for weights that the checkpoint lacks.
        tokenizer_name (`str`): the hub name or folder of the tokenizer, for a checkpoint without one.
    """

    mm_vision_tower: str | None = None
    tokenizer_name: str | None = None

    def plain(self) -> Ma2mbaConfig:
        """Return a copy without these places."""
        config = copy.deepcopy(self)
        config.__class__ = Ma2mbaConfig
        del config.mm_vision_tower, config.tokenizer_name
        return config


class LlavaMambaConfig(PreTrainedConfig):
    """The authors' model type. Its `from_dict` reads their configuration into ours."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> PublishedMa2mbaConfig:
        """Read the authors' configuration.

        Args:
            config_dict: the content of `config.json`.
            kwargs: keys of it to replace, such as `mm_vision_tower` and `tokenizer_name`, and fields of
                [`Ma2mbaConfig`].

        Raises:
            ValueError: see [`published_config`].
        """
        replaceable = {*config_dict, "tokenizer_name"} - {"dtype", "torch_dtype"}
        config_dict = {**config_dict, **{key: kwargs.pop(key) for key in list(kwargs) if key in replaceable}}
        fields = published_config(config_dict).to_dict()
        places = {
            "mm_vision_tower": config_dict["mm_vision_tower"],
            "tokenizer_name": published_tokenizer(config_dict),
        }
        return PublishedMa2mbaConfig.from_dict({**fields, **places}, **kwargs)


class LlavaMambaForVideoQA(Ma2mbaForVideoQA):
    """A [`Ma2mbaForVideoQA`] while it loads from the authors' layout."""

    config: PublishedMa2mbaConfig

    @classmethod
    def _from_config(cls, config, **kwargs):
        return Ma2mbaForVideoQA._from_config(config.plain(), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, strict=True, **kwargs):
        """Load a checkpoint in the authors' layout.

        A vision encoder that the checkpoint lacks, since it was not trained, comes from `mm_vision_tower`. The heads
        of a frame selector are left out with a warning.

        Args:
            pretrained_model_name_or_path: a hub name or a folder.
            config: a [`PublishedMa2mbaConfig`]; by default it is read from the checkpoint.
            strict: whether weights that are left over, missing or of another shape are an error. If False, they are a
                warning, and missing weights are initialised.
            kwargs: options of [`PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: if the weights do not fit the configuration, which the message lists, or a file is cut short.
            OSError: if a file is missing.
        """
        name = str(pretrained_model_name_or_path)
        if not isinstance(config, PublishedMa2mbaConfig):
            config = AutoConfig.from_pretrained(config or name, **_hub_options(kwargs, *_PLACE_OPTIONS))
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # they are in the error
        # Adapters come last: Transformers would report on their weights alone, and the vision encoder may be missing.
        adapter_options = kwargs.pop("adapter_kwargs", None) or {}
        adapter, adapter_name = adapter_options.pop("_adapter_model_path", None), kwargs.pop("adapter_name", "default")
        with _without_loading_report(), _naming_broken_files(name, _hub_options(kwargs, *_PLACE_OPTIONS)):
            model, info = super().from_pretrained(
                name, *model_args, config=config.plain(), output_loading_info=True, **kwargs
            )
        model.__class__ = Ma2mbaForVideoQA
        model._weight_conversions = None  # the model saves our names
        misfits = _Misfits(model, info)
        if misfits.lacks_vision:
            loaded = _load_vision_encoder(model, config.mm_vision_tower, _hub_options(kwargs))
            misfits.missing -= loaded
            info["missing_keys"] -= loaded
        if misfits.heads:
            warnings.warn(
                f"{name} holds the heads of a frame selector, which this model does not have; they are left out: "
                f"{_listed(misfits.heads)}.",
                UserWarning,
                stacklevel=2,
            )
        if message := misfits.message(name):
            if strict:
                raise ValueError(message)
            warnings.warn(message, UserWarning, stacklevel=2)
        if adapter is not None:
            model.load_adapter(adapter, adapter_name=adapter_name, adapter_kwargs=adapter_options)
        return (model, info) if wants_info else model


class LlavaMambaProcessor(Ma2mbaProcessor):
    """A [`Ma2mbaProcessor`] for a checkpoint in the authors' layout, which has none of its own."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> Ma2mbaProcessor:
        """Make the processor by the configuration, with the checkpoint's tokenizer or the one that it names.

        Args:
            pretrained_model_name_or_path: a hub name or a folder.
            kwargs: options that say how to reach the Hub, keys of `config.json` and fields of [`Ma2mbaConfig`] to
                replace, and options of [`Ma2mbaVideoProcessor`].

        Raises:
            ValueError: if no tokenizer can be loaded, or it has another number of tokens than the configuration says.
        """
        name = str(pretrained_model_name_or_path)
        hub_options = _hub_options(kwargs, *_PLACE_OPTIONS)
        config = AutoConfig.from_pretrained(name, **kwargs)
        lenient = {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors")}
        if not any(cached_file(name, file, **hub_options, **lenient) for file in _TOKENIZER_FILES):
            name, hub_options = config.tokenizer_name, _hub_options(kwargs)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **hub_options)
        except Exception as error:  # its class depends on Transformers and on the wrong file
            raise ValueError(
                f"The tokenizer {name!r} cannot be loaded: put its files beside config.json, or set tokenizer_name "
                f"there to a folder with them. {error}"
            ) from error
        processor = Ma2mbaProcessor.from_model_config(config.plain(), with_special_tokens(tokenizer))
        video_processor = processor.video_processor
        processor.video_processor = type(video_processor).from_dict(video_processor.to_dict(), **kwargs)
        return processor


def with_special_tokens(tokenizer):
    """Give a tokenizer that has no end of text or no padding token those of GPT-NeoX, if they are in its vocabulary.

    A `tokenizer.json` alone names neither, and GPT-NeoX's published tokenizer names no padding token.
    """
    vocabulary = tokenizer.get_vocab()
    if tokenizer.eos_token is None and "<|endoftext|>" in vocabulary:
        tokenizer.eos_token = "<|endoftext|>"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|padding|>" if "<|padding|>" in vocabulary else tokenizer.eos_token
    return tokenizer


def published_renamings() -> list[WeightRenaming]:
    """Return the renaming of weights while they load, for `register_checkpoint_conversion_mapping`."""
    return [WeightRenaming(f"^{re.escape(theirs)}", ours) for theirs, ours in PREFIXES if theirs != ours]


def _hub_options(kwargs: dict, *more: str) -> dict:
    return {key: kwargs[key] for key in (*_HUB_OPTIONS, *more) if key in kwargs}


class _Misfits:
    """The weights by which a checkpoint and a model differ, after loading."""

    def __init__(self, model: Ma2mbaForVideoQA, info: dict):
        unused = [key for key in model.state_dict() if is_unused_vision_weight(key, model.config)]
        used = {key for key in model.state_dict() if key.startswith(VISION_PREFIX)}.difference(unused)
        left_over = {key for key in info["unexpected_keys"] if not is_unused_vision_weight(key, model.config)}
        self.missing = set(info["missing_keys"]).difference(unused)
        self.heads = sorted(filter(is_frame_selector_head, left_over))
        self.left_over = left_over.difference(self.heads)
        self.mismatched = sorted(info["mismatched_keys"], key=str)
        self.lacks_vision = bool(used) and used <= self.missing
        # Transformers takes the head out of the mapping where both weights are stored and differ.
        self.two_heads = model.config.tie_word_embeddings and "lm_head.weight" not in model.all_tied_weights_keys

    def message(self, name: str) -> str | None:
        """One message with all differences and the ways out; None if there are none."""
        parts = []
        if self.left_over:
            parts.append(f"Left over, with no place in the model: {_listed(map(_published, self.left_over))}.")
        if self.missing:
            parts.append(f"Missing in the files: {_listed(map(_published, self.missing))}.")
        if self.mismatched:
            shapes = (
                f"{_published(key)} {tuple(found)} in the files and {tuple(expected)} by config.json"
                for key, found, expected in self.mismatched
            )
            parts.append(f"Of another shape: {_listed(shapes, '; ')}.")
        if self.two_heads:
            parts.append("Different, though tie_embeddings is true: backbone.embedding.weight and lm_head.weight.")
        if not parts:
            return None
        return "\n".join(
            [
                f"The weights in {name!r} do not fit its config.json, read as the authors' layout ({MODEL_TYPE}).",
                *parts,
                "What to do: if files are missing or were cut short, download them again. If shapes differ, compare "
                "d_model, n_layer, ssm_cfg, vocab_size, pad_vocab_size_multiple and mm_vision_tower in config.json "
                "with the shapes above. Set tie_embeddings to true if lm_head.weight is missing, and to false if it "
                "differs. To load the weights that do fit, and to initialise the others at random, pass strict=False "
                "to from_pretrained.",
            ]
        )


def _published(key: str) -> str:
    return to_published(key) or key


def _listed(names, separator=", ") -> str:
    names = sorted(names)
    more = len(names) - _LISTED
    return separator.join(names[:_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")


def _load_vision_encoder(model: Ma2mbaForVideoQA, name: str, hub_options: dict) -> set[str]:
    """Load the weights of the vision tower from the encoder's own repository.

    Returns:
        The names of the model's weights that were loaded.

    Raises:
        ValueError: if the encoder cannot be loaded, or its weights do not fit.
    """
    tower = model.model.vision_tower
    if any(parameter.is_meta for parameter in tower.parameters()):
        raise ValueError(
            f"The vision encoder comes from {name!r}, which cannot be spread over devices while it loads: keep "
            "model.vision_tower off the disk in device_map."
        )
    if any(type(module).__module__.startswith("bitsandbytes") for module in tower.modules()):
        raise ValueError(
            f"The vision encoder comes from {name!r}, which cannot be quantized while it loads: convert the "
            "checkpoint with `transformers-ma2mba convert` first, or set llm_int8_skip_modules to "
            "['model.vision_tower', 'lm_head']."
        )
    what_to_do = (
        "The checkpoint has no weights of the vision encoder, since it was not trained. Pass mm_vision_tower=, or set "
        "it in config.json, to a folder with the encoder's files."
    )
    try:
        with _without_loading_report(), _naming_broken_files(name, hub_options):
            source, info = type(tower).from_pretrained(
                name,
                config=copy.deepcopy(model.config.vision_config),
                dtype=tower.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **hub_options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"The vision encoder {name!r} cannot be loaded. {what_to_do} {error}") from error
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    lacking = {key for key in lacking if not is_unused_vision_weight(VISION_PREFIX + key, model.config)}
    if lacking:
        raise ValueError(
            f"The vision encoder {name!r} lacks weights or has them in another shape: {_listed(lacking)}. {what_to_do}"
        )
    with _whole_parameters(source, tower):
        tower.load_state_dict(source.state_dict())
    return {VISION_PREFIX + key for key in source.state_dict()}


def _whole_parameters(source: nn.Module, target: nn.Module):
    """Gather the parameters of two modules while one is copied into the other, where ZeRO-3 has spread both."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([*source.parameters(), *target.parameters()], modifier_rank=0)


@contextmanager
def _without_loading_report():
    """Keep Transformers from logging a table of the keys that our own message lists."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(is_no_report)


@contextmanager
def _naming_broken_files(name: str, options: dict):
    """Turn the readers' errors about a damaged file of weights, or their index, into one that names the file."""
    try:
        yield
    except _READ_ERRORS as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a missing file, which the message names
            raise
        reason = _reason_of_broken_files(name, options)
        if reason is None and isinstance(error, (SafetensorError, UnpicklingError, EOFError)):
            reason = f"{error!r}."
        if reason:
            raise ValueError(f"The weights of {name!r} cannot be read: {reason} Download them again.") from error
        raise


# PyTorch raises a plain RuntimeError, or an OSError for an invalid argument, by the place where a file was cut.
_READ_ERRORS = (
    SafetensorError,
    UnpicklingError,
    EOFError,
    RuntimeError,
    OSError,
    json.JSONDecodeError,
    KeyError,
    AttributeError,
)


def _reason_of_broken_files(name: str, options: dict) -> str | None:
    folder = Path(cached_file(name, "config.json", **options)).parent
    if not any((folder / file).is_file() for file in WEIGHT_FILES):
        return None  # files of another name, by `variant`
    try:
        TensorFolder(folder)
    except ValueError as error:
        return str(error)
    return None
