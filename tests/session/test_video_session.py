"""Sessions: a stream equals the whole film at once, questions leave it unchanged, and failures keep what was seen."""

import copy
import re
import socket
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from prompts import make_prompt
from tiny import approximately, random_frames, tiny_config, tiny_model, tiny_processor
from torch.testing import assert_close
from transformers import AutoModel, GenerationConfig
from video_files import index_video_bytes

from transformers_ma2mba import StateFileError, VideoReadError, VideoSession, VideoStreamError, iter_frames, read_video
from transformers_ma2mba.session.state_file import cache_to_tensors, load_state_file
from transformers_ma2mba.session.video_session import watch_together

QUESTIONS = ["Who opens the door?", "Which colour is it?", "Why?", "What?", "Where is it?"]
CANDIDATES = ["red", "green", "blue green", "yellow", "blue"]
SHORT = dict(max_new_tokens=6)
FRAMES = random_frames(7, 48, 40)


@pytest.fixture
def session(model, processor):
    """Returns a function that makes sessions."""

    def make(**options):
        return VideoSession(model, processor, **options)

    return make


@pytest.fixture
def ask_about(session):
    """Returns a function that answers a question about frames watched in one piece."""
    return lambda frames, question="Why?": session(frames_per_piece=100).extend(frames).ask(question, **SHORT)


def close_states(actual, expected, **tolerances):
    assert_close(cache_to_tensors(actual), cache_to_tensors(expected), **tolerances)


# A stream equals the whole film at once


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pieces_of_any_size_equal_one_forward_pass(processor, in_double, kind):
    config = tiny_config(kind)
    model = tiny_model(config, dtype=torch.float64)
    prompt = make_prompt(processor, FRAMES, "Why?")
    beginning = int((prompt["input_ids"][0] == processor.video_token_id).nonzero()[-1]) + 1
    prompt = {
        **prompt,
        "input_ids": prompt["input_ids"][:, :beginning],
        "attention_mask": prompt["attention_mask"][:, :beginning],
    }
    with torch.no_grad():
        expected = model(**prompt, use_cache=True, logits_to_keep=1).cache_params
    for size in range(1, len(FRAMES) + 2):
        watched = VideoSession(model, processor, frames_per_piece=size).extend(FRAMES)
        close_states(watched.state(), expected, rtol=0, atol=1e-10)
        assert watched.num_tokens == beginning


def test_frames_of_one_token(in_double):
    """The stock layer would take a segment of one token for a step of decoding."""
    config = tiny_config(spatial_pool_stride=4)
    model, processor = tiny_model(config, dtype=torch.float64), tiny_processor(config)
    states = [VideoSession(model, processor, frames_per_piece=n).extend(FRAMES).state() for n in (1, 3, 100)]
    close_states(states[0], states[2], rtol=0, atol=1e-10)
    close_states(states[1], states[2], rtol=0, atol=1e-10)


def test_answers_equal_plain_generate(session, model, processor):
    expected = []
    for question in QUESTIONS:
        prompt = make_prompt(processor, FRAMES, question)
        tokens = model.generate(**prompt, **SHORT)[0, prompt["input_ids"].shape[1] :]
        expected.append(processor.decode(tokens, skip_special_tokens=True).strip())
    assert len(set(expected)) > 2
    for size in (1, 2, 3, 100):
        watched = session(frames_per_piece=size).extend(FRAMES)
        assert [entry["answer"] for entry in watched.ask(QUESTIONS, **SHORT)] == expected


def test_questions_leave_the_session_unchanged(session):
    watched = session().extend(FRAMES)
    before = watched.state()
    first = watched.ask("Why?", **SHORT)
    ranked = watched.ask("Why?", candidates=CANDIDATES)
    watched.ask(QUESTIONS, num_beams=2, **SHORT)
    chat = watched.chat()
    chat.ask("Who?", **SHORT)
    assert watched.ask("Why?", **SHORT) == first
    assert watched.ask("Why?", candidates=CANDIDATES) == ranked
    close_states(watched.state(), before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(num_beams=3, num_return_sequences=2)], ids=str)
