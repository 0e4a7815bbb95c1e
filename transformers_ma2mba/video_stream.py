"""Frames one at a time out of whatever shows a film: a file, a URL, a device, an array, or any iterable of frames."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image

from .video_processing_ma2mba import frames_to_tensor
from .video_reader import VideoReadError, iter_frames, probe

Fit = Callable[[torch.Tensor], torch.Tensor]


class Picture:
    """A frame as it came, which is resized if it is looked at and then once."""

    def __init__(self, frame: torch.Tensor, fit: Fit | None = None):
        self._frame, self._fit = frame, fit

    @cached_property
    def pixels(self) -> torch.Tensor:
        """`(3, height, width)` uint8, as the vision encoder takes it."""
        return self._frame if self._fit is None else self._fit(self._frame)


class VideoStream:
    """Goes through a film once, and holds no more of it than the frame at hand.

    Args:
        source: a path, URL, file object or bytes, which is read at `frame_rate`; an array or tensor of frames
            `(num_frames, height, width, 3)` or `(num_frames, 3, height, width)`; or any iterable of frames, arrays and
            tensors `(height, width, 3)` or `(3, height, width)` or PIL images, or of pairs of seconds and a frame.
        frame_rate: frames per second of film at which a file is read.
        fit: resizes `(3, height, width)` uint8 frames.
        open_options: `format`, `options` and `timeout` of `iter_frames`, for sources that FFmpeg opens.

    Attributes:
        name: what messages call the film.
        num_frames: how many frames have come, those that no sample fell on included.

    Raises:
        ValueError: if the source is none of these, or an array has a wrong shape, dtype or value.
    """

    def __init__(self, source: Any, frame_rate: float, fit: Fit, **open_options):
        self.frame_rate, self.num_frames = frame_rate, 0
        self._source, self._fit, self._open_options = source, fit, open_options
        self._is_file = isinstance(source, (str, os.PathLike, bytes)) or hasattr(source, "read")
        self._is_path = isinstance(source, (str, os.PathLike))
        path = source if self._is_path else getattr(source, "name", None)
        is_named = self._is_path or isinstance(path, str)
        self.name = os.path.basename(os.fspath(path)) if is_named else f"the {type(source).__name__}"
        if open_options and not self._is_file:
            raise ValueError(
                f"{', '.join(open_options)}: options for FFmpeg, but {self.name} needs none to be opened."
            )
        if isinstance(source, Image.Image):
            self._source = [source]
        elif not self._is_file:
            is_array = isinstance(source, torch.Tensor) or hasattr(source, "__array__")
            if is_array and not isinstance(source, (np.ndarray, torch.Tensor)):
                self._source = source = np.asarray(source)
            if is_array or not isinstance(source, Iterable) or isinstance(source, Mapping):
                self._source = frames_to_tensor(source)
                self.name = "the array"

    @property
    def seconds(self) -> float | None:
        """How long the film is by the account of its file, or None."""
        if isinstance(self._source, torch.Tensor):
            return len(self._source) / self.frame_rate
        if self._is_path and os.path.isfile(self._source) and not self._open_options:
            return probe(self._source).duration
        return None

    def __iter__(self) -> Iterator[tuple[float | None, Picture]]:
        """Yields (seconds, picture); seconds are None if each picture is one sample at the frame rate.

        Raises:
            FileNotFoundError: if there is no such file.
            VideoReadError: if the source fails, or a frame or its time cannot be used; the message says which.
        """
        if self._is_file:
            frames = self._read_file()
        elif isinstance(self._source, torch.Tensor):
            frames = ((None, Picture(frame, self._fit)) for frame in self._source)
        else:
            frames = self._read_items()
        for item in frames:
            self.num_frames += 1
            yield item

    def _read_file(self):
        def fit(frame):
            return self._fit(torch.from_numpy(frame).permute(2, 0, 1))

        for _, pixels in iter_frames(self._source, self.frame_rate, fit, **self._open_options):
            yield None, Picture(pixels)

    def _read_items(self):
        size = is_timed = None
        for index, item in enumerate(self._items()):
            has_time = is_timed_frame(item)
            is_timed = has_time if is_timed is None else is_timed
            if has_time != is_timed:
                which = "a time, but those before it had none" if has_time else "no time, but those before it had one"
                raise VideoReadError(f"Frame {index} of {self.name} has {which}: give one to all frames or to none.")
            seconds, frame = item if has_time else (None, item)
            if seconds is not None and not np.isfinite(seconds):
                raise VideoReadError(f"Frame {index} of {self.name} is at {seconds} seconds: give a finite time.")
            frame = self._checked(frame, index)
            size = size or tuple(frame.shape[1:])
            if tuple(frame.shape[1:]) != size:
                raise VideoReadError(
                    f"Frame {index} of {self.name} is {frame.shape[2]} x {frame.shape[1]} px, but those before it "
                    f"were {size[1]} x {size[0]} px: the frames of one video must have one size."
                )
            yield (None if seconds is None else float(seconds)), Picture(frame, self._fit)

    def _items(self):
        """The source's items. What it raises is put into words, as that of a file would be."""
        try:
            yield from self._source
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(".")
            raise VideoReadError(f"{self.name} broke off after {self.num_frames} frames ({reason}).") from error

    def _checked(self, frame, index: int) -> torch.Tensor:
        """A frame of its own: cameras write the next one into the same memory."""
        if isinstance(frame, Image.Image):
            frame = frame.convert("RGB")
        if not isinstance(frame, torch.Tensor):
            frame = np.asarray(frame)
        if frame.ndim != 3:
            shape = f"shape {tuple(frame.shape)}" if frame.ndim else f"type {type(frame.item()).__name__}"
            raise VideoReadError(
                f"Frame {index} of {self.name} has {shape}: it must be an image, (height, width, 3) or "
                "(3, height, width)."
            )
        try:
            return frames_to_tensor(frame[None])[0].clone()
        except ValueError as error:
            raise VideoReadError(f"{error}".replace("Frame 0 ", f"Frame {index} ")) from error


def is_timed_frame(item) -> bool:
    """Whether this is a pair of seconds and a frame."""
    return isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Real)


def is_list_of_films(video) -> bool:
    """Whether this is a list of films rather than a list of the frames of one."""
    if not isinstance(video, (list, tuple)) or not video:
        return False
    first = video[0]
    is_array = isinstance(first, (np.ndarray, torch.Tensor))
    return not (isinstance(first, Image.Image) or is_timed_frame(first) or (is_array and first.ndim <= 3))


__all__ = ["Picture", "VideoStream", "is_list_of_films"]
