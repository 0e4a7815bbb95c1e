"""The processor: the paper's conversation, placeholders, assistant masks, padding, and errors."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import VOCABULARY, random_frames, random_pixels, tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from transformers_ma2mba import Ma2mbaProcessor, Ma2mbaVideoProcessor
from transformers_ma2mba.video.frames import FittedFrames

IMAGE, VIDEO = "<image>", "<video>"


def user(*blocks):
    content = [{"type": "text", "text": block} if isinstance(block, str) else block for block in blocks]
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def video(frames):
    return {"type": "video", "video": frames}


def image(frame):
    return {"type": "image", "image": Image.fromarray(frame)}


def naive_tokens(processor, parts: list, spoken: bool = False) -> list[tuple[int, int]]:
    """(token, whether the assistant says it) of parts of a text and of (placeholder, number of frames)."""
    tokens = []
    for part in parts:
        if isinstance(part, tuple):
            name, num_frames = part
            token = processor.tokenizer.convert_tokens_to_ids(name)
            tokens += [(token, 0)] * (num_frames * processor.tokens_per_frame)
        else:
            tokens += [(token, int(spoken)) for token in processor.tokenizer(part)["input_ids"]]
    return tokens


def naive_conversation(processor, turns, system=None, ask=False) -> list[tuple[int, int]]:
    """The paper's Table 5, turn by turn: an even turn is a list of the user's parts, an odd one the assistant's text.

    With `ask`, the assistant's turn is next.
    """
    tokens = naive_tokens(processor, [f"<|system|>{system or 'You are a helpful assistant.'}<|endoftext|>"])
    for number, turn in enumerate(turns):
        if number % 2 == 0:
            tokens += naive_tokens(processor, ["<|user|>", *turn, "<|endoftext|>"])
        else:
            tokens += naive_tokens(processor, ["<|assistant|>"])
            tokens += naive_tokens(processor, [turn, "<|endoftext|>"], spoken=True)
    return tokens + (naive_tokens(processor, ["<|assistant|>"]) if ask else [])


# The conversation


def test_the_paper_s_conversation(processor):
    """Table 5: the video once, before the first question; later questions follow in the same sequence."""
    conversation = [
        user({"type": "video", "path": "film.mp4"}, "Who opens the door?"),
        assistant("A dog."),
        user("Which colour is it?"),
        assistant("red"),
        user("And then?"),
    ]
    expected = (
        "<|system|>You are a helpful assistant.<|endoftext|>"
        "<|user|><video>Who opens the door?<|endoftext|>"
        "<|assistant|>A dog.<|endoftext|>"
        "<|user|>Which colour is it?<|endoftext|>"
        "<|assistant|>red<|endoftext|>"
        "<|user|>And then?<|endoftext|>"
    )
    assert processor.apply_chat_template(conversation) == expected
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == expected + "<|assistant|>"
    assert processor.apply_chat_template([conversation] * 2) == [expected] * 2


@pytest.mark.parametrize("as_blocks", [True, False], ids=["blocks", "string"])
def test_own_system_message(processor, as_blocks):
    text = "You answer in one word."
    system = {"role": "system", "content": [{"type": "text", "text": text}] if as_blocks else text}
    conversation = [system, {"role": "user", "content": "Who?"}]
    assert processor.apply_chat_template(conversation, add_generation_prompt=True) == (
        "<|system|>You answer in one word.<|endoftext|><|user|>Who?<|endoftext|><|assistant|>"
    )


def test_whitespace_and_signs_stay_as_they_are(processor):
    text = "  two  spaces,\n\n{{ braces }} {% signs %} <|user|>\n"
    rendered = processor.apply_chat_template([user(text), assistant(text)])
    assert rendered.endswith(f"<|endoftext|><|user|>{text}<|endoftext|><|assistant|>{text}<|endoftext|>")


def test_images_and_videos_keep_their_places(processor):
    blocks = [{"type": "image"}, "Before,", {"type": "video"}, "between", {"type": "image"}, "and after."]
    rendered = processor.apply_chat_template([user(*blocks)])
    assert rendered.endswith("<|user|><image>Before,<video>between<image>and after.<|endoftext|>")


# Placeholders


def test_placeholders_equal_tokenizing_the_text_with_all_of_them(processor):
    text = "a<video>b <image>c<video><image><|endoftext|>é"
    videos, images = [random_frames(3), random_frames(1)], [Image.fromarray(random_frames(1)[0])] * 2
    output = processor(text=text, videos=videos, images=images)
    written_out = "a" + VIDEO * 12 + "b " + IMAGE * 4 + "c" + VIDEO * 4 + IMAGE * 4 + "<|endoftext|>é"
    plain = processor.tokenizer(written_out)
    assert output["input_ids"] == [plain["input_ids"]]
    assert output["attention_mask"] == [plain["attention_mask"]]
    assert output["pixel_values_videos"].shape == (4, 3, 32, 32)
    assert output["pixel_values"].shape == (2, 3, 32, 32)


PARTS = st.one_of(st.sampled_from(["<|endoftext|>", "<|user|>", " ", "\n"]), st.text(max_size=8), st.integers(1, 3))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(PARTS, st.booleans()), max_size=8))
def test_placeholders_in_any_text(processor, parts):
    """A number stands for a video with this many frames, or for this many images."""
    text, written_out, videos, images = "", "", [], []
    for part, is_video in parts:
        if isinstance(part, str):
            text, written_out = text + part, written_out + part
        elif is_video:
            text, written_out = text + VIDEO, written_out + VIDEO * 4 * part
            videos.append(random_frames(part))
        else:
            text, written_out = text + IMAGE * part, written_out + IMAGE * 4 * part
            images += list(random_frames(part))
    output = processor(text=[text], videos=videos or None, images=images or None)
    assert output["input_ids"] == processor.tokenizer([written_out])["input_ids"]
    assert len(output.get("pixel_values_videos", [])) == sum(map(len, videos))
    assert len(output.get("pixel_values", [])) == len(images)


@pytest.mark.parametrize("tokens_per_frame", [1, 4, 144])
def test_tokens_per_frame(tokens_per_frame):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([IMAGE, VIDEO], special_tokens=True)
    processor = Ma2mbaProcessor(tokenizer, Ma2mbaVideoProcessor(), tokens_per_frame=tokens_per_frame)
    output = processor(text="<video>a<image>", videos=random_frames(2, 8, 8), images=random_frames(1, 8, 8)[0])
    ids = output["input_ids"][0]
    assert ids.count(processor.video_token_id) == 2 * tokens_per_frame
    assert ids.count(processor.image_token_id) == tokens_per_frame
    assert output["pixel_values_videos"].shape == (2, 3, 336, 336)


def test_pixels_are_the_video_processor_s(processor, film):
    frames = random_frames(2, 40, 24)
    pictures = [random_frames(1, 24, 40)[0], Image.fromarray(random_frames(1, 64, 64)[0])]
    output = processor(text="<video><video><image><image>", videos=[str(film), frames], images=pictures)
    video_processor = processor.video_processor
    assert torch.equal(output["pixel_values_videos"], video_processor([film, frames])["pixel_values_videos"])
    expected = video_processor([[picture] for picture in pictures])["pixel_values_videos"]
    assert torch.equal(output["pixel_values"], expected)


@pytest.mark.parametrize("form", ["image", "array", "tensor", "str", "path"])
def test_forms_of_an_image(processor, tmp_path, form):
    frame = random_frames(1, 40, 24)[0]
    path = tmp_path / "picture.png"
    Image.fromarray(frame).save(path)
    forms = {
        "image": Image.fromarray(frame),
        "array": frame,
        "tensor": torch.from_numpy(frame).permute(2, 0, 1),
        "str": str(path),
        "path": path,
    }
    expected = processor.video_processor([frame])["pixel_values_videos"]
    for images in (forms[form], [forms[form]], [[forms[form]]]):
        assert torch.equal(processor(text="<image>", images=images)["pixel_values"], expected)


def test_text_alone_and_pixels_alone(processor):
    assert set(processor(text="Who?")) == {"input_ids", "attention_mask"}
    assert set(processor(videos=random_frames(1))) == {"pixel_values_videos"}
    assert set(processor(images=random_frames(1)[0])) == {"pixel_values"}


def test_fps_and_other_options_reach_the_video_processor(processor, film):
    for output in (
        processor(text="<video>", videos=film, fps=2),
        processor(text="<video>", videos=film, videos_kwargs={"fps": 2}),
        processor.apply_chat_template(
            [user({"type": "video", "path": str(film)})], tokenize=True, return_dict=True, processor_kwargs={"fps": 2}
        ),
    ):
        assert output["pixel_values_videos"].shape[0] == 12
        assert output["input_ids"][0].count(processor.video_token_id) == 12 * processor.tokens_per_frame


def test_metadata(processor, film):
    output = processor(text="<video>", videos=film, return_metadata=True, return_tensors="pt")
    assert output["video_metadata"][0].duration == 6
    assert "num_frames" not in output


# Chats with pixels


@pytest.mark.parametrize("return_tensors", [None, "pt"])
@pytest.mark.parametrize("key", ["path", "url", "video"])
def test_a_chat_with_a_file(processor, film, key, return_tensors):
    conversation = [user({"type": "video", key: str(film)}, "Who?"), assistant("red")]
    output = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors=return_tensors or "auto"
    )
    expected = naive_conversation(processor, [[(VIDEO, 6), "Who?"], "red"])
    assert np.asarray(output["input_ids"]).tolist() == [[token for token, _ in expected]]
    assert torch.equal(output["pixel_values_videos"], processor.video_processor(film)["pixel_values_videos"])


def test_a_chat_with_fitted_frames(processor):
    pixels = random_pixels(3)
    output = processor.apply_chat_template(
        [user(video(FittedFrames(pixels)), "Who?")], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(output["pixel_values_videos"], pixels)
    expected = naive_conversation(processor, [[(VIDEO, 3), "Who?"]])
    assert output["input_ids"].tolist() == [[token for token, _ in expected]]


def test_a_chat_with_images_and_videos(processor, tmp_path):
    pictures, frames = random_frames(2), random_frames(3, seed=1)
    path = tmp_path / "picture.png"
    Image.fromarray(pictures[1]).save(path)
    turns = [[(IMAGE, 1), "Before,", (VIDEO, 3), "after."], "red", [(IMAGE, 1), "And this?"]]
    conversation = [
        user(image(pictures[0]), "Before,", video(frames), "after."),
        assistant("red"),
        user({"type": "image", "path": str(path)}, "And this?"),
    ]
    output = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert output["input_ids"] == [[token for token, _ in naive_conversation(processor, turns, ask=True)]]
    assert torch.equal(output["pixel_values_videos"], processor.video_processor(frames)["pixel_values_videos"])
    assert torch.equal(output["pixel_values"], processor.video_processor(pictures)["pixel_values_videos"])


def test_a_batch_of_chats_with_a_video_an_image_both_or_neither(processor):
    frames = random_frames(4)
    conversations = [
        [user(video(frames[:2]), "Who?")],
        [user(image(frames[2]), "Which colour?")],
        [user(image(frames[3]), video(frames[2:3]), "Who opens the door?")],
        [user("Who?")],
    ]
    output = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    expected = [
        naive_conversation(processor, [[(VIDEO, 2), "Who?"]]),
        naive_conversation(processor, [[(IMAGE, 1), "Which colour?"]]),
        naive_conversation(processor, [[(IMAGE, 1), (VIDEO, 1), "Who opens the door?"]]),
        naive_conversation(processor, [["Who?"]]),
    ]
    for row, tokens in enumerate(expected):
        assert output["input_ids"][row, -len(tokens) :].tolist() == [token for token, _ in tokens]
        assert output["attention_mask"][row].sum() == len(tokens)
    everything = processor.video_processor(frames)["pixel_values_videos"]
    assert torch.equal(output["pixel_values_videos"], everything[:3])
    assert torch.equal(output["pixel_values"], everything[2:])


# Assistant masks

TURNS = [
    ([[(VIDEO, 3), "Who opens the door?"], "A dog."], None),
    ([[(VIDEO, 2), "Which colour?"], "red", ["And then?"], "  blue, green \n", ["Why?"], "!"], None),
    ([[(IMAGE, 1), "Say <|assistant|>red<|endoftext|>"], "café ☕ 日本 <|user|>"], "Short."),
    ([["No video."], "", [(IMAGE, 1), (VIDEO, 1), "Late"], "yellow"], None),
]


def conversation_of(turns, system):
    visuals = {VIDEO: lambda n: video(random_frames(n)), IMAGE: lambda n: image(random_frames(n)[0])}
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns):
        if number % 2:
            messages.append(assistant(turn))
        else:
            messages.append(user(*(visuals[p[0]](p[1]) if isinstance(p, tuple) else p for p in turn)))
    return messages


@pytest.mark.parametrize("return_tensors", ["auto", "pt", "np"])
@pytest.mark.parametrize("turns, system", TURNS, ids=["one-turn", "several-turns", "any-text", "empty-and-late"])
def test_assistant_mask(processor, turns, system, return_tensors):
    """The mask covers exactly the assistant's text and its end of text."""
    output = processor.apply_chat_template(
        conversation_of(turns, system),
        tokenize=True,
        return_dict=True,
        return_tensors=return_tensors,
        return_assistant_tokens_mask=True,
    )
    tokens, mask = zip(*naive_conversation(processor, turns, system), strict=True)
    assert np.asarray(output["input_ids"]).tolist() == [list(tokens)]
    assert np.asarray(output["assistant_masks"]).tolist() == [list(mask)]
    assert "offset_mapping" not in output
    if return_tensors == "pt":
        assert output["assistant_masks"].shape == output["input_ids"].shape


