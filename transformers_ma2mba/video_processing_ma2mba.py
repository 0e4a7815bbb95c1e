"""The video processor: videos in any form to uint8 frames of the vision encoder's size."""

from collections.abc import Callable
from functools import partial

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .video import (
    Clip,
    FittedFrames,
    as_list_of_videos,
    checked_frame_rate,
    frames_to_tensor,
    is_video_file,
    read_video,
)


class Ma2mbaVideosKwargs(VideosKwargs, total=False):
    """Options of the video processor besides those of Transformers.

    progress (`bool`, *optional*):
        Whether to show a progress bar while a file is read. By default one appears when reading takes a while.
    """

    progress: bool | None


class Ma2mbaVideoProcessor(BaseVideoProcessor):
    r"""Reads videos at a fixed rate from beginning to end, and resizes each frame as it is decoded.

    A video is a path or URL, an array or tensor of frames `(num_frames, height, width, 3)` or
    `(num_frames, 3, height, width)`, or a list of PIL images. The processor samples a file at `fps` frames per second
    of film, and takes every frame of an array, tensor or list. Pixels stay uint8, because the model normalises them on
    its device. With `do_rescale=True, do_normalize=True` they become floats for another vision encoder.

    Returns a `BatchFeature` with

    - `pixel_values_videos`: uint8 `(total_num_frames, 3, height, width)`, all videos one after the other,
    - `num_frames`: the number of frames of each video,
    - `video_metadata`, with `return_metadata=True`: one `VideoMetadata` for each video.
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
        """Convert videos to pixels, see the class.

        Args:
            videos: one video, a list, or a list of lists.
            kwargs: override the processor's attributes for this call.

        Raises:
            FileNotFoundError: if a path does not exist.
            ValueError: if a file is no video, `fps` is not above 0, or frames have a wrong rank, dtype or value.
        """
        return_tensors = kwargs.pop("return_tensors", None)
        unknown = sorted(set(kwargs) - set(self.valid_kwargs.__annotations__))
        if unknown:
            raise ValueError(f"{type(self).__name__} has no option {', '.join(unknown)}.")
        if kwargs.get("num_frames") is not None:
            raise ValueError("num_frames is not supported: every second counts. Set `fps` to look more or less often.")
        options = self._options(**kwargs)
        checked_frame_rate(options["fps"], "fps")

        clips, metadata = [], []
        for video in as_list_of_videos(videos):
            frames, clip_metadata = self._load(video, options)
            clips.append(self._rescale_and_normalize(frames, options))
            metadata.append(clip_metadata)
        _check_same_size(clips)
        pixels = clips[0] if len(clips) == 1 else torch.cat(clips)  # a single film is not copied
        if options["device"] is not None:
            pixels = pixels.to(options["device"])
        data = {"pixel_values_videos": pixels, "num_frames": [len(clip) for clip in clips]}
        if options["return_metadata"]:
            data["video_metadata"] = metadata
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["num_frames", "video_metadata"])

    def _options(self, **overrides) -> dict:
        """All options of a call: the processor's attributes unless overridden."""
        options = {name: overrides.get(name, getattr(self, name, None)) for name in self.valid_kwargs.__annotations__}
        return {**options, **self._standardize_kwargs(**options)}

    def _load(self, video, options: dict) -> tuple[torch.Tensor, VideoMetadata]:
        """Load one video as uint8 frames `(num_frames, 3, height, width)` of the final size."""
        fps, backend = options["fps"], None
        if isinstance(video, FittedFrames):
            frames = video.pixels
        elif isinstance(video, Clip) or is_video_file(video):
            clip = video if isinstance(video, Clip) else Clip(video)
            pixels, _ = read_video(
                clip.source,
                frame_rate=fps,
                transform=lambda frame: self._fit(torch.from_numpy(frame).permute(2, 0, 1), options).numpy(),
                progress=options["progress"],
                start=clip.start,
                end=clip.end,
            )
            frames, backend = torch.from_numpy(pixels), "pyav"
        else:
            frames = self._fit(frames_to_tensor(video), options)
        metadata = VideoMetadata(
            total_num_frames=len(frames),
            fps=fps,
            height=frames.shape[-2],
            width=frames.shape[-1],
            duration=len(frames) / fps,
            video_backend=backend,
            frames_indices=list(range(len(frames))),
        )
        return frames, metadata

    def frame_fitter(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that resizes and crops uint8 frames `(..., 3, height, width)` as the processor does."""
        return partial(self._fit, options=self._options())

    def frame_normalizer(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function that rescales and normalises fitted frames as the processor does."""
        return partial(self._rescale_and_normalize, options=self._options())

    def _rescale_and_normalize(self, frames: torch.Tensor, options: dict) -> torch.Tensor:
        if not (options["do_rescale"] or options["do_normalize"]):
            return frames
        names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        return self.rescale_and_normalize(frames, *(options[name] for name in names))

    def _fit(self, frames: torch.Tensor, options: dict) -> torch.Tensor:
        """Resizes and crops `(..., 3, height, width)` frames."""
        if frames.ndim == 4 and len(frames) > 64:  # bounds the working memory of resizing
            return torch.cat([self._fit(piece, options) for piece in frames.split(64)])
        if options["do_resize"]:
            frames = self.resize(frames, size=options["size"], resample=options["resample"])
        if options["do_center_crop"]:
            frames = self.center_crop(frames, options["crop_size"] or options["size"])
        return frames.contiguous()


def _check_same_size(clips: list[torch.Tensor]):
    sizes = sorted({tuple(clip.shape[-2:]) for clip in clips})
    if len(sizes) > 1:
        raise ValueError(
            f"The videos of one batch must end up with one size, got {sizes}: set `size` to a height and a width, or "
            "turn on `do_center_crop`."
        )


__all__ = ["Ma2mbaVideoProcessor"]
