"""State files: the recurrent state of a film in one safetensors file, with a checksum and the model it belongs to.

A file holds each layer's state under a name such as `layers.0.conv`. Its metadata holds the format, its version and a
SHA-256 of everything else. It also describes the model, because only the model's own weights, config and prompt can
continue from a state. The description guards against mistakes, not against forgery.
"""

import hashlib
import json
import os
import threading
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Cache

from ..mamba2 import LayerState, empty_cache, read_state, write_state
from ..video import Clock, Picture
from .watched_film import Memory

_FORMAT = "transformers_ma2mba state"
_VERSION = "1"
_MAX_HEADER_BYTES = 2**24  # a thousand layers need less than half a megabyte

# A fingerprint takes this many values of each parameter, or up to twice as many, and all values of a smaller one.
_NUM_VALUES = 1024
# Config entries that belong to a run and not to the model: they change no state.
_SETTINGS = (
    "frame_rate",
    "frames_per_vision_pass",
    "tokens_per_pass",
    "unpadded_vocab_size",
    "transformers_version",
    "dtype",
    "architectures",
)
# Config fields that were added later, with the value by which earlier models worked.
_EARLIER = {"spatial_pool_rounding": "up"}


class StateFileError(ValueError):
    """A file that cannot be loaded as the state of a film. The message names the file, the reason and the remedy."""


# Films


def save_film(path: str | os.PathLike, model, prompt_beginning: Sequence[int], frame_rate: float, memory: Memory):
    """Save a film; its file has the same size for every film.

    Args:
        path: the file to write.
        model ([`Ma2mbaForVideoQA`]): the model that watched the film.
        prompt_beginning: the tokens of every prompt up to its video.
        frame_rate: samples per second of film.
        memory: the film so far, without frames that wait for the model.

    Raises:
        FileNotFoundError: if the directory does not exist.
    """
    cache, num_frames, clock, _ = memory
    side = model.config.vision_config.image_size
    metadata = {
        "frames": _fixed_width(num_frames),
        "tokens": _fixed_width(len(prompt_beginning) + num_frames * model.config.tokens_per_frame),
        "seconds": _fixed_width(num_frames / frame_rate),
        "frame_rate": _fixed_width(frame_rate),
        "clock": "1" if clock else "0",
        "clock_origin": _fixed_width(clock.origin if clock else 0.0),
        "clock_first_sample": _fixed_width(num_frames - clock.num_samples if clock else 0),
        "clock_latest": _fixed_width(clock.latest if clock else 0.0),
        **describe_model(model, prompt_beginning),
    }
    on_screen = clock.on_screen.pixels if clock else torch.zeros(3, side, side, dtype=torch.uint8)
    save_state_file(path, {**cache_to_tensors(cache), "on_screen": on_screen}, metadata)


def load_film(path: str | os.PathLike, model, prompt_beginning: Sequence[int]) -> tuple[float, Memory]:
    """Load the frame rate and the memory that [`save_film`] wrote; model and beginning must be the same as then.

    Raises:
        FileNotFoundError: if the file does not exist.
        StateFileError: if it has another format or version, is damaged, or belongs to another checkpoint.
    """
    tensors, metadata = load_state_file(path)
    try:
        own = describe_model(model, prompt_beginning)
        if not is_same_model(metadata, own):
            raise StateFileError(
                f"{os.fspath(path)} was made by {name_model(metadata)}, and cannot be resumed with {name_model(own)}: "
                "load the model that made it."
            )
        num_frames, frame_rate, clock = int(metadata["frames"]), float(metadata["frame_rate"]), None
        if metadata["clock"] == "1":
            num_samples = num_frames - int(metadata["clock_first_sample"])
            times = float(metadata["clock_origin"]), float(metadata["clock_latest"])
            clock = Clock(frame_rate, *times, Picture(tensors["on_screen"]), num_samples)
        return frame_rate, Memory(cache_from_tensors(tensors, _layer_devices(model)), num_frames, clock)
    except KeyError as error:
        raise StateFileError(f"{os.fspath(path)} is no film's state: it has no {error}.") from error


def _fixed_width(number: int | float) -> str:
    """A number as text of the same length for every value, so that the size of a file depends on no value."""
    return f"{number:020d}" if isinstance(number, int) else f"{number:+.17e}"


# The file