@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_masks_of_a_padded_batch(processor, side):
    output = processor.apply_chat_template(
        [conversation_of(*turns) for turns in TURNS],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": side},
    )
    rows = [naive_conversation(processor, *turns) for turns in TURNS]
    longest = max(map(len, rows))
    for row, tokens in enumerate(rows):
        padding = [(processor.tokenizer.pad_token_id, 0)] * (longest - len(tokens))
        padded = padding + tokens if side == "left" else tokens + padding
        assert output["input_ids"][row].tolist() == [token for token, _ in padded]
        assert output["assistant_masks"][row].tolist() == [spoken for _, spoken in padded]
        assert output["attention_mask"][row].sum() == len(tokens)


# Padding


@pytest.fixture
def batch():
    return {"text": ["<video>Who?", "Which colour is it?", "<video>"], "videos": [random_frames(2), random_frames(3)]}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize(
    "options, length",
    [
        (dict(padding=True), None),
        (dict(padding="longest"), None),
        (dict(padding=True, pad_to_multiple_of=8), 16),
        (dict(padding="max_length", max_length=30), 30),
        (dict(padding="max_length", max_length=30, pad_to_multiple_of=32), 32),
    ],
    ids=["true", "longest", "multiple", "max-length", "multiple-of-max-length"],
)
def test_padding(processor, batch, options, length, side):
    """Padding is on the left by default, because padding after a text would enter its state."""
    rows = processor(**batch)["input_ids"]
    length = length or max(map(len, rows))
    output = processor(**batch, **options, **({"padding_side": side} if side else {}), return_tensors="pt")
    assert output["input_ids"].shape == output["attention_mask"].shape == (3, length)
    for ids, mask, row in zip(output["input_ids"].tolist(), output["attention_mask"].tolist(), rows, strict=True):
        padding = [processor.tokenizer.pad_token_id] * (length - len(row))
        assert ids == (row + padding if side == "right" else padding + row)
        zeros, ones = [0] * len(padding), [1] * len(row)
        assert mask == (ones + zeros if side == "right" else zeros + ones)