def test_a_batch_of_questions_equals_one_by_one(session, options):
    questions = [*QUESTIONS, *(f"Why {word}?" for word in CANDIDATES), "Why?"]
    lengths = [len(session().processor.tokenizer(question)["input_ids"]) for question in questions]
    assert len(set(lengths)) < len(lengths)  # some questions form a batch
    watched = session().extend(FRAMES)
    one_by_one = [watched.ask(question, **SHORT, **options) for question in questions]
    assert watched.ask(questions, **SHORT, **options) == approximately(one_by_one)


def test_a_batch_of_questions_with_candidates(session):
    watched = session().extend(FRAMES)
    one_by_one = [watched.ask(question, candidates=CANDIDATES) for question in QUESTIONS]
    assert watched.ask(QUESTIONS, candidates=CANDIDATES) == approximately(one_by_one)
    many = [f"word{index}" for index in range(40)]
    assert len(watched.ask("Why?", candidates=many)) == 40


def test_answers_have_at_most_128_tokens_by_default(session, monkeypatch):
    watched = session().extend(FRAMES)
    seen = []
    generate = watched.model.generate
    monkeypatch.setattr(
        watched.model, "generate", lambda **options: seen.append(options["max_new_tokens"]) or generate(**options)
    )
    watched.ask("Why?")
    watched.ask("Why?", max_new_tokens=3)
    assert seen == [128, 3]
    monkeypatch.undo()
    expected = watched.ask("Why?", max_new_tokens=3)
    assert watched.ask("Why?", generation_config=GenerationConfig(max_new_tokens=3)) == expected


@pytest.mark.parametrize("sizes", [(5, 5, 5), (7, 1, 4), (2, 3, 6)], ids=str)
def test_films_in_lockstep_equal_one_by_one(session, sizes):
    films = [random_frames(size, seed=size + index) for index, size in enumerate(sizes)]
    for piece in (1, 2, 9):
        sessions = [session(frames_per_piece=piece) for _ in films]
        watch_together(sessions, films)
        for watched, film in zip(sessions, films, strict=True):
            close_states(watched.state(), session().extend(film).state(), rtol=1e-4, atol=1e-4)
            assert watched.num_frames == len(film)


# A conversation


def test_a_conversation_equals_the_chat_template(session, processor, monkeypatch):
    """Token for token: the test records the input of the model."""
    watched = session(frames_per_piece=100).extend(FRAMES)
    heard, turns = [], []
    chat = watched.chat()
    hear = chat._hear
    monkeypatch.setattr(chat, "_hear", lambda state, tokens: heard.extend(tokens) or hear(state, tokens))
    for question, candidates in (("Who opens the door?", None), ("Why?", ["red.", ">blue"]), ("Where?", None)):
        prompt = make_prompt(processor, FRAMES, *turns, question)
        tokens = watched.model.generate(**prompt, **SHORT)[0, prompt["input_ids"].shape[1] :]
        expected = processor.decode(tokens, skip_special_tokens=True).strip()
        result = chat.ask(question, candidates=candidates, **({} if candidates else SHORT))
        answer = (result[0] if candidates else result)["answer"]
        assert candidates is not None or answer == expected
        turns += [question, answer]
        whole = make_prompt(processor, FRAMES, *turns)["input_ids"][0].tolist()
        beginning = len(whole) - whole[::-1].index(processor.video_token_id)
        assert heard == whole[beginning:]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3
    assert watched.ask("Why?", **SHORT) == watched.chat().ask("Why?", **SHORT)  # without the other conversation


def test_a_question_that_fails_is_not_remembered(session):
    chat = session().extend(FRAMES).chat()
    chat.ask("Who?", **SHORT)
    other = copy.copy(chat)
    expected = other.ask("Why?", **SHORT)
    for bad in ("", "Is it <video>?"):
        with pytest.raises(ValueError):
            chat.ask(bad)
    with pytest.raises(ValueError, match="max_new_token"):
        chat.ask("Where?", max_new_token=3)
    assert chat.ask("Why?", **SHORT) == expected


# Streams


