"""Videos of any kind to the uint8 frames that the vision encoder takes."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .video_reader import read_video


class Ma2mbaVideosKwargs(VideosKwargs, total=False):
    """
    progress (`bool`, *optional*):
        Whether to show a progress bar while a file is read. Unless given, one appears when reading takes a while.
    """

    progress: bool | None


class Ma2mbaVideoProcessor(BaseVideoProcessor):
    r"""Reads videos at a fixed rate, every second of them, and resizes each frame as it is decoded.

    A video is a path or URL, an array or tensor of frames `(num_frames, height, width, 3)` or
    `(num_frames, 3, height, width)`, or a list of PIL images. Files are read at `fps` frames per second of film;
    frames that are given as such are taken as they are, all of them. Pixels stay uint8: the model normalises them on
    its device. Ask for `do_rescale=True, do_normalize=True` to get floats for another vision encoder.

    Returns a `BatchFeature` with

    - `pixel_values_videos`: uint8 `(total_num_frames, 3, height, width)`, all videos one after the other,
    - `num_frames`: how many of them are each video's,
    - `video_metadata`, with `return_metadata=True`: one `VideoMetadata` a video.
    """

    valid_kwargs = Ma2mbaVideosKwargs
    model_input_names = ["pixel_values_videos"]
    size = {"height": 336, "width": 336}
    default_to_square = True
    resample = PILImageResampling.BICUBIC
    do_resize = True
    do_center_crop = False
    crop_size = None
    do_rescale = False
    do_normalize = False
    do_convert_rgb = True
    do_sample_frames = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    fps = 1.0
    num_frames = None
    return_metadata = False

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """See the class. Keyword arguments override the processor's attributes for this call.

        Raises:
            FileNotFoundError: if a path does not exist.
            ValueError: if a file is no video, `fps` is not above 0, or frames have a wrong rank, dtype or value.
        """
        return_tensors = kwargs.pop("return_tensors", None)
        unknown = sorted(set(kwargs) - set(self.valid_kwargs.__annotations__))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}.")
        options = {name: kwargs.get(name, getattr(self, name, None)) for name in self.valid_kwargs.__annotations__}
        if kwargs.get("num_frames") is not None:
            raise ValueError("num_frames is not supported: every second counts. Set `fps` to look more or less often.")
        if not (isinstance(options["fps"], Real) and 0 < options["fps"] < math.inf):
            raise ValueError(f"fps must be a finite number of frames per second above 0; got {options['fps']!r}.")
        options = {**options, **self._standardize_kwargs(**options)}

        clips, metadata = [], []
        for video in as_list_of_videos(videos):
            frames, clip_metadata = self._load(video, options)
            if options["do_rescale"] or options["do_normalize"]:
                frames = self.rescale_and_normalize(
                    frames,
                    options["do_rescale"],
                    options["rescale_factor"],
                    options["do_normalize"],
                    options["image_mean"],
                    options["image_std"],
                )
            clips.append(frames)
            metadata.append(clip_metadata)
        _check_same_size(clips)
        pixels = clips[0] if len(clips) == 1 else torch.cat(clips)  # one film is not copied
        if options["device"] is not None:
            pixels = pixels.to(options["device"])
        data = {"pixel_values_videos": pixels, "num_frames": [len(clip) for clip in clips]}
        if options["return_metadata"]:
            data["video_metadata"] = metadata
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["num_frames", "video_metadata"])

    def _load(self, video, options) -> tuple[torch.Tensor, VideoMetadata]:
        """One video as uint8 frames `(num_frames, 3, height, width)` of the final size."""
        fps = options["fps"]
        if isinstance(video, (str, os.PathLike, bytes)) or hasattr(video, "read"):
            frames, _ = read_video(
                video,
                frame_rate=fps,
                transform=lambda frame: self._fit(torch.from_numpy(frame).permute(2, 0, 1), options).numpy(),
                progress=options["progress"],
            )
            frames, backend = torch.from_numpy(frames), "pyav"
        else:
            frames, backend = self._fit(frames_to_tensor(video), options), None
        indices = list(range(len(frames)))
        metadata = VideoMetadata(
            total_num_frames=len(frames),
            fps=fps,
            height=frames.shape[-2],
            width=frames.shape[-1],
            duration=len(frames) / fps,
            video_backend=backend,
            frames_indices=indices,
        )
        return frames, metadata

    def frame_fitter(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """What resizes and crops frames as this processor does, for frames that come a few at a time.

        Returns:
            A function of uint8 frames `(..., 3, height, width)`, which returns them in their final size.
        """
        options = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        options.update(self._standardize_kwargs(**options))
        return partial(self._fit, options=options)

    def _fit(self, frames: torch.Tensor, options: dict) -> torch.Tensor:
        """Resizes and crops `(..., 3, height, width)` frames."""
        if frames.ndim == 4 and len(frames) > 64:  # resizing needs working memory: bound it
            return torch.cat([self._fit(piece, options) for piece in frames.split(64)])
        if options["do_resize"]:
            frames = self.resize(frames, size=options["size"], resample=options["resample"])
        if options["do_center_crop"]:
            frames = self.center_crop(frames, options["crop_size"] or options["size"])
        return frames.contiguous()


def frames_to_tensor(video) -> torch.Tensor:
    """Frames as an array, a tensor or a list of images to uint8 `(num_frames, 3, height, width)`.

    Floating-point frames must lie between 0 and 1.

    Raises:
        ValueError: for another rank, dtype or number of channels, NaN, values out of range, or no frame at all.
    """
    if isinstance(video, Image.Image):
        video = [video]
    if isinstance(video, Sequence):
        video = [np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame) for frame in video]
        shapes = sorted({frame.shape for frame in video})
        if len(shapes) > 1:
            raise ValueError(f"The frames of one video must have one size; got {shapes}.")
        video = np.stack(video) if video else np.empty((0, 1, 1, 3), np.uint8)
    if isinstance(video, np.ndarray):
        if video.dtype.kind not in "buif":
            raise ValueError(f"Frames must be uint8, or floating point from 0 to 1; got {video.dtype}.")
        video = torch.from_numpy(np.ascontiguousarray(video))  # PyTorch takes no BGR array turned RGB
    frames = video
    if not isinstance(frames, torch.Tensor):
        raise ValueError(
            f"A video must be a path, an array or tensor of frames, or a list of images; got {type(video).__name__}."
        )
    if frames.ndim != 4 or 3 not in (frames.shape[1], frames.shape[3]):
        raise ValueError(
            "Frames must have shape (num_frames, height, width, 3) or (num_frames, 3, height, width); "
            f"got {tuple(frames.shape)}."
        )
    if frames.shape[0] == 0:
        raise ValueError("A video must have at least one frame; got none.")
    if frames.shape[3] == 3:
        frames = frames.permute(0, 3, 1, 2)
    if frames.is_floating_point():
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
    if frames.dtype != torch.uint8:
        raise ValueError(f"Frames must be uint8, or floating point from 0 to 1; got {frames.dtype}.")
    return frames


def as_list_of_videos(videos) -> list:
    """One video, a list of videos, or a list of such lists (one per sample, empty without any) to a flat list."""
    if not isinstance(videos, (list, tuple)):
        if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
            return list(videos)
        return [videos]
    if not videos:
        raise ValueError("The list of videos is empty.")
    first = videos[0]
    is_frame = isinstance(first, Image.Image) or (isinstance(first, (np.ndarray, torch.Tensor)) and first.ndim <= 3)
    if is_frame:
        return [videos]
    flat = []
    for video in videos:
        if not isinstance(video, (list, tuple)):
            flat.append(video)
        elif video:
            flat.extend(as_list_of_videos(video))
    if not flat:
        raise ValueError("The list of videos is empty.")
    return flat


def _check_same_size(clips: list[torch.Tensor]):
    sizes = sorted({tuple(clip.shape[-2:]) for clip in clips})
    if len(sizes) > 1:
        raise ValueError(
            f"The videos of one batch must end up with one size, got {sizes}: set `size` to a height and a width, or "
            "turn on `do_center_crop`."
        )


__all__ = ["Ma2mbaVideoProcessor"]
