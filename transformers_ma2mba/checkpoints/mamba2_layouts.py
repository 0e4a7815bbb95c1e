"""The layouts in which Mamba-2 language models are published, read into `Mamba2Config` and the names of Transformers.

- original (`state-spaces/mamba2-*`): `config.json` with `d_model`, `n_layer` and `ssm_cfg`; `pytorch_model.bin` with
  names such as `backbone.embedding.weight`;
- Transformers' (`AntonV/mamba2-*-hf`): `config.json` with `model_type` "mamba2"; `model.safetensors` with names such
  as `backbone.embeddings.weight`, or `backbone.embedding.weight`;
- Codestral's (`mistralai/Mamba-Codestral-7B-v0.1`): `params.json`; `consolidated.safetensors` with names such as
  `model.backbone.embedding.weight`.

No file of these repositories has been tried: the tests write small ones from descriptions. The configuration of
`mamba2-130m` was read in its file. Of `params.json` only `dim` and `n_layers` are known, so that sizes that show in
Codestral's weights are read off them.
"""

import hashlib
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from .published import SSM_NAMES, is_published_config, original_mamba2_config
from .tensor_files import StoredWeights, TensorFolder, check_tensors

TOKENIZERS = {
    "original": "The original Mamba-2 models have none of their own and use that of EleutherAI/gpt-neox-20b",
    "transformers": "A Mamba-2 in Transformers' layout usually carries one",
    "codestral": "Codestral's tokenizer.model.v3 is Mistral's SentencePiece model, version 3, and must be converted "
    "to a tokenizer.json first",
}

_ADVICE = "Is the configuration that of these weights? Download or copy both again."


@dataclass(frozen=True)
class LanguageModel(StoredWeights):
    """A stored Mamba-2, its weights under the names of `Mamba2ForCausalLM`; of a tied head only the embeddings.

    Args:
        layout: `"original"`, `"transformers"` or `"codestral"`.
        config: its configuration in Transformers.
        dtype: the dtype of its matrices.
    """

    layout: str
    config: Mamba2Config
    dtype: torch.dtype


def matrix_dtype(tensors: TensorFolder, name: str) -> torch.dtype:
    """Return the dtype of a stored matrix.

    Raises:
        ValueError: if no model can compute in it, since the weights are quantized.
    """
    dtype = tensors.info(name).dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"{name} in {str(tensors.folder)!r} is stored as {dtype}: quantized weights cannot be used, take the "
            "model's original ones."
        )
    return dtype


def read_json(path: Path) -> dict:
    """Read an object from a JSON file.

    Raises:
        ValueError: if the file is missing or holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"There is no {path.name} in {str(path.parent)!r}.")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


@contextmanager
def naming_configuration(folder: Path):
    """Turn any error about a configuration into a ValueError of one sentence that names its folder."""
    try:
        yield
    except Exception as error:  # its class depends on Transformers and on the wrong field
        reason = " ".join(str(error).split())
        raise ValueError(f"The configuration in {str(folder)!r} cannot be used: {reason}") from error


def stock_name(stored: str) -> str:
    """Return the name in `Mamba2ForCausalLM` of a tensor in any of the layouts."""
    name = stored.removeprefix("model.")
    if name.startswith("lm_head."):
        return name
    name = name.removeprefix("backbone.")
    if name.startswith("embedding."):
        name = "embeddings." + name.removeprefix("embedding.")
    return "backbone." + name


def original_name(name: str) -> str:
    """Return the name in the original layout of a parameter of `Mamba2ForCausalLM`."""
    return name.replace("backbone.embeddings.", "backbone.embedding.", 1)


def open_language_model(folder: str | os.PathLike) -> LanguageModel:
    """Open a Mamba-2 in any of the layouts, and check its weights against its configuration.

    Raises:
        ValueError: if the folder holds no Mamba-2, one that Transformers cannot express, or weights that do not fit.
    """
    folder = Path(folder)
    layout, settings = _recognise(folder)
    if layout == "codestral":
        tensors = TensorFolder(folder, ("consolidated.safetensors",))
    else:
        tensors = TensorFolder(folder)
    names = _stored_names(folder, tensors)
    shapes = {name: tensors.info(stored).shape for name, stored in names.items()}
    with naming_configuration(folder):
        config = _READERS[layout](settings, shapes, folder)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in Mamba2ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
        drop_tied_head(folder, tensors, names, "backbone.embeddings.weight")
        shapes.pop("lm_head.weight", None)
    check_tensors(str(folder), expected, shapes, _ADVICE)
    dtype = matrix_dtype(tensors, names["backbone.layers.0.mixer.in_proj.weight"])
    return LanguageModel(tensors, {name: names[name] for name in expected}, layout, config, dtype)


def _recognise(folder: Path) -> tuple[str, dict]:
    """Return the layout and its configuration file."""
    if not (folder / "config.json").is_file():
        if (folder / "params.json").is_file():
            return "codestral", read_json(folder / "params.json")
        raise ValueError(f"There is no language model in {str(folder)!r}: it has neither config.json nor params.json.")
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if is_published_config(settings):
        raise ValueError(
            f"{str(folder)!r} holds a whole Video-Ma²mba in its authors' layout: use `transformers-ma2mba convert`."
        )
    if {"d_model", "n_layer"} <= settings.keys():
        return "original", settings
    if kind == "mamba2":
        return "transformers", settings
    if kind == "ma2mba":
        raise ValueError(f"{str(folder)!r} holds a whole Ma²mba model; a language model in it needs `export` first.")
    raise ValueError(
        f"{str(folder)!r} holds a {kind!r} model; a Mamba-2 is needed, in the original layout, in Transformers' or in "
        "Codestral's."
    )


def _stored_names(folder: Path, tensors: TensorFolder) -> dict[str, str]:
    names: dict[str, str] = {}
    for stored in tensors:
        other = names.setdefault(stock_name(stored), stored)
        if other != stored:
            raise ValueError(f"The weights in {str(folder)!r} have one tensor twice, as {other} and as {stored}.")
    if "backbone.layers.0.mixer.dt_bias" not in names or "backbone.embeddings.weight" not in names:
        raise ValueError(
            f"The weights in {str(folder)!r} are not those of a Mamba-2, which has embedding.weight and "
            "layers.0.mixer.dt_bias; Mamba-1 and other models cannot be used."
        )
    return names


def drop_tied_head(folder: Path, tensors: TensorFolder, names: dict[str, str], embeddings: str) -> None:
    """Drop the stored head of a tied model, which must equal the embeddings.

    Args:
        folder: the folder, for the message.
        tensors: its weights.
        names: stored names by the names of a model; `lm_head.weight` is removed.
        embeddings: the name of the embeddings in the model.

    Raises:
        ValueError: if the head differs from the embeddings.
    """
    head = names.pop("lm_head.weight", None)
    if head is None or embeddings not in names:
        return
    if _digest(tensors[head]) != _digest(tensors[names[embeddings]]):
        raise ValueError(
            f"The configuration in {str(folder)!r} ties the head to the embeddings, but {head} differs from them: set "
            "tie_embeddings (or tie_word_embeddings) to false."
        )


def _digest(tensor: torch.Tensor) -> bytes:
    """Return a digest, by which large tensors are compared one after the other."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).digest()


