"""The data collator: rows of a LLaVA-Video style list to training batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_frames, tiny_processor
from video_files import write_index_video

from transformers_ma2mba import DataCollatorForVideoQA, conversation_to_messages


def turns(*texts):
    """A conversation in which human and assistant alternate."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    (path / "films").mkdir()
    write_index_video(path / "films" / "short.mp4", 8, fps=4, preset="ultrafast")
    write_index_video(path / "films" / "long.mp4", 20, fps=4, preset="ultrafast")
    Image.fromarray(random_frames(1, 40, 24)[0]).save(path / "picture.png")
    return path


@pytest.fixture
def rows():
    return [
        {"id": 7, "video": "films/short.mp4", "conversations": turns("<image>\nWho?", "A dog.", "Why?", "red")},
        {"video": "films/long.mp4", "conversations": turns("<video>\nWho opens the door?", "blue green")},
        {"image": "picture.png", "conversations": turns("<image>\nWhich colour is it?", "yellow")},
    ]


def spoken(processor, batch, row) -> list[str]:
    """The runs of supervised tokens of a row as text."""
    labels = batch["labels"][row].numpy()
    positions = np.flatnonzero(labels != -100)
    runs = np.split(labels[positions], np.flatnonzero(np.diff(positions) > 1) + 1)
    return [processor.decode(run.tolist()) for run in runs]


def test_only_the_assistant_is_supervised(processor, folder, rows):
    batch = DataCollatorForVideoQA(processor, folder)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values", "pixel_values_videos"}
    assert spoken(processor, batch, 0) == ["A dog.<|endoftext|>", "red<|endoftext|>"]
    assert spoken(processor, batch, 1) == ["blue green<|endoftext|>"]
    assert spoken(processor, batch, 2) == ["yellow<|endoftext|>"]
    supervised = batch["labels"] != -100
    assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])


def test_a_batch_equals_the_processor_row_by_row(processor, folder, rows):
    batch = DataCollatorForVideoQA(processor, folder)(rows)
    longest = 0
    for row, source in enumerate(rows):
        text = processor.apply_chat_template(conversation_to_messages(source, folder))
        videos = [folder / source["video"]] if "video" in source else None
        images = [folder / source["image"]] if "image" in source else None
        ids = processor(text=text, videos=videos, images=images)["input_ids"][0]
        assert batch["input_ids"][row, -len(ids) :].tolist() == ids
        assert (batch["input_ids"][row, : -len(ids)] == processor.tokenizer.pad_token_id).all()  # on the left
        assert batch["attention_mask"][row].tolist() == [0] * (batch["labels"].shape[1] - len(ids)) + [1] * len(ids)
        longest = max(longest, len(ids))
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    paths = [folder / "films/short.mp4", folder / "films/long.mp4"]
    assert torch.equal(batch["pixel_values_videos"], processor.video_processor(paths)["pixel_values_videos"])
    assert batch["pixel_values_videos"].shape[0] == 2 + 5
    assert batch["pixel_values"].shape[0] == 1


def test_a_model_learns_from_a_batch(processor, model, folder, rows):
    with torch.no_grad():
        output = model(**DataCollatorForVideoQA(processor, folder)(rows))
    assert output.loss.isfinite() and output.loss > 0


def test_keeping_frames_only_saves_reading(processor, folder, rows, monkeypatch):
    plain, keeping = (DataCollatorForVideoQA(processor, folder, keep_frames=keep) for keep in (False, True))
    expected = plain(rows)
    for _ in range(2):
        batch = keeping(rows)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)

    def fail(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr("transformers_ma2mba.video_processing_ma2mba.read_video", fail)
    assert torch.equal(keeping(rows[:1])["input_ids"], plain_ids(expected, 0))
    with pytest.raises(AssertionError, match="read again"):
        plain(rows[:1])


@pytest.mark.parametrize(
    "options",
    [
        dict(size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32}),
        dict(do_rescale=True, do_normalize=True),
    ],
    ids=["crop", "normalize"],
)
def test_kept_frames_pass_the_video_processor_once(config, folder, rows, options):
    """A second crop would enlarge the middle of the frame; normalised frames are no longer uint8."""
    processor = tiny_processor(config)
    for name, value in options.items():
        setattr(processor.video_processor, name, value)
    plain, keeping = (DataCollatorForVideoQA(processor, folder, keep_frames=keep) for keep in (False, True))
    expected = plain(rows)
    for _ in range(2):
        assert torch.equal(keeping(rows)["pixel_values_videos"], expected["pixel_values_videos"])


