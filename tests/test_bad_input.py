"""Bad input to the pipeline: the error is one sentence with the file or argument and the remedy."""

import math
import wave

import numpy as np
import pytest
import torch
from tiny import random_frames, tiny_config, tiny_model, tiny_processor
from transformers import pipeline
from video_files import write_index_video

from transformers_ma2mba import VideoReadError

FRAMES = random_frames(2)
NAN = np.full((3, 8, 8, 3), 0.5)
NAN[1, 2, 3, 0] = math.nan


def write_text(path):
    path.write_text("This is no film. " * 100)


def write_nothing(path):
    path.touch()


def write_sound(path):
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))


def assert_one_sentence(error):
    message = str(error.value)
    assert "\n" not in message and message.endswith("."), message
    assert len(message) < 250, message


@pytest.mark.parametrize(
    "write, message",
    [
        pytest.param(write_text, "is not a video that FFmpeg can read: check what it is, or convert it", id="text"),
        pytest.param(write_nothing, "is empty .0 bytes.: make or copy it again", id="empty"),
        pytest.param(write_sound, "has no video, only sound or a cover picture: give a file that has one", id="sound"),
    ],
)
def test_files_that_are_no_films(qa, tmp_path, write, message):
    path = tmp_path / "film.mp4"
    write(path)
    with pytest.raises(VideoReadError, match=f"film.mp4 {message}") as error:
        qa(video=str(path), question="Why?")
    assert_one_sentence(error)


def test_a_missing_file(qa, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*nowhere.mp4: check its path") as error:
        qa(video=str(tmp_path / "nowhere.mp4"), question="Why?")
    assert_one_sentence(error)


def test_a_film_cut_short_gets_an_answer_and_a_warning(qa, tmp_path):
    path = tmp_path / "cut.mp4"
    write_index_video(path, 80, fps=4, preset="ultrafast", faststart=True)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"cut.mp4 ends early: \d+\.\d of 20.0 seconds could be decoded"):
        entry = qa(video=str(path), question="Why?", max_new_tokens=2)
    assert set(entry) == {"answer", "score"}


@pytest.mark.parametrize(
    "inputs, message",
    [
        pytest.param(dict(question="Why?"), "There is a question but no video: pass video=", id="no-video"),
        pytest.param(dict(video="", question="Why?"), "There is a question but no video", id="empty-path"),
        pytest.param(dict(video=[], question="Why?"), "There is a question but no video", id="no-images"),
        pytest.param(dict(video=FRAMES), "question must be a text or a list of texts.*got None", id="no-question"),
        pytest.param(dict(video=FRAMES, question=""), "question must be .*none of them empty; got ''", id="empty"),
        pytest.param(dict(video=FRAMES, question=" \n"), "question must be .*none of them empty", id="blank"),
        pytest.param(dict(video=FRAMES, question=[]), r"question must be .*got \[\]", id="no-questions"),
        pytest.param(
            dict(video=FRAMES, question=["Why?", ""]), "question must be .*none of them empty", id="one-empty"
        ),
        pytest.param(dict(video=FRAMES, question=12), "question must be .*got 12", id="number"),
        pytest.param(dict(video=FRAMES, question="Is it <video>?"), "contains a placeholder", id="placeholder"),
        pytest.param(dict(video=FRAMES, question="<image> Why?"), "contains a placeholder", id="image-placeholder"),
        pytest.param(dict(video=FRAMES[0], question="Why?"), r"Frames must have shape .*\(32, 32, 3\)", id="rank"),
        pytest.param(dict(video=FRAMES.astype(int), question="Why?"), "Frames must be uint8, or .*int64", id="dtype"),
        pytest.param(dict(video=FRAMES * 1.0, question="Why?"), "must lie between 0 and 1, got 0 to", id="range"),
        pytest.param(dict(video=NAN, question="Why?"), "Frame 1 has NaN or infinite pixels; give finite", id="nan"),
        pytest.param(dict(video=FRAMES[:0], question="Why?"), "at least one frame; got none", id="no-frames"),
        pytest.param(dict(video=[FRAMES, FRAMES], question="Why?"), "but 2 videos were given", id="two-videos"),
        pytest.param(dict(video=12, question="Why?"), "A video must be a path, .*got int", id="no-video-at-all"),
        pytest.param(dict(video=FRAMES, question="Why?", fps=0), "fps must be .*above 0; got 0", id="rate-0"),
        pytest.param(
            dict(video=FRAMES, question="Why?", fps=-2.5), "fps must be .*above 0; got -2.5", id="rate-below"
        ),
    ],
)
def test_arguments(qa, inputs, message):
    with pytest.raises(ValueError, match=message) as error:
        qa(**inputs)
    assert_one_sentence(error)


@pytest.mark.parametrize("fps", [0, -1])
def test_bad_rate_for_a_file(qa, film, fps):
    with pytest.raises(ValueError, match=f"fps must be .*above 0; got {fps}") as error:
        qa(video=str(film), question="Why?", fps=fps)
    assert_one_sentence(error)


def test_rows_that_are_not_mappings(qa):
    with pytest.raises(ValueError, match="Each input must be a mapping with `video` and `question`; got str"):
        list(qa(name for name in ["film.mp4"]))


def test_a_batch_of_several_videos(qa):
    rows = [{"video": FRAMES, "question": "Why?"}] * 2
    with pytest.raises(ValueError, match="batch_size must be 1: videos differ in length"):
        qa(rows, batch_size=2)


@pytest.mark.parametrize("image_size", [16, 48])
def test_a_processor_of_another_checkpoint(model, image_size):
    other = tiny_processor(tiny_config(vision=dict(image_size=image_size)))
    pipe = pipeline("video-question-answering", model=model, processor=other)
    message = f"frames of {image_size} x {image_size} px, but this checkpoint's vision encoder takes 32 x 32 px"
    with pytest.raises(ValueError, match=message) as error:
        pipe(video=FRAMES, question="Why?")
    assert_one_sentence(error)


def test_a_processor_that_counts_other_tokens(model):
    other = tiny_processor(tiny_config(spatial_pool_stride=4))
    pipe = pipeline("video-question-answering", model=model, processor=other)
    with pytest.raises(ValueError, match="counts 1 tokens a frame, but the model makes 4"):
        pipe(video=FRAMES, question="Why?")


def test_an_error_leaves_the_pipeline_unchanged(qa):
    before = qa(video=FRAMES, question="Why?", max_new_tokens=4)
    for bad in (dict(video=NAN, question="Why?"), dict(video=FRAMES, question="")):
        with pytest.raises(ValueError):
            qa(**bad)
    assert qa(video=FRAMES, question="Why?", max_new_tokens=4) == before


def test_frames_of_another_size_given_to_a_model(config):
    """Two frames of 24 px without a processor; the number of their tokens would match the placeholders."""
    model = tiny_model(config)
    input_ids = torch.tensor([[config.video_token_id] * 8])
    with pytest.raises(ValueError, match="24 x 24 px, but this checkpoint's vision encoder takes 32 x 32 px"):
        model.generate(input_ids=input_ids, pixel_values_videos=torch.zeros(2, 3, 24, 24), max_new_tokens=1)