def test_no_padding(processor, batch):
    output = processor(**batch)
    assert [type(row) for row in output["input_ids"]] == [list] * 3
    assert len({len(row) for row in output["input_ids"]}) > 1


def test_a_text_longer_than_max_length(processor, batch):
    with pytest.raises(ValueError, match="A text with its videos takes 12 tokens, more than max_length=11"):
        processor(**batch, padding="max_length", max_length=11)


@pytest.mark.parametrize("truncation", [True, "longest_first", "only_first"])
def test_truncation_is_refused(processor, batch, truncation):
    with pytest.raises(ValueError, match="Truncation would cut videos in two"):
        processor(**batch, truncation=truncation, max_length=8)


# Two hours of film


def test_two_hours_of_film_take_seconds(processor, capsys):
    """7,200 frames of 144 tokens; frames of 2 x 2 px, because the test measures the 1,036,800 placeholders."""
    hours = Ma2mbaProcessor(
        processor.tokenizer, Ma2mbaVideoProcessor(size={"height": 2, "width": 2}), tokens_per_frame=144
    )
    frames = np.zeros((7200, 2, 2, 3), np.uint8)
    conversation = [user(video(frames), "Who opens the door?"), assistant("A dog.")]
    start = time.perf_counter()
    output = hours.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n7,200 frames with 1,036,800 placeholders and an assistant mask: {seconds:.1f} s")
    assert seconds < 10
    assert (output["input_ids"] == hours.video_token_id).sum() == 1_036_800
    spoken = output["input_ids"][output["assistant_masks"].bool()]
    assert hours.decode(spoken) == "A dog.<|endoftext|>"


