"""The configuration: published sizes, derived properties, saving and loading, and checks of its fields."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import tiny_config, tiny_text_config, tiny_vision_config
from transformers import AutoConfig, CLIPVisionConfig, Mamba2Config, SiglipVisionConfig

from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA

SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def test_the_default_is_the_largest_published_model():
    config = Ma2mbaConfig()
    assert config.to_dict() == Ma2mbaConfig.from_preset("3.1b").to_dict()

    text, vision = config.text_config, config.vision_config
    assert isinstance(text, Mamba2Config) and isinstance(vision, CLIPVisionConfig)
    assert (text.num_hidden_layers, text.hidden_size, text.state_size, text.head_dim) == (64, 2560, 128, 64)
    assert (text.conv_kernel, text.expand, text.n_groups, text.chunk_size) == (4, 2, 1, 256)
    assert text.num_heads * text.head_dim == text.expand * text.hidden_size
    assert text.vocab_size == 50288  # 50,277 tokens, padded to a multiple of 16
    assert text.tie_word_embeddings and config.tie_word_embeddings
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.hidden_size) == (336, 14, 24, 1024)
    assert (config.vision_feature_layer, config.spatial_pool_mode, config.spatial_pool_stride) == (-2, "bilinear", 2)
    assert config.projector_hidden_act == "gelu"
    assert config.frame_rate == 1.0
    # The placeholders are rows from the vocabulary's padding: the tokenizer's last id is 50,276.
    assert 50277 <= config.image_token_id < config.video_token_id < text.vocab_size


@pytest.mark.parametrize("preset, billions", [("0.7b", 0.7), ("1.8b", 1.8), ("3.1b", 3.1)])
def test_presets_have_the_published_number_of_parameters(preset, billions):
    """The models' names count the tied embedding twice, as embedding and as head; the tolerance is 5%."""
    with torch.device("meta"):
        model = Ma2mbaForVideoQA(Ma2mbaConfig.from_preset(preset))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.shape[0] == 50288  # as in the published weights
    once = sum(parameter.numel() for parameter in model.parameters())
    twice = once + model.lm_head.weight.numel()
    assert twice == pytest.approx(billions * 1e9, rel=0.05)


def test_a_preset_accepts_other_fields():
    config = Ma2mbaConfig.from_preset("0.7b", vision_config=SIGLIP_SO400M, frame_rate=2.0)
    assert config.text_config.hidden_size == 1024
    assert isinstance(config.vision_config, SiglipVisionConfig)
    assert config.frame_rate == 2.0


def test_presets_do_not_share_state():
    Ma2mbaConfig.from_preset("0.7b").text_config.hidden_size = 1
    Ma2mbaConfig.from_preset("0.7b").vision_config.hidden_size = 1
    config = Ma2mbaConfig.from_preset("0.7b")
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (1024, 1024)


@pytest.mark.parametrize(
    "vision, tokens",
    [
        pytest.param(None, 144, id="clip-336"),
        pytest.param(SIGLIP_SO400M, 196, id="siglip-so400m-384"),
        pytest.param(tiny_vision_config("clip", image_size=224, patch_size=14), 64, id="clip-224"),
        pytest.param(tiny_vision_config("siglip", image_size=24), 4, id="odd-grid"),
    ],
)
def test_tokens_per_frame(vision, tokens):
    assert Ma2mbaConfig(vision_config=vision).tokens_per_frame == tokens


@pytest.mark.parametrize("stride, tokens", [(1, 576), (2, 144), (3, 64), (5, 25), (24, 1), (99, 1)])
def test_tokens_per_frame_at_other_strides(stride, tokens):
    assert Ma2mbaConfig(spatial_pool_stride=stride).tokens_per_frame == tokens


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_saving_and_loading_gives_the_same_config(tmp_path, kind):
    config = tiny_config(
        kind,
        vision_feature_layer=-1,
        spatial_pool_mode="max",
        spatial_pool_stride=3,
        spatial_pool_rounding="down",
        projector_hidden_act="relu",
        multimodal_projector_bias=False,
        frame_rate=0.5,
        unpadded_vocab_size=383,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    config.save_pretrained(tmp_path / "once")
    once = AutoConfig.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    assert type(once) is Ma2mbaConfig
    assert type(once.vision_config) is type(config.vision_config)
    assert once.to_json_string() == config.to_json_string()
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "once" / "config.json").read_text()


