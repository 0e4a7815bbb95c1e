"""Records of every data set as rows, and what is wrong with others."""

import math

import pytest
from dataset_records import CHOICE, COLOURS, DATA_SETS, WHICH, turns

from transformers_ma2mba import rows_of
from transformers_ma2mba.data.formats import QUESTION_SHAPES, SHAPES

KEYS = ["id", "video", "image", "start", "end", "fps", "duration", "conversations", "candidates", "answer"]


def texts(row):
    return [turn["value"] for turn in row["conversations"]]


def one(record, **options):
    (row,) = rows_of(record, **options)
    assert list(row) == KEYS
    return row


@pytest.mark.parametrize("name", sorted(DATA_SETS.keys() - {"ActivityNet-QA"}))
def test_fields_without_a_value_do_not_count(name):
    """In Parquet, a row has the fields of all rows; missing ones are None, or NaN where they are numbers."""
    empty = {
        "scenes": None,
        "time_stamp": None,
        "QA": math.nan,
        "options": None,
        "start": math.nan,
        "end": None,
        "Q": None,
    }
    for content in DATA_SETS[name].lists.values():
        for record in content if isinstance(content, list) else [content]:
            assert rows_of({**empty, **record}) == rows_of(record)


def test_every_known_data_set_is_named_by_the_error():
    with pytest.raises(ValueError, match="The fields path, caption are those of no known data set") as error:
        rows_of({"path": "a.mp4", "caption": "red", "video": None})
    for name in [name for name, *_ in SHAPES] + list(QUESTION_SHAPES):
        assert f"{name}: " in str(error.value)
    assert "VideoChat2-IT: QA;" in str(error.value)


@pytest.mark.parametrize("record", [[1], "text", None, 5])
def test_a_record_without_fields(record):
    with pytest.raises(ValueError, match="A record must be an object with fields, got "):
        rows_of(record)


def test_an_empty_record():
    with pytest.raises(ValueError, match=r"The fields \(none\) are those of no known data set"):
        rows_of({})


def test_answers_and_ids_that_are_numbers():
    row = one({"id": 7, "video": 12345, "conversations": turns("Who?", 3) + [{"from": "human", "value": 1.5}]})
    assert (row["id"], row["video"], texts(row)) == ("7", ["12345"], ["Who?", "3", "1.5"])


@pytest.mark.parametrize("first", ["<image>\nWho?", "Who?\n<image>", "<video>\nWho?", "Who?"])
def test_the_placeholder_is_that_of_the_file(first):
    conversation = [{"from": "user", "value": first}, {"from": "assistant", "value": "An <image> tag."}]
    for kind, other in (("video", "image"), ("image", "video")):
        row = one({kind: "a", "conversations": conversation})
        assert texts(row) == [first.replace(f"<{other}>", f"<{kind}>"), "An <image> tag."]
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
    both = one({"video": "a", "image": "b", "conversations": turns("<image><video>", "red")})
    assert texts(both)[0] == "<image><video>"


@pytest.mark.parametrize(
    "options, answer, letter",
    [
        (COLOURS, "blue", "B"),
        (COLOURS, " Blue. ", "B"),
        (COLOURS, "C", "C"),
        (COLOURS, "(C)", "C"),
        (COLOURS, "C.", "C"),
        (COLOURS, 2, "C"),
        (COLOURS, "2", "C"),
        (["1", "0", "2"], "0", "B"),  # the text before the number
        ([1, 0, 2], 0, "B"),
        (["B", "A"], "A", "B"),  # the text before the letter
        (["A. B", "B. A"], "A", "A"),  # the options' own letter before their text
        (["A. B", "B. A"], "B. A", "B"),
        (["(A) red", "(B) blue"], "(B) blue", "B"),
        (["A. red", "B. blue"], "blue", "B"),
        (["Red", "red"], "red", "B"),
    ],
)
def test_the_right_option(options, answer, letter):
    row = one({"video": "a", "question": "Which?", "candidates": options, "answer": answer})
    assert row["answer"] == letter
    number = ord(letter) - ord("A")
    assert texts(row)[1].startswith(f"{letter}. {row['candidates'][number]}")
    assert texts(row)[0].split("\n")[number + 1] == f"{letter}. {row['candidates'][number]}"
    assert not any(option.startswith(("A.", "(A)")) for option in row["candidates"])


