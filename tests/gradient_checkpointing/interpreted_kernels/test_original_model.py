"""A stored Mamba-2 in mamba-ssm's own model, with its own kernels, against ours on the same weights.

mamba-ssm also loads the files and the configuration that `export` writes for it.
"""

import original_mamba2 as original
import pytest
import torch
from comparison import assert_same
from tiny import tiny_tokenizer, tiny_vision_config
from transformers import AutoModel, CLIPVisionModel

from transformers_ma2mba.checkpoints import build_model, export_model
from transformers_ma2mba.mamba2 import kernel_choice

KERNELS = kernel_choice.mamba_ssm_kernels()
pytestmark = pytest.mark.skipif(KERNELS.missing is not None, reason=f"{KERNELS.missing}; see make test-kernels")
IDS = [5, 9, 300, 17, 2, 2, 378, 41, 8, 100, 3, 77, 6, 12, 250, 31, 31, 4, 9]  # more than a chunk


@pytest.mark.parametrize(
    ("tie", "layer"),
    [(True, {}), (False, {"ngroups": 2, "bias": True, "conv_bias": False, "dt_limit": [0.1, 0.5]})],
    ids=["tied", "untied-groups-biases"],
)
def test_mamba_ssm_gives_the_same_logits(tmp_path, tie, layer):
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    layer = {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 16, **layer}
    config = original.settings(ssm_cfg=layer, tie_embeddings=tie)
    state = weights(config)
    original.write_original(tmp_path / "source", config, state)
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    CLIPVisionModel(tiny_vision_config()).save_pretrained(tmp_path / "clip")
    build_model(tmp_path / "source", tmp_path / "clip", tmp_path / "built")
    export_model(tmp_path / "built", tmp_path / "exported", "original")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = MambaLMHeadModel.from_pretrained(str(tmp_path / "exported"), device=device)
    assert_same(theirs.state_dict(), {name: weight.to(device) for name, weight in state.items()}, tolerance=0)
    ours = AutoModel.from_pretrained(tmp_path / "built")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        found, expected = ours(ids).logits, theirs(ids.to(device)).logits.cpu()
    # Tensor cores round float32 to TF32.
    assert_same({"logits": found}, {"logits": expected}, tolerance=1e-5 if device == "cpu" else 6e-3)


def weights(config: dict) -> dict[str, torch.Tensor]:
    """Weights with the biases that `ssm_cfg` adds and removes."""
    state = original.weights(config)
    for name in [name for name in state if name.endswith("_proj.weight")]:
        if config["ssm_cfg"].get("bias"):
            state[name.replace("weight", "bias")] = torch.linspace(-1, 1, len(state[name]))
    if not config["ssm_cfg"].get("conv_bias", True):
        state = {name: weight for name, weight in state.items() if not name.endswith("conv1d.bias")}
    return state