@pytest.mark.parametrize("form", ["arrays", "channels-first", "tensors", "images", "floats", "list", "one by one"])
def test_frames_of_any_kind(session, ask_about, form):
    items = {
        "arrays": iter(FRAMES),
        "channels-first": (frame.transpose(2, 0, 1) for frame in FRAMES),
        "tensors": (torch.from_numpy(frame) for frame in FRAMES),
        "images": (Image.fromarray(frame) for frame in FRAMES),
        "floats": (frame / 255 for frame in FRAMES),
        "list": list(FRAMES),
        "one by one": None,
    }[form]
    watched = session()
    for source in [items] if items is not None else ([frame] for frame in FRAMES):
        assert watched.extend(source) is watched
    assert watched.num_frames == 7
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES))


def test_files_and_frames_in_turn(session, ask_about, film):
    frames, _ = read_video(film)
    both = np.concatenate([frames, frames[:2]])
    watched = session().extend(film).extend(frames[:2])
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(both))
    with open(film, "rb") as file:
        assert session().extend(file).extend(iter(frames[:2])).ask("Why?", **SHORT) == approximately(ask_about(both))


def test_a_camera_that_writes_into_the_same_memory(session, ask_about):
    def camera(timed):
        memory = np.empty_like(FRAMES[0])
        for second, frame in enumerate(FRAMES):
            memory[:] = frame
            yield (second, memory) if timed else memory

    for timed in (False, True):
        assert session().extend(camera(timed)).ask("Why?", **SHORT) == approximately(ask_about(FRAMES))


@pytest.mark.parametrize("fps", [0.5, 1.0, 3.0, 4.0])
@pytest.mark.parametrize("start", [0.0, 1.7e9])
def test_timed_frames_are_sampled_like_a_file(session, film, fps, start):
    """The frames of a film with their times equal the film."""
    timed = ((start + seconds, frame) for seconds, frame in iter_frames(film, 4.0))
    watched = session(fps=fps).extend(timed)
    expected = session(fps=fps).extend(film)
    assert watched.num_frames == expected.num_frames
    close_states(watched.state(), expected.state(), rtol=1e-4, atol=1e-4)


def test_a_frame_stays_on_screen_until_the_next(session, ask_about):
    times = [0.0, 0.4, 1.0004, 1.9, 4.2]
    seen = [0, 2, 3, 3, 3]  # at 0, 1, 2, 3 and 4 seconds
    timed = list(zip(times, FRAMES, strict=False))
    expected = approximately(ask_about(FRAMES[seen]))
    assert session().extend(timed).ask("Why?", **SHORT) == expected
    for cut in range(1, 5):  # the times continue from call to call
        watched = session().extend(timed[:cut])
        watched.ask("Where?", **SHORT)
        assert watched.extend(iter(timed[cut:])).ask("Why?", **SHORT) == expected
    # After frames without times, the times begin again.
    watched = session().extend(timed[:3]).extend(FRAMES[:1]).extend(timed[:3])
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES[[0, 2, 0, 0, 2]]))


def test_memory_does_not_grow(session, monkeypatch):
    """Only one piece of the frames is alive at any time."""
    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def stream():
        nonlocal most
        for index in range(60):
            frame = FRAMES[index % 7].copy().view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield frame
            del frame

    watched = session(frames_per_piece=4)
    sizes = []
    feed = watched.model.get_video_features
    monkeypatch.setattr(watched.model, "get_video_features", lambda pixels: sizes.append(len(pixels)) or feed(pixels))
    watched.extend(stream())
    assert sizes == [4] * 15
    assert most <= 6
    assert watched._film.memory.window == ()


# While frames arrive


class LiveStream:
    """A stream that waits for the test before each frame, watched by a session in a thread."""

    def __init__(self, watched, frames, **options):
        self.asked, self.given = threading.Semaphore(0), threading.Semaphore(0)
        self.watched = watched.extend(self.stream(frames), background=True, **options)
        self.asked.acquire()

    def stream(self, frames):
        for frame in frames:
            self.asked.release()  # the session has seen all frames before this one
            self.given.acquire()
            yield frame
        self.asked.release()
        self.given.acquire()

    def give(self, count):
        for _ in range(count):
            self.given.release()
            self.asked.acquire()

    def end(self):
        self.given.release()
        assert self.watched.wait(60)