def plain_ids(batch, row):
    """A row of a batch as a batch of one, without padding."""
    return batch["input_ids"][row : row + 1, batch["attention_mask"][row].bool()]


def test_rows_without_visuals(processor):
    batch = DataCollatorForVideoQA(processor)([{"conversations": turns("Who?", "red")}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert spoken(processor, batch, 0) == ["red<|endoftext|>"]


# Rows to messages


@pytest.mark.parametrize("first", ["<image>\nWho?", "<video>\nWho?", "Who?\n<video>", "Who?", " <image> Who? "])
def test_the_video_comes_once_before_the_first_question(first):
    row = {"video": "a.mp4", "conversations": turns(first, "A dog.", "Why?", "red")}
    assert conversation_to_messages(row, "films") == [
        {
            "role": "user",
            "content": [{"type": "video", "path": "films/a.mp4"}, {"type": "text", "text": "Who?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]


def test_several_files_and_a_system_turn(tmp_path):
    row = {
        "video": ["a.mp4", "https://example.com/b.mp4", tmp_path / "c.mp4"],
        "image": "d.png",
        "conversations": [{"from": "system", "value": "Be brief."}, *turns("Who?", "red")],
    }
    system, question, _ = conversation_to_messages(row, "data")
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    paths = ["data/a.mp4", "https://example.com/b.mp4", str(tmp_path / "c.mp4"), "data/d.png"]
    assert [block["path"] for block in question["content"][:-1]] == paths


@pytest.mark.parametrize(
    "row, message",
    [
        ({"id": 7, "video": "a.mp4"}, "Row 7 has no `conversations`"),
        ({"id": 7, "conversations": []}, "Row 7 has no `conversations`"),
        ({"id": 7, "conversations": [{"from": "dog", "value": "Woof"}]}, "Row 7 has the turn .*'dog'.*human or gpt"),
        ({"id": 7, "conversations": [{"value": "Who?"}]}, "Row 7 has the turn .*'Who.'.*`from` must be human or gpt"),
        ({"id": 7, "conversations": [{"from": "human"}]}, "Row 7 has the turn .*'human'.*and `value`"),
        (
            {"id": 7, "video": "a.mp4", "conversations": turns("a", "b")[1:]},
            "Row 7 has a video or an image, but no turn",
        ),
        ({"id": 7, "conversations": ["Who?"]}, "Row 7 has the turn 'Who.'"),
        ({"id": 7, "video": [None], "conversations": turns("a", "b")}, r"Row 7 has the video \[None\]: give a path"),
        ({"id": 7, "image": {"path": "a"}, "conversations": turns("a", "b")}, "Row 7 has the image {.*: give a path"),
        ([{"id": 7}], r"A row must be a dictionary with `conversations`, got \[{'id': 7}\]"),
    ],
    ids=[
        *("no-turns", "empty", "unknown-speaker", "no-speaker", "no-text", "no-question"),
        *("text-turn", "no-path", "image-dict", "list-row"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(ValueError, match=message):
        conversation_to_messages(row)


def test_a_row_whose_file_is_missing(processor, folder):
    row = {"video": "films/nowhere.mp4", "conversations": turns("Who?", "red")}
    for keep_frames in (False, True):
        with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
            DataCollatorForVideoQA(processor, folder, keep_frames=keep_frames)([row])
