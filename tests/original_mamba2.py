"""The original Mamba-2 in plain PyTorch, from the paper's equations, and small files in published layouts.

The model is written from arXiv:2405.21060, §6 and §7, and the order of operations of the original module; it shares no
code with Transformers or with this package.
"""

import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

EPSILON = 1e-5


def settings(**changes) -> dict:
    """A `config.json` of the original layout: 4 heads of 16, and 379 tokens padded to 384 rows."""
    plain = {
        "d_model": 32,
        "d_intermediate": 0,
        "n_layer": 2,
        "vocab_size": 379,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 8},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }
    return {**plain, **changes}


def sizes(config: dict) -> dict[str, int]:
    """The sizes of a layer, by the paper's symbols, with the original's defaults."""
    layer = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, **config["ssm_cfg"]}
    inner = layer["expand"] * config["d_model"]
    return {"E": inner, "N": layer["d_state"], "K": layer["d_conv"], "P": layer["headdim"], "G": layer["ngroups"]} | {
        "H": inner // layer["headdim"]
    }


def weights(config: dict, seed=0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random weights by their original names, large enough for each of them to change the output."""
    generator = torch.Generator().manual_seed(seed)
    size, width = sizes(config), config["d_model"]
    multiple = config["pad_vocab_size_multiple"]
    rows = math.ceil(config["vocab_size"] / multiple) * multiple
    convolved = size["E"] + 2 * size["G"] * size["N"]

    def normal(*shape, scale=None):
        values = torch.randn(*shape, generator=generator)
        return values * (1.5 / math.sqrt(shape[-1]) if scale is None else scale)

    state = {"backbone.embedding.weight": normal(rows, width, scale=0.5)}
    for layer in range(config["n_layer"]):
        state |= {
            f"backbone.layers.{layer}.{name}": value
            for name, value in {
                "norm.weight": 1 + normal(width, scale=0.3),
                "mixer.in_proj.weight": normal(size["E"] + convolved + size["H"], width),
                "mixer.conv1d.weight": normal(convolved, 1, size["K"]),
                "mixer.conv1d.bias": normal(convolved, scale=0.3),
                "mixer.dt_bias": normal(size["H"], scale=1.0),
                "mixer.A_log": normal(size["H"], scale=0.5),
                "mixer.D": 1 + normal(size["H"], scale=0.3),
                "mixer.norm.weight": 1 + normal(size["E"], scale=0.3),
                "mixer.out_proj.weight": normal(width, size["E"]),
            }.items()
        }
    state["backbone.norm_f.weight"] = 1 + normal(width, scale=0.3)
    state["lm_head.weight"] = normal(rows, width)
    state = {name: value.to(dtype) for name, value in state.items()}
    if config["tie_embeddings"]:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    return state


def rms_norm(x, weight, groups=1):
    parts = x.unflatten(-1, (groups, -1))
    return (parts / (parts.square().mean(-1, keepdim=True) + EPSILON).sqrt()).flatten(-2) * weight


def mixer(u, w, size):
    """One layer, `(T, width)` to `(T, width)`, token by token."""
    inner, state_size, groups, heads = size["E"], size["N"], size["G"], size["H"]
    z, xBC, dt = (u @ w["in_proj.weight"].T).split([inner, inner + 2 * groups * state_size, heads], -1)
    kernel, xBC = w["conv1d.weight"][:, 0], F.pad(xBC, (0, 0, size["K"] - 1, 0))
    xBC = F.silu(xBC.unfold(0, size["K"], 1).mul(kernel).sum(-1) + w["conv1d.bias"])
    x, B, C = xBC.split([inner, groups * state_size, groups * state_size], -1)
    x = x.unflatten(-1, (heads, -1))
    B, C = (v.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, -2) for v in (B, C))
    dt, A = F.softplus(dt + w["dt_bias"]), -w["A_log"].exp()
    h = torch.zeros(heads, x.shape[-1], state_size, dtype=u.dtype)
    outputs = []
    for t in range(len(u)):
        # Equation 2 of arXiv:2405.21060 with the discretisation of §7: h = exp(dt A) h + dt B x, y = C h + D x.
        h = (dt[t] * A).exp()[:, None, None] * h + dt[t][:, None, None] * x[t][:, :, None] * B[t][:, None, :]
        outputs.append((h * C[t][:, None, :]).sum(-1) + w["D"][:, None] * x[t])
    y = torch.stack(outputs).flatten(-2)
    return rms_norm(y * F.silu(z), w["norm.weight"], groups) @ w["out_proj.weight"].T


def logits(config: dict, state: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """`(T, rows)` predictions in float32, whatever the dtype of the weights."""
    state = {name: value.float() for name, value in state.items()}
    return logits_of_embeddings(config, state, state["backbone.embedding.weight"][ids])


def logits_of_embeddings(config: dict, state: dict[str, torch.Tensor], embeddings: torch.Tensor) -> torch.Tensor:
    """`(T, rows)` predictions for `(T, width)` embeddings of one sequence, in the dtype of both."""
    residual = embeddings
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        own_mixer = {name.removeprefix("mixer."): value for name, value in own.items() if name.startswith("mixer.")}
        residual = residual + mixer(rms_norm(residual, own["norm.weight"]), own_mixer, sizes(config))
    head = state["backbone.embedding.weight" if config["tie_embeddings"] else "lm_head.weight"]
    return rms_norm(residual, state["backbone.norm_f.weight"]) @ head.T


def in_shards(folder, state, number, stem, kind):
    """Write one file, or several with an index."""
    write = torch.save if kind == "bin" else lambda part, path: save_file(part, path, metadata={"format": "pt"})
    if number == 1:
        write(state, folder / f"{stem}.{kind}")
        return
    weight_map = {}
    for shard in range(number):
        part = dict(list(state.items())[shard::number])
        file = f"{stem}-{shard + 1:05}-of-{number:05}.{kind}"
        write(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_original(folder, config, state, number=1):
    """As `state-spaces/mamba2-*`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    in_shards(folder, state, number, "pytorch_model", "bin")


def write_transformers(folder, config, state, number=1, embeddings="embeddings", with_head=False, kind="safetensors"):
    """As `AntonV/mamba2-*-hf`."""
    folder.mkdir(parents=True, exist_ok=True)
    size = sizes(config)
    content = {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "num_heads": size["H"],
        "head_dim": size["P"],
        "state_size": size["N"],
        "conv_kernel": size["K"],
        "n_groups": size["G"],
        "expand": size["E"] // config["d_model"],
        "chunk_size": 8,
        "vocab_size": len(state["backbone.embedding.weight"]),
        "tie_word_embeddings": config["tie_embeddings"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(content))
    named = {name.replace("embedding.", f"{embeddings}."): value.clone() for name, value in state.items()}
    if config["tie_embeddings"] and not with_head:
        del named["lm_head.weight"]
    in_shards(folder, named, number, "model" if kind == "safetensors" else "pytorch_model", kind)


def write_codestral(folder, config, state):
    """As `mistralai/Mamba-Codestral-7B-v0.1`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps({"dim": config["d_model"], "n_layers": config["n_layer"]}))
    named = {f"model.{name}": value.clone() for name, value in state.items()}
    if config["tie_embeddings"]:
        del named["model.lm_head.weight"]
    save_file(named, folder / "consolidated.safetensors")