def save_state_file(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]):
    """Write tensors and metadata into one file, completely or not at all.

    The size of the file depends only on the shapes and dtypes of the tensors and on the lengths of the metadata.

    Raises:
        FileNotFoundError: if the directory does not exist.
    """
    path = os.fspath(path)
    directory = os.path.dirname(path)
    if directory and not os.path.isdir(directory):
        raise FileNotFoundError(f"There is no directory {directory} to save {path} in: make it first.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "format": _FORMAT, "version": _VERSION}
    metadata["sha256"] = _digest(tensors, metadata)
    temporary = f"{path}.{os.getpid()}-{threading.get_ident()}.part"
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_state_file(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors, on the CPU, and the metadata that [`save_state_file`] wrote.

    Raises:
        FileNotFoundError: if the file does not exist.
        StateFileError: if the file has another format or version, is cut short or damaged.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}: check its path.")
    metadata, length = _read_header(path)
    size = os.path.getsize(path)
    if size < length:
        raise StateFileError(f"{path} is cut short: it has {size} of {length} bytes; copy or save it again.")
    if metadata["version"] != _VERSION:
        raise StateFileError(
            f"{path} has version {metadata['version']!r}, but this release reads version {_VERSION!r}: watch the "
            "film again, or use the release that saved it."
        )
    damaged = f"{path} is damaged: its contents do not match its checksum; copy it again."
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateFileError(damaged) from error
    if _digest(tensors, metadata) != metadata.get("sha256"):
        raise StateFileError(damaged)
    return tensors, metadata


def _read_header(path: str) -> tuple[dict[str, str], int]:
    """The metadata of a safetensors file, and the length in bytes that the file should have."""
    foreign = f"{path} is not the saved state of a film, or its beginning is damaged: give a file that `save` wrote."
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if size < 8 or header_length > _MAX_HEADER_BYTES:
            raise StateFileError(foreign)
        header = file.read(header_length)
    if len(header) < header_length and header.startswith(b"{"):
        raise StateFileError(
            f"{path} is cut short: it has {size} bytes, fewer than its header alone; copy or save it again."
        )
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__")
        length = 8 + header_length + max(entry["data_offsets"][1] for entry in entries.values())
        if metadata["format"] == _FORMAT and "version" in metadata:
            return metadata, length
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        pass
    raise StateFileError(foreign)


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(metadata.items()):
        if name != "sha256":
            digest.update(f"{name}={value}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# States


def cache_to_tensors(cache: Cache) -> dict[str, torch.Tensor]:
    """The states of a cache by their names in a file, `layers.0.conv` and so on; the tensors are not copied."""
    return {
        f"layers.{index}.{name}": tensor
        for index, layer in enumerate(cache.layers)
        for name, tensor in read_state(layer)._asdict().items()
    }


def cache_from_tensors(tensors: dict[str, torch.Tensor], devices: Sequence[torch.device]) -> Cache:
    """The cache with the states that [`cache_to_tensors`] named.

    Args:
        tensors: the states by name; other entries are ignored.
        devices: one for each layer of the model.

    Raises:
        KeyError: if a layer's state is missing.
    """
    cache = empty_cache(len(devices))
    for index, (layer, device) in enumerate(zip(cache.layers, devices, strict=True)):
        write_state(layer, LayerState(*(tensors[f"layers.{index}.{name}"].to(device) for name in LayerState._fields)))
    return cache


def _layer_devices(model) -> list[torch.device]:
    """The device on which each layer of the language model computes; accelerate may keep its parameters elsewhere."""
    devices = []
    for layer in model.model.language_model.layers:
        device = next(layer.parameters()).device
        if device.type == "meta":
            device = torch.device(layer._hf_hook.execution_device)
        devices.append(device)
    return devices


# The model that a state belongs to


def describe_model(model, prompt_beginning: Sequence[int]) -> dict[str, str]:
    """The metadata that tells a model from others.

    The fingerprint does not depend on the place or name of a checkpoint, and changes with fine-tuning.

    Args:
        model ([`Ma2mbaForVideoQA`]): the model, on any devices.
        prompt_beginning: the tokens of every prompt up to its video.

    Returns:
        `checkpoint`, the model's name or path; `dtype`; and `fingerprint`, a SHA-256 of the config, the prompt's
        beginning, the name, dtype, shape and evenly spaced values of each parameter, and the adapters in use.
        Parameters on the meta device count without values.
    """
    digest = hashlib.sha256()
    config = _without_settings(model.config.to_dict())
    digest.update(json.dumps([config, list(prompt_beginning)], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        if parameter.device.type != "meta":
            values = parameter.detach().flatten()
            values = values[:: max(1, values.numel() // _NUM_VALUES)].contiguous().cpu()
            digest.update(values.view(torch.uint8).numpy())
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            digest.update(f"{name} {_adapters_in_use(module)}\n".encode())
    name = getattr(model, "name_or_path", None) or "a model without a name"
    return {
        "checkpoint": str(name),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": digest.hexdigest(),
    }


def _adapters_in_use(layer) -> dict:
    """The adapters that one of PEFT's layers applies, by name, with their factors; and those in its weights."""
    active = [] if layer.disable_adapters else layer.active_adapters
    factors = getattr(layer, "scaling", {})
    return {"active": {name: factors.get(name) for name in active}, "merged": layer.merged_adapters}


def is_same_model(description: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two descriptions, or metadata that contain them, are of one model under any name.

    Raises:
        KeyError: if one of them is no description.
    """
    return all(description[name] == other[name] for name in ("dtype", "fingerprint"))


def name_model(description: dict[str, str]) -> str:
    """A description as words for messages."""
    return f"{description['checkpoint']} ({description['dtype']}, fingerprint {description['fingerprint'][:12]})"


def _without_settings(config):
    """A config without the entries in which two runs of one model may differ, at all levels."""
    if not isinstance(config, dict):
        return config
    return {
        str(name): _without_settings(value)
        for name, value in config.items()
        if name not in _SETTINGS
        and not str(name).startswith("_")
        and (name not in _EARLIER or value != _EARLIER[name])
    }
