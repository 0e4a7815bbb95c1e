"""The video processor: forms of videos, options, and errors for bad videos."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_frames
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize
from video_files import read_index, write_index_video

from transformers_ma2mba import Ma2mbaVideoProcessor, read_video
from transformers_ma2mba.video.frames import FittedFrames

SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def video_processor():
    return Ma2mbaVideoProcessor(size=SIZE)


def pixels_of(video_processor, video, **options) -> torch.Tensor:
    return video_processor(video, return_tensors="pt", **options)["pixel_values_videos"]


def reference(frames: np.ndarray) -> torch.Tensor:
    """Resizes uint8 frames `(num_frames, height, width, 3)` one by one with torchvision."""
    channels_first = [torch.from_numpy(frame).permute(2, 0, 1).contiguous() for frame in frames]
    return torch.stack([resize(f, [32, 32], InterpolationMode.BICUBIC, antialias=True) for f in channels_first])


# Forms of a video

FORMS = {
    "array": lambda frames: frames,
    "array-channels-first": lambda frames: frames.transpose(0, 3, 1, 2),
    "tensor": torch.from_numpy,
    "tensor-channels-first": lambda frames: torch.from_numpy(frames).permute(0, 3, 1, 2),
    "list-of-arrays": list,
    "tuple-of-tensors": lambda frames: tuple(torch.from_numpy(frames)),
    "list-of-images": lambda frames: [Image.fromarray(frame) for frame in frames],
    "list-of-one-array": lambda frames: [frames],
    "batch-of-one": lambda frames: frames[None],
    "float64": lambda frames: frames / 255,
    "float32": lambda frames: torch.from_numpy(frames).float() / 255,
    "float16": lambda frames: (frames / 255).astype(np.float16),
    "images-with-alpha": lambda frames: [Image.fromarray(frame).convert("RGBA") for frame in frames],
    "turned-around": lambda frames: np.ascontiguousarray(frames[..., ::-1])[..., ::-1],  # from BGR
}


@pytest.mark.parametrize("height, width", [(32, 32), (48, 80), (37, 21)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_frames_are_equal(video_processor, form, height, width):
    frames = random_frames(5, height, width)
    output = video_processor(FORMS[form](frames), return_tensors="pt")
    assert output["num_frames"] == [5]
    assert output["pixel_values_videos"].dtype == torch.uint8
    assert torch.equal(output["pixel_values_videos"], reference(frames))


def test_many_frames_are_resized_in_pieces_like_few(video_processor):
    frames = random_frames(150, 40, 24)
    assert torch.equal(pixels_of(video_processor, frames), reference(frames))


@pytest.mark.parametrize("form", ["str", "path", "bytes", "file", "list"])
def test_a_file_equals_its_frames(video_processor, film, form):
    frames, _ = read_video(film, 1.0)
    assert [read_index(frame) for frame in frames] == [0, 4, 8, 12, 16, 20]
    with open(film, "rb") as file:
        video = {"str": str(film), "path": film, "bytes": film.read_bytes(), "file": file, "list": [str(film)]}[form]
        pixels = pixels_of(video_processor, video)
    assert torch.equal(pixels, pixels_of(video_processor, frames))
    assert torch.equal(pixels, reference(frames))


def test_an_image_is_a_video_of_one_frame(video_processor):
    frames = random_frames(1, 40, 24)
    assert torch.equal(pixels_of(video_processor, Image.fromarray(frames[0])), reference(frames))


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "one-list-a-text"])
def test_several_videos_are_concatenated(video_processor, film, nested):
    first, second = random_frames(3, 40, 24), random_frames(2, 64, 64, seed=1)
    images = [Image.fromarray(frame) for frame in second]
    videos = [[first, str(film)], [images], []] if nested else [first, str(film), images]
    output = video_processor(videos, return_tensors="pt")
    assert output["num_frames"] == [3, 6, 2]
    from_film, _ = read_video(film, 1.0)
    expected = torch.cat([reference(first), reference(from_film), reference(second)])
    assert torch.equal(output["pixel_values_videos"], expected)


# Options


@pytest.mark.parametrize("fps, expected", [(0.5, [0, 8, 16]), (2, list(range(0, 24, 2))), (4.0, list(range(24)))])
def test_fps(film, fps, expected):
    processor = Ma2mbaVideoProcessor(size={"height": 64, "width": 96})
    for pixels in (
        pixels_of(processor, film, fps=fps),
        pixels_of(Ma2mbaVideoProcessor(size={"height": 64, "width": 96}, fps=fps), film),
    ):
        assert [read_index(frame.permute(1, 2, 0).numpy()) for frame in pixels] == expected


def test_fps_has_no_effect_on_given_frames(video_processor):
    frames = random_frames(5)
    assert torch.equal(pixels_of(video_processor, frames, fps=0.1), reference(frames))


def test_no_frame_of_a_long_film_is_left_out(video_processor, tmp_path):
    write_index_video(tmp_path / "long.mp4", 700, fps=1, preset="ultrafast", crf=51, g=700)
    assert len(pixels_of(video_processor, tmp_path / "long.mp4")) == 700


def test_center_crop(video_processor, tmp_path):
    """The frame is resized by its shortest side and cropped: the border between its two halves is in the middle."""
    frames = np.zeros((2, 40, 80, 3), np.uint8)
    frames[:, :, 40:] = 255
    options = dict(size={"shortest_edge": 32}, do_center_crop=True, crop_size=SIZE)
    pixels = pixels_of(video_processor, frames, **options)
    assert pixels.shape == (2, 3, 32, 32)
    assert (pixels[..., :14] == 0).all() and (pixels[..., 18:] == 255).all()
    whole = resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [32], InterpolationMode.BICUBIC, antialias=True)
    assert whole.shape[-1] == 64
    assert torch.equal(pixels, whole[..., 16:48])


def test_no_resizing(video_processor):
    frames = random_frames(2, 24, 40)
    pixels = pixels_of(video_processor, frames, do_resize=False)
    assert torch.equal(pixels, torch.from_numpy(frames).permute(0, 3, 1, 2))


def test_rescaling_and_normalising_for_other_vision_encoders(video_processor):
    frames = random_frames(3)
    uint8 = reference(frames)
    scaled = pixels_of(video_processor, frames, do_rescale=True)
    assert scaled.dtype == torch.float32
    assert_close(scaled, uint8.float() / 255, rtol=1e-6, atol=0)

    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    options = dict(do_rescale=True, do_normalize=True, image_mean=mean, image_std=std)
    expected = (uint8.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert_close(pixels_of(video_processor, frames, **options).double(), expected, rtol=1e-5, atol=1e-5)


def test_fitted_frames_are_not_resized_or_cropped_again():
    options = dict(size={"shortest_edge": 40}, do_center_crop=True, crop_size=SIZE)
    video_processor, frames = Ma2mbaVideoProcessor(**options), random_frames(3, 48, 64)
    pixels = pixels_of(video_processor, frames)
    fitted = FittedFrames(pixels)
    assert torch.equal(pixels_of(video_processor, fitted), pixels)
    assert torch.equal(pixels_of(video_processor, [[fitted], [frames]]), torch.cat([pixels, pixels]))
    normalized = pixels_of(video_processor, frames, do_rescale=True, do_normalize=True)
    assert torch.equal(pixels_of(video_processor, fitted, do_rescale=True, do_normalize=True), normalized)


@pytest.mark.parametrize("kind", [None, "np", "pt"])
def test_return_tensors(video_processor, kind):
    output = video_processor(random_frames(2), return_tensors=kind)
    expected = {None: torch.Tensor, "np": np.ndarray, "pt": torch.Tensor}[kind]
    assert type(output["pixel_values_videos"]) is expected
    assert output["num_frames"] == [2]


def test_metadata(video_processor, film):
    output = video_processor([film, random_frames(3)], return_metadata=True, fps=2)
    from_file, given = output["video_metadata"]
    assert (from_file.total_num_frames, from_file.fps, from_file.duration) == (12, 2, 6)
    assert (from_file.height, from_file.width, from_file.video_backend) == (32, 32, "pyav")
    assert list(from_file.timestamps) == [index / 2 for index in range(12)]
    assert (given.total_num_frames, given.video_backend) == (3, None)
    assert "video_metadata" not in video_processor(film)


@pytest.mark.parametrize("progress", [True, False])
def test_progress(video_processor, film, capsys, progress):
    video_processor(film, progress=progress)
    assert ("film.mp4" in capsys.readouterr().err) == progress


def test_options_are_saved(tmp_path):
    processor = Ma2mbaVideoProcessor(size=SIZE, fps=2.0, image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 1.0, 1.0])
    processor.save_pretrained(tmp_path)
    loaded = Ma2mbaVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.fps, dict(loaded.size)["height"]) == (2.0, 32)


# Errors

NAN, TOO_BRIGHT, NEGATIVE = (np.full((3, 8, 8, 3), 0.5) for _ in range(3))
NAN[1, 2, 3, 0] = math.nan
TOO_BRIGHT[2, 2, 3, 0] = 200
NEGATIVE[0] = -1


@pytest.mark.parametrize(
    "video, message",
    [
        pytest.param(np.zeros((8, 8, 3), np.uint8), r"must have shape .*got \(8, 8, 3\)", id="one-frame-without-axis"),
        pytest.param(np.zeros((2, 8, 8), np.uint8), r"must have shape .*got \(2, 8, 8\)", id="grey"),
        pytest.param(np.zeros((2, 8, 8, 4), np.uint8), r"must have shape .*got \(2, 8, 8, 4\)", id="alpha"),
        pytest.param([np.zeros((8, 8), np.uint8)] * 2, r"must have shape .*got \(2, 8, 8\)", id="list-of-grey"),
        pytest.param(np.zeros((1, 1, 2, 8, 8, 3), np.uint8), r"must have shape", id="six-axes"),
        pytest.param(
            np.zeros((2, 8, 8, 3), np.int64), "must be uint8, or floating point.*got torch.int64", id="int64"
        ),
        pytest.param(np.zeros((2, 8, 8, 3), np.uint16), "must be uint8.*got torch.uint16", id="uint16"),
        pytest.param(np.zeros((2, 8, 8, 3), bool), "must be uint8.*got torch.bool", id="bool"),
        pytest.param(np.zeros((2, 8, 8, 3), object), "must be uint8.*got object", id="objects"),
        pytest.param(
            torch.zeros(2, 8, 8, 3, dtype=torch.complex64), "must be uint8.*got torch.complex64", id="complex"
        ),
        pytest.param(NAN, "Frame 1 has NaN or infinite pixels", id="nan"),
        pytest.param(TOO_BRIGHT, "must lie between 0 and 1, got 0.5 to 200", id="too-bright"),
        pytest.param(NEGATIVE, "must lie between 0 and 1, got -1 to 0.5", id="negative"),
        pytest.param(np.zeros((0, 8, 8, 3), np.uint8), "must have at least one frame; got none", id="no-frames"),
        pytest.param([], "list of videos is empty", id="no-videos"),
        pytest.param([[], []], "list of videos is empty", id="no-video-for-any-text"),
        pytest.param(
            [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)],
            r"frames of one video must have one size; got \[\(8, 8, 3\), \(8, 9, 3\)\]",
            id="frames-of-mixed-sizes",
        ),
        pytest.param(12, "must be a path, an array or tensor of frames, or a list of images; got int", id="number"),
        pytest.param((f for f in ()), "must be a path, .*; got generator", id="generator"),
        pytest.param({"video": 1}, "must be a path, .*; got dict", id="dict"),
    ],
)
def test_values_that_are_no_video(video_processor, video, message):
    with pytest.raises(ValueError, match=message):
        video_processor(video)


@pytest.mark.parametrize("fps", [0, -1, -0.5, math.nan, math.inf, "1"], ids=str)
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "frames"])
def test_bad_fps(video_processor, film, fps, from_file):
    with pytest.raises(ValueError, match=f"^fps must be .*above 0; got {fps!r}"):
        video_processor(film if from_file else random_frames(2), fps=fps)


def test_num_frames_is_refused(video_processor, film):
    with pytest.raises(ValueError, match="num_frames is not supported: every second counts"):
        video_processor(film, num_frames=8)


def test_unknown_options_are_refused(video_processor):
    with pytest.raises(ValueError, match="has no option frame_rate, sise"):
        video_processor(random_frames(1), sise=SIZE, frame_rate=2)


def test_videos_that_end_up_with_different_sizes(video_processor):
    videos = [random_frames(1, 32, 64), random_frames(1, 32, 48)]
    with pytest.raises(ValueError, match=r"must end up with one size, got \[\(32, 48\), \(32, 64\)\]: set `size`"):
        video_processor(videos, size={"shortest_edge": 32})


def test_a_missing_file(video_processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        video_processor([random_frames(1), tmp_path / "nowhere.mp4"])
