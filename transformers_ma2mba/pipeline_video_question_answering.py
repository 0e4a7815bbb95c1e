"""`pipeline("video-question-answering")`: watches a video once, and each question continues from its state."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset
from transformers import GenerationConfig, Pipeline

from .session import VideoSession, checked_candidates, checked_questions, watch_together
from .video import is_array, is_list_of_films, is_video_file

_VIDEO_OPTIONS = ("fps", "progress")


class VideoQuestionAnsweringPipeline(Pipeline):
    """A pipeline that answers questions about a video.

    ```python
    qa = pipeline("video-question-answering", model="path/video-ma2mba")
    qa(video="film.mp4", question="Who opens the door?")  # {"answer": "...", "score": 0.93}
    qa(video="film.mp4", question=["Who opens the door?", "What colour is it?"])  # a list of these
    qa(video="film.mp4", question="What colour is the door?", candidates=["red", "blue"])  # ranked by likelihood
    watched = qa.watch("film.mp4")  # once, for any number of questions
    watched.ask("Who opens the door?")
    ```

    Without a model, the task loads a tiny one that ships with the package and only knows its own toy films.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=128)

    def __call__(self, video: Any = None, question: str | list[str] | None = None, **kwargs):
        """Answers one question or several about a video, or each row of several inputs.

        Args:
            video: a path or URL; frames as an array or tensor `(num_frames, height, width, 3)` or
                `(num_frames, 3, height, width)`; or a list of PIL images. In its place, a mapping with `"video"` and
                `"question"`, or a list, generator or data set of such mappings.
            question (`str` or `list[str]`): one question, or several about the same video, which is watched once.
            candidates (`list[str]`, *optional*): answers to rank by their likelihood.
            fps (`float`, *optional*): frames per second of film to sample; `model.config.frame_rate` by default.
            progress (`bool`, *optional*): whether to show a bar; by default one appears if watching takes a while.
            kwargs: options for `generate`, such as `max_new_tokens`.

        Returns:
            `{"answer": str, "score": float}` for a question and a list of these for a list of questions. The score of
            a generated answer is the geometric mean of its tokens' probabilities, its end of text included. With
            `candidates`, each question gets a list with one such entry for each candidate, best first. Their scores
            are the likelihoods of the candidates, end of text included, divided by the sum of all.

        Raises:
            ValueError: if the video or the question is missing or empty, or the video cannot be read.
            FileNotFoundError: if the path does not exist.
        """
        if isinstance(video, Mapping):
            inputs = dict(video)
        elif question is None and (rows := _as_rows(video)) is not None:
            inputs = rows
        else:
            inputs = {"video": video, "question": question}
        return super().__call__(inputs, **kwargs)

    def watch(
        self,
        video: Any,
        fps: float | None = None,
        progress: bool | None = None,
        background: bool = False,
        frames_per_piece: int | None = None,
        **open_options,
    ) -> VideoSession | list[VideoSession]:
        """Watches a film once, at constant memory, for any number of questions.

        Args:
            video: a film as for [`VideoSession.extend`]: a path, URL or device, frames, or any iterable of frames
                with or without times. A list of films is watched as one batch, in lockstep.
            fps: frames per second of film to sample; `model.config.frame_rate` by default.
            progress, background, open_options: see [`VideoSession.extend`].
            frames_per_piece: see [`VideoSession`].

        Returns:
            The session, or a list of sessions for a list of films. After Ctrl-C, a warning says up to which second
            the films were seen.

        Raises:
            FileNotFoundError, ValueError: see [`VideoSession.extend`].
            VideoStreamError: if a film fails after some of its frames have arrived; its `session` keeps those. If
                several films are watched, the one that fails ends early with a warning.
        """
        if not is_list_of_films(video):
            session = self._new_session(fps, frames_per_piece)
            return session.extend(video, progress=progress, background=background, **open_options)
        if background or open_options:
            option = "background" if background else ", ".join(open_options)
            raise ValueError(f"{option} is for one film, but a list of {len(video)} was given: watch them one by one.")
        sessions = [self._new_session(fps, frames_per_piece) for _ in video]
        watch_together(sessions, video, progress)
        return sessions

    def resume(self, path: str | os.PathLike) -> VideoSession:
        """Load the session that [`VideoSession.save`] wrote, which gives the same answers.

        Raises:
            FileNotFoundError, StateFileError: see [`VideoSession.resume`].
        """
        return VideoSession.resume(
            path, self.model, self.processor, prepare_generate_kwargs=self._prepare_generate_kwargs
        )

    def _new_session(self, fps: float | None, frames_per_piece: int | None = None) -> VideoSession:
        return VideoSession(self.model, self.processor, fps, frames_per_piece, self._prepare_generate_kwargs)

    def _sanitize_parameters(self, candidates=None, **kwargs):
        video_options = {name: kwargs.pop(name) for name in _VIDEO_OPTIONS if name in kwargs}
        forward = {**video_options, "generate_kwargs": kwargs} if kwargs else video_options
        if candidates is not None:
            forward["candidates"] = checked_candidates(candidates, self.processor)
        return {}, forward, {}

    def preprocess(self, inputs):
        """Check a mapping with `video` and `question`; `_forward` watches the video and asks."""
        if not isinstance(inputs, Mapping):
            raise ValueError(f"Each input must be a mapping with `video` and `question`; got {type(inputs).__name__}.")
        video, question = inputs.get("video"), inputs.get("question")
        if video is None or (isinstance(video, (list, tuple, str)) and len(video) == 0):
            raise ValueError("There is a question but no video: pass video=, a path or frames.")
        checked_questions(question, self.processor)
        if is_list_of_films(video):
            if len(video) != 1:
                raise ValueError(
                    f"A question is about one video, but {len(video)} videos were given: ask about one at a time, or "
                    "`watch` them together."
                )
            video = video[0]
        return {"video": _AsItIs(video), "question": question}

    def _forward(self, model_inputs, fps=None, progress=None, candidates=None, generate_kwargs=None):
        session = self._new_session(fps)
        session.watch(model_inputs["video"].value, progress)
        return {"results": session.ask(model_inputs["question"], candidates, **(generate_kwargs or {}))}

    def postprocess(self, model_outputs):
        """Return the answers."""
        return model_outputs["results"]

    def get_iterator(self, inputs, num_workers, batch_size, *params):
        """Goes through several inputs one by one.

        Raises:
            ValueError: if `batch_size` is not 1.
        """
        if batch_size != 1:
            raise ValueError("batch_size must be 1: videos differ in length. Ask several questions about one instead.")
        return super().get_iterator(inputs, num_workers, batch_size, *params)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save model and processor for `pipeline(task, model=save_directory)`."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


class _AsItIs:
    """A wrapper that keeps the pipeline from moving a whole film to the model's device."""

    def __init__(self, value):
        self.value = value


def _as_rows(inputs) -> list | Dataset | Iterator | None:
    """Convert several mappings for `Pipeline`, which goes through them one by one; None if `inputs` is one video."""
    if isinstance(inputs, (list, tuple)):
        return list(inputs) if inputs and isinstance(inputs[0], Mapping) else None
    if isinstance(inputs, Dataset):
        return inputs
    is_video = is_video_file(inputs) or is_array(inputs)
    return (row for row in inputs) if isinstance(inputs, Iterable) and not is_video else None


__all__ = ["VideoQuestionAnsweringPipeline"]
