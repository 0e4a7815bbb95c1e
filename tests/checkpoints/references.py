"""The authors' model in plain PyTorch, token by token, and its files, independent of the package.

The language model is that of `original_mamba2.py`. The vision path follows the facts about the authors' code. Weights
are dicts with the authors' names. Shape suffixes: T tokens, D width, F frames, S patches along a side.
"""

import json

import original_mamba2
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

VISION = "mm_model.vision_tower.vision_tower.vision_model."
PROJECTOR = "mm_model.mm_projector."
IMAGE_PLACEHOLDER = -200
MEANS_AND_DEVIATIONS = {
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

# A vision encoder that runs in milliseconds, in the words of Transformers' configurations.
ENCODER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 40,
    "patch_size": 8,
}


def authors_config(vision_tower, **changes) -> dict:
    """The `config.json` of a tiny model in the authors' layout, with two layers and 382 tokens in 384 rows."""
    config = {
        **original_mamba2.settings(vocab_size=382),
        "architectures": ["LlavaMambaForCausalLM"],
        "model_type": "llava_mamba",
        "mm_vision_tower": str(vision_tower),
        "mm_hidden_size": ENCODER["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_patch_merge_type": "flat",
        "vision_encode_chunk_size": 4,
        "tokenizer_model_max_length": 4096,
        "tokenizer_padding_side": "right",
    }
    return {**config, **changes}


# Weights


def language_model_shapes(config: dict) -> dict[str, tuple]:
    """Names and shapes of a Mamba-2 in the original layout."""
    ssm = {"d_state": 128, "headdim": 64, "ngroups": 1, "expand": 2, "d_conv": 4, **config["ssm_cfg"]}
    width, inner = config["d_model"], ssm["expand"] * config["d_model"]
    heads, mixed = inner // ssm["headdim"], inner + 2 * ssm["ngroups"] * ssm["d_state"]
    rows = -(-config["vocab_size"] // config["pad_vocab_size_multiple"]) * config["pad_vocab_size_multiple"]
    shapes = {"backbone.embedding.weight": (rows, width), "backbone.norm_f.weight": (width,)}
    if not config["tie_embeddings"]:
        shapes["lm_head.weight"] = (rows, width)
    for layer in range(config["n_layer"]):
        mixer = f"backbone.layers.{layer}.mixer."
        shapes |= {
            f"backbone.layers.{layer}.norm.weight": (width,),
            mixer + "in_proj.weight": (inner + mixed + heads, width),
            mixer + "conv1d.weight": (mixed, 1, ssm["d_conv"]),
            mixer + "conv1d.bias": (mixed,),
            mixer + "dt_bias": (heads,),
            mixer + "A_log": (heads,),
            mixer + "D": (heads,),
            mixer + "norm.weight": (inner,),
            mixer + "out_proj.weight": (width, inner),
        }
    return shapes


def vision_shapes(kind: str, layers: int) -> dict[str, tuple]:
    """Names, without a prefix, and shapes of a CLIP or SigLIP vision encoder; SigLIP's without its head."""
    width, inner, patches = ENCODER["hidden_size"], ENCODER["intermediate_size"], _patches_per_side() ** 2
    shapes = {
        "embeddings.patch_embedding.weight": (width, 3, ENCODER["patch_size"], ENCODER["patch_size"]),
        "embeddings.position_embedding.weight": (patches + (kind == "clip"), width),
        "post_layernorm.weight": (width,),
        "post_layernorm.bias": (width,),
    }
    if kind == "clip":
        shapes |= {"embeddings.class_embedding": (width,)}
        shapes |= {"pre_layrnorm.weight": (width,), "pre_layrnorm.bias": (width,)}
    else:
        shapes["embeddings.patch_embedding.bias"] = (width,)
    for layer in range(layers):
        prefix = f"encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {prefix + norm + ".weight": (width,), prefix + norm + ".bias": (width,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{prefix}self_attn.{name}.weight": (width, width), f"{prefix}self_attn.{name}.bias": (width,)}
        shapes |= {prefix + "mlp.fc1.weight": (inner, width), prefix + "mlp.fc1.bias": (inner,)}
        shapes |= {prefix + "mlp.fc2.weight": (width, inner), prefix + "mlp.fc2.bias": (width,)}
    return shapes


def projector_shapes(config: dict) -> dict[str, tuple]:
    """Names and shapes of the projector."""
    vision, width = ENCODER["hidden_size"], config["d_model"]
    return {
        PROJECTOR + "0.weight": (width, vision),
        PROJECTOR + "0.bias": (width,),
        PROJECTOR + "2.weight": (width, width),
        PROJECTOR + "2.bias": (width,),
    }


def random_weights(shapes: dict[str, tuple], seed=0) -> dict[str, torch.Tensor]:
    """Weights that let each part of the input change the output."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            values = values.exp().add(0.5).log()
        elif name.endswith("norm.weight") or name.endswith("weight") and "norm" in name.split(".")[-2]:
            values = 1 + 0.2 * values
        elif name in ("backbone.embedding.weight", "lm_head.weight"):
            values = 0.1 * values  # logits of about 0.5, whose rounding in float32 stays below 1e-5
        elif len(shape) == 1:
            values = 0.3 * values
        else:
            values = values / values[0].numel() ** 0.5
        weights[name] = values
    return weights


def authors_weights(config: dict, kind="siglip", vision_prefix=VISION, seed=0) -> dict[str, torch.Tensor]:
    """All weights of a trained model. The authors delete the last layer of SigLIP before they save."""
    layers = ENCODER["num_hidden_layers"] - (kind == "siglip")
    vision = {vision_prefix + name: shape for name, shape in vision_shapes(kind, layers).items()}
    return random_weights({**language_model_shapes(config), **vision, **projector_shapes(config)}, seed)


# Files


def write_weights(folder, weights: dict[str, torch.Tensor], files=1, suffix="safetensors"):
    """Write weights into one file, or into several with an index."""
    stem, save = ("pytorch_model", torch.save) if suffix == "bin" else ("model", save_file)
    if files == 1:
        save(dict(weights), folder / f"{stem}.{suffix}")
        return
    names, weight_map = sorted(weights), {}
    for index in range(files):
        file = f"{stem}-{index + 1:05}-of-{files:05}.{suffix}"
        shard = {name: weights[name] for name in names[index::files]}
        weight_map |= dict.fromkeys(shard, file)
        save(shard, folder / file)
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def write_checkpoint(folder, config: dict, weights: dict[str, torch.Tensor], tokenizer=None, **options):
    """Write a checkpoint in the authors' layout; `options` are those of [`write_weights`]."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, weights, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_encoder(folder, kind: str, weights: dict[str, torch.Tensor] | None = None):
    """Write the repository of a CLIP or SigLIP as published: both towers, and names with `vision_model.`."""
    folder.mkdir(exist_ok=True)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "model_type": kind,
        "text_config": {"model_type": f"{kind}_text_model", **text},
        "vision_config": {"model_type": f"{kind}_vision_model", **ENCODER},
    }
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        others = {"text_model.final_layer_norm.weight": torch.ones(16), "logit_scale": torch.ones(1)}
        write_weights(folder, {**{f"vision_model.{name}": weight for name, weight in weights.items()}, **others})
    return folder


