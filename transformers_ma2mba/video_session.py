"""Watch once, ask many: a film goes through the model once, as a stream, and a state of fixed size is all that stays.

Decoding, resizing, vision tower, projector and language model work on a few frames at a time. Questions continue
copies of the state, so that each costs its own tokens only.
"""

import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from numbers import Real
from typing import Any, NamedTuple

import torch
from transformers import Cache
from transformers.utils.logging import tqdm

from .answering import Answerer, checked_candidates, checked_questions
from .model_fingerprint import describe_model, is_same_model, name_model
from .recurrent_state import (
    StateFileError,
    cache_from_tensors,
    cache_layers_of,
    cache_to_tensors,
    copy_cache,
    empty_cache,
    join_caches,
    load_state_file,
    save_state_file,
)
from .video_reader import VideoReadError
from .video_stream import Picture, VideoStream

# Timestamps are rounded, often to milliseconds; a frame this many seconds late for a sample is on time.
_TOLERANCE = 0.6e-3


class VideoStreamError(VideoReadError):
    """A stream that failed after frames of it had been watched; `session` holds those, and can be asked and saved."""

    def __init__(self, message: str, session: "VideoSession"):
        super().__init__(message)
        self.session = session


class _Memory(NamedTuple):
    """All that is known of the film. It is replaced as a whole: whatever interrupts a step leaves the last one's."""

    cache: Cache
    num_frames: int = 0  # that are in the cache
    window: tuple[torch.Tensor, ...] = ()  # of frames that are not yet, each (3, height, width)


class _Clock(NamedTuple):
    """Where in a stream with timestamps the session stands."""

    origin: float  # the first frame's time
    first_sample: int  # how many samples there were before it
    latest: float  # the last frame's time
    on_screen: Picture  # the last frame


