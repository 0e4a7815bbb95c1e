"""The authors' configuration and weight names, read into ours and back."""

import pytest
import torch
from tiny import tiny_text_config, tiny_vision_config
from transformers import CLIPConfig

from transformers_ma2mba import Ma2mbaForVideoQA
from transformers_ma2mba.checkpoints.published import (
    KNOWN_VISION_ENCODERS,
    PREFIXES,
    is_frame_selector_head,
    is_published_config,
    is_unused_vision_weight,
    original_mamba2_config,
    published_config,
    published_tokenizer,
    to_ours,
    to_published,
)

SO400M, CLIP = "google/siglip-so400m-patch14-384", "openai/clip-vit-large-patch14-336"


def published(**changes) -> dict:
    """A configuration as the 1.3B's may look, from the facts that are known."""
    config = {
        "model_type": "llava_mamba",
        "d_model": 2048,
        "d_intermediate": 0,
        "n_layer": 48,
        "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": [],
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
        "mm_vision_tower": SO400M,
        "mm_hidden_size": 1152,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_patch_merge_type": "flat",
        "vision_encode_chunk_size": 32,
    }
    return {**config, **changes}


def test_the_published_size():
    config = published_config(published())
    assert config.model_type == "ma2mba"
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_heads, text.vocab_size) == (2048, 48, 64, 50288)
    assert (text.state_size, text.head_dim, text.n_groups, text.expand) == (128, 64, 1, 2)
    assert (text.conv_kernel, text.chunk_size) == (4, 256)
    assert text.tie_word_embeddings and config.tie_word_embeddings
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (0, 0, 1)
    # SigLIP so400m without its last layer and without its head
    assert (vision.model_type, vision.num_hidden_layers, vision.vision_use_head) == ("siglip_vision_model", 26, False)
    assert (vision.hidden_size, config.vision_feature_layer, config.patches_per_side) == (1152, -1, 27)
    assert config.image_mean == config.image_std == [0.5, 0.5, 0.5]
    assert (config.image_token_id, config.video_token_id) == (50277, 50278)
    assert config.unpadded_vocab_size == 50279  # with the placeholders
    assert config.frames_per_vision_pass == 32
    assert KNOWN_VISION_ENCODERS[SO400M].num_hidden_layers == 27


def test_weights_of_the_published_size():
    with torch.device("meta"):
        model = Ma2mbaForVideoQA(published_config(published()))
    shapes = {to_published(name): tuple(weight.shape) for name, weight in model.named_parameters()}
    assert len(shapes) == 2 + 48 * 9 + (3 + 26 * 16 + 2) + 4
    assert shapes["backbone.embedding.weight"] == (50288, 2048)
    assert shapes["backbone.layers.47.mixer.in_proj.weight"] == (2 * 4096 + 2 * 128 + 64, 2048)
    assert shapes["backbone.layers.47.mixer.conv1d.weight"] == (4096 + 2 * 128, 1, 4)
    assert shapes["mm_model.mm_projector.0.weight"] == (2048, 1152)
    assert shapes["mm_model.vision_tower.vision_tower.vision_model.encoder.layers.25.mlp.fc1.weight"] == (4304, 1152)


@pytest.mark.parametrize("mode, tokens", [("bilinear", 196), ("average", 169), ("max", 169)])
def test_pooling_rounds_as_the_authors_do(mode, tokens):
    assert published_config(published(mm_spatial_pool_mode=mode)).tokens_per_frame == tokens


@pytest.mark.parametrize("layer", [-2, -1])
def test_clip_keeps_its_layers(layer):
    config = published_config(published(mm_vision_tower=CLIP, mm_hidden_size=1024, mm_vision_select_layer=layer))
    assert (config.vision_config.num_hidden_layers, config.vision_feature_layer) == (24, layer)
    assert config.tokens_per_frame == 144
    assert config.image_mean != [0.5, 0.5, 0.5]


def test_a_vision_encoder_in_a_folder(tmp_path):
    for name, config in (("alone", tiny_vision_config()), ("whole", CLIPConfig(vision_config=tiny_vision_config()))):
        config.save_pretrained(tmp_path / name)
        read = published_config(published(mm_vision_tower=str(tmp_path / name), mm_hidden_size=24))
        assert read.vision_config.to_dict() == tiny_vision_config().to_dict()


@pytest.mark.parametrize(
    "tokens, multiple, rows, placeholder",
    [
        (50277, 16, 50288, 50277),
        (50277, 8, 50280, 50277),
        (50288, 16, 50288, 50277),
        (50432, 16, 50432, 50277),
        (382, 16, 384, 382),
    ],
)
def test_padded_vocabulary(tokens, multiple, rows, placeholder):
    config = published_config(published(vocab_size=tokens, pad_vocab_size_multiple=multiple))
    assert config.text_config.vocab_size == rows
    assert (config.image_token_id, config.video_token_id) == (placeholder, placeholder + 1)
    assert config.unpadded_vocab_size == placeholder + 2