def _read_transformers(settings: dict, shapes: dict, folder: Path) -> Mamba2Config:
    return Mamba2Config.from_pretrained(folder, local_files_only=True)


def _read_original(settings: dict, shapes: dict, folder: Path) -> Mamba2Config:
    """Read the configuration of the original layout; the stored embeddings have the last word on their rows."""
    config = original_mamba2_config(settings)
    config.vocab_size = _stored_rows(settings["vocab_size"], shapes)
    return config


def _stored_rows(vocab_size: int, shapes: dict) -> int:
    """Return the number of stored rows, which is `vocab_size` padded to a multiple."""
    rows = shapes["backbone.embeddings.weight"][0]
    if rows < vocab_size:
        raise ValueError(f"the embeddings have {rows} rows, fewer than the vocab_size {vocab_size}.")
    return rows


def _read_codestral(settings: dict, shapes: dict, folder: Path) -> Mamba2Config:
    """Read Codestral's `params.json`; sizes that it may lack come from the weights."""
    missing = {"dim", "n_layers"} - settings.keys()
    if missing:
        raise ValueError(f"params.json lacks {' and '.join(sorted(missing))}.")
    mixer = {name.rpartition("mixer.")[2]: shape for name, shape in shapes.items() if ".layers.0.mixer." in name}
    missing = {"conv1d.weight", "dt_bias", "out_proj.weight"} - mixer.keys()
    if missing:
        raise ValueError(f"the weights lack {' and '.join(sorted(missing))} of layer 0.")
    heads, intermediate = mixer["dt_bias"][0], mixer["out_proj.weight"][1]
    state_size = settings.get("d_state", 128)
    return Mamba2Config(
        hidden_size=settings["dim"],
        num_hidden_layers=settings["n_layers"],
        num_heads=heads,
        head_dim=intermediate // heads,
        expand=intermediate // settings["dim"],
        state_size=state_size,
        n_groups=settings.get("n_groups", (mixer["conv1d.weight"][0] - intermediate) // (2 * state_size)),
        conv_kernel=mixer["conv1d.weight"][-1],
        chunk_size=settings.get("chunk_size", 256),
        use_bias="in_proj.bias" in mixer,
        use_conv_bias="conv1d.bias" in mixer,
        vocab_size=_stored_rows(settings.get("vocab_size", 0), shapes),
        residual_in_fp32=settings.get("residual_in_fp32", True),
        tie_word_embeddings=settings.get("tie_embeddings", "lm_head.weight" not in shapes),
        bos_token_id=1,  # <s>, </s> and <unk> of Mistral's tokenizers
        eos_token_id=2,
        pad_token_id=0,
    )


_READERS = {"transformers": _read_transformers, "original": _read_original, "codestral": _read_codestral}


def original_config(config: Mamba2Config) -> dict:
    """Return the configuration of the original layout, the inverse of reading it.

    Raises:
        ValueError: if the layout has no place for a setting.
    """
    for name, value in {"layer_norm_epsilon": 1e-5, "hidden_act": "silu"}.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"The original layout has no place for {name} = {getattr(config, name)!r}: its code uses {value!r}."
            )
    layer = {name: getattr(config, ours) for name, ours in SSM_NAMES.items()}
    if tuple(layer["dt_limit"]) == (0.0, math.inf):
        del layer["dt_limit"]  # JSON has no infinity
    return {
        "d_model": config.hidden_size,
        "d_intermediate": 0,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": "Mamba2", **layer},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": math.gcd(config.vocab_size, 16),
        "tie_embeddings": config.tie_word_embeddings,
    }
