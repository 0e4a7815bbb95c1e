"""Watch once, ask many: a film goes through the model once, as a stream, and leaves a state of fixed size.

Decoding, resizing, vision tower, projector and language model work on a few frames at a time. Questions continue
copies of the state, so that each costs only its own tokens.
"""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache

from ..mamba2 import cache_layers_of, copy_cache, empty_cache
from ..video import VideoReadError, VideoStream, checked_frame_rate
from .answering import Answerer, VideoChat, beginning_tokens
from .state_file import load_film, save_film
from .watched_film import Memory, WatchedFilm, watch_in_lockstep


class VideoStreamError(VideoReadError):
    """A stream that failed after some of its frames had arrived; `session` keeps those, and can be asked and saved."""

    def __init__(self, message: str, session: "VideoSession"):
        super().__init__(message)
        self.session = session


class VideoSession:
    """A film that is being watched or has been: extend it, ask about it, save it.

    ```python
    watched = VideoSession(model, processor).extend("film.mp4")
    watched.ask("Who opens the door?")  # {"answer": "...", "score": 0.93}
    ```

    Frames wait in a window until `frames_per_piece` of them go through the model; asking and saving do not wait for
    more. Any number of threads may ask while another extends.

    Args:
        model ([`Ma2mbaForVideoQA`]): the model, on any devices, or a `PeftModel` around it.
        processor ([`Ma2mbaProcessor`]): its processor.
        fps (`float`, *optional*): frames per second of film to sample; `model.config.frame_rate` by default.
        frames_per_piece (`int`, *optional*): the number of frames that go through the model at a time, which bounds
            memory and changes no answer; `model.config.frames_per_vision_pass` by default.
        prepare_generate_kwargs: see [`Answerer`].

    Attributes:
        frame_rate: frames per second of film.

    Raises:
        ValueError: if `fps` or `frames_per_piece` is not above 0, the processor belongs to another model, or PEFT adds
            a prompt to the model's inputs.
    """

    def __init__(
        self,
        model,
        processor,
        fps: float | None = None,
        frames_per_piece: int | None = None,
        prepare_generate_kwargs: Callable[..., dict] | None = None,
    ):
        model = _without_peft_wrapper(model)
        self.frame_rate = checked_frame_rate(model.config.frame_rate if fps is None else fps, "fps")
        if frames_per_piece is None:
            frames_per_piece = model.config.frames_per_vision_pass
        if not isinstance(frames_per_piece, int) or frames_per_piece < 1:
            raise ValueError(f"frames_per_piece must be a whole number above 0; got {frames_per_piece!r}.")
        processor.check_model_config(model.config)
        self.model, self.processor, self.frames_per_piece = model, processor, frames_per_piece
        self._answerer = Answerer(model, processor, prepare_generate_kwargs)
        self._fit = processor.video_processor.frame_fitter()
        self._done = threading.Event()  # unset while a stream is watched
        self._done.set()
        self._stop = False
        self._failure: Exception | None = None  # of the last thread
        self._beginning = beginning_tokens(processor)
        cache = empty_cache(model.config.text_config.num_hidden_layers)
        cache_layers_of(cache, model.model.language_model.layers)  # raises if layers share a place in the cache
        if self._beginning:
            input_ids = torch.tensor([self._beginning], device=model.device)
            with torch.no_grad():
                model(input_ids=input_ids, cache_params=cache, use_cache=True, logits_to_keep=1)
        normalize = processor.video_processor.frame_normalizer()
        self._film = WatchedFilm(model, normalize, self.frame_rate, Memory(cache))

    @property
    def num_frames(self) -> int:
        """The number of frames sampled so far."""
        return self._film.num_frames

    @property
    def num_tokens(self) -> int:
        """The number of tokens of these frames and of the prompt's beginning."""
        return len(self._beginning) + self.num_frames * self.model.config.tokens_per_frame

    @property
    def seconds(self) -> float:
        """The length of the film seen so far."""
        return self._film.seconds

    def __repr__(self):
        return f"{type(self).__name__}({self.seconds:g} seconds, {self.num_frames} frames, {self.num_tokens} tokens)"

    # Watching

    def extend(self, video: Any, progress: bool | None = None, background: bool = False, **open_options):
        """Watches a film, or more of it.

        Files, URLs and devices are sampled at `frame_rate` from their beginning. A frame without a time is one sample.
        Of pairs of seconds and a frame, each frame stays on screen until the time of the next, and the session takes a
        sample every `1 / frame_rate` seconds. Such times continue from one call to the next, unless frames without
        times come between.

        Args:
            video: a path or URL, an open binary file or bytes; an array or tensor `(num_frames, height, width, 3)` or
                `(num_frames, 3, height, width)`; or any iterable of frames `(height, width, 3)` uint8, PIL images, or
                pairs of seconds and one of these.
            progress: whether to show a bar. By default one appears if watching takes a while, and none in background.
            background: whether to return at once and watch in a thread. `wait` waits for its end.
            open_options: options with which FFmpeg opens the video, as for [`iter_frames`]: `format="v4l2"`,
                `options`, and `timeout`, the seconds after which a source that sends nothing counts as ended.

        Returns:
            The session itself. After Ctrl-C it warns up to which second the film was seen.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the video is none of the above.
            VideoReadError: if it cannot be read, or a frame or its time cannot be used. [`VideoStreamError`] if frames
                of it have arrived before: the session keeps them, and can be asked and extended.
            RuntimeError: if the session is being extended already.
        """
        stream = self._open(video, **open_options)
        if background:
            arguments = stream, bool(progress), True
            threading.Thread(target=self._watch, args=arguments, name=f"watching {stream.name}", daemon=True).start()
            return self
        with _ctrl_c_ends([self]):
            self._watch(stream, progress)
        return self

    def watch(self, video: Any, progress: bool | None = None):
        """Watches more like `extend`, but passes Ctrl-C on, for callers who need the whole film."""
        self._watch(self._open(video), progress)

    def _open(self, video: Any, **open_options) -> VideoStream:
        """Open a stream, after which the session counts as watching until `_watch` has ended."""
        stream = VideoStream(video, self.frame_rate, self._fit, **open_options)
        with self._film.lock:
            if self.is_watching:
                raise RuntimeError("This session is being extended already: `wait` for that, or `stop` it.")
            self._stop, self._failure = False, None  # a call of `stop` may have come too late for the last stream
            self._done.clear()
        return stream

    def _watch(self, stream: VideoStream, progress: bool | None, in_thread: bool = False):
        try:
            watch_in_lockstep([self._film], [stream], [self._take_all(stream)], self.frames_per_piece, progress)
        except Exception as error:
            if not in_thread:
                raise
            self._failure = error
        finally:
            self._stop = False
            self._done.set()

    @property
    def is_watching(self) -> bool:
        """Whether a stream is being watched."""
        return not self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a thread has watched all of its stream.

        Args:
            timeout: the most seconds to wait.

        Returns:
            Whether the stream has ended.

        Raises:
            VideoReadError: if the stream failed, see `extend`.
        """
        if not self._done.wait(timeout):
            return False
        if self._failure is not None:
            raise self._failure
        return True

    def stop(self):
        """Stop watching in a thread after the next frame of its stream."""
        self._stop = self.is_watching

    def _take_all(self, stream: VideoStream) -> Iterator[None]:
        """Take the samples of a stream, and yield after each so that the caller may feed the model."""
        try:
            for seconds, picture in stream:
                clock = self._film.memory.clock
                if seconds is not None and clock is not None and seconds < clock.latest:
                    raise VideoReadError(
                        f"Frame {stream.num_frames - 1} of {stream.name} is at {seconds:.10g} seconds, but the one "
                        f"before it was at {clock.latest:.10g}: times must not go back."
                    )
                yield from self._film.take(seconds, picture)
                if self._stop:
                    break
            yield from self._film.take_due()
            if self.num_frames == 0:
                raise VideoReadError(f"{stream.name} has no frame: there is nothing to watch.")
        except VideoReadError as error:
            if stream.num_frames == 0:
                raise
            raise VideoStreamError(str(error), self) from error

    # Asking

    def state(self) -> Cache:
        """Return a copy of the recurrent state after all frames so far, of one sample, for loops of your own.

        The model continues from it with `cache_params=`.

        Raises:
            ValueError: if nothing has been watched yet.
        """
        return copy_cache(self._caught_up().cache)

    def _caught_up(self) -> Memory:
        memory = self._film.catch_up()
        if memory.num_frames == 0:
            raise ValueError("Nothing watched yet: `extend` the session by a video before the first question.")
        return memory

    def ask(self, question: str | list[str], candidates: list[str] | None = None, **generate_kwargs):
        """Answers questions about the film so far, each independently of the others.

        Args:
            question: one question, or several.
            candidates: answers to rank by their likelihood.
            generate_kwargs: options for `generate`, such as `max_new_tokens`.

        Returns:
            `{"answer": str, "score": float}` as from [`VideoQuestionAnsweringPipeline`]; a list of these, best first,
            with candidates or `num_return_sequences`. For a list of questions, a list with one such result each.

        Raises:
            ValueError: if nothing has been watched yet, or the question or the candidates are empty.
        """
        return self._answerer.ask(self.state, question, candidates, **generate_kwargs)

    def chat(self) -> VideoChat:
        """Begins a conversation about the film so far, which remembers its earlier questions and answers."""
        return VideoChat(self.state(), self._answerer)

    # Saving

    def save(self, path: str | os.PathLike):
        """Save the state after all frames so far to one safetensors file, of the same size for every film.

        The file is written completely or not at all. `resume` of session and pipeline loads it.

        Raises:
            ValueError: if nothing has been watched yet.
            FileNotFoundError: if the directory does not exist.
        """
        save_film(path, self.model, self._beginning, self.frame_rate, self._caught_up())

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        model,
        processor,
        frames_per_piece: int | None = None,
        prepare_generate_kwargs: Callable[..., dict] | None = None,
    ) -> "VideoSession":
        """Load the session that `save` wrote; model and processor must be the same as then.

        Raises:
            FileNotFoundError: if the file does not exist.
            StateFileError: if it has another format or version, is damaged, or belongs to another checkpoint.
        """
        model = _without_peft_wrapper(model)
        frame_rate, memory = load_film(path, model, beginning_tokens(processor))
        session = cls(model, processor, frame_rate, frames_per_piece, prepare_generate_kwargs)
        session._film.memory = memory
        return session


def _without_peft_wrapper(model):
    """The model inside a `PeftModel`; its layers hold the adapters."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} adds a prompt to each input, which would stand between the "
            "pieces of a film: use adapters in the layers, such as LoRA."
        )
    return model.get_base_model()