# Errors

FRAMES = random_frames(2)


@pytest.mark.parametrize(
    "inputs, message",
    [
        pytest.param(dict(text="Who?", videos=FRAMES), "has 0 <video> placeholders, but 1 video was given", id="none"),
        pytest.param(dict(text="<video><video>", videos=FRAMES), "2 <video> placeholders, but 1 video was", id="more"),
        pytest.param(
            dict(text="<video>", videos=[FRAMES] * 3), "1 <video> placeholder, but 3 videos were", id="fewer"
        ),
        pytest.param(dict(text="<video>Who?"), "1 <video> placeholder, but 0 videos were given", id="no-video"),
        pytest.param(dict(text="<image>Who?"), "1 <image> placeholder, but 0 images were given", id="no-image"),
        pytest.param(dict(text="<image>", videos=FRAMES), "0 <video> placeholders, but 1 video was", id="other-kind"),
        pytest.param(
            dict(text="<image>", images=[FRAMES[0], FRAMES[1]]), "1 <image> placeholder, but 2 images", id="images"
        ),
        pytest.param(
            dict(text=["<video>", "<video>"], videos=[FRAMES]), "2 <video> placeholders, but 1 video was", id="batch"
        ),
        pytest.param(
            dict(text=["<video>"], videos=[[FRAMES], [FRAMES]]), "1 <video> placeholder, but 2 videos", id="texts"
        ),
        pytest.param(
            dict(text=["<video><video>", "Who?"], videos=[[FRAMES], [FRAMES]]),
            "Text 0 of the batch has 2 <video> placeholders, but 1 video was",
            id="wrong-text",
        ),
        pytest.param(
            dict(text=["<image>", "<image>"], images=[[FRAMES[0], FRAMES[1]], []]),
            "Text 0 of the batch has 1 <image> placeholder, but 2 images were",
            id="wrong-text-image",
        ),
        pytest.param(dict(), "Give the processor text, videos or images", id="nothing"),
        pytest.param(dict(text=[["Who?"]]), "text must be a string or a list of strings", id="nested-text"),
        pytest.param(dict(text=12), "text must be a string or a list of strings", id="number"),
    ],
)
def test_inputs_that_do_not_match(processor, inputs, message):
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def test_a_placeholder_in_a_question(processor):
    with pytest.raises(ValueError, match="2 <video> placeholders, but 1 video was given"):
        processor.apply_chat_template([user(video(FRAMES), "What is <video>?")], tokenize=True, return_dict=True)


