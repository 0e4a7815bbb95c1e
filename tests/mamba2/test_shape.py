"""The cutting of sequences into segments."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from transformers_ma2mba.configuration_ma2mba import Ma2mbaConfig
from transformers_ma2mba.mamba2.shape import indexable_tokens, segment_bounds, segments_of


@given(length=st.integers(1, 300), interval=st.integers(1, 320))
def test_segments_cover_the_sequence_and_none_is_a_single_token(length, interval):
    bounds = segment_bounds(length, interval)
    assert [bounds[0][0], bounds[-1][1]] == [0, length]
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
    sizes = [stop - start for start, stop in bounds]
    assert length == 1 or min(sizes) >= 2
    assert segments_of(length, interval) == (len(sizes), max(sizes))
    assert max(sizes) <= max(interval, 2) + 1


def test_segments_are_shorter_than_the_kernels_limits():
    """mamba-ssm's kernels failed in trials past about 203,000, 252,000 and 490,000 tokens."""
    assert 150_000 < indexable_tokens(Ma2mbaConfig.from_preset("3.1b"), 1) < 203_000
    assert indexable_tokens(Ma2mbaConfig.from_preset("1.8b"), 1) < 252_000
    assert indexable_tokens(Ma2mbaConfig.from_preset("0.7b"), 1) < 490_000
