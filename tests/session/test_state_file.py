"""State files: complete or refused, with the model they belong to; files of earlier versions still load."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_config, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor

from transformers_ma2mba.auto import DEFAULT_CHECKPOINT
from transformers_ma2mba.session.answering import beginning_tokens
from transformers_ma2mba.session.state_file import (
    StateFileError,
    cache_from_tensors,
    cache_to_tensors,
    describe_model,
    is_same_model,
    load_state_file,
    name_model,
    save_state_file,
)

CPU = [torch.device("cpu")] * 2
BEGINNING = [5, 3, 8]


@pytest.fixture
def cache(model):
    """The state after two texts."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]), use_cache=True).cache_params


@pytest.fixture
def file(cache, tmp_path):
    path = tmp_path / "film.safetensors"
    save_state_file(path, cache_to_tensors(cache), {"frames": "0012"})
    return path


def test_a_saved_file_loads_bit_for_bit(file, cache):
    tensors, metadata = load_state_file(file)
    assert metadata["frames"] == "0012"
    loaded = cache_to_tensors(cache_from_tensors(tensors, CPU))
    assert_close(loaded, cache_to_tensors(cache), rtol=0, atol=0)
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # no temporary file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    tensors = {"half": torch.randn(2, 3, 4).to(dtype), "none": torch.empty(0), "turned": torch.randn(3, 5).T}
    save_state_file(tmp_path / "file", tensors, {})
    assert_close(load_state_file(tmp_path / "file")[0], tensors, rtol=0, atol=0)


def test_a_failure_while_saving_leaves_the_old_file(file, cache, monkeypatch):
    before = file.read_bytes()

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_state_file(file, cache_to_tensors(cache), {"frames": "0013"})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def assert_refused(path, pattern):
    with pytest.raises(StateFileError, match=pattern) as error:
        load_state_file(path)
    message = str(error.value)
    assert str(path) in message and message.endswith(".") and "\n" not in message


def test_a_file_cut_short(file):
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 200):
        file.write_bytes(whole[:length])
        assert_refused(file, f"is cut short: it has {length} ")
    for length in (7, 0):
        file.write_bytes(whole[:length])
        assert_refused(file, "is not the saved state of a film")


def test_a_flipped_bit_anywhere(file):
    whole = file.read_bytes()
    header_length = 8 + int.from_bytes(whole[:8], "little")
    accepted = 0
    for position in [*range(header_length), *range(header_length, len(whole), 997)]:
        for bit in (0, 3, 5):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                load_state_file(file)
            except StateFileError as error:
                assert str(file) in str(error)
            else:
                assert position < header_length and whole[position : position + 1] == b" "
                accepted += 1
    assert accepted == 0 or whole[:header_length].endswith(b" ")


def test_another_version(file):
    file.write_bytes(file.read_bytes().replace(b'"version":"1"', b'"version":"7"'))
    assert_refused(file, "has version '7', but this release reads version '1'")


def test_other_files(tmp_path):
    weights, text, pickled = tmp_path / "model.safetensors", tmp_path / "notes.txt", tmp_path / "state.pt"
    save_file({"weight": torch.ones(3)}, weights, {"format": "pt"})
    text.write_text("Notes. " * 1000)
    torch.save({"state": torch.ones(3)}, pickled)
    listing = tmp_path / "list.safetensors"
    header = json.dumps(["no", "header"]).encode()
    listing.write_bytes(len(header).to_bytes(8, "little") + header)
    for path in (weights, text, pickled, listing):
        assert_refused(path, "is not the saved state of a film, or its beginning is damaged")
    with pytest.raises(FileNotFoundError, match="There is no file .*nowhere: check its path."):
        load_state_file(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="There is no directory .*nowhere to save .*film in: make it first."):
        save_state_file(tmp_path / "nowhere" / "film", {}, {})


# The model that a state belongs to


@pytest.fixture(scope="module")
def description(model):
    return describe_model(model, BEGINNING)


class PlainModel(nn.Module):
    """Parameters with fewer, as many and more values than a fingerprint reads, and a plain config."""

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
    "setting",
    [
        dict(frame_rate=3.0),
        dict(frames_per_vision_pass=1),
        dict(tokens_per_pass=64),
        dict(unpadded_vocab_size=384),
    ],
    ids=str,
)
def test_settings_of_a_run_leave_the_fingerprint(description, setting):
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


def test_parameters_on_the_meta_device_count_by_name_and_shape():
    described = describe_model(PlainModel("meta"), BEGINNING)
    assert is_same_model(describe_model(PlainModel("meta"), BEGINNING), described)
    assert not is_same_model(describe_model(PlainModel(), BEGINNING), described)
    other = PlainModel("meta")
    other.small = nn.Parameter(other.small[:2])
    assert not is_same_model(describe_model(other, BEGINNING), described)


def test_states_of_the_toy_model_stay_usable():
    """New fields of the configuration must not change the fingerprint of a model that does not use them."""
    toy, processor = AutoModel.from_pretrained(DEFAULT_CHECKPOINT), AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    fingerprint = describe_model(toy, beginning_tokens(processor))["fingerprint"]
    assert fingerprint == "eeded84b2b85bcd52b6201d088139cedec51fb9affbb632f6a6223c628ec1d70"


def test_the_fingerprint_equals_that_in_earlier_files():
    """A changed fingerprint would make every saved state unusable."""
    model = PlainModel(size=2, dtype="float32", text_config={"frame_rate": 1.0, "_private": 0, "depth": [1, 2]})
    assert describe_model(model, BEGINNING) == {
        "checkpoint": "a model without a name",
        "dtype": "float32",
        "fingerprint": "c7b6000405c76ddf6b431db5d046afd374890cf7df2f9e3e0ba7b34ab63c2aac",
    }


def test_a_name_for_messages():
    description = {"checkpoint": "path/model", "dtype": "bfloat16", "fingerprint": "0123456789abcdef"}
    assert name_model(description) == "path/model (bfloat16, fingerprint 0123456789ab)"
