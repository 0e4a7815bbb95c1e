"""Fingerprints: what is one model, what is another, and that files of earlier versions are still recognised."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch import nn
from transformers import AutoModel

from transformers_ma2mba.model_fingerprint import describe_model, is_same_model, name_model

BEGINNING = [5, 3, 8]


@pytest.fixture(scope="module")
def description(model):
    return describe_model(model, BEGINNING)


class PlainModel(nn.Module):
    """Parameters smaller than, as large as and larger than what is read of each, with a config of no library's."""

    def __init__(self, device="cpu", **config):
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: config)
        self.dtype = torch.float32
        for name, size in (("small", 3), ("whole", 1024), ("large", 5000)):
            values = torch.arange(size, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(values))


def test_the_same_model(model, checkpoint, config, description):
    assert is_same_model(describe_model(model, BEGINNING), description)
    loaded = AutoModel.from_pretrained(checkpoint)
    assert is_same_model(describe_model(loaded, BEGINNING), description)
    again = tiny_model(config)
    again.name_or_path = "elsewhere"
    assert is_same_model(describe_model(again, BEGINNING), description)


@pytest.mark.parametrize(
    "setting", [dict(frame_rate=3.0), dict(frames_per_vision_pass=1), dict(tokens_per_pass=64)], ids=str
)
def test_settings_of_a_run_make_no_other_model(description, setting):
    assert is_same_model(describe_model(tiny_model(tiny_config(**setting)), BEGINNING), description)


@pytest.mark.parametrize(
    "options",
    [dict(vision=dict(hidden_act="gelu")), dict(text=dict(layer_norm_epsilon=1e-3)), dict(vision_feature_layer=-1)],
    ids=str,
)
def test_another_config_with_the_same_weights(description, options):
    assert not is_same_model(describe_model(tiny_model(tiny_config(**options)), BEGINNING), description)


def test_other_weights(config, description):
    assert not is_same_model(describe_model(tiny_model(config, seed=1), BEGINNING), description)
    assert not is_same_model(describe_model(tiny_model(config, dtype=torch.bfloat16), BEGINNING), description)
    deeper = tiny_model(tiny_config(text=dict(num_hidden_layers=3)))
    assert not is_same_model(describe_model(deeper, BEGINNING), description)
    for name, _ in tiny_model(config).named_parameters():
        tuned = tiny_model(config)
        with torch.no_grad():
            tuned.get_parameter(name).add_(1)
        assert not is_same_model(describe_model(tuned, BEGINNING), description), name


def test_another_prompt(model, description):
    assert not is_same_model(describe_model(model, BEGINNING[:2]), description)


def test_parameters_on_no_device_count_by_name_and_shape():
    described = describe_model(PlainModel("meta"), BEGINNING)
    assert is_same_model(describe_model(PlainModel("meta"), BEGINNING), described)
    assert not is_same_model(describe_model(PlainModel(), BEGINNING), described)
    other = PlainModel("meta")
    other.small = nn.Parameter(other.small[:2])
    assert not is_same_model(describe_model(other, BEGINNING), described)


def test_the_fingerprint_is_that_of_files_written_before():
    """To change it is to refuse every state that anyone has saved."""
    model = PlainModel(size=2, dtype="float32", text_config={"frame_rate": 1.0, "_private": 0, "depth": [1, 2]})
    assert describe_model(model, BEGINNING) == {
        "checkpoint": "a model without a name",
        "dtype": "float32",
        "fingerprint": "c7b6000405c76ddf6b431db5d046afd374890cf7df2f9e3e0ba7b34ab63c2aac",
    }


def test_a_name_for_messages():
    description = {"checkpoint": "path/model", "dtype": "bfloat16", "fingerprint": "0123456789abcdef"}
    assert name_model(description) == "path/model (bfloat16, fingerprint 0123456789ab)"
