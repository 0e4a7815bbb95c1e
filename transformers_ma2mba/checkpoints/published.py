"""The authors' layout, `llava_mamba`: its configuration and the names of its weights, read into ours and back.

Sources: the configuration keys and weight names are those of the code that loads such checkpoints, the authors'
`interlive-team/ReFoCUS`, with their fork of mamba-ssm. No published file was at hand when this was written, so no real
file has confirmed them.
"""

import re

from transformers import AutoConfig, CLIPVisionConfig, Mamba2Config, PreTrainedConfig, SiglipVisionConfig

from ..configuration_ma2mba import CLIP_VIT_LARGE_336, Ma2mbaConfig

MODEL_TYPE = "llava_mamba"
DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"

# The number of tokens of DEFAULT_TOKENIZER, and the largest number that configurations give for it, with padding.
_GPT_NEOX_TOKENS = 50277
_GPT_NEOX_ROWS = 50432

# Vision encoders whose configuration is known without a download.
_SIGLIP_SO400M_384 = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
KNOWN_VISION_ENCODERS = {
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(**CLIP_VIT_LARGE_336),
    "google/siglip-so400m-patch14-384": _SIGLIP_SO400M_384,
}

# Beginnings of weight names, the authors' and ours. Of several that fit, the first counts, in both directions: the
# other ones of the same part are spellings that are read and never written.
PREFIXES = (
    ("backbone.embedding.", "model.language_model.embeddings."),
    ("backbone.embeddings.", "model.language_model.embeddings."),
    ("backbone.", "model.language_model."),
    ("mm_model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("mm_model.vision_tower.vision_tower.", "model.vision_tower."),
    ("mm_model.vision_tower.vision_model.", "model.vision_tower."),
    ("mm_model.vision_tower.", "model.vision_tower."),
    ("mm_model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("mm_model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("lm_head.", "lm_head."),
)
VISION_PREFIX = "model.vision_tower."

# Heads of ReFoCUS's frame selector, which shares the trunk. This model has none of them.
FRAME_SELECTOR_HEADS = (
    "key_head",
    "query_head",
    "value_head",
    "value_embedding",
    "value_head_scale",
    "logit_scale",
    "rank_head",
)


def to_ours(name: str) -> str | None:
    """Translate the authors' name of a weight into ours; None if it has no place in this model."""
    return _renamed(name, PREFIXES)


def to_published(name: str) -> str | None:
    """Translate our name of a weight into the authors'; None if it has no place there."""
    return _renamed(name, [(ours, theirs) for theirs, ours in PREFIXES])


def _renamed(name, prefixes):
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def is_frame_selector_head(name: str) -> bool:
    """Whether a weight, by its name in the authors' layout, belongs to the heads of a frame selector."""
    return name.split(".")[0] in FRAME_SELECTOR_HEADS


def is_unused_vision_weight(name: str, config: Ma2mbaConfig) -> bool:
    """Whether a weight, by our name, belongs to the part of the vision encoder above `vision_feature_layer`.

    The features do not depend on such a weight: a checkpoint may have it or not, and the model may have it or not.
    """
    if not name.startswith(VISION_PREFIX):
        return False
    name = name.removeprefix(VISION_PREFIX)
    if name.startswith(("post_layernorm.", "head.")) or name == "embeddings.position_ids":
        return True
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    used = config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)
    return layer is not None and int(layer[1]) >= used


def is_published_config(config: dict) -> bool:
    """Whether a `config.json` is of the authors' layout.

    Some may say `model_type` "mamba2", which is the name of Transformers' own model. The `mm_*` keys tell them apart.
    """
    return config.get("model_type") == MODEL_TYPE or "mm_vision_tower" in config


def published_tokenizer(config: dict) -> str:
    """Return the hub name or folder of the tokenizer that the authors' `config.json` names, or else the paper's."""
    for key in ("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path", "tokenizer"):
        if isinstance(config.get(key), str) and config[key]:
            return config[key]
    return DEFAULT_TOKENIZER


def published_config(config: dict) -> Ma2mbaConfig:
    """Read the authors' configuration into ours.

    The vision encoder is the one of `mm_vision_tower`, a hub name or a local folder whose configuration is read; the
    configurations of `KNOWN_VISION_ENCODERS` are known. Of SigLIP the authors delete the last layer and the head, and
    take the hidden states that remain, whatever `mm_vision_select_layer` says. Of CLIP, `mm_vision_select_layer`
    counts (-2 unless given). Bilinear pooling rounds up as there, average and max pooling round down.

    Args:
        config: the content of `config.json`.

    Raises:
        ValueError: if the configuration describes another architecture, a value is of another kind, or
            `mm_vision_tower` cannot be read.
    """
    config = _checked(config)
    text_config = original_mamba2_config(config)
    vision_config = _published_vision_config(config)
    is_siglip = vision_config.model_type == "siglip_vision_model"
    if config.get("mm_hidden_size", vision_config.hidden_size) != vision_config.hidden_size:
        raise ValueError(
            f"mm_hidden_size is {config['mm_hidden_size']}, but the vision encoder {config['mm_vision_tower']!r} has "
            f"a width of {vision_config.hidden_size}: set mm_vision_tower in config.json to the encoder that was used."
        )
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if is_siglip else {}
    mode = config.get("mm_spatial_pool_mode", "bilinear")
    first_placeholder = _first_placeholder(config["vocab_size"], text_config.vocab_size)
    optional = {"frames_per_vision_pass": config.get("vision_encode_chunk_size")}
    optional["dtype"] = config.get("dtype", config.get("torch_dtype"))
    return Ma2mbaConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_feature_layer=-1 if is_siglip else config.get("mm_vision_select_layer", -2),
        spatial_pool_mode=mode,
        spatial_pool_stride=config.get("mm_spatial_pool_stride", 2),
        spatial_pool_rounding="up" if mode == "bilinear" else "down",
        image_token_id=first_placeholder,
        video_token_id=first_placeholder + 1,
        unpadded_vocab_size=first_placeholder + 2,
        tie_word_embeddings=text_config.tie_word_embeddings,
        **normalisation,
        **{name: value for name, value in optional.items() if value is not None},
    )