def test_the_number_of_a_choice_is_never_its_text():
    record = {"video_path": "a", "question": "Which?", "option0": "1", "option1": "0", "correct_choice": 0}
    assert one(record)["answer"] == "A"
    record = {"video_path": "a", "question": "Which?", "candidates": ["1", "0"], "correct_choice": 0}
    assert one(record)["answer"] == "A"


@pytest.mark.parametrize(
    "question",
    ["Which colour?\nA. red\nB. blue\nC. green", "Which colour?\n(A) red\n(B) blue\n(C) green"],
)
def test_options_within_the_question(question):
    row = one({"video_path": "a", "question": question, "answer": "B"})
    assert texts(row) == WHICH
    assert row["candidates"] == COLOURS


def test_a_full_stop_is_not_doubled():
    row = one({"video": "a", "question": "Which?", "candidates": ["It ends.", "No"], "answer": "It ends."})
    assert texts(row) == [f"Which?\nA. It ends.\nB. No\n{CHOICE}", "A. It ends."]


def test_a_question_without_options():
    assert texts(one({"video": "a", "question": "How many?", "answer": 3, "question_type": "count"})) == [
        "How many?",
        "3",
    ]
    assert texts(one({"video": "a", "question": "A. what?\nB", "answer": "yes"})) == ["A. what?\nB", "yes"]


@pytest.mark.parametrize(
    "scene, clip",
    [
        ({"start_time": "00:01:02.500", "end_time": "01:00:00"}, (62.5, 3600.0)),
        ({"start_time": "12.5", "end_time": "13"}, (12.5, 13.0)),
        ({"start": 1, "end": 2.5}, (1.0, 2.5)),
        ({"begin": "1:02", "end_sec": 100}, (62.0, 100.0)),
        ([3, 4], (3.0, 4.0)),
        ({"start_frame": 50, "end_frame": 60, "start_fps": 25, "end_fps": 30}, (2.0, 2.0)),
        ({"start_frame": 50, "end_frame": 75, "fps": 25.0}, (2.0, 3.0)),
        (
            {"start_frame": 50, "end_frame": 75, "start_fps": 25, "end_fps": 25, "start_time": 2.1, "end_time": 3.1},
            (2.1, 3.1),
        ),
    ],
)
def test_the_times_of_scenes(scene, clip):
    record = {"id": 1, "video": "a", "scenes": [scene], "conversations": turns("Tell.", "red")}
    row = one(record)
    assert (row["start"], row["end"]) == ([clip[0]], [clip[1]])


@pytest.mark.parametrize(
    "url, name",
    [
        ("https://www.youtube.com/watch?v=zukEQgbWdsY", "zukEQgbWdsY"),
        ("https://youtu.be/zukEQgbWdsY", "zukEQgbWdsY"),
        ("https://example.com/films/a.mp4", "a.mp4"),
        (None, "segment_1"),
    ],
)
def test_the_video_of_a_segment(url, name):
    clip = {"start_time": "00:00:01.000", "end_time": "00:00:02.000", "duration": 25}
    record = {"id": "segment_1", "url": url, "time_stamp": clip, "conversations": turns("Tell.", "red")}
    asked = []
    row = one(record, find=lambda *names, kind: asked.append(names) or names[0])
    assert row["video"] == [name] and asked[0][-1] == "segment_1"
    assert (row["start"], row["end"], row["duration"]) == ([1.0], [2.0], None)


def test_clips_of_several_videos():
    record = {"video": ["a", "b"], "conversations": turns("<video><video>", "red")}
    row = one({**record, "start": [0, None], "end": ["0:05", 2]})
    assert (row["start"], row["end"]) == ([0.0, None], [5.0, 2.0])
    assert one({**record, "start": [None, None]})["start"] is None
    assert one({**record, "start": 3})["start"] == [3.0, 3.0]
    assert one({**record, "end": math.inf})["end"] is None


