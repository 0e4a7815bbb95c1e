"""Frames and films: which values count as which. The video processor tests the frames' pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_frames

from transformers_ma2mba.video.frames import (
    as_list_of_videos,
    frames_to_tensor,
    is_array,
    is_frame,
    is_list_of_films,
    is_timed_frame,
    is_video_file,
)

FRAMES = random_frames(3)
IMAGE = Image.fromarray(FRAMES[0])


class Array:
    """An array of another library."""

    ndim = 4

    def __array__(self, dtype=None, copy=None):
        return FRAMES


VALUES = {
    "path": "film.mp4",
    "bytes": b"film",
    "file": io.BytesIO(),
    "image": IMAGE,
    "frame": FRAMES[0],
    "tensor": torch.from_numpy(FRAMES[0]),
    "pair": (0.5, FRAMES[0]),
    "frames": FRAMES,
    "other": Array(),
    "list of images": [IMAGE, IMAGE],
    "list of frames": list(FRAMES),
    "list of pairs": [(0, IMAGE), [0.5, IMAGE]],
    "list of films": ["film.mp4", FRAMES],
    "nested": [[IMAGE, IMAGE], [IMAGE]],
    "empty": [],
    "iterator": iter(FRAMES),
}


@pytest.mark.parametrize(
    "check, names",
    [
        (is_video_file, {"path", "bytes", "file"}),
        (is_array, {"frame", "tensor", "frames", "other"}),
        (is_frame, {"image", "frame", "tensor"}),
        (is_timed_frame, {"pair"}),
        (is_list_of_films, {"list of films", "nested"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_kinds_of_values(check, names):
    pair_as_list = {"pair"} if check is is_list_of_films else set()  # a pair alone is no film
    assert {name for name, value in VALUES.items() if check(value)} - pair_as_list == names


def test_videos_are_flattened():
    batch = np.stack([FRAMES, FRAMES])
    assert as_list_of_videos("film.mp4") == ["film.mp4"]
    assert as_list_of_videos(["a.mp4", ["b.mp4"], []]) == ["a.mp4", "b.mp4"]
    assert [len(video) for video in as_list_of_videos([[IMAGE, IMAGE], [IMAGE]])] == [2, 1]
    assert [len(video) for video in as_list_of_videos([IMAGE, IMAGE])] == [2]
    assert [len(video) for video in as_list_of_videos(batch)] == [3, 3]
    for empty in ([], [[], []]):
        with pytest.raises(ValueError, match="The list of videos is empty"):
            as_list_of_videos(empty)


def test_arrays_of_other_libraries():
    assert torch.equal(frames_to_tensor(Array()), frames_to_tensor(FRAMES))


def test_frames_with_times_are_refused():
    with pytest.raises(ValueError, match="takes frames without times; only a session takes pairs"):
        frames_to_tensor([(0.0, FRAMES[0]), (1.0, FRAMES[1])])