def test_options_of_the_layers():
    ssm = {"layer": "Mamba2", "d_state": 16, "headdim": 16, "ngroups": 2, "expand": 4, "d_conv": 3, "chunk_size": 8}
    config = original_mamba2_config({"d_model": 32, "n_layer": 2, "vocab_size": 384, "ssm_cfg": ssm})
    assert (config.state_size, config.head_dim, config.n_groups, config.expand) == (16, 16, 2, 4)
    assert (config.conv_kernel, config.chunk_size, config.num_heads) == (3, 8, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(ssm_cfg={}), "layer='Mamba1'"),
        (dict(ssm_cfg={"layer": "Mamba2", "D_has_hdim": True}), "D_has_hdim=True"),
        (dict(ssm_cfg={"layer": "Mamba2", "activation": "relu"}), "activation='relu'"),
        (dict(ssm_cfg={"layer": "Mamba2", "headdim": "64"}), "headdim='64', but headdim must be a whole number above"),
        (dict(ssm_cfg="Mamba2"), "ssm_cfg='Mamba2', but ssm_cfg must be an object"),
        (dict(d_model=2048.0), "d_model=2048.0, but d_model must be a whole number above 0"),
        (dict(vocab_size=None), "lacks vocab_size"),
        (dict(pad_vocab_size_multiple=0), "pad_vocab_size_multiple=0"),
        (dict(tie_embeddings="true"), "tie_embeddings='true', but tie_embeddings must be true or false"),
        (dict(norm_epsilon=1e-6), "norm_epsilon=1e-06"),
        (dict(d_intermediate=64), "d_intermediate=64"),
        (dict(attn_layer_idx=[3]), "attn_layer_idx"),
        (dict(rms_norm=False), "rms_norm=False"),
        (dict(mm_projector_type="linear"), "mm_projector_type='linear'.*mlp2x_gelu"),
        (dict(mm_patch_merge_type="spatial_unpad"), "mm_patch_merge_type"),
        (dict(mm_vision_select_feature="cls_patch"), "mm_vision_select_feature"),
        (dict(mm_hidden_size=768), "mm_hidden_size is 768.*1152"),
        (dict(mm_vision_select_layer=[-2]), "mm_vision_select_layer must be a whole number"),
        (dict(mm_spatial_pool_stride=0), "mm_spatial_pool_stride=0"),
        (dict(mm_vision_tower=[SO400M]), "mm_vision_tower must be a string"),
        (dict(mm_vision_tower=None), "lacks mm_vision_tower"),
        (dict(mm_vision_tower="nobody/nothing"), "'nobody/nothing' cannot be read"),
    ],
)
def test_other_architectures_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        published_config(published(**changes))


def test_null_means_the_default():
    needed = {"model_type", "d_model", "n_layer", "vocab_size", "ssm_cfg", "mm_vision_tower"}
    config = {key: value for key, value in published(mm_vision_tower=CLIP).items() if key in needed}
    nulls = {**dict.fromkeys(published()), **config}
    nulls["ssm_cfg"] = {"layer": "Mamba2", "d_state": None, "expand": None, "rmsnorm": None, "d_ssm": None}
    assert published_config(nulls).to_dict() == published_config(config).to_dict()


def test_a_vision_encoder_of_another_kind(tmp_path):
    tiny_text_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'mamba2'; CLIP and SigLIP are supported"):
        published_config(published(mm_vision_tower=str(tmp_path)))


def test_the_layout_is_told_from_stock_mamba2():
    assert is_published_config(published())
    assert is_published_config(published(model_type="mamba2"))
    assert not is_published_config({"model_type": "mamba2", "hidden_size": 64})


def test_the_tokenizer_that_is_named():
    assert published_tokenizer(published()) == "EleutherAI/gpt-neox-20b"
    assert published_tokenizer(published(tokenizer_model_max_length=2048)) == "EleutherAI/gpt-neox-20b"
    assert published_tokenizer(published(tokenizer_name="some/where")) == "some/where"


def test_names_of_all_weights_there_and_back(model):
    for name in Ma2mbaForVideoQA(model.config).state_dict():
        assert to_ours(to_published(name)) == name


def test_names():
    assert to_published("model.language_model.embeddings.weight") == "backbone.embedding.weight"
    mixer = "layers.3.mixer.conv1d.bias"
    assert to_published(f"model.language_model.{mixer}") == f"backbone.{mixer}"
    layer = "encoder.layers.0.layer_norm1.weight"
    assert to_published(f"model.vision_tower.{layer}") == f"mm_model.vision_tower.vision_tower.vision_model.{layer}"
    for prefix in [theirs for theirs, ours in PREFIXES if ours == "model.vision_tower."]:
        assert to_ours(prefix + layer) == f"model.vision_tower.{layer}"
    assert to_published("model.multi_modal_projector.linear_2.bias") == "mm_model.mm_projector.2.bias"
    assert to_published("lm_head.weight") == to_ours("lm_head.weight") == "lm_head.weight"
    assert to_ours("mm_model.image_newline") is None


def test_frame_selector_heads():
    assert all(map(is_frame_selector_head, ["key_head.weight", "value_embedding", "logit_scale", "rank_head.weight"]))
    assert not any(map(is_frame_selector_head, ["lm_head.weight", "backbone.norm_f.weight"]))


def test_unused_vision_weights(config):
    assert is_unused_vision_weight("model.vision_tower.encoder.layers.2.layer_norm1.bias", config)
    assert is_unused_vision_weight("model.vision_tower.post_layernorm.bias", config)
    assert not is_unused_vision_weight("model.vision_tower.encoder.layers.1.layer_norm1.bias", config)
    assert not is_unused_vision_weight("model.vision_tower.embeddings.class_embedding", config)
    assert not is_unused_vision_weight("model.language_model.layers.2.norm.weight", config)
