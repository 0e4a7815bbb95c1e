"""Frames and films: which values count as a video file, a frame, the frames of one film, or a list of films."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Clip:
    """A part of a video file, cut out while the file is decoded.

    Args:
        source: a video file as for `iter_frames`.
        start: the seconds at which the clip starts, 0 by default.
        end: the seconds before which it ends; by default it goes on to the film's end.

    Raises:
        ValueError: if `start` or `end` is not a finite number of at least 0, or `end` is not above `start`.
    """

    source: object
    start: float | None = None
    end: float | None = None

    def __post_init__(self):
        for name, seconds in (("start", self.start), ("end", self.end)):
            is_number = isinstance(seconds, Real) and not isinstance(seconds, bool)
            if seconds is not None and not (is_number and 0 <= seconds < math.inf):
                raise ValueError(f"The {name} of a clip must be a number of seconds from 0 on, got {seconds!r}.")
        if self.end is not None and not self.end > (self.start or 0):
            raise ValueError(f"A clip must end after its start, got {self.start or 0} to {self.end} seconds.")

    @property
    def is_whole(self) -> bool:
        """Whether the clip is the whole film."""
        return not self.start and self.end is None


@dataclass(frozen=True)
class FrameFolder(os.PathLike):
    """A film as a folder of images, one for each frame, in the order of their names.

    Args:
        path: the folder.
        fps: frames per second.
    """

    path: str
    fps: float

    def __fspath__(self) -> str:
        return self.path


@dataclass(frozen=True, eq=False)
class FittedFrames:
    """Frames that a video processor has resized and cropped already, and does not resize or crop again.

    Args:
        pixels: `(num_frames, 3, height, width)` uint8.
    """

    pixels: torch.Tensor


@dataclass(frozen=True, eq=False)
class EncodedFrames:
    """The frames of a film as a frozen vision tower has encoded them, each different picture once.

    Args:
        features: `(num_pictures, tokens_per_frame, vision_width)`, as from `get_vision_features` of the model.
        picture_indices: `(num_frames,)` int64, the picture that each frame shows.
    """

    features: torch.Tensor
    picture_indices: torch.Tensor


class Picture:
    """A frame that is resized when its pixels are first needed, and only once.

    Args:
        frame: `(3, height, width)` uint8.
        fit: resizes the frame; without it the frame has its final size.
    """

    def __init__(self, frame: torch.Tensor, fit: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self._frame, self._fit = frame, fit

    @cached_property
    def pixels(self) -> torch.Tensor:
        """The pixels for the vision encoder, `(3, height, width)` uint8."""
        return self._frame if self._fit is None else self._fit(self._frame)


def is_video_file(video) -> bool:
    """Whether a value is a path, a URL, the bytes of a file, or an open file."""
    return isinstance(video, (str, os.PathLike, bytes)) or hasattr(video, "read")


def is_array(value) -> bool:
    """Whether a value is a tensor, or an array of any library."""
    return hasattr(value, "__array__") and not isinstance(value, Image.Image)


def is_frame(item) -> bool:
    """Whether a value is one image: a PIL image, or an array of at most three axes."""
    return isinstance(item, Image.Image) or (is_array(item) and np.ndim(item) <= 3)


def is_timed_frame(item) -> bool:
    """Whether a value is a pair of seconds and a frame."""
    return isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], Real)


def is_list_of_films(videos) -> bool:
    """Whether a value is a list of films, and not a list of the frames of one film."""
    if not isinstance(videos, (list, tuple)) or not videos:
        return False
    return not (is_frame(videos[0]) or is_timed_frame(videos[0]))


def as_list_of_videos(videos) -> list:
    """Flattens one video, a list of videos, or a list of such lists (one for each sample, perhaps empty).

    Raises:
        ValueError: if there is no video.
    """
    flat = _flatten(videos)
    if not flat:
        raise ValueError("The list of videos is empty.")
    return flat


def _flatten(videos) -> list:
    if not isinstance(videos, (list, tuple)):
        return list(videos) if is_array(videos) and np.ndim(videos) == 5 else [videos]
    if is_list_of_films(videos):
        return [film for nested in videos for film in _flatten(nested)]
    return [videos] if videos else []


def frames_to_tensor(video) -> torch.Tensor:
    """Convert an array, a tensor, an image or a list of images to uint8 `(num_frames, 3, height, width)`.

    Floating-point frames must lie between 0 and 1.

    Raises:
        ValueError: for another rank, dtype or number of channels, NaN, values out of range, or no frame at all.
    """
    frames = _as_tensor(video)
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]):
        raise ValueError(
            "Frames must have shape (num_frames, height, width, 3) or (num_frames, 3, height, width); "
            f"got {tuple(frames.shape)}."
        )
    if frames.shape[0] == 0:
        raise ValueError("A video must have at least one frame; got none.")
    if frames.shape[3] == 3:
        frames = frames.permute(0, 3, 1, 2)
    return _as_uint8(frames)


def _as_tensor(video) -> torch.Tensor:
    if isinstance(video, Image.Image):
        video = [video]
    if isinstance(video, Sequence) and not isinstance(video, (str, bytes)):
        video = _stack(video)
    if isinstance(video, torch.Tensor):
        return video
    if not is_array(video):
        raise ValueError(
            f"A video must be a path, an array or tensor of frames, or a list of images; got {type(video).__name__}."
        )
    video = np.asarray(video)
    if video.dtype.kind not in "buif":
        raise ValueError(f"Frames must be uint8, or floating point from 0 to 1; got {video.dtype}.")
    return torch.from_numpy(np.ascontiguousarray(video))  # PyTorch rejects negative strides, as of BGR turned to RGB


def _stack(images: Sequence) -> np.ndarray:
    if any(map(is_timed_frame, images)):
        raise ValueError(
            "A video processor takes frames without times; only a session takes pairs of seconds and frame."
        )
    frames = [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
    shapes = sorted({frame.shape for frame in frames})
    if len(shapes) > 1:
        raise ValueError(f"The frames of one video must have one size; got {shapes}.")
    return np.stack(frames) if frames else np.empty((0, 1, 1, 3), np.uint8)


def _as_uint8(frames: torch.Tensor) -> torch.Tensor:
    if frames.dtype == torch.uint8:
        return frames
    if not frames.is_floating_point():
        raise ValueError(f"Frames must be uint8, or floating point from 0 to 1; got {frames.dtype}.")
    not_finite = (~torch.isfinite(frames)).flatten(1).any(1).nonzero()
    if len(not_finite):
        raise ValueError(f"Frame {int(not_finite[0])} has NaN or infinite pixels; give finite values from 0 to 1.")
    low, high = float(frames.min()), float(frames.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"Floating-point frames must lie between 0 and 1, got {low:.3g} to {high:.3g}; "
            "give values from 0 to 255 as uint8."
        )
    return (frames * 255).round().to(torch.uint8)