# Making and saving


def test_from_model_config():
    config = tiny_config(frame_rate=2.0, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.5, 0.5])
    processor = Ma2mbaProcessor.from_model_config(config, tiny_tokenizer())
    video_processor = processor.video_processor
    assert (video_processor.fps, dict(video_processor.size)) == (2.0, {"height": 32, "width": 32})
    assert list(video_processor.image_mean) == [0.1, 0.2, 0.3] and list(video_processor.image_std) == [0.5, 0.5, 0.5]
    assert processor.tokens_per_frame == config.tokens_per_frame == 4
    assert (processor.image_token_id, processor.video_token_id) == (VOCABULARY - 2, VOCABULARY - 1)


def test_from_model_config_counts_the_tokens():
    config = tiny_config(text=dict(vocab_size=VOCABULARY + 8))
    assert config.unpadded_vocab_size is None
    Ma2mbaProcessor.from_model_config(config, tiny_tokenizer())
    assert config.unpadded_vocab_size == VOCABULARY


def test_from_model_config_with_too_many_tokens():
    config, tokenizer = tiny_config(), tiny_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    tokenizer.add_tokens(["one", "more"])
    with pytest.raises(ValueError, match="has 386 tokens, placeholders included, but the language model has only 384"):
        Ma2mbaProcessor.from_model_config(config, tokenizer)


