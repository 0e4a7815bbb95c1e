"""The data collator: rows of a LLaVA-Video style list to training batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_frames, tiny_model, tiny_processor
from video_files import write_index_video

from transformers_ma2mba import (
    BrokenSamples,
    DataCollatorForVideoQA,
    FrozenVisionFeatures,
    Ma2mbaProcessor,
    VideoReadError,
    conversation_to_messages,
    read_video,
)


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


def test_special_tokens_in_text_do_not_control(processor):
    """The end of text would end an answer early, and would begin a turn that the list does not have."""
    question, answer = "Who <|endoftext|>opens<|padding|>?", "red <|endof<|endoftext|>text|>green<|endoftext|>"
    rows = [
        {"conversations": [{"from": "system", "value": "A<|endoftext|>"}, *turns(question, answer)]},
        {"conversations": [{"from": "system", "value": "A"}, *turns("Who opens?", "red green")]},
    ]
    batch = DataCollatorForVideoQA(processor)(rows)
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert torch.equal(batch["labels"][0], batch["labels"][1])
    assert spoken(processor, batch, 0) == ["red green<|endoftext|>"]


# Clips


def by_hand(processor, messages) -> dict:
    """A batch of hand-made messages."""
    batch = processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    spoken = torch.as_tensor(batch.pop("assistant_masks")).bool()
    return {**batch, "labels": torch.where(spoken, batch["input_ids"], -100)}


@pytest.mark.parametrize("with_features", [False, True], ids=["frames", "features"])
def test_segments_and_captions_interleave(with_features, processor, config, folder):
    """The loss equals that of frames cut by hand, placed by hand."""
    row = {
        "video": ["films/long.mp4"] * 3,
        "start": [0, 1.5, 4],
        "end": [1.5, 3.25, 60],
        "conversations": turns("<video>\nWho?", "A dog.", "<video>", "red <video>", "Why?<video>", "blue"),
    }
    frames, _ = read_video(folder / "films/long.mp4", 4)
    cuts = [frames[[0, 4]], frames[[6, 10]], frames[[16]]]
    expected = [
        {"role": "user", "content": [{"type": "video", "video": cuts[0]}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": [{"type": "video", "video": cuts[1]}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "video", "video": cuts[2]}]},
        {"role": "assistant", "content": "blue"},
    ]
    model = tiny_model(config)
    model.model.vision_tower.requires_grad_(False)
    features = FrozenVisionFeatures(model, processor) if with_features else None
    actual = DataCollatorForVideoQA(processor, folder, vision_features=features)([row])
    expected = by_hand(processor, expected)
    assert torch.equal(actual["labels"], expected["labels"])
    losses = []
    for batch in (actual, expected):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append((loss.item(), model.model.multi_modal_projector.linear_1.weight.grad.clone()))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6) and losses[0][0] > 1
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-6)


def test_a_clip_in_a_chat(processor, folder):
    block = {"type": "video", "path": str(folder / "films/long.mp4"), "start": 1, "end": 3}
    options = dict(tokenize=True, return_dict=True, return_tensors="pt")
    frames, _ = read_video(folder / "films/long.mp4")
    for messages in ([{"role": "user", "content": [block]}], [[{"role": "user", "content": [block]}]]):
        batch = processor.apply_chat_template(messages, **options)
        assert torch.equal(batch["pixel_values_videos"], processor.video_processor(frames[1:3])["pixel_values_videos"])
    with pytest.raises(ValueError, match="Only a video has a start and an end.*'image'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": "a.png", "start": 1}]}])
    with pytest.raises(ValueError, match="end after its start, got 1 to 1"):
        processor.apply_chat_template([{"role": "user", "content": [{**block, "end": 1}]}])


def test_clips_of_one_film_are_kept_apart(processor, folder):
    collator = DataCollatorForVideoQA(processor, folder, keep_frames=True)
    film = {"video": "films/long.mp4", "conversations": turns("Who?", "red")}
    for _ in range(2):
        for clip, count in (({}, 5), ({"end": 2}, 2), ({"start": 1}, 4), ({"start": 1, "end": 2}, 1)):
            assert len(collator([{**film, **clip}])["pixel_values_videos"]) == count


# Broken samples


def film_of_noise(folder):
    (folder / "noise.mp4").write_bytes(b"no film" * 100)
    (folder / "noise.png").write_bytes((folder / "picture.png").read_bytes()[:60])
    return "noise.mp4"


BROKEN = {
    "missing": ({"video": "films/nowhere.mp4"}, FileNotFoundError, "There is no file .*nowhere.mp4"),
    "missing-image": ({"image": "nowhere.png"}, FileNotFoundError, "There is no file .*nowhere.png"),
    "no-film": ({"video": "noise.mp4"}, VideoReadError, "noise.mp4 is not a video"),
    "no-image": ({"image": "noise.png"}, ValueError, "noise.png is not an image that can be read"),
    "image-folder": ({"image": "films"}, ValueError, "films is a directory"),
    "film-as-image": ({"image": "films/short.mp4"}, ValueError, "short.mp4 is not an image"),
    "second-film": ({"video": ["films/short.mp4", "noise.mp4"]}, VideoReadError, "noise.mp4 is not a video"),
    "late-clip": ({"video": "films/short.mp4", "start": 9}, VideoReadError, r"ends at 2.00 s.*starts at 9 s"),
    "clip-backwards": (
        {"video": "films/short.mp4", "start": 2, "end": 1},
        ValueError,
        "end after its start, got 2 to 1",
    ),
    "malformed": ({"video": 7}, ValueError, "has the video 7: give a path"),
    "no-turns": ({"conversations": []}, ValueError, "has no `conversations`"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_is_left_out_and_read_once(kind, processor, folder, rows, tmp_path, monkeypatch):
    film_of_noise(folder)
    extra, error, message = BROKEN[kind]
    bad = {"id": "bad", "conversations": turns("Who?", "red"), **extra}
    with pytest.raises(error, match=f"(?s)Row bad.*{message}"):
        DataCollatorForVideoQA(processor, folder)([rows[0], bad])
    with pytest.raises(ValueError, match=f"(?s)Sample bad.*{message}"):
        DataCollatorForVideoQA(processor, folder, broken_samples=BrokenSamples(strict=True))([bad])

    collator = DataCollatorForVideoQA(processor, folder, broken_samples=BrokenSamples(tmp_path / "broken.jsonl"))
    with pytest.warns(UserWarning, match=f"(?s)Sample bad.* is left out: .*{message}"):
        batch = collator([rows[0], bad])
    expected = DataCollatorForVideoQA(processor, folder)(rows[:1])
    assert torch.equal(plain_ids(batch, 0), expected["input_ids"])
    assert torch.equal(batch["pixel_values_videos"], expected["pixel_values_videos"])
    assert spoken(processor, batch, 0) == spoken(processor, expected, 0)
    assert (batch["labels"][1] == -100).all() and len(batch["labels"]) == 2
    assert len(collator.broken_samples) == 1 and "bad" in collator.broken_samples.summary()

    def fail(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr("transformers_ma2mba.video_processing_ma2mba.read_video", fail)
    monkeypatch.setattr("transformers_ma2mba.data.data_collator.read_image", fail)
    later = DataCollatorForVideoQA(processor, folder, broken_samples=BrokenSamples(tmp_path / "broken.jsonl"))
    for known in (collator, later):
        assert (known([bad])["labels"] == -100).all()
    strict = BrokenSamples(tmp_path / "broken.jsonl", strict=True)
    with pytest.raises(ValueError, match=f"(?s)Sample bad.*{message}"):
        DataCollatorForVideoQA(processor, folder, broken_samples=strict)([bad])


def test_a_film_cut_short_is_no_broken_sample(processor, folder, tmp_path):
    write_index_video(tmp_path / "cut.mp4", 40, fps=4, preset="ultrafast", faststart=True)
    content = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 2 // 3])
    collator = DataCollatorForVideoQA(processor, tmp_path, broken_samples=BrokenSamples())
    with pytest.warns(UserWarning, match="cut.mp4 ends early") as caught:
        batch = collator([{"video": "cut.mp4", "conversations": turns("Who?", "red")}])
    assert len(caught) == 1 and len(collator.broken_samples) == 0
    assert 1 < len(batch["pixel_values_videos"]) < 10 and spoken(processor, batch, 0) == ["red<|endoftext|>"]


@pytest.mark.filterwarnings("ignore:Sample ")
def test_worker_processes_and_epochs_share_what_is_broken(processor, folder, tmp_path):
    """Each epoch has new worker processes."""
    broken = BrokenSamples()
    collator = DataCollatorForVideoQA(processor, folder, broken_samples=broken)
    bad = [{"id": number, "video": "nowhere.mp4", "conversations": turns("Who?", "red")} for number in range(4)]
    for _ in range(2):
        loader = torch.utils.data.DataLoader(
            bad, 1, collate_fn=collator, num_workers=2, multiprocessing_context="fork"
        )
        assert all((batch["labels"] == -100).all() for batch in loader)
        assert len(broken) == 4
    assert len(broken.file.read_text().splitlines()) == 4


def test_a_replaced_file_and_a_mended_row_are_read(processor, folder, tmp_path):
    broken = BrokenSamples()
    collator = DataCollatorForVideoQA(processor, tmp_path, broken_samples=broken)
    film = {"id": 1, "video": "a.mp4", "conversations": turns("Who?", "red")}
    text = {"id": 2, "conversations": turns("Who?", None)}
    with pytest.warns(UserWarning):
        assert (collator([film, text])["labels"] == -100).all()
    (tmp_path / "a.mp4").write_bytes((folder / "films/short.mp4").read_bytes())
    text["conversations"] = turns("Who?", "red")
    batch = collator([film, text])
    assert [spoken(processor, batch, row) for row in (0, 1)] == [["red<|endoftext|>"]] * 2


def test_errors_of_the_machine_are_not_the_samples(processor, folder, rows, tmp_path, monkeypatch):
    for error in (
        MemoryError(),
        KeyboardInterrupt(),
        OSError(24, "Too many open files"),
        OSError(28, "No space left"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        for name in ("video_processing_ma2mba.read_video", "data.images.load_image"):
            monkeypatch.setattr(f"transformers_ma2mba.{name}", fail)
        broken = BrokenSamples()
        for row in rows[1:]:
            with pytest.raises(type(error)):
                DataCollatorForVideoQA(processor, folder, broken_samples=broken)([row])
        assert len(broken) == 0


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "ma-gc"])
def test_a_batch_of_broken_rows_costs_and_teaches_nothing(checkpointed, processor, config):
    collator = DataCollatorForVideoQA(processor, broken_samples=BrokenSamples())
    with pytest.warns(UserWarning):
        batch = collator(
            [{"id": number, "video": "nowhere.mp4", "conversations": turns("a", "b")} for number in (1, 2)]
        )
    assert set(batch) == {"input_ids", "attention_mask", "labels"} and batch["labels"].shape[1] < 40
    model = tiny_model(config).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"layer_interval": 1, "sequence_interval": 8})
    for num_items_in_batch in (None, torch.tensor(0), 0, torch.tensor(7)):
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=num_items_in_batch).loss
        loss.backward()
        assert loss.item() == 0
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert gradients["model.language_model.layers.0.mixer.in_proj.weight"] is not None
        assert not any(grad.any() for grad in gradients.values() if grad is not None)  # NaN counts as true


def test_text_of_placeholders_is_no_placeholder(processor, folder):
    """Neither in answers, nor in pieces that another placeholder keeps apart."""
    row = {
        "video": "films/short.mp4",
        "conversations": turns("<video>What does <vid<video>eo> mean, <ima<ima<image>ge>ge>?", "It is a <video> tag."),
    }
    batch = DataCollatorForVideoQA(processor, folder)([row])
    assert (batch["input_ids"] == processor.video_token_id).sum() == 2 * processor.tokens_per_frame
    assert spoken(processor, batch, 0) == ["It is a  tag.<|endoftext|>"]


def test_placeholders_of_another_tokenizer(config, folder):
    tokenizer = tiny_processor(config).tokenizer
    tokenizer.add_tokens(["[film]"], special_tokens=True)
    other = tiny_processor(config)
    processor = Ma2mbaProcessor(
        tokenizer, other.video_processor, tokens_per_frame=other.tokens_per_frame, video_token="[film]"
    )
    row = {"video": "films/short.mp4", "conversations": turns("<video>Who?", "The [film] says [fi[film]lm].")}
    batch = DataCollatorForVideoQA(processor, folder)([row])
    assert (batch["input_ids"] == processor.video_token_id).sum() == 2 * processor.tokens_per_frame


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


def placed(**row) -> list[list[str]]:
    """The paths and texts of each message."""
    messages = conversation_to_messages(row)
    return [[block["text"] if block["type"] == "text" else block["path"] for block in m["content"]] for m in messages]


@pytest.mark.parametrize(
    "files, texts, expected",
    [
        ({"video": "a"}, ["Who?", "A dog.", "<video>\nWhy?", "red"], [["Who?"], ["A dog."], ["a", "Why?"], ["red"]]),
        ({"video": "a"}, ["Who?", "A dog.", "Why?\n<image>", "red"], [["Who?"], ["A dog."], ["a", "Why?"], ["red"]]),
        ({"video": "a"}, ["<video> <video>", "red"], [["a", ""], ["red"]]),
        ({"video": "a"}, ["Who?", "<video>"], [["a", "Who?"], [""]]),
        ({"video": ["a", "b"]}, ["<video>Who?", "red", "<video>", "blue"], [["a", "Who?"], ["red"], ["b"], ["blue"]]),
        ({"video": ["a", "b"]}, ["Is <image> like <image>?", "no"], [["Is", "a", "like", "b", "?"], ["no"]]),
        ({"video": ["a", "b"]}, ["<video>Who?", "<video>"], [["a", "b", "Who?"], [""]]),
        ({"video": ["a", "b"]}, ["Hm.", "<video>", "<video>Who?", "x"], [["a", "b", "Hm."], [""], ["Who?"], ["x"]]),
        ({"image": ["a", "b", "c"]}, ["<image>\nWho?", "red"], [["a", "b", "c", "Who?"], ["red"]]),
        (
            {"image": ["a", "b"], "video": "c"},
            ["Hm.", "x", "Is <image> in <video> or <image>?", "no"],
            [["Hm."], ["x"], ["c", "Is", "a", "in  or", "b", "?"], ["no"]],
        ),
        ({"image": "a", "video": "b"}, ["<video>", "x", "<image>", "y"], [["b", ""], ["x"], ["a", ""], ["y"]]),
        ({"image": "a", "video": "b"}, ["Who?", "x"], [["b", "a", "Who?"], ["x"]]),
        ({}, ["<video>Who?", "<image>"], [["Who?"], [""]]),
    ],
)
def test_placement(files, texts, expected):
    assert placed(**files, conversations=turns(*texts)) == expected


def test_clips_of_a_row():
    row = {"video": ["a", "b"], "start": [None, 2], "end": [3.5, None], "conversations": turns("Who?", "red")}
    first, second, _ = conversation_to_messages(row)[0]["content"]
    assert first == {"type": "video", "path": "a", "end": 3.5} and second == {"type": "video", "path": "b", "start": 2}
    row = {"video": "a", "start": None, "end": None, "conversations": turns("Who?", "red")}
    assert conversation_to_messages(row)[0]["content"][0] == {"type": "video", "path": "a"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"video": "a", "start": [1, 2]}, r"has the start \[1, 2\], but 1 videos"),
        ({"video": ["a", "b"], "start": 1}, "has the start 1, but 2 videos: give one number for each"),
        ({"image": "a", "end": 1}, "has the end 1, but 0 videos"),
        ({"video": "a", "start": "1"}, "start of a clip must be a number of seconds from 0 on, got '1'"),
        ({"video": "a", "start": -1.5}, "start of a clip must be .*, got -1.5"),
        ({"video": "a", "end": float("nan")}, "end of a clip must be .*, got nan"),
        ({"video": "a", "end": True}, "end of a clip must be .*, got True"),
        ({"video": "a", "start": 3, "end": 2}, "must end after its start, got 3 to 2 s"),
        ({"conversations": "Who?"}, "has the conversations 'Who.': give a list"),
        ({"conversations": [{"from": ["human"], "value": "Who?"}]}, "has the turn .*`from` must be human or gpt"),
    ],
)
def test_bad_clips_and_turns(row, message):
    with pytest.raises(ValueError, match=f"Row 7.*{message}"):
        conversation_to_messages({"id": 7, "conversations": turns("Who?", "red"), **row})


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


def test_a_row_without_an_answer_is_left_out(processor):
    """As `check-data` says, and before its film is read."""
    broken, row = BrokenSamples(), {"id": "mute", "video": "nowhere.mp4", "conversations": turns("Who?")}
    with pytest.raises(ValueError, match="Row mute has no answer to learn from"):
        DataCollatorForVideoQA(processor)([row])
    with pytest.warns(UserWarning, match="mute is left out"):
        batch = DataCollatorForVideoQA(processor, broken_samples=broken)([row])
    assert (batch["labels"] == -100).all() and "no answer" in broken.reasons()[0][1]