class VideoSession:
    """A film that is being watched, or has been: extend it, ask about it, save it.

    ```python
    watched = VideoSession(model, processor).extend("film.mp4")
    watched.ask("Who opens the door?")  # {"answer": "...", "score": 0.93}
    ```

    Frames wait in a window until `frames_per_piece` of them go through the model; a question, and saving, does not
    wait for more. Any number of threads may ask while another extends.

    Args:
        model ([`Ma2mbaForVideoQA`]): the model, on whatever devices.
        processor ([`Ma2mbaProcessor`]): its processor.
        fps (`float`, *optional*): frames per second of film to look at; `model.config.frame_rate` unless given.
        frames_per_piece (`int`, *optional*): how many frames go through the model at a time, which bounds memory and
            changes no answer; `model.config.frames_per_vision_pass` unless given.
        prepare_generate_kwargs: see [`Answerer`].

    Attributes:
        frame_rate: frames per second of film.

    Raises:
        ValueError: if `fps` or `frames_per_piece` is not above 0, or the processor is another model's.
    """

    def __init__(
        self,
        model,
        processor,
        fps: float | None = None,
        frames_per_piece: int | None = None,
        prepare_generate_kwargs: Callable[..., dict] | None = None,
    ):
        self._set_up(model, processor, fps, frames_per_piece, prepare_generate_kwargs)
        input_ids = torch.tensor([_beginning(processor)], device=model.device)
        cache = empty_cache(model.config.text_config.num_hidden_layers)
        cache_layers_of(cache, model.model.language_model.layers)  # raises where layers would write into one place
        if input_ids.numel():
            with torch.no_grad():
                model(input_ids=input_ids, cache_params=cache, use_cache=True, logits_to_keep=1)
        self._memory = _Memory(cache)

    def _set_up(self, model, processor, fps, frames_per_piece, prepare_generate_kwargs):
        fps = model.config.frame_rate if fps is None else fps
        if not isinstance(fps, Real) or not 0 < fps < math.inf:
            raise ValueError(f"fps must be a finite number of frames per second above 0; got {fps!r}.")
        if frames_per_piece is None:
            frames_per_piece = model.config.frames_per_vision_pass
        if not isinstance(frames_per_piece, int) or frames_per_piece < 1:
            raise ValueError(f"frames_per_piece must be a whole number above 0; got {frames_per_piece!r}.")
        size, side = dict(processor.video_processor.size), model.config.vision_config.image_size
        is_final = processor.video_processor.do_resize and not processor.video_processor.do_center_crop
        if is_final and (height := size.get("height")) and (height, size["width"]) != (side, side):
            raise ValueError(
                f"The processor makes frames of {height} x {size['width']} px, but this checkpoint's vision encoder "
                f"takes {side} x {side} px: load both from one checkpoint."
            )
        if processor.tokens_per_frame != model.config.tokens_per_frame:
            raise ValueError(
                f"The processor counts {processor.tokens_per_frame} tokens a frame, but the model makes "
                f"{model.config.tokens_per_frame}: load both from one checkpoint."
            )
        self.model, self.processor, self.frame_rate = model, processor, float(fps)
        self.frames_per_piece = frames_per_piece
        self._answerer = Answerer(model, processor, prepare_generate_kwargs)
        self._fit = processor.video_processor.frame_fitter()
        self._num_beginning_tokens = len(_beginning(processor))
        self._clock: _Clock | None = None
        self._lock = threading.RLock()  # of memory and clock
        self._extending = threading.Lock()  # held from the first to the last frame of a stream
        self._done = threading.Event()  # unset while a thread watches
        self._done.set()
        self._stop = False
        self._failure: Exception | None = None  # of the last thread

    # What has been seen

    @property
    def num_frames(self) -> int:
        """How many frames have been sampled."""
        memory = self._memory
        return memory.num_frames + len(memory.window)

    @property
    def num_tokens(self) -> int:
        """How many tokens these and the prompt's beginning are."""
        return self._num_beginning_tokens + self.num_frames * self.model.config.tokens_per_frame

    @property
    def seconds(self) -> float:
        """How much of the film that is."""
        return self.num_frames / self.frame_rate

    def __repr__(self):
        return f"{type(self).__name__}({self.seconds:g} seconds, {self.num_frames} frames, {self.num_tokens} tokens)"

    # Watching

    def extend(self, video: Any, progress: bool | None = None, background: bool = False, **open_options):
        """Watches more.

        Files, URLs and devices are read at `frame_rate`, from their own beginning. Of frames that are given as such,
        each is one sample. Of pairs of seconds and a frame, each frame is on screen until the next one's time, and the
        session looks every `1 / frame_rate` seconds. Such times go on from one call to the next, unless frames without
        times come between.

        Args:
            video: a path or URL, an open binary file or bytes; an array or tensor `(num_frames, height, width, 3)` or
                `(num_frames, 3, height, width)`; or any iterable of frames `(height, width, 3)` uint8, PIL images, or
                pairs of seconds and one of these.
            progress: whether to show a bar; unless given, one appears if it takes a while, and none in background.
            background: whether to return at once, and watch in a thread. `wait` waits for its end.
            open_options: what FFmpeg needs to open the video, as for [`iter_frames`]: `format="v4l2"`, `options`, and
                `timeout`, seconds after which a source that sends nothing counts as ended.

        Returns:
            The session itself. After Ctrl-C, with a warning that says up to where the film was seen.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the video is none of the above.
            VideoReadError: if it cannot be read, or a frame or its time cannot be used. [`VideoStreamError`] if this
                happens after frames of it have been watched, which stay: the session can be asked, and extended.
            RuntimeError: if the session is being extended already.
        """
        stream = VideoStream(video, self.frame_rate, self._fit, **open_options)
        if not background:
            try:
                self._watch(stream, progress)
            except KeyboardInterrupt:
                if self.num_frames == 0:
                    raise
                _warn_of_interruption([self])
            return self
        self._begin()

        def watch():
            try:
                self._take_all(stream, bool(progress))
            except Exception as error:
                self._failure = error
            finally:
                self._extending.release()
                self._done.set()

        threading.Thread(target=watch, name=f"watching {stream.name}", daemon=True).start()
        return self

    def _begin(self):
        if not self._extending.acquire(blocking=False):
            raise RuntimeError("This session is being extended already: `wait` for that, or `stop` it.")
        self._done.clear()
        self._stop, self._failure = False, None

    def watch(self, video: Any, progress: bool | None = None):
        """Watches more like `extend`, but Ctrl-C is raised: for callers who want all of the film or nothing."""
        self._watch(VideoStream(video, self.frame_rate, self._fit), progress)

    def _watch(self, stream: VideoStream, progress: bool | None):
        self._begin()
        try:
            self._take_all(stream, progress)
        finally:
            self._extending.release()
            self._done.set()

    @property
    def is_watching(self) -> bool:
        """Whether frames are still arriving."""
        return not self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until a thread has watched all of its stream.

        Args:
            timeout: seconds to wait at most.

        Returns:
            Whether it has.

        Raises:
            VideoReadError: if it failed, as in `extend`.
        """
        if not self._done.wait(timeout):
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def stop(self):
        """Lets a thread that is watching end with the frame that comes next."""
        self._stop = True

    def _take_all(self, stream: VideoStream, progress: bool | None):
        try:
            with _bar([self], [stream], progress) as show:
                for seconds, picture in stream:
                    with self._lock:
                        for pixels in self._samples(seconds, picture, stream):
                            self._see(pixels)
                            if len(self._memory.window) >= self.frames_per_piece:
                                _feed([self])
                    show()
                    if self._stop:
                        break
                with self._lock:
                    self._catch_up()
                show()
        except VideoReadError as error:
            if stream.num_frames == 0:
                raise
            raise VideoStreamError(str(error), self) from error
        if self.num_frames == 0:
            raise VideoReadError(f"{stream.name} has not one frame: there is nothing to watch.")

    def _samples(self, seconds: float | None, picture: Picture, stream: VideoStream) -> Iterator[torch.Tensor]:
        """Frames that a picture's arrival settles, `(3, height, width)` each. The one who gets them sees them before
        the next: the clock goes by the number seen."""
        if seconds is None:
            yield from self._on_screen_until_now()
            self._clock = None
            yield picture.pixels
            return
        clock = self._clock or _Clock(seconds, self.num_frames, seconds, picture)
        if seconds < clock.latest:
            raise VideoReadError(
                f"Frame {stream.num_frames - 1} of {stream.name} is at {seconds:.10g} seconds, but the one before it "
                f"was at {clock.latest:.10g}: times must not go back."
            )
        while self._sample_time(clock) < seconds - _TOLERANCE:
            yield clock.on_screen.pixels
        self._clock = clock._replace(latest=seconds, on_screen=picture)

    def _on_screen_until_now(self) -> Iterator[torch.Tensor]:
        """Samples up to the last picture's own moment. How long it stays on screen, only the next one tells."""
        clock = self._clock
        while clock is not None and self._sample_time(clock) <= clock.latest + _TOLERANCE:
            yield clock.on_screen.pixels

    def _sample_time(self, clock: _Clock) -> float:
        """When the next sample is due, in the time of a stream."""
        return clock.origin + (self.num_frames - clock.first_sample) / self.frame_rate

    def _see(self, pixels: torch.Tensor):
        self._memory = self._memory._replace(window=(*self._memory.window, pixels))

    def _catch_up(self):
        """Puts into the state whatever has arrived."""
        for pixels in self._on_screen_until_now():
            self._see(pixels)
        if self._memory.window:
            _feed([self])

    # Asking

    def state(self) -> Cache:
        """A copy of the recurrent state after all that has arrived, of one sample, for loops of one's own: the model
        continues from it with `cache_params=`.

        Raises:
            ValueError: if nothing has been watched yet.
        """
        with self._lock:
            self._catch_up()
            if self.num_frames == 0:
                raise ValueError("Nothing watched yet: `extend` the session by a video before the first question.")
            return copy_cache(self._memory.cache)

    def ask(self, question: str | list[str], candidates: list[str] | None = None, **generate_kwargs):
        """Answers about what has been seen up to now; no question knows of another.

        Args:
            question: one question, or several.
            candidates: answers to choose from, ranked by their likelihood.
            generate_kwargs: for `generate`, `max_new_tokens` for example.

        Returns:
            What [`VideoQuestionAnsweringPipeline`] returns: `{"answer": str, "score": float}`, a list of these with
            candidates, best first, or if several answers are asked for; and a list with one such result a question
            for a list of questions.

        Raises:
            ValueError: if nothing has been watched yet, or question or candidates are empty.
        """
        questions = checked_questions(question, self.processor)
        candidates = checked_candidates(candidates)
        state = self.state()
        prompts = [_after_video(self.processor, [_user(text, with_video=True)], True) for text in questions]
        results = self._answerer.answer(state, prompts, candidates, **generate_kwargs)
        return results[0] if isinstance(question, str) else results

    def chat(self) -> "VideoChat":
        """A conversation about what has been seen up to now, in which earlier questions and answers are remembered."""
        return VideoChat(self.state(), self._answerer)

    # Saving

    def save(self, path: str | os.PathLike):
        """Saves the state after all that has arrived to one safetensors file, whose size does not depend on the film.

        The file is written at once or not at all. `resume` of session and pipeline reads it.

        Raises:
            ValueError: if nothing has been watched yet.
            FileNotFoundError: if there is no such directory.
        """
        with self._lock:
            cache, clock = self.state(), self._clock
            num_frames, num_tokens, seconds = self.num_frames, self.num_tokens, self.seconds
        side = self.model.config.vision_config.image_size
        picture = torch.zeros(3, side, side, dtype=torch.uint8)
        if clock is not None:
            picture = clock.on_screen.pixels
        metadata = {
            "frames": f"{num_frames:020d}",
            "tokens": f"{num_tokens:020d}",
            "seconds": _fixed_width(seconds),
            "frame_rate": _fixed_width(self.frame_rate),
            "clock": str(int(clock is not None)),
            "clock_origin": _fixed_width(clock.origin if clock else 0.0),
            "clock_first_sample": f"{clock.first_sample if clock else 0:020d}",
            "clock_latest": _fixed_width(clock.latest if clock else 0.0),
            **describe_model(self.model, _beginning(self.processor)),
        }
        save_state_file(path, {**cache_to_tensors(cache), "on_screen": picture}, metadata)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        model,
        processor,
        frames_per_piece: int | None = None,
        prepare_generate_kwargs: Callable[..., dict] | None = None,
    ) -> "VideoSession":
        """The session that `save` wrote, with the model and processor that it had.

        Raises:
            FileNotFoundError: if there is no such file.
            StateFileError: if it is no such file, is damaged, of another version, or another checkpoint's.
        """
        tensors, metadata = load_state_file(path)
        own = describe_model(model, _beginning(processor))
        try:
            if not is_same_model(metadata, own):
                raise StateFileError(
                    f"{os.fspath(path)} was made by {name_model(metadata)}, and cannot be resumed with "
                    f"{name_model(own)}: load the former."
                )
            session = cls.__new__(cls)
            frame_rate = float(metadata["frame_rate"])
            session._set_up(model, processor, frame_rate, frames_per_piece, prepare_generate_kwargs)
            session._memory = _Memory(cache_from_tensors(tensors, _layer_devices(model)), int(metadata["frames"]))
            if metadata["clock"] == "1":
                times = float(metadata["clock_origin"]), int(metadata["clock_first_sample"])
                session._clock = _Clock(*times, float(metadata["clock_latest"]), Picture(tensors["on_screen"]))
        except KeyError as error:
            raise StateFileError(f"{os.fspath(path)} is no film's state: it has no {error}.") from error
        return session


