"""Frames one at a time from any source that shows a film: a file, a URL, a device, an array, or an iterable."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from .frames import Picture, frames_to_tensor, is_array, is_timed_frame, is_video_file
from .reader import VideoReadError, iter_frames, probe


class VideoStream:
    """Goes through a film once, and holds only the current frame of it.

    Args:
        source: a path, URL, file object or bytes, sampled at `frame_rate`; an array or tensor of frames
            `(num_frames, height, width, 3)` or `(num_frames, 3, height, width)`; or any iterable of frames or of pairs
            of seconds and a frame. A frame is an array or tensor `(height, width, 3)` or `(3, height, width)`, or a
            PIL image.
        frame_rate: frames per second of film at which a file is read.
        fit: resizes `(3, height, width)` uint8 frames.
        open_options: `format`, `options` and `timeout` of `iter_frames`, for sources that FFmpeg opens.

    Attributes:
        name: the film's name in messages.
        num_frames: the number of frames that have arrived, sampled or not.

    Raises:
        ValueError: if the source is none of these, or an array has a wrong shape, dtype or value.
    """

    def __init__(self, source: Any, frame_rate: float, fit: Callable[[torch.Tensor], torch.Tensor], **open_options):
        self.frame_rate, self.num_frames = frame_rate, 0
        self._source, self._fit, self._open_options = source, fit, open_options
        path = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
        self.name = f"the {type(source).__name__}"
        if isinstance(path, (str, os.PathLike)):
            self.name = os.path.basename(os.fspath(path))
        if is_video_file(source):
            return
        if open_options:
            raise ValueError(f"FFmpeg does not open {self.name}: leave out its options {', '.join(open_options)}.")
        if isinstance(source, Image.Image):
            self._source = [source]
        elif is_array(source) or not isinstance(source, Iterable) or isinstance(source, Mapping):
            self._source = frames_to_tensor(source)
            self.name = "the array"

    @property
    def seconds(self) -> float | None:
        """The length of the film as its file states it, or None."""
        if isinstance(self._source, torch.Tensor):
            return len(self._source) / self.frame_rate
        is_path = isinstance(self._source, (str, os.PathLike))
        if is_path and os.path.isfile(self._source) and not self._open_options:
            return probe(self._source).duration
        return None

    def __iter__(self) -> Iterator[tuple[float | None, Picture]]:
        """Yield (seconds, picture); seconds is None if each picture is one sample at the frame rate.

        Raises:
            FileNotFoundError: if the file does not exist.
            VideoReadError: if the source fails, or a frame or its time cannot be used; the message names the frame.
        """
        if is_video_file(self._source):
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
        """Yield the source's items, and raise its errors as a file's."""
        try:
            yield from self._source
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(".")
            raise VideoReadError(f"{self.name} broke off after {self.num_frames} frames ({reason}).") from error

    def _checked(self, frame, index: int) -> torch.Tensor:
        """A copy of a frame as uint8 `(3, height, width)`: cameras write the next frame into the same memory."""
        if isinstance(frame, Image.Image):
            frame = np.array(frame.convert("RGB"))  # a writable copy, as PyTorch demands
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
