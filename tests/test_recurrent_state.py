"""States in inference: copies that share nothing, and files that are whole or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from transformers_ma2mba.recurrent_state import (
    StateFileError,
    cache_from_tensors,
    cache_to_tensors,
    copy_cache,
    empty_cache,
    join_caches,
    load_state_file,
    save_state_file,
)

CPU = [torch.device("cpu")] * 2


def state_after(model, input_ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor(input_ids), use_cache=True, logits_to_keep=1).cache_params


@pytest.fixture
def cache(model):
    """After three texts."""
    return state_after(model, [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [30, 40, 50, 60, 70]])


def rows_of(cache, rows):
    return {name: tensor[rows] for name, tensor in cache_to_tensors(cache).items()}


def assert_same(cache, tensors):
    assert_close(cache_to_tensors(cache), tensors, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [None, [0], [2, 0], [1, 1, 1, 0]], ids=str)
def test_a_copy_holds_the_rows_asked_for_and_shares_nothing(model, cache, rows):
    before = {name: tensor.clone() for name, tensor in cache_to_tensors(cache).items()}
    copied = copy_cache(cache, rows)
    assert_same(copied, rows_of(cache, [0, 1, 2] if rows is None else rows))
    with torch.no_grad():
        for input_ids in (torch.full((len(rows or "123"), 3), 12), torch.full((len(rows or "123"), 1), 12)):
            model(input_ids=input_ids, cache_params=copied, use_cache=True)
    assert_same(cache, before)
    assert not torch.equal(
        copied.layers[0].recurrent_states[0], rows_of(cache, rows or [0, 1, 2])["layers.0.recurrent"]
    )


def test_joined_caches_are_a_batch(cache):
    one_by_one = [copy_cache(cache, [row]) for row in range(3)]
    assert_same(join_caches(one_by_one), cache_to_tensors(cache))
    joined = join_caches([copy_cache(cache, [0, 1]), one_by_one[2]])
    assert_same(joined, cache_to_tensors(cache))


def test_an_empty_cache_stays_empty(model):
    for cache in (copy_cache(empty_cache(2)), copy_cache(empty_cache(2), [0, 0]), join_caches([empty_cache(2)] * 2)):
        assert not any(layer.has_previous_state[0] for layer in cache.layers)
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]), cache_params=cache, use_cache=True)
        assert_same(cache, cache_to_tensors(state_after(model, [[5, 6, 7]])))


# Files


@pytest.fixture
def file(cache, tmp_path):
    path = tmp_path / "film.safetensors"
    save_state_file(path, cache_to_tensors(cache), {"frames": "0012"})
    return path


def test_a_file_gives_back_what_was_saved(file, cache):
    tensors, metadata = load_state_file(file)
    assert metadata["frames"] == "0012"
    assert_same(cache_from_tensors(tensors, CPU), cache_to_tensors(cache))
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing is left over


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
