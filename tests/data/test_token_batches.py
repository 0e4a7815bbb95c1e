"""Batches by tokens: every row once, none too large, the same for the same seed."""

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_processor
from video_files import write_index_video

from transformers_ma2mba import BrokenSamples, DataCollatorForVideoQA, batches_by_tokens
from transformers_ma2mba.data import token_batches
from transformers_ma2mba.video import probe

PROCESSOR = tiny_processor(tiny_config())


def row_of(seconds, number=0) -> dict:
    turns = [{"from": "human", "value": "Who opens the door?"}, {"from": "gpt", "value": "red"}]
    return {"id": number, "video": "none.mp4", "duration": seconds, "conversations": turns}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 3000), st.integers(0, 3))
def test_each_row_is_in_one_batch_within_the_limit(lengths, max_tokens, seed):
    rows = [row_of(seconds, number) for number, seconds in enumerate(lengths)]
    batches = batches_by_tokens(rows, PROCESSOR, max_tokens, seed=seed)
    assert batches == batches_by_tokens(rows, PROCESSOR, max_tokens, seed=seed)
    assert sorted(row["id"] for batch in batches for row in batch) == list(range(len(rows)))
    for batch in batches:
        longest = max(row["duration"] for row in batch) * PROCESSOR.tokens_per_frame
        assert len(batch) == 1 or longest * len(batch) <= max_tokens


def test_lengths_are_mixed_across_batches_and_alike_within():
    rows = [row_of(seconds) for seconds in range(1, 400)]
    batches = batches_by_tokens(rows, PROCESSOR, 4000)
    for batch in batches:
        durations = [row["duration"] for row in batch]
        assert max(durations) <= 2 * min(durations) + 40  # a row has text, too
    longest = [max(row["duration"] for row in batch) for batch in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    assert batches != batches_by_tokens(rows, PROCESSOR, 4000, seed=1)


def test_the_length_of_a_file_counts(tmp_path):
    for name, count in (("short", 4), ("long", 160)):
        write_index_video(tmp_path / f"{name}.mp4", count, fps=4, preset="ultrafast")
    rows = [{"video": f"{name}.mp4", "conversations": row_of(0)["conversations"]} for name in ("short", "long")] * 3
    collator = DataCollatorForVideoQA(PROCESSOR, tmp_path)
    long = collator(rows[1:2])["input_ids"].numel()
    batches = batches_by_tokens(rows, PROCESSOR, long + 2, folder=tmp_path)
    assert sorted(map(len, batches))[:3] == [1, 1, 1] and max(map(len, batches)) > 1
    for batch in batches:
        assert collator([batch])["input_ids"].shape[0] == len(batch)
        assert collator([batch])["input_ids"].numel() <= long + 2
    both = collator([batches[0], batches[1]])
    assert len(both["input_ids"]) == len(batches[0]) + len(batches[1])


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="max_tokens must be above 0"):
        batches_by_tokens([], PROCESSOR, 0)
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        batches_by_tokens([{**row_of(0), "duration": None}], PROCESSOR, 10)
    for seconds in (-5, float("nan"), float("inf"), "12"):
        with pytest.raises(ValueError, match=f"Row 3 has the duration {seconds!r}: it must be a number of seconds"):
            batches_by_tokens([row_of(seconds, 3)], PROCESSOR, 10)
    with pytest.raises(ValueError, match="A row must be a dictionary with `conversations`, got 'film.mp4'"):
        batches_by_tokens(["film.mp4"], PROCESSOR, 10)


def test_a_clip_counts_as_long_as_it_is(tmp_path):
    write_index_video(tmp_path / "film.mp4", 160, fps=4, preset="ultrafast")
    film = {"video": "film.mp4", "conversations": row_of(0)["conversations"]}
    clips = [{"start": 3, "end": 5.5}, {"start": 38}, {"end": 4}, {"start": 30, "end": 90, "duration": 10}]
    clips.append({"video": ["film.mp4"] * 2, "start": [0, 39], "end": [2, None]})
    collator = DataCollatorForVideoQA(PROCESSOR, tmp_path)
    for clip in clips:
        row = film | clip
        length = collator([row])["input_ids"].numel()
        # The placeholder of a video counts, too.
        assert batches_by_tokens([row, row], PROCESSOR, 2 * (length + 2), folder=tmp_path) == [[row, row]]
        assert len(batches_by_tokens([row, row], PROCESSOR, 2 * length - 1, folder=tmp_path)) == 2


def test_broken_rows_are_left_out(tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"no film")
    turns, good = row_of(0)["conversations"], row_of(3)
    bad = [
        {"id": "missing", "video": "nowhere.mp4", "conversations": turns},
        {"id": "noise", "video": "noise.mp4", "conversations": turns},
        {"id": "malformed", "conversations": []},
        {"id": "duration", "video": "none.mp4", "duration": -1, "conversations": turns},
    ]
    broken, num_warnings = BrokenSamples(tmp_path / "broken.jsonl"), []
    for _ in range(2):  # the second time stands for a run that goes on
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert batches_by_tokens([*bad, good], PROCESSOR, 100, tmp_path, broken_samples=broken) == [[good]]
        num_warnings.append(len(caught))
    assert num_warnings == [4, 0] and len(broken) == 4
    assert broken.reason("noise", [tmp_path / "noise.mp4"])
    mended = {**bad[3], "duration": 4}
    assert batches_by_tokens([mended], PROCESSOR, 100, tmp_path, broken_samples=broken) == [[mended]]
    assert broken.reason("duration", [tmp_path / "none.mp4"]) is None  # so that the collator reads it


def test_a_row_that_broke_in_training_stays_in_its_batch(tmp_path):
    """A run that is resumed has the same batches."""
    broken, rows = BrokenSamples(), [row_of(3, number) for number in range(5)]
    with pytest.warns(UserWarning):
        broken.add("2", "cannot be decoded", [tmp_path / "none.mp4"])
    batches = batches_by_tokens(rows, PROCESSOR, 100, tmp_path, broken_samples=broken)
    assert batches == batches_by_tokens(rows, PROCESSOR, 100, tmp_path)


def test_rows_may_come_from_a_generator():
    rows = [row_of(seconds) for seconds in (3, 40, 4)]
    assert batches_by_tokens(iter(rows), PROCESSOR, 100) == batches_by_tokens(rows, PROCESSOR, 100)


def test_a_file_of_many_rows_is_opened_once(tmp_path, monkeypatch):
    write_index_video(tmp_path / "film.mp4", 4, fps=4, preset="ultrafast")
    opened = []
    monkeypatch.setattr(token_batches, "probe", lambda path: (opened.append(path), probe(path))[1])
    row = {"video": "film.mp4", "conversations": row_of(0)["conversations"]}
    batches_by_tokens([row] * 5, PROCESSOR, 100, folder=tmp_path)
    assert len(opened) == 1


def test_a_wrong_folder_leaves_no_batch(tmp_path):
    row = {"id": "lost", "video": "nowhere.mp4", "conversations": row_of(0)["conversations"]}
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="no row to train on; lost: There is no file .*nowhere.mp4"),
    ):
        batches_by_tokens([row], PROCESSOR, 100, tmp_path, broken_samples=BrokenSamples())
    with pytest.raises(ValueError, match="no row to train on"):
        batches_by_tokens([], PROCESSOR, 100)