def test_fps_and_duration():
    record = {"video": "a", "question": "Who?", "answer": "red"}
    row = one({**record, "fps": 3, "duration": "12.5"})
    assert (row["fps"], row["duration"]) == (3.0, 12.5)
    row = one({**record, "fps": "3", "duration": "short"})
    assert (row["fps"], row["duration"]) == (None, None)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"conversations": []}, r"`conversations` must be a list of turns, got \[\]"),
        ({"conversations": "Who?"}, "`conversations` must be a list of turns, got 'Who"),
        (
            {"conversations": [{"from": "dog", "value": "Woof"}]},
            "The turn {'from': 'dog'.*must have `from`, human or gpt",
        ),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "The turn .* must have `from`"),
        ({"conversations": [{"from": "human"}]}, "The turn .* and `value`, a text"),
        ({"conversations": [{"from": "human", "value": ["a"]}]}, r"`value` must be a text, got \['a'\]"),
        ({"conversations": turns("\ud800", "a")}, "`value` has characters that are not UTF-8"),
        ({"conversations": turns("a", "b")[1:], "video": "a"}, "no turn of a human"),
        ({"conversations": turns("a", "b"), "video": {"path": "a"}}, "`video` must be the name of a file, or a list"),
        ({"conversations": turns("a", "b"), "image": ["a", None]}, "`image` must be the name of a file.* got None"),
        ({"conversations": turns("a", "b"), "video": ["a", "b"], "start": [1]}, "`start` has 1 times for 2 videos"),
        (
            {"conversations": turns("a", "b"), "video": "a", "end": "later"},
            "`end` must be seconds, or a time .*'later'",
        ),
        ({"conversations": turns("a", "b"), "video": "a", "start": -1}, "`start` must be seconds.* got -1"),
        ({"conversations": turns("a", "b"), "video": "a", "scenes": 3}, "`scenes` must be a list, got 3"),
        ({"conversations": turns("a", "b"), "video": "a", "scenes": [{"x": 1}]}, "has no start: give start_time"),
        (
            {"conversations": turns("a", "b"), "video": "a", "scenes": [5]},
            "A scene must have a start and an end, got 5",
        ),
        ({"conversations": turns("a", "b"), "time_stamp": {}}, "needs a `url` or an `id`"),
        ({"QA": []}, "`QA` must be a list of questions and answers"),
        ({"QA": [{"q": "a"}]}, "Question 1 of `QA` must have `q` and `a`"),
        ({"QA": [{"q": "a", "a": "b"}, {"q": "", "a": "b"}]}, "Question 2 of `QA` has neither `q` nor `i`"),
        ({"video": "a", "question": "Who?"}, "The question has no answer"),
        ({"video_idx": "a", "question": "Who?", "option": COLOURS, "answer": None}, "The question has no answer"),
        (
            {"video": "a", "question": "Who?", "candidates": COLOURS, "answer": "brown"},
            "'brown' is none of the options",
        ),
        ({"video": "a", "question": "Who?", "candidates": COLOURS, "answer": 3}, "3 is none of the options"),
        ({"video": "a", "question": "Who?", "candidates": COLOURS, "answer": "D"}, "'D' is none of the options"),
        ({"video_path": "a", "question": "Who?", "candidates": COLOURS, "correct_choice": -1}, "-1 is none of"),
        (
            {"video": "a", "question": "Who?", "candidates": "red", "answer": "red"},
            "options must be a list of 2 to 26",
        ),
        ({"video": "a", "question": ["Who?"], "answer": "red"}, "`question` must be a text"),
        ({"V": {"action": [{"question": "Who?"}]}}, "Each question of TempCompass must have"),
    ],
)
def test_malformed_records(record, message):
    with pytest.raises(ValueError, match=message):
        rows_of(record)


def test_questions_with_their_answers_elsewhere():
    record = {"question": "Who?", "video_name": "abc", "question_id": "v_abc_1"}
    row = one(record, answers={"v_abc_1": "red"}, find=lambda *names, kind: "|".join(names))
    assert (texts(row), row["video"], row["id"]) == (["Who?", "red"], ["abc|v_abc"], "v_abc_1")
    with pytest.raises(ValueError, match="The question has no answer: `answer` is missing, or in a file that was not"):
        rows_of(record, answers={"v_abc_2": "red"})
