"""Caches in inference: copies that share no memory, and joined caches."""

import pytest
import torch
from torch.testing import assert_close

from transformers_ma2mba.mamba2.recurrent_state import copy_cache, empty_cache, join_caches
from transformers_ma2mba.session.state_file import cache_to_tensors


def state_after(model, input_ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor(input_ids), use_cache=True, logits_to_keep=1).cache_params


@pytest.fixture
def cache(model):
    """The state after three texts."""
    return state_after(model, [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5], [30, 40, 50, 60, 70]])


def rows_of(cache, rows):
    return {name: tensor[rows] for name, tensor in cache_to_tensors(cache).items()}


def assert_same(cache, tensors):
    assert_close(cache_to_tensors(cache), tensors, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [None, [0], [2, 0], [1, 1, 1, 0]], ids=str)
def test_a_copy_holds_the_given_rows_and_shares_no_memory(model, cache, rows):
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


def test_joined_caches_equal_a_batch(cache):
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