def test_from_model_config_with_other_ids():
    with pytest.raises(ValueError, match="gives <image> the id 382, but the config expects 383: set image_token_id"):
        config = tiny_config(image_token_id=VOCABULARY - 1, video_token_id=VOCABULARY - 2)
        Ma2mbaProcessor.from_model_config(config, tiny_tokenizer())


def test_a_tokenizer_without_placeholders():
    with pytest.raises(ValueError, match="The tokenizer has no token <image>: add it, or let"):
        Ma2mbaProcessor(tiny_tokenizer(), Ma2mbaVideoProcessor())


def test_other_placeholders():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[i]", "[v]"], special_tokens=True)
    processor = Ma2mbaProcessor(tokenizer, Ma2mbaVideoProcessor(), 4, image_token="[i]", video_token="[v]")
    conversation = [user(video(random_frames(2)), image(random_frames(1)[0]), "Not <video>.")]
    assert processor.apply_chat_template(conversation).endswith("<|user|>[v][i]Not <video>.<|endoftext|>")
    ids = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"][0]
    assert (ids.count(VOCABULARY - 1), ids.count(VOCABULARY - 2)) == (8, 4)


def test_saving_keeps_everything(tmp_path, film):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[i]", "[v]"], special_tokens=True)
    processor = Ma2mbaProcessor(
        tokenizer,
        Ma2mbaVideoProcessor(size={"height": 16, "width": 16}, fps=2.0),
        tokens_per_frame=7,
        chat_template="{% for message in messages %}{{ message.content }}[v]{% endfor %}",
        image_token="[i]",
        video_token="[v]",
    )
    processor.save_pretrained(tmp_path / "once")
    loaded = AutoProcessor.from_pretrained(tmp_path / "once")
    loaded.save_pretrained(tmp_path / "twice")
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name
    expected = processor(text="a[v]b", videos=film, return_tensors="pt")
    output = loaded(text="a[v]b", videos=film, return_tensors="pt")
    assert output["input_ids"].shape == (1, 2 + 7 * 12)
    assert all(torch.equal(output[name], expected[name]) for name in expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_padded_on_the_left_with_any_tokenizer(processor, tmp_path, side):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    made = Ma2mbaProcessor.from_model_config(tiny_config(), tokenizer)
    made.save_pretrained(tmp_path)
    for some in (made, AutoProcessor.from_pretrained(tmp_path)):
        assert some(text=["Who?", "Who opens the door?"], padding=True)["attention_mask"][0][0] == 0


def test_decoding(processor):
    ids = processor(text="red green")["input_ids"]
    assert processor.batch_decode(ids) == ["red green"]
    assert processor.decode(ids[0] + [0], skip_special_tokens=True) == "red green"


def test_number_of_tokens_without_pixels(processor):
    """Serving engines call this method."""
    data = processor._get_num_multimodal_tokens(image_sizes=[(480, 640)] * 2, video_sizes=[(10, 480, 640)])
    assert (data.num_image_tokens, data.num_image_patches, data.num_video_tokens) == ([4, 4], [1, 1], [40])


def test_no_token_reaches_from_the_marker_into_an_answer():
    """Training has the tokens of generation, whose prompt ends behind the marker, for an answer such as "(A)" too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["vector<int>(a), list<int>(b)"] * 9 + ["<|assistant|>"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    assert tokenizer.tokenize("|>(") == ["|", ">("]
    processor = Ma2mbaProcessor(tokenizer, Ma2mbaVideoProcessor(), tokens_per_frame=4)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "(A)"}] * 2
    options = dict(tokenize=True, return_dict=True)
    prompt = processor.apply_chat_template(messages[:3], add_generation_prompt=True, **options)["input_ids"][0]
    batch = processor.apply_chat_template([messages], return_assistant_tokens_mask=True, **options)
    ids, mask = batch["input_ids"][0], batch["assistant_masks"][0]
    assert ids[: len(prompt)] == prompt and tokenizer.decode(ids[len(prompt) :]) == "(A)<|endoftext|>"
    answers = [token for token, spoken in zip(ids, mask, strict=True) if spoken]
    assert tokenizer.decode(answers) == "(A)<|endoftext|>" * 2