class VideoChat:
    """A conversation about a film, each question with those before it and their answers in mind (paper, Table 5).

    The film is what the session had seen when the conversation began. Made by [`VideoSession.chat`].

    Attributes:
        messages: the conversation so far, as chat templates take it.
    """

    def __init__(self, state: Cache, answerer: Answerer):
        self.messages: list[dict] = []
        self._state, self._answerer, self._processor = state, answerer, answerer.processor
        self._said = ""  # the text behind the video that the state holds
        self._lock = threading.Lock()

    def ask(self, question: str, candidates: list[str] | None = None, **generate_kwargs):
        """Answers the next question; arguments and result as in [`VideoSession.ask`].

        Of several answers or candidates the first, which is the best, counts as said.
        """
        [text] = checked_questions([question], self._processor)
        candidates = checked_candidates(candidates)
        with self._lock:
            messages = [*self.messages, _user(text, with_video=not self.messages)]
            prompt = _after_video(self._processor, messages, True).removeprefix(self._said)
            [result] = self._answerer.answer(self._state, [prompt], candidates, **generate_kwargs)
            answer = (result[0] if isinstance(result, list) else result)["answer"]
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            # Said again as the template has it: an answer may have been cut short, or written in other tokens.
            said = _after_video(self._processor, messages, False)
            state = copy_cache(self._state)
            self._hear(state, self._answerer.tokenize(said.removeprefix(self._said)))
            self.messages, self._said, self._state = messages, said, state
        return result

    @torch.no_grad()
    def _hear(self, state: Cache, tokens: list[int]):
        model = self._answerer.model
        input_ids = torch.tensor([tokens], device=model.device)
        model(input_ids=input_ids, cache_params=state, use_cache=True, logits_to_keep=1)