def watch_together(sessions: Sequence[VideoSession], videos: Iterable[Any], progress: bool | None = None):
    """Watches several films in lockstep, as one batch that a film leaves when it ends.

    Args:
        sessions: one for each film, with one model; nothing else may use them meanwhile.
        videos: films as for [`VideoSession.extend`], whose errors are raised if a film fails before its first frame.

    Warns:
        UserWarning: if a film fails later, or Ctrl-C is pressed; the sessions keep the frames seen so far.
    """
    streams = [VideoStream(video, s.frame_rate, s._fit) for s, video in zip(sessions, videos, strict=True)]
    samples = [_until_failure(s._take_all(stream)) for s, stream in zip(sessions, streams, strict=True)]
    piece = min(session.frames_per_piece for session in sessions)
    with _ctrl_c_ends(sessions):
        watch_in_lockstep([session._film for session in sessions], streams, samples, piece, progress)


def _until_failure(samples: Iterator[None]) -> Iterator[None]:
    try:
        yield from samples
    except VideoStreamError as error:
        warnings.warn(f"{error} Frames seen before the failure can be asked about.", UserWarning, stacklevel=2)
        yield from error.session._film.take_due()


@contextlib.contextmanager
def _ctrl_c_ends(sessions: Sequence[VideoSession]):
    """Turn Ctrl-C into a warning if any frame has been seen."""
    try:
        yield
    except KeyboardInterrupt:
        if not any(session.num_frames for session in sessions):
            raise
        seen = ", ".join(f"{session.seconds:g}" for session in sessions)
        message = f"Interrupted: watched up to second {seen}; ask about that much, or extend it."
        warnings.warn(message, UserWarning, stacklevel=5)
