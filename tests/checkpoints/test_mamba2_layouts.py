"""The layouts of published Mamba-2 models: recognised, read, and equal in Transformers to a plain reference."""

import json

import original_mamba2 as original
import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import Mamba2ForCausalLM

from transformers_ma2mba.checkpoints.mamba2_layouts import (
    open_language_model,
    original_config,
    original_name,
    stock_name,
)

IDS = [5, 9, 300, 17, 2, 2, 378, 41, 8, 100, 3]
FOUR_LAYOUTS = ["original", "transformers", "transformers-old", "codestral"]


def write(folder, layout, config, state, **options):
    if layout == "original":
        original.write_original(folder, config, state, **options)
    elif layout == "codestral":
        original.write_codestral(folder, config, state)
    else:
        embeddings = "embedding" if layout.endswith("old") else "embeddings"
        original.write_transformers(folder, config, state, embeddings=embeddings, **options)


def loaded(folder) -> Mamba2ForCausalLM:
    """The stock model with the weights of a folder."""
    language = open_language_model(folder)
    model = Mamba2ForCausalLM(language.config).eval()
    state = {name: language.read(name) for name in language.stored_names}
    missing, left_over = model.load_state_dict(state, strict=False)
    assert missing == (["lm_head.weight"] if language.config.tie_word_embeddings else []) and not left_over
    model.tie_weights()
    return model


