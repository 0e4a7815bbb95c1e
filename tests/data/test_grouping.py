"""Rows about one video joined to one."""

import random

import pytest
from dataset_records import turns

from transformers_ma2mba.data.formats import rows_of
from transformers_ma2mba.data.grouping import merge_adjacent, merge_all


def row(number, video="a.mp4", texts=None, **more):
    record = {"id": number, "video": video, "conversations": turns(*(texts or (f"<video>\nq{number}", f"a{number}")))}
    return {**rows_of({**record, **more})[0], "source": f"row {number}"}


def segment(number, start, end, caption=None, **more):
    return row(number, texts=("<video>\nTell.", caption or f"c{number}"), start=start, end=end, **more)


def texts(row):
    return [turn["value"] for turn in row["conversations"]]


def merged(rows, group=True, interleave=False):
    return list(merge_all(rows, group, interleave))


def test_questions_about_one_video_become_one_conversation():
    first, second = merged([row(0), row(1, "b.mp4"), row(2, duration=5), row(3, "b.mp4")])
    assert texts(first) == ["<video>\nq0", "a0", "q2", "a2"]
    assert texts(second) == ["<video>\nq1", "a1", "q3", "a3"]
    assert (first["video"], first["id"], first["source"]) == (["a.mp4"], "0", "row 0, and 1 more")
    assert first["duration"] == 5
    assert first.keys() == row(0).keys()


def test_a_row_on_its_own_stays_as_it_is():
    rows = [row(0), row(1, "b.mp4"), row(2, None), row(3, None), row(4, None, image="a.png")]
    assert merged(rows) == rows
    assert merged([]) == []


@pytest.mark.parametrize(
    "other",
    [
        dict(video="b.mp4"),
        dict(video=["a.mp4", "a.mp4"]),
        dict(start=1),
        dict(end=5),
        dict(image="a.png"),
    ],
    ids=["video", "videos", "start", "end", "image"],
)
def test_rows_that_show_something_else_stay_apart(other):
    rows = [row(0), row(1, **other)]
    assert merged(rows) == rows


def test_a_start_of_zero_is_no_clip():
    assert len(merged([row(0), row(1, start=0), row(2, start=None)])) == 1


def test_another_instruction_makes_another_conversation():
    questions = [{"i": "Be brief.", "q": "Who?", "a": "red"}]
    rows = [rows_of({"video": "a.mp4", "QA": questions})[0] | {"source": f"row {i}"} for i in range(2)]
    assert [texts(row) for row in merged([*rows, row(2)])] == [["Be brief.", "Who?", "red"], ["<video>\nq2", "a2"]]
    rows[1]["conversations"][1]["value"] = "Why?"
    assert texts(merged(rows)[0]) == ["Be brief.", "Who?", "red", "Why?", "red"]


def test_a_question_with_the_same_answer_comes_once():
    rows = [
        row(i, texts=pair) for i, pair in enumerate([("<video>\nq", "a"), ("q", "a"), ("q", "b"), ("q\n<video>", "a")])
    ]
    assert texts(merged(rows)[0]) == ["<video>\nq", "a", "q", "b"]


def test_the_video_stays_where_the_first_row_has_it():
    rows = [row(0, texts=("q0", "a0", "<video>\nq1", "a1")), row(1, texts=("<video>\nq2", "a2"))]
    assert texts(merged(rows)[0]) == ["q0", "a0", "<video>\nq1", "a1", "q2", "a2"]
    rows = [row(0, texts=("q0", "a0")), row(1, texts=("<video>\nq2", "a2"))]
    assert texts(merged(rows)[0]) == ["q0", "a0", "q2", "a2"]


def test_several_videos_of_a_row():
    rows = [
        row(i, ["a.mp4", "b.mp4"], (f"<video> and <video>: q{i}", "a"), start=[0, 3], end=[1, 4]) for i in range(2)
    ]
    (joined,) = merged(rows)
    assert texts(joined) == ["<video> and <video>: q0", "a", "and : q1", "a"]
    assert (joined["video"], joined["start"], joined["end"]) == (["a.mp4", "b.mp4"], [0, 3], [1, 4])


def test_options_belong_to_one_question():
    record = {"video": "a.mp4", "question": "Which?", "candidates": ["x", "y"], "answer": "y"}
    alone = {**rows_of(record)[0], "source": "row 0"}
    assert (merged([alone])[0]["candidates"], merged([alone])[0]["answer"]) == (["x", "y"], "B")
    assert (merged([alone, row(1)])[0]["candidates"], merged([alone, row(1)])[0]["answer"]) == (None, None)


def test_segments_of_one_video_are_interleaved_with_their_captions():
    rows = [segment(0, 10, 20), segment(1, 0, 10), row(2), segment(3, 20, None), segment(4, 0, 5, video="b.mp4")]
    long, whole, other = merged(rows, group=False, interleave=True)
    assert texts(long) == ["<video>", "c1", "<video>", "c0", "<video>", "c3"]
    assert [turn["from"] for turn in long["conversations"]] == ["human", "gpt"] * 3
    assert (long["video"], long["start"], long["end"]) == (["a.mp4"] * 3, [0, 10, 20], [10, 20, None])
    assert whole == rows[2]
    assert texts(other) == ["<video>", "c4"] and other["video"] == ["b.mp4"]


def test_overlapping_segments_stay_in_the_order_of_their_start_and_end():
    rows = [segment(0, 5, 15), segment(1, 5, 10), segment(2, 0, 30), segment(3, 5, 10, "more"), segment(4, 5, 10)]
    rows[4]["conversations"][1]["value"] = "c1"
    (long,) = merged(rows, interleave=True)
    assert (long["start"], long["end"]) == ([0, 5, 5], [30, 10, 15])
    assert texts(long) == ["<video>", "c2", "<video>", "c1\nmore", "<video>", "c0"]


def test_segments_without_an_end():
    (long,) = merged([segment(0, 5, None), segment(1, 1, None)], interleave=True)
    assert (long["start"], long["end"]) == ([1, 5], None)


@pytest.mark.parametrize("group, interleave", [(True, False), (False, True), (True, True)])
def test_adjacent_rows_are_joined_as_all_rows_are(group, interleave):
    rows = [row(0), row(1), row(2, None), row(3, None), segment(4, 0, 1), segment(5, 1, 2), row(6, "b.mp4")]
    assert list(merge_adjacent(rows, group, interleave)) == merged(rows, group, interleave)
    apart = [row(0), row(1, "b.mp4"), row(2)]
    assert list(merge_adjacent(apart, True, False)) == apart


def test_the_order_of_many_rows():
    generator = random.Random(0)
    rows = [row(i, generator.choice(["a.mp4", "b.mp4", "c.mp4", None])) for i in range(300)]
    expected = {}
    for i, one in enumerate(rows):
        expected.setdefault(one["video"][0] if one["video"] else i, []).append(f"a{i}")
    assert [texts(joined)[1::2] for joined in merged(rows)] == list(expected.values())