def test_sub_configs_may_be_dicts():
    """A dict without a `model_type` is for CLIP or Mamba-2; missing fields have the class's defaults."""
    config = Ma2mbaConfig(vision_config={"image_size": 64}, text_config={"vocab_size": 50288})
    assert config.vision_config.to_dict() == CLIPVisionConfig(image_size=64).to_dict()
    assert config.text_config.to_dict() == Mamba2Config(vocab_size=50288).to_dict()


BAD_FIELDS = [
    (dict(spatial_pool_stride=0), "spatial_pool_stride must be at least 1, got 0"),
    (dict(spatial_pool_mode="median"), "spatial_pool_mode"),
    (dict(spatial_pool_rounding="nearest"), "spatial_pool_rounding"),
    (dict(spatial_pool_stride=5, spatial_pool_rounding="down"), "4 patches along each side: .*leaves none"),
    (dict(frame_rate=0), "frame_rate must be .*above 0.*got 0"),
    (dict(frame_rate=-1.0), "frame_rate must be .*above 0.*got -1"),
    (dict(frame_rate=math.nan), "frame_rate must be .*above 0.*got nan"),
    (dict(frame_rate=math.inf), "frame_rate must be .*above 0.*got inf"),
    (dict(frames_per_vision_pass=0), "frames_per_vision_pass must be at least 1, got 0"),
    (dict(tokens_per_pass=1), "tokens_per_pass must be at least 2, got 1"),
    (dict(vision_feature_layer=4), "vision_feature_layer is 4, but the vision encoder has 3 layers"),
    (dict(vision_feature_layer=-5), "vision_feature_layer is -5, but the vision encoder has 3 layers"),
    (dict(vision_feature_layer=1.5), "vision_feature_layer"),
    (dict(image_token_id=384), "image_token_id is 384, outside of the vocabulary of 384"),
    (dict(video_token_id=-1), "video_token_id is -1, outside of the vocabulary of 384"),
    (dict(image_token_id=7, video_token_id=7), "must differ, both are 7"),
    (dict(unpadded_vocab_size=0), "unpadded_vocab_size is 0, but the language model has rows for 1 to 384 tokens"),
    (dict(unpadded_vocab_size=385), "unpadded_vocab_size is 385, but the language model has rows for 1 to 384 tokens"),
    (dict(image_mean=[0.5, 0.5]), "image_mean must have 3 values"),
    (dict(image_std=[0.5] * 4), "image_std must have 3 values"),
    (dict(image_std=[0.5, 0.0, 0.5]), "image_std must be above 0"),
    (dict(vision=dict(image_size=4)), "patches of 8 px in frames of 4 px"),
]


@pytest.mark.parametrize("fields, message", [pytest.param(*bad, id=str(bad[0])[1:-1]) for bad in BAD_FIELDS])
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="no preset '7b'; choose one of 0.7b, 1.8b, 3.1b"):
        Ma2mbaConfig.from_preset("7b")


@pytest.mark.parametrize("layer", [-4, -1, 0, 3])
def test_feature_layers_at_the_limits_are_accepted(layer):
    assert tiny_config(vision_feature_layer=layer).vision_feature_layer == layer


def test_get_text_config_returns_the_language_model_s_fields():
    config = tiny_config(text=dict(eos_token_id=5))
    assert config.get_text_config().eos_token_id == 5
    assert config.get_text_config(decoder=True).vocab_size == tiny_text_config().vocab_size