def watch_together(sessions: Sequence[VideoSession], videos: Iterable[Any], progress: bool | None = None):
    """Watches several films in lockstep, as one batch that a film leaves when it ends; each as if it were alone.

    Args:
        sessions: one for each film, with one model, in use nowhere else.
        videos: as for [`VideoSession.extend`].

    Raises:
        FileNotFoundError, ValueError: if a film cannot be read from the start, as in `extend`.

    Warns:
        UserWarning: if a film fails after its first frame, or Ctrl-C is pressed; the sessions have what was seen.
    """
    streams = [VideoStream(video, s.frame_rate, s._fit) for s, video in zip(sessions, videos, strict=True)]

    def samples(session, stream):
        try:
            for seconds, picture in stream:
                yield from session._samples(seconds, picture, stream)
        except VideoReadError as error:
            if session.num_frames == 0:
                raise
            warnings.warn(f"{error} What was seen before can be asked about.", UserWarning, stacklevel=2)
        yield from session._on_screen_until_now()

    watching = [(session, samples(session, stream)) for session, stream in zip(sessions, streams, strict=True)]
    try:
        with _bar(sessions, streams, progress) as show:
            while watching:
                piece = max(1, min(session.frames_per_piece for session in sessions) // len(watching))
                groups, still_watching = {}, []
                for session, frames in watching:
                    for pixels in islice(frames, piece):
                        session._see(pixels)
                    if length := len(session._memory.window):
                        groups.setdefault(length, []).append(session)
                    if length == piece:
                        still_watching.append((session, frames))
                for group in groups.values():
                    _feed(group)
                watching = still_watching
                show()
    except KeyboardInterrupt:
        if not any(session.num_frames for session in sessions):
            raise
        _warn_of_interruption(sessions)


@torch.no_grad()
def _feed(sessions: Sequence[VideoSession]):
    """Puts the frames that wait, as many in each session, through the model as one batch."""
    model, video_processor = sessions[0].model, sessions[0].processor.video_processor
    pixels = torch.stack([frame for session in sessions for frame in session._memory.window])
    if video_processor.do_rescale or video_processor.do_normalize:
        pixels = video_processor.rescale_and_normalize(
            pixels,
            video_processor.do_rescale,
            video_processor.rescale_factor,
            video_processor.do_normalize,
            video_processor.image_mean,
            video_processor.image_std,
        )
    features_FND = model.get_video_features(pixels).pooler_output
    inputs_embeds_BTD = features_FND.reshape(len(sessions), -1, features_FND.shape[-1])
    embeddings = model.get_input_embeddings().weight
    inputs_embeds_BTD = inputs_embeds_BTD.to(embeddings.dtype)
    if embeddings.device.type != "meta":  # then it is somewhere else, and so will these be
        inputs_embeds_BTD = inputs_embeds_BTD.to(embeddings.device)
    # On copies: a step that is interrupted leaves some layers further than others.
    cache = join_caches([session._memory.cache for session in sessions])
    model(inputs_embeds=inputs_embeds_BTD, cache_params=cache, use_cache=True, logits_to_keep=1)
    for row, session in enumerate(sessions):
        own_cache = cache if len(sessions) == 1 else copy_cache(cache, rows=[row])
        session._memory = _Memory(own_cache, session.num_frames)


@contextlib.contextmanager
def _bar(sessions: Sequence[VideoSession], streams: Sequence[VideoStream], progress: bool | None):
    """A progress bar in seconds of film; gives a function that brings it up to date."""
    lengths = [None if progress is False else stream.seconds for stream in streams]
    total = None if None in lengths else round(sum(lengths))
    started, beginning = time.monotonic(), sum(session.seconds for session in sessions)
    first_token = sum(session.num_tokens for session in sessions)
    bar = tqdm(
        desc=streams[0].name if len(streams) == 1 else f"{len(streams)} films",
        total=total or None,
        unit="s",
        delay=0 if progress else 2,
        disable=progress is False,
    )
    shown = 0

    def show():
        nonlocal shown
        seconds = int(sum(session.seconds for session in sessions) - beginning)
        if seconds > shown:
            tokens = sum(session.num_tokens for session in sessions) - first_token
            speed = tokens / max(time.monotonic() - started, 1e-6)
            bar.set_postfix_str(f"{tokens:,} tokens, {speed:,.0f} tokens/s", refresh=False)
            bar.update(seconds - shown)
            shown = seconds

    with bar:
        yield show


def _warn_of_interruption(sessions: Sequence[VideoSession]):
    seen = ", ".join(f"{session.seconds:g}" for session in sessions)
    warnings.warn(
        f"Interrupted: watched up to second {seen}; ask about that much, or extend it.", UserWarning, stacklevel=4
    )


# The prompt


def _user(text: str, with_video: bool) -> dict:
    content = [{"type": "video"}] if with_video else []
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _beginning(processor) -> list[int]:
    """Tokens of every prompt up to its video. The placeholder is a special token: cutting a text there does not change
    how either part is split into tokens."""
    text = processor.apply_chat_template([_user("?", with_video=True)], add_generation_prompt=True)
    before, placeholder, _ = text.partition(processor.video_token)
    input_ids = processor.tokenizer(before + placeholder)["input_ids"]
    return input_ids[: input_ids.index(processor.video_token_id)]


def _after_video(processor, messages: list[dict], add_generation_prompt: bool) -> str:
    """What of a conversation stands behind its video."""
    text = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    return text.partition(processor.video_token)[2]


# Files


def _layer_devices(model) -> list[torch.device]:
    """Where each layer of the language model computes."""
    devices = []
    for layer in model.model.language_model.layers:
        device = next(layer.parameters()).device
        if device.type == "meta":
            device = torch.device(layer._hf_hook.execution_device)
        devices.append(device)
    return devices


def _fixed_width(value: float) -> str:
    return f"{value:+.17e}"


__all__ = ["VideoChat", "VideoSession", "VideoStreamError", "watch_together"]