def edit(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize("groups", [1, 2, 8], ids=lambda groups: f"{groups}-groups")
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", FOUR_LAYOUTS)
def test_logits_equal_the_plain_reference(tmp_path, layout, tie, groups):
    layer = {"layer": "Mamba2", "d_state": 16, "headdim": 8, "ngroups": groups, "chunk_size": 8}
    if layout == "codestral":
        layer["d_state"] = 128  # which params.json does not say
    config = original.settings(ssm_cfg=layer, tie_embeddings=tie)
    state = original.weights(config)
    write(tmp_path, layout, config, state)
    language = open_language_model(tmp_path)
    assert language.layout == layout.removesuffix("-old")
    assert language.config.n_groups == groups and language.config.vocab_size == 384
    with torch.no_grad():
        found = loaded(tmp_path)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(found, original.logits(config, state, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("number", [1, 10], ids=["one-file", "ten-files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_are_read_bit_by_bit(tmp_path, layout, number, dtype):
    config = original.settings()
    state = original.weights(config, dtype=dtype)
    write(tmp_path, layout, config, state, number=number)
    language = open_language_model(tmp_path)
    assert language.dtype == dtype
    assert set(map(original_name, language.stored_names)) == set(state) - {"lm_head.weight"}
    for name in language.stored_names:
        assert language.info(name).dtype == dtype
        assert torch.equal(language.read(name), state[original_name(name)])


def test_the_stored_rows_count(tmp_path):
    """Some files were padded to another multiple than their configuration says."""
    config = original.settings(pad_vocab_size_multiple=64)
    original.write_original(
        tmp_path, {**config, "pad_vocab_size_multiple": 16, "vocab_size": 300}, original.weights(config)
    )
    assert open_language_model(tmp_path).config.vocab_size == 384
    edit(tmp_path / "config.json", vocab_size=385)
    with pytest.raises(ValueError, match="have 384 rows, fewer than the vocab_size 385"):
        open_language_model(tmp_path)


def test_a_tied_head_may_be_stored(tmp_path):
    config = original.settings()
    original.write_transformers(tmp_path, config, original.weights(config), with_head=True)
    assert "lm_head.weight" not in open_language_model(tmp_path).stored_names


def test_a_head_that_should_be_tied_but_differs(tmp_path):
    config = original.settings(tie_embeddings=False)
    original.write_original(tmp_path, {**config, "tie_embeddings": True}, original.weights(config))
    with pytest.raises(ValueError, match="lm_head.weight differs from them: set tie_embeddings .* to false"):
        open_language_model(tmp_path)


def test_a_base_model_without_prefix(tmp_path):
    """`Mamba2Model.save_pretrained` writes no `backbone.`."""
    model = tiny_model(tiny_config()).model.language_model
    model.save_pretrained(tmp_path)
    language = open_language_model(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(language.read(f"backbone.{name}"), weight)


@pytest.mark.parametrize("layout", FOUR_LAYOUTS)
def test_names_there_and_back(layout):
    prefix = "model." if layout == "codestral" else ""
    embedding = "embeddings" if layout == "transformers" else "embedding"
    assert stock_name(f"{prefix}backbone.{embedding}.weight") == "backbone.embeddings.weight"
    assert stock_name(f"{prefix}backbone.layers.3.mixer.D") == "backbone.layers.3.mixer.D"
    assert stock_name(f"{prefix}lm_head.weight") == "lm_head.weight"
    for name in original.weights(original.settings()):
        assert original_name(stock_name(name)) == name


def test_the_configuration_there_and_back(tmp_path):
    layer = {"layer": "Mamba2", "d_state": 32, "d_conv": 3, "expand": 4, "headdim": 16, "ngroups": 2, "chunk_size": 64}
    layer |= {"dt_limit": [0.001, 0.5]}
    config = original.settings(ssm_cfg=layer, tie_embeddings=False, residual_in_fp32=False, vocab_size=384)
    original.write_original(tmp_path, config, original.weights(config))
    written = original_config(open_language_model(tmp_path).config)
    assert layer.items() <= written.pop("ssm_cfg").items()
    assert written == {name: value for name, value in config.items() if name != "ssm_cfg"}
    json.dumps(written, allow_nan=False)


def test_a_setting_without_a_place_in_the_original_layout(tmp_path):
    config = original.settings()
    original.write_original(tmp_path, config, original.weights(config))
    found = open_language_model(tmp_path).config
    json.dumps(original_config(found), allow_nan=False)
    found.layer_norm_epsilon = 1e-6
    with pytest.raises(ValueError, match="no place for layer_norm_epsilon = 1e-06"):
        original_config(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba1"}}, "layer='Mamba1'"),
        ({"ssm_cfg": {}}, "layer='Mamba1'"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate=True"),
        ({"attn_layer_idx": [9]}, r"attn_layer_idx=\[9\]"),
        ({"d_intermediate": 64}, "d_intermediate=64"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"mm_vision_tower": "somewhere"}, "use `transformers-ma2mba convert`"),
        ({"model_type": "llava_mamba"}, "use `transformers-ma2mba convert`"),
        ({"d_model": None, "model_type": "llama"}, "holds a 'llama' model"),
        ({"d_model": None, "model_type": "ma2mba"}, "needs `export` first"),
        ({"d_model": None}, "holds a None model"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_other_models_are_refused(tmp_path, changes, message):
    config = original.settings()
    original.write_original(tmp_path, config, original.weights(config))
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        open_language_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_all_that_does_not_fit_is_listed(tmp_path):
    config = original.settings()
    state = original.weights(config)
    del state["backbone.norm_f.weight"]
    state["backbone.layers.7.mixer.D"] = torch.ones(4)
    state["backbone.layers.0.mixer.D"] = torch.ones(5)
    original.write_original(tmp_path, config, state)
    with pytest.raises(ValueError) as caught:
        open_language_model(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: backbone.norm_f.weight [32]",
        "  left over: backbone.layers.7.mixer.D [4]",
        "  wrong shape: backbone.layers.0.mixer.D is [5], the configuration makes it [4]",
    ]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_weights_are_refused(tmp_path, dtype):
    config = original.settings()
    name = "backbone.layers.0.mixer.in_proj.weight"
    state = original.weights(config)
    original.write_original(tmp_path, config, {**state, name: state[name].to(dtype)})
    with pytest.raises(ValueError, match=f"{name} in .* is stored as {dtype}: quantized weights cannot be used"):
        open_language_model(tmp_path)


def test_heads_that_do_not_divide_the_width(tmp_path):
    config = original.settings(ssm_cfg={"layer": "Mamba2", "d_state": 16, "headdim": 24})
    original.write_original(tmp_path, config, original.weights(config))
    with pytest.raises(ValueError, match="configuration in .* cannot be used: .*head_dim") as caught:
        open_language_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_mamba1_weights_are_refused(tmp_path):
    config = original.settings()
    original.write_original(tmp_path, config, {"backbone.embedding.weight": torch.ones(384, 32)})
    with pytest.raises(ValueError, match="not those of a Mamba-2"):
        open_language_model(tmp_path)


def test_one_tensor_under_two_names(tmp_path):
    config = original.settings()
    state = original.weights(config)
    state["backbone.embeddings.weight"] = state["backbone.embedding.weight"]
    original.write_original(tmp_path, config, state)
    with pytest.raises(ValueError, match="one tensor twice, as backbone.embedding.weight and as backbone.embeddings"):
        open_language_model(tmp_path)


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_configuration_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="neither config.json nor params.json|no JSON"):
        open_language_model(tmp_path)


def test_codestral_without_its_sizes(tmp_path):
    config = original.settings(ssm_cfg={"layer": "Mamba2", "headdim": 8, "ngroups": 8})
    original.write_codestral(tmp_path, config, original.weights(config))
    edit(tmp_path / "params.json", dim=None)
    with pytest.raises(ValueError, match="params.json lacks dim"):
        open_language_model(tmp_path)


def test_codestral_without_a_layer_s_weights(tmp_path):
    config = original.settings(ssm_cfg={"layer": "Mamba2", "headdim": 8, "ngroups": 8})
    state = original.weights(config)
    del state["backbone.layers.0.mixer.out_proj.weight"]
    original.write_codestral(tmp_path, config, state)
    with pytest.raises(ValueError, match="the weights lack out_proj.weight of layer 0"):
        open_language_model(tmp_path)


def test_the_original_defaults(tmp_path):
    config = original.settings(d_model=64, n_layer=1, vocab_size=50277, ssm_cfg={"layer": "Mamba2"})
    original.write_original(tmp_path, config, original.weights(config))
    found = open_language_model(tmp_path).config
    assert (found.state_size, found.head_dim, found.n_groups, found.expand) == (128, 64, 1, 2)
    assert (found.conv_kernel, found.chunk_size, found.vocab_size, found.num_heads) == (4, 256, 50288, 2)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 0, 1)