# The language model


# The vision path


def vision_features(weights: dict, prefix: str, kind: str, pixels, num_layers: int) -> torch.Tensor:
    """Hidden states `(F, patches, width)` after the first `num_layers` layers, without CLIP's class token."""
    heads, patch = ENCODER["num_attention_heads"], ENCODER["patch_size"]
    bias = weights.get(prefix + "embeddings.patch_embedding.bias")
    hidden = F.conv2d(pixels, weights[prefix + "embeddings.patch_embedding.weight"], bias, stride=patch)
    hidden = hidden.flatten(2).transpose(1, 2)
    if kind == "clip":
        first = weights[prefix + "embeddings.class_embedding"].expand(len(hidden), 1, -1)
        hidden = torch.cat([first, hidden], dim=1)
    hidden = hidden + weights[prefix + "embeddings.position_embedding.weight"]

    def norm(x, name):
        gain, shift = weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]
        eps = 1e-5 if kind == "clip" else 1e-6
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt() * gain + shift

    def linear(x, name):
        return x @ weights[f"{prefix}{name}.weight"].T + weights[f"{prefix}{name}.bias"]

    def activate(x):
        return x * torch.sigmoid(1.702 * x) if kind == "clip" else F.gelu(x, approximate="tanh")

    if kind == "clip":
        hidden = norm(hidden, "pre_layrnorm")
    for layer in (f"encoder.layers.{index}." for index in range(num_layers)):
        normed = norm(hidden, layer + "layer_norm1")
        queries, keys, values = (
            linear(normed, f"{layer}self_attn.{name}_proj").unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        weight = (queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5).softmax(-1)
        hidden = hidden + linear((weight @ values).transpose(1, 2).flatten(2), layer + "self_attn.out_proj")
        normed = norm(hidden, layer + "layer_norm2")
        hidden = hidden + linear(activate(linear(normed, layer + "mlp.fc1")), layer + "mlp.fc2")
    return hidden[:, 1:] if kind == "clip" else hidden


def pooled(features: torch.Tensor, mode: str) -> torch.Tensor:
    """Pool patches 2 x 2: bilinear to `ceil(S / 2)`, average and maximum to `floor(S / 2)`."""
    side = _patches_per_side()
    grid = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if mode == "bilinear":
        grid = F.interpolate(grid, size=[-(-side // 2)] * 2, mode="bilinear")
    else:
        blocks = grid[:, :, : side // 2 * 2, : side // 2 * 2].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        grid = blocks.mean((3, 5)) if mode == "average" else blocks.amax((3, 5))
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def frame_tokens(weights: dict, config: dict, kind: str, frames, prefix=VISION) -> torch.Tensor:
    """Tokens `(F, tokens per frame, D)` of uint8 frames `(F, 3, height, width)`.

    Of SigLIP, the hidden states that the layers before the last one leave; of CLIP, those that the configuration
    selects, of all layers.
    """
    mean, deviation = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in MEANS_AND_DEVIATIONS[kind]
    )
    pixels = (frames / 255 - mean) / deviation
    layers = ENCODER["num_hidden_layers"]
    used = layers - 1 if kind == "siglip" else (layers + 1 + config["mm_vision_select_layer"])
    features = pooled(vision_features(weights, prefix, kind, pixels, used), config["mm_spatial_pool_mode"])
    hidden = F.gelu(features @ weights[PROJECTOR + "0.weight"].T + weights[PROJECTOR + "0.bias"])
    return hidden @ weights[PROJECTOR + "2.weight"].T + weights[PROJECTOR + "2.bias"]


def reference_logits(weights: dict, config: dict, kind: str, ids: list[int], frames, prefix=VISION) -> torch.Tensor:
    """Logits of a text in which one placeholder, -200, stands for all tokens of the film.

    Args:
        ids: token ids, with the placeholder.
        frames: uint8 `(F, 3, height, width)`.

    Returns:
        Logits `(T, rows)`, computed in float64, with the tokens of the film in place of the placeholder.
    """
    weights = {name: weight.double() for name, weight in weights.items()}
    place, embedding = ids.index(IMAGE_PLACEHOLDER), weights["backbone.embedding.weight"]
    film = frame_tokens(weights, config, kind, frames, prefix).flatten(0, 1)
    before, after = embedding[ids[:place]], embedding[ids[place + 1 :]]
    return original_mamba2.logits_of_embeddings(config, weights, torch.cat([before, film, after])).float()


def _patches_per_side() -> int:
    return ENCODER["image_size"] // ENCODER["patch_size"]