def original_mamba2_config(config: dict) -> Mamba2Config:
    """Read the configuration of a Mamba-2 in the original layout, with the defaults of mamba-ssm.

    The embedding has `vocab_size` rows, rounded up to a multiple of `pad_vocab_size_multiple`.

    Args:
        config: the content of `config.json`, with `d_model`, `n_layer`, `vocab_size` and `ssm_cfg`.

    Raises:
        ValueError: if a key is missing, a value is of another kind, or the layers are not plain Mamba-2.
    """
    config = _without_nulls(config)
    missing = [key for key in ("d_model", "n_layer", "vocab_size") if key not in config]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}, which a Mamba-2 in the original layout has.")
    _check_values(config, _VALUES)
    ssm = {"layer": "Mamba1", **_without_nulls(config.get("ssm_cfg", {}))}
    _check_values(ssm, _SSM_VALUES)
    wrong = {key: ssm[key] for key, plain in _PLAIN_SSM.items() if key in ssm and ssm[key] not in plain}
    wrong |= {key: config[key] for key, plain in _PLAIN_TRUNK.items() if config.get(key, plain) != plain}
    if wrong:
        listed = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise ValueError(f"config.json says {listed}: only language models of plain Mamba-2 layers are supported.")
    names = {ours: ssm[theirs] for theirs, ours in SSM_NAMES.items() if theirs in ssm}
    shape = {
        "head_dim": 64,
        "expand": 2,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 256,
        **names,
    }
    multiple = config.get("pad_vocab_size_multiple", 8)
    return Mamba2Config(
        vocab_size=-(-config["vocab_size"] // multiple) * multiple,
        hidden_size=config["d_model"],
        num_hidden_layers=config["n_layer"],
        num_heads=shape["expand"] * config["d_model"] // shape["head_dim"],
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_embeddings", True),
        bos_token_id=0,  # <|endoftext|>
        eos_token_id=0,
        pad_token_id=1,  # <|padding|>
        **shape,
    )


# Options of mamba-ssm's Mamba-2 layer, and the field of `Mamba2Config` for each.
SSM_NAMES = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "n_groups",
    "chunk_size": "chunk_size",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_limit": "time_step_limit",
}
# Options of mamba-ssm that `Mamba2Config` cannot express, and the values that it stands for.
_PLAIN_SSM = {
    "layer": ("Mamba2",),
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
    "D_has_hdim": (False,),
    "d_ssm": (),
    "activation": ("swish", "silu"),
}
_PLAIN_TRUNK = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True, "norm_epsilon": 1e-5}
_KINDS = {
    "a whole number": lambda value: type(value) is int,
    "a whole number above 0": lambda value: type(value) is int and value > 0,
    "true or false": lambda value: isinstance(value, bool),
    "a string": lambda value: isinstance(value, str),
    "an object": lambda value: isinstance(value, dict),
}
_VALUES = {
    "d_model": "a whole number above 0",
    "n_layer": "a whole number above 0",
    "vocab_size": "a whole number above 0",
    "pad_vocab_size_multiple": "a whole number above 0",
    "ssm_cfg": "an object",
    "residual_in_fp32": "true or false",
    "tie_embeddings": "true or false",
    "mm_vision_tower": "a string",
    "mm_hidden_size": "a whole number above 0",
    "mm_vision_select_layer": "a whole number",
    "mm_spatial_pool_stride": "a whole number above 0",
    "vision_encode_chunk_size": "a whole number above 0",
}
_SSM_VALUES = dict.fromkeys(
    ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"), "a whole number above 0"
)