@pytest.mark.parametrize("timed", [False, True], ids=["frames", "pairs"])
def test_questions_while_frames_arrive(session, ask_about, timed):
    """The answers equal those about a film that ends there."""
    stream = LiveStream(session(), [*enumerate(FRAMES)] if timed else FRAMES)
    watched = stream.watched
    with pytest.raises(ValueError, match="Nothing watched yet"):
        watched.ask("Why?")
    seen = 0
    for count in (1, 1, 3):
        stream.give(count)
        seen += count
        assert watched.is_watching
        assert watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES[:seen]))
        assert watched.num_frames == seen
    with pytest.raises(RuntimeError, match="is being extended already"):
        watched.extend(FRAMES)
    assert watched.wait(0) is False
    stream.give(2)
    stream.end()
    assert not watched.is_watching
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES))
    expected = approximately(ask_about(np.concatenate([FRAMES, FRAMES])))
    assert watched.extend(FRAMES).ask("Why?", **SHORT) == expected


def test_a_stream_can_be_stopped(session, ask_about):
    stream = LiveStream(session(), FRAMES)
    stream.give(3)
    stream.watched.stop()
    stream.given.release()  # the thread ends after one more frame
    assert stream.watched.wait(60)
    assert stream.watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES[:4]))


def test_a_stop_that_comes_too_late_does_not_stop_the_next_stream(session, monkeypatch):
    is_watching = VideoSession.is_watching.fget
    watched, proceed = session(), threading.Event()

    def at_the_end(self):
        """The thread ends its stream between the question whether it watches and the request to stop."""
        was_watching = is_watching(self)
        proceed.set()
        assert self.wait(60)
        return was_watching

    def frames():
        yield FRAMES[0]
        assert proceed.wait(60)

    watched.extend(frames(), background=True)
    with monkeypatch.context() as patches:
        patches.setattr(VideoSession, "is_watching", property(at_the_end))
        watched.stop()
    assert watched.extend(FRAMES).num_frames == 1 + len(FRAMES)


def test_wait_raises_the_error_of_a_thread(session, ask_about):
    def broken():
        yield from FRAMES[:3]
        raise OSError("connection lost")

    watched = session().extend(broken(), background=True)
    with pytest.raises(VideoStreamError, match=r"broke off after 3 frames \(OSError: connection lost\)"):
        watched.wait(60)
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES[:3]))


def test_threads_that_ask_a_session_while_it_is_extended(session, ask_about):
    stream = LiveStream(session(), FRAMES)
    stream.give(5)
    expected = {question: approximately(ask_about(FRAMES[:5], question)) for question in QUESTIONS}
    answers, together = {}, threading.Barrier(len(QUESTIONS))

    def ask(question):
        together.wait(60)
        answers[question] = stream.watched.ask(question, **SHORT)

    threads = [threading.Thread(target=ask, args=(question,)) for question in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == expected
    stream.give(2)
    stream.end()
    assert stream.watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES))


# Failures


def broken_streams():
    small = random_frames(1, 16, 24)[0]
    bad = np.full((48, 40, 3), np.nan)
    yield (
        "size",
        [*FRAMES[:3], small],
        "Frame 3 of the list is 24 x 16 px, but those before it were 40 x 48 px",
        [0, 1, 2],
    )
    times = [(0, FRAMES[0]), (1.5, FRAMES[1]), (1.25, FRAMES[2])]
    yield (
        "back",
        times,
        "Frame 2 of the list is at 1.25 seconds, but the one before it was at 1.5: times must not",
        [0, 0],
    )  # at 0 and 1 seconds
    yield "nan-time", [(0, FRAMES[0]), (float("nan"), FRAMES[1])], "Frame 1 of the list is at nan seconds", [0]
    yield "no-time", [(0, FRAMES[0]), FRAMES[1]], "Frame 1 of the list has no time, but those before it had", [0]
    yield "a-time", [FRAMES[0], (1, FRAMES[1])], "Frame 1 of the list has a time, but those before it had none", [0]
    yield "nan", [*(FRAMES[:2] / 255), bad], "Frame 2 has NaN or infinite pixels", [0, 1]
    yield "rank", [FRAMES[0], FRAMES[1, 0]], r"Frame 1 of the list has shape \(40, 3\): it must be an image", [0]
    yield "none", [FRAMES[0], None], "Frame 1 of the list has type NoneType: it must be an image", [0]
    yield "dtype", [FRAMES[0], FRAMES[1].astype(int)], "Frames must be uint8, or floating point .*int64", [0]


