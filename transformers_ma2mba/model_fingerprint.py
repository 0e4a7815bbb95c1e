"""Which model a saved state belongs to: only its own weights, config and prompt can go on from a state.

A description of the model goes into the state's file. Its fingerprint is the same wherever a checkpoint lies and
whatever it is called, and another after fine-tuning. It guards against mistakes, not against forgery.
"""

import hashlib
import json
from collections.abc import Sequence

import torch

# Of each parameter, so many values or up to twice as many make up the fingerprint; of a smaller one, all.
_NUM_VALUES = 1024
# Of the config, these belong to a run rather than to the model, and change no state.
_SETTINGS = (
    "frame_rate",
    "frames_per_vision_pass",
    "tokens_per_pass",
    "transformers_version",
    "dtype",
    "architectures",
)


def describe_model(model, prompt_beginning: Sequence[int]) -> dict[str, str]:
    """What tells a model from others, for the metadata of a state's file.

    Args:
        model ([`Ma2mbaForVideoQA`]): the model, on whatever devices.
        prompt_beginning: tokens of every prompt up to its video.

    Returns:
        `checkpoint`, the model's name or path; `dtype`; and `fingerprint`, a SHA-256 of the config, the prompt's
        beginning and, of every parameter, name, dtype, shape and values spread over it. Parameters that wait on no
        device count without values.
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
    name = getattr(model, "name_or_path", None) or "a model without a name"
    return {
        "checkpoint": str(name),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": digest.hexdigest(),
    }


def is_same_model(description: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two descriptions are of one model, whatever it is called.

    Raises:
        KeyError: if one of them is no description.
    """
    return all(description[name] == other[name] for name in ("dtype", "fingerprint"))


def name_model(description: dict[str, str]) -> str:
    """A description in words, for messages."""
    return f"{description['checkpoint']} ({description['dtype']}, fingerprint {description['fingerprint'][:12]})"


def _without_settings(config):
    """A config without what may differ between two runs of one model, at all levels."""
    if not isinstance(config, dict):
        return config
    return {
        str(name): _without_settings(value)
        for name, value in config.items()
        if name not in _SETTINGS and not str(name).startswith("_")
    }


__all__ = ["describe_model", "is_same_model", "name_model"]