def _without_nulls(config: dict) -> dict:
    """Leave out the keys that are null, which mean the same as absent ones."""
    return {key: value for key, value in config.items() if value is not None}


def _check_values(config: dict, kinds: dict):
    for key, kind in kinds.items():
        if key in config and not _KINDS[kind](config[key]):
            raise ValueError(f"config.json says {key}={config[key]!r}, but {key} must be {kind}.")


def _checked(config: dict) -> dict:
    """Check the parts of the authors' configuration that have one supported value; return it without nulls."""
    config = _without_nulls(config)
    _check_values(config, _VALUES)
    expected = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": ("flat",),
        "mm_vision_select_feature": ("patch",),
        "mm_spatial_pool_mode": ("bilinear", "average", "max"),
    }
    for key, values in expected.items():
        if key in config and config[key] not in values:
            raise ValueError(f"config.json says {key}={config[key]!r}, but only {' or '.join(values)} is supported.")
    if not config.get("mm_vision_tower"):
        raise ValueError("config.json lacks mm_vision_tower, the hub name or the folder of the vision encoder.")
    return config


def _published_vision_config(config: dict) -> PreTrainedConfig:
    try:
        vision_config = vision_encoder_config(config["mm_vision_tower"])
    except ValueError as error:
        raise ValueError(
            f"{error} Set mm_vision_tower to it, or to one of {', '.join(KNOWN_VISION_ENCODERS)}."
        ) from error
    if vision_config.model_type == "siglip_vision_model":
        vision_config.num_hidden_layers -= 1
        vision_config.vision_use_head = False
    return vision_config


def vision_encoder_config(name: str) -> PreTrainedConfig:
    """Read the configuration of a CLIP or SigLIP vision encoder, alone or in a repository with its text tower.

    Args:
        name: a hub name or a local folder.

    Raises:
        ValueError: if the configuration cannot be read, or is of another encoder.
    """
    if name in KNOWN_VISION_ENCODERS:
        return type(KNOWN_VISION_ENCODERS[name]).from_dict(KNOWN_VISION_ENCODERS[name].to_dict())
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The configuration of the vision encoder {name!r} cannot be read ({_first_line(error)}). A "
            "folder with its files is needed."
        ) from error
    config = getattr(config, "vision_config", config)
    if config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"The vision encoder {name!r} is a {config.model_type!r}; CLIP and SigLIP are supported.")
    config.name_or_path = ""  # of the encoder, not of the model that it becomes a part of
    return config


def _first_placeholder(num_tokens: int, num_rows: int) -> int:
    """The first of two rows of the embedding that no token of the tokenizer uses."""
    if _GPT_NEOX_TOKENS <= num_tokens <= _GPT_NEOX_ROWS and num_rows >= _GPT_NEOX_TOKENS + 2:
        return _GPT_NEOX_TOKENS  # some configurations give the padded number of tokens
    return min(num_tokens, num_rows - 2)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