@pytest.mark.parametrize(
    ("items", "message", "kept"), [pytest.param(*rest, id=name) for name, *rest in broken_streams()]
)
def test_frames_before_a_bad_frame_are_kept(session, ask_about, items, message, kept):
    watched = session()
    with pytest.raises(VideoStreamError, match=message) as error:
        watched.extend(items)
    assert error.value.session is watched
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    frames = FRAMES[kept]
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(frames))
    watched.extend(FRAMES[3:])
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(np.concatenate([frames, FRAMES[3:]])))


def test_a_stream_that_fails_before_its_first_frame(session):
    def broken():
        raise OSError("no camera")
        yield

    watched = session()
    with pytest.raises(VideoReadError, match=r"the generator broke off after 0 frames \(OSError: no camera\)"):
        watched.extend(broken())
    with pytest.raises(VideoReadError, match="the list_iterator has no frame"):
        watched.extend(iter([]))
    for ask in (lambda: watched.ask("Why?"), watched.chat, lambda: watched.save("film"), watched.state):
        with pytest.raises(ValueError, match="Nothing watched yet"):
            ask()


def test_ctrl_c_keeps_the_frames_seen(session, ask_about):
    def interrupted(frames):
        yield from frames
        raise KeyboardInterrupt

    watched = session(fps=2)
    with pytest.warns(UserWarning, match="Interrupted: watched up to second 2.5; ask about that much, or extend it"):
        assert watched.extend(interrupted(FRAMES[:5])) is watched
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES[:5]))
    assert watched.extend(FRAMES[5:]).ask("Why?", **SHORT) == approximately(ask_about(FRAMES))
    with pytest.raises(KeyboardInterrupt):  # there is nothing to keep
        session().extend(interrupted([]))
    sessions = [session(), session()]
    with pytest.warns(UserWarning, match="Interrupted: watched up to second 3, 2;"):
        watch_together(sessions, [iter(FRAMES[:3]), interrupted(FRAMES[:2])])


@pytest.mark.parametrize("moment", range(6))
def test_ctrl_c_in_the_middle_of_the_model(session, ask_about, monkeypatch, moment):
    """An interrupted piece goes through all layers again, although some had finished it."""
    watched = session()
    calls = 0
    layer = watched.model.model.language_model.layers[moment % 2]
    forward = layer.forward

    def interrupt(*args, **kwargs):
        nonlocal calls
        calls += 1
        outputs = forward(*args, **kwargs)
        if calls == 1 + moment // 2:
            raise KeyboardInterrupt
        return outputs

    monkeypatch.setattr(layer, "forward", interrupt)
    with pytest.warns(UserWarning, match="Interrupted"):
        watched.extend(iter(FRAMES))
    seen = watched.num_frames
    assert seen == [3, 3, 6, 6, 7, 7][moment]
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES[:seen]))


def test_ctrl_c_while_a_frame_is_resized_leaves_the_clock(session, ask_about, monkeypatch):
    """Frames without times end the times before them, but only once the first of them has been sampled."""
    watched = session().extend([(0.0, FRAMES[0]), (1.5, FRAMES[1])])

    def interrupt(frame):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(watched, "_fit", interrupt)
        with pytest.warns(UserWarning, match="Interrupted"):
            watched.extend(FRAMES[5:])
    watched.extend([(3.0, FRAMES[2])])
    assert watched.ask("Why?", **SHORT) == approximately(ask_about(FRAMES[[0, 0, 1, 2]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fps=0), "fps must be a finite number of frames per second above 0; got 0."),
        (dict(fps="1"), "fps must be a finite number of frames per second above 0; got '1'."),
        (dict(frames_per_piece=0), "frames_per_piece must be a whole number above 0; got 0."),
    ],
    ids=str,
)
def test_bad_options(session, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        session(**options)


@pytest.mark.parametrize(
    "video", [12, None, {"a": 1}, FRAMES[0], FRAMES[:0], object()], ids=lambda v: type(v).__name__
)
def test_values_that_are_no_video(session, video):
    with pytest.raises(ValueError, match="A video must be|Frames must have shape|at least one frame"):
        session().extend(video)


def test_format_and_options_reach_ffmpeg(session, tmp_path):
    """A file of bare pixels does not state their size."""
    path = tmp_path / "film.raw"
    path.write_bytes(FRAMES.tobytes())
    options = {"video_size": "40x48", "pixel_format": "rgb24", "framerate": "1"}
    watched = session().extend(str(path), format="rawvideo", options=options, timeout=60)
    close_states(watched.state(), session().extend(FRAMES).state(), rtol=1e-4, atol=1e-4)
    with pytest.raises(VideoReadError, match="no frame|could not be opened|not a video|Not one frame"):
        session().extend(str(tmp_path / "nothing"), format="v4l2")


# Files


def test_a_resumed_session_continues_bit_for_bit(session, model, processor, tmp_path):
    path = tmp_path / "film.safetensors"
    timed = list(zip([0.0, 0.4, 1.0, 1.9, 4.2, 5.0], FRAMES, strict=False))
    for frames, more in ((FRAMES[:4], FRAMES[4:]), (timed[:4], timed[4:])):
        watched = session(fps=2).extend(frames)
        watched.save(path)
        resumed = VideoSession.resume(path, model, processor)
        for _ in range(2):
            assert (resumed.num_frames, resumed.num_tokens, resumed.seconds, resumed.frame_rate) == (
                watched.num_frames,
                watched.num_tokens,
                watched.seconds,
                2.0,
            )
            close_states(resumed.state(), watched.state(), rtol=0, atol=0)
            assert resumed.ask(QUESTIONS, **SHORT) == watched.ask(QUESTIONS, **SHORT)
            assert resumed.ask("Why?", candidates=CANDIDATES) == watched.ask("Why?", candidates=CANDIDATES)
            watched.extend(more)
            resumed.extend(more)
            more = FRAMES[:1]


def test_metadata_of_earlier_files(session, tmp_path):
    """Files of earlier releases have these entries, and must load."""
    path = tmp_path / "film.safetensors"
    session(fps=2).extend(FRAMES[:2]).extend([(-3.0, FRAMES[0]), (-1.9, FRAMES[1])]).save(path)
    metadata = load_state_file(path)[1]
    model = {"checkpoint", "dtype", "fingerprint", "format", "version", "sha256"}
    assert {name: value for name, value in metadata.items() if name not in model} == {
        "frames": "00000000000000000005",  # two, and those at -3, -2.5 and -2 seconds
        "tokens": "00000000000000000033",
        "seconds": "+2.50000000000000000e+00",
        "frame_rate": "+2.00000000000000000e+00",
        "clock": "1",
        "clock_origin": "-3.00000000000000000e+00",
        "clock_first_sample": "00000000000000000002",
        "clock_latest": "-1.89999999999999991e+00",
    }


def test_files_of_short_and_long_films_are_equally_large(session, tmp_path):
    sizes = []
    for name, frames in (
        ("short", FRAMES[:1]),
        ("long", FRAMES),
        ("timed", [(-1e9, FRAMES[0]), (-1e9 + 2, FRAMES[1])]),
    ):
        session().extend(frames).save(tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    watched = session().extend(FRAMES)
    watched._film.memory = watched._film.memory._replace(num_frames=7200 * 24)
    watched.save(tmp_path / "hours")
    assert set(sizes) == {(tmp_path / "hours").stat().st_size}


def test_another_checkpoint_is_refused_by_name(session, processor, config, qa, tmp_path):
    path = tmp_path / "film.safetensors"
    session().extend(FRAMES).save(path)
    assert qa.resume(path).num_frames == 7  # the pipeline loaded the same weights from a checkpoint
    other = tiny_model(config, seed=1)
    other.name_or_path = "path/other"
    with pytest.raises(StateFileError, match=r"film.safetensors was made by .* and cannot be resumed with path/other"):
        VideoSession.resume(path, other, processor)
    half = tiny_model(config, dtype=torch.bfloat16)
    with pytest.raises(StateFileError, match=r"was made by .*\(float32, .* resumed with .*\(bfloat16, "):
        VideoSession.resume(path, half, processor)
    again = tiny_model(config)  # the same weights
    assert VideoSession.resume(path, again, processor).num_frames == 7


def test_a_damaged_file_is_refused(session, model, processor, tmp_path):
    """See test_state_file.py for other kinds of damage."""
    path = tmp_path / "film.safetensors"
    session().extend(FRAMES).save(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StateFileError, match="film.safetensors is cut short"):
        VideoSession.resume(path, model, processor)


# Models on other devices and with other dtypes


def test_bfloat16(processor, config, tmp_path):
    model = tiny_model(config, dtype=torch.bfloat16)
    watched = VideoSession(model, processor).extend(FRAMES)
    watched.save(tmp_path / "film")
    resumed = VideoSession.resume(tmp_path / "film", model, processor)
    assert resumed.ask(QUESTIONS, **SHORT) == watched.ask(QUESTIONS, **SHORT)
    assert watched.ask("Why?", candidates=CANDIDATES)[0]["score"] > 0


def test_a_device_map(checkpoint, processor, session, tmp_path):
    """The CPU stands for several devices, between which the hooks of accelerate move tensors."""
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model": "cpu"}
    model = AutoModel.from_pretrained(checkpoint, device_map={**parts, "lm_head": "cpu"})
    watched = VideoSession(model, processor).extend(FRAMES)
    assert watched.ask(QUESTIONS, **SHORT) == session().extend(FRAMES).ask(QUESTIONS, **SHORT)
    watched.save(tmp_path / "film")
    assert VideoSession.resume(tmp_path / "film", model, processor).num_frames == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda(processor, config, session, tmp_path):
    model = tiny_model(config).to("cuda")
    watched = VideoSession(model, processor).extend(FRAMES)
    expected = session().extend(FRAMES)
    assert watched.ask(QUESTIONS, **SHORT) == approximately(expected.ask(QUESTIONS, **SHORT))
    watched.save(tmp_path / "film")
    resumed = VideoSession.resume(tmp_path / "film", model, processor)
    assert resumed.ask(QUESTIONS, **SHORT) == watched.ask(QUESTIONS, **SHORT)
    assert {tensor.device.type for tensor in cache_to_tensors(resumed.state()).values()} == {"cuda"}


def test_a_bar_with_seconds_tokens_and_speed(session, film, capsys):
    session().extend(film, progress=True)
    error = capsys.readouterr().err
    assert "film.mp4" in error and "6/6" in error
    assert re.search(r"24 tokens, [\d,]+ tokens/s", error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session().extend(film, progress=False)
    assert "film.mp4" not in capsys.readouterr().err


def test_a_connection_that_stalls(session, film):
    """With a timeout the film ends where the connection stalls, with a warning."""
    data = index_video_bytes(400, "mpegts", fps=4, preset="ultrafast")
    server, done = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve():
        connection, _ = server.accept()
        with connection:
            connection.sendall(data[: len(data) // 2])
            done.wait(60)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.warns(UserWarning, match="ends early: after .* seconds reading failed"):
            watched = session().extend(f"tcp://127.0.0.1:{server.getsockname()[1]}", format="mpegts", timeout=1.0)
    finally:
        done.set()
        thread.join(60)
        server.close()
    assert 30 < watched.seconds < 60
    assert watched.ask("Why?", **SHORT)["answer"]


def test_layers_that_share_a_place_in_the_cache_are_refused(model, processor):
    model = copy.deepcopy(model)
    layers = model.model.language_model.layers
    layers.append(copy.deepcopy(layers[0]))
    with pytest.raises(ValueError, match="both keep their state under layer_idx 0"):
        VideoSession(model, processor)
