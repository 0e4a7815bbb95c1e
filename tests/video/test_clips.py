"""Clips: what a whole read shows between two times, at the cost of the clip alone."""

import io
import math

import av
import numpy as np
import pytest
from PIL import Image
from test_reader import STEPPED, overwrite_packets
from video_files import index_frame, moving_frames, read_index, write_index_video, write_video

from transformers_ma2mba.video import FrameFolder
from transformers_ma2mba.video import reader as video_reader
from transformers_ma2mba.video.reader import VideoReadError, iter_frames, read_video

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # except warnings that a test expects

JUMPS = [0, 40, 900, 1110, 1111, 1120, 5003, 5050, 5090, 7777, 7800]
FILES = {
    "mp4": ("film.mp4", dict(STEPPED)),
    "matroska": ("film.mkv", dict(STEPPED)),
    "mpeg-ts": ("film.ts", dict(STEPPED)),
    "flash": ("film.flv", dict(STEPPED)),
    "avi-b-frames": ("film.avi", dict(STEPPED)),
    "avi": ("film.avi", dict(codec="mpeg4")),
    "raw": ("film.h264", dict(STEPPED)),
    "open-gop": ("film.mkv", dict(preset="fast", bf=5, refs=4, g=36, **{"x264-params": "open-gop=1"})),
    "open-gop-mp4": ("film.mp4", dict(preset="fast", bf=5, refs=4, g=36, **{"x264-params": "open-gop=1"})),
    "intra-refresh": ("film.mp4", dict(preset="veryfast", g=36, **{"x264-params": "intra-refresh=1"})),
    "hevc": ("film.mp4", dict(codec="libx265", preset="ultrafast", **{"x265-params": "keyint=36:log-level=none"})),
    "hevc-open-gop": (
        "film.mkv",
        dict(codec="libx265", preset="fast", **{"x265-params": "keyint=36:open-gop=1:bframes=4:log-level=none"}),
    ),
    "vp9": ("film.webm", dict(codec="libvpx-vp9", g=36, **{"cpu-used": 8, "deadline": "realtime"})),
    "mpeg4": ("film.mp4", dict(codec="mpeg4", g=36, bf=2)),
    "mpeg2-open-gop": ("film.mkv", dict(codec="mpeg2video", g=18, bf=2)),
    "interlaced": ("film.mp4", dict(preset="veryfast", g=36, flags="+ildct+ilme", **{"x264-params": "tff=1"})),
    "late-mp4": ("film.mp4", dict(STEPPED, start=5.0)),
    "late-matroska": ("film.mkv", dict(STEPPED, start=5.0)),
    "television": ("film.mp4", dict(STEPPED, fps=30000 / 1001)),
    "fragmented": ("film.mp4", dict(STEPPED, fragmented=True)),
    "turned": ("film.mp4", dict(STEPPED, rotation=90, sample_aspect_ratio="4/3")),
}


def assert_clip_is_slice(source, start, end, rate, read=read_video):
    """A clip equals the samples of a whole read at a rate that has `start` among its samples."""
    frames, times = read(source, rate)
    clip, clip_times = read_video(source, rate, start=start, end=end, progress=False)
    first = round(start * rate)
    assert first == pytest.approx(start * rate), "a bad choice of `start`"
    stop = len(frames) if end is None else max(first + 1, math.ceil(end * rate - 1e-6))
    np.testing.assert_allclose(clip_times, times[first:stop], atol=1e-9, rtol=0)
    assert np.array_equal(clip, frames[first:stop])


@pytest.mark.parametrize("kind", FILES)
def test_a_clip_is_a_slice_of_a_whole_read(kind, tmp_path):
    name, options = FILES[kind]
    path = tmp_path / name
    write_video(path, moving_frames(150, height=64, width=96), **options)
    for start, end, rate in [(1, 3, 1), (1.5, 2.25, 8), (4, None, 2), (3.125, 3.2, 24), (0, 2, 3.7), (2.5, 60, 24)]:
        assert_clip_is_slice(path, start, end, rate)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_variable_rate(suffix, tmp_path):
    write_index_video(tmp_path / f"film.{suffix}", 11, timestamps=JUMPS, preset="ultrafast", g=3)
    for start, end in [(0.5, 2), (1, 5), (5, 6), (4.5, None), (7.5, None)]:
        for rate in (2, 20):
            assert_clip_is_slice(tmp_path / f"film.{suffix}", start, end, rate)


def test_joined_recordings(tmp_path):
    """The times of the second one begin again, so that a time in the film does not say where to find it."""
    write_index_video(tmp_path / "one.ts", 60, **STEPPED)
    write_index_video(tmp_path / "two.ts", 60, height=96, width=144, **STEPPED)
    with open(tmp_path / "both.ts", "wb") as both:
        both.write((tmp_path / "one.ts").read_bytes() + (tmp_path / "two.ts").read_bytes())
    for start, end in [(1, 2), (2, 4), (3.5, None)]:
        assert_clip_is_slice(tmp_path / "both.ts", start, end, 2)


class Pipe(io.RawIOBase):
    """A stream that cannot seek."""

    def __init__(self, content):
        self.file = io.BytesIO(content)

    def readable(self):
        return True

    def read(self, size=-1):
        return self.file.read(size)


def test_file_objects(tmp_path):
    write_index_video(tmp_path / "film.mp4", 150, faststart=True, **STEPPED)
    content = (tmp_path / "film.mp4").read_bytes()
    for source in (content, io.BytesIO(content), Pipe(content), (tmp_path / "film.mp4").as_uri()):
        frames, times = read_video(source, 2, start=4.5, end=6, progress=False)
        assert [read_index(frame) for frame in frames] == [108, 120, 132] and times.tolist() == [4.5, 5, 5.5]


def test_a_start_between_samples_and_frames(tmp_path):
    write_index_video(tmp_path / "film.mp4", 150, **STEPPED)
    frames, times = read_video(tmp_path / "film.mp4", 1, start=2.03, end=5)
    assert [read_index(frame) for frame in frames] == [48, 72, 96]
    assert times.tolist() == [2.03 + second for second in range(3)]


@pytest.mark.parametrize("start, end", [(1.2, 1.21), (0, 0.001), (1.999, 2.5), (6.2, 6.24), (6.2, 99)])
def test_the_shortest_clip_has_one_frame(start, end, tmp_path):
    write_index_video(tmp_path / "film.mp4", 150, **STEPPED)
    frames, times = read_video(tmp_path / "film.mp4", 1, start=start, end=end)
    assert times.tolist() == [start] and read_index(frames[0]) == math.floor(start * 24 + 1e-9)


def test_the_frames_keep_the_size_of_the_films_first(tmp_path):
    for name, size in (("one", (64, 96)), ("two", (96, 144))):
        write_index_video(tmp_path / f"{name}.ts", 60, height=size[0], width=size[1], **STEPPED)
    with open(tmp_path / "both.ts", "wb") as both:
        both.write((tmp_path / "one.ts").read_bytes() + (tmp_path / "two.ts").read_bytes())
    assert read_video(tmp_path / "both.ts", start=3.0)[0].shape == (2, 64, 96, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_a_clip_after_the_end_names_both(suffix, tmp_path):
    write_index_video(tmp_path / f"film.{suffix}", 48, codec="mpeg4")
    for start in (2, 2.5, 1000):
        with pytest.raises(VideoReadError, match=rf"film\.{suffix} ends at 2\.00 s.*the clip starts at {start:g} s"):
            read_video(tmp_path / f"film.{suffix}", start=start, end=start + 5)


@pytest.mark.parametrize("options", [dict(start=-1), dict(start=math.nan), dict(end=math.inf), dict(start="3")])
def test_times_that_are_no_times(options):
    ((name, value),) = options.items()
    for read in (iter_frames, read_video):
        with pytest.raises(ValueError, match=f"The {name} of a clip must be a number of .*, got {value!r}"):
            read("no such file", **options)


@pytest.mark.parametrize("options", [dict(end=0), dict(start=3, end=3), dict(start=3, end=2.5)])
def test_an_end_before_the_start(options):
    with pytest.raises(ValueError, match=f"end after its start, got {options.get('start', 0)} to {options['end']} s"):
        iter_frames("no such file", **options)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_film_cut_short(suffix, tmp_path):
    path = tmp_path / f"film.{suffix}"
    write_video(path, moving_frames(240), faststart=suffix == "mp4", preset="veryfast", g=24)
    whole, _ = read_video(path, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert np.array_equal(read_video(path, 2, start=1.5, end=3)[0], whole[3:6])  # no warning: nothing is missing
    with pytest.warns(UserWarning, match=rf"film\.{suffix} ends early: [3-6]\.\d of 10\.0 seconds"):
        frames, _ = read_video(path, 2, start=2, end=9)
    assert np.array_equal(frames[:-1], whole[4 : 3 + len(frames)])
    with pytest.warns(UserWarning, match="ends early"), pytest.raises(VideoReadError, match="the clip starts at 8 s"):
        read_video(path, 2, start=8)


def test_damage_counts_where_it_is_read(tmp_path):
    path = tmp_path / "film.mp4"
    write_index_video(path, 240, preset="ultrafast", g=24, bf=0)
    overwrite_packets(path, [60, 61, 168])
    assert [read_index(frame) for frame in read_video(path, start=4, end=6)[0]] == [96, 120]
    with pytest.warns(UserWarning, match="is damaged: 2 of"):
        assert [read_index(frame) for frame in read_video(path, start=2, end=4)[0]] == [48, 72]
    with pytest.warns(UserWarning, match="is damaged: 3 of"):  # the keyframe before this clip is damaged
        frames, _ = read_video(path, start=7.5, end=9)
    with pytest.warns(UserWarning, match="is damaged"):
        whole, _ = read_video(path, 2)
    assert np.array_equal(frames, whole[15:18:2])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_clip_at_the_end_costs_as_much_as_the_clip(suffix, tmp_path, monkeypatch):
    path, decoded = tmp_path / f"film.{suffix}", []
    write_video(path, moving_frames(2000, height=32, width=32), preset="ultrafast", g=48, bf=2)
    begin_with = video_reader._Film._begin_with

    def count(film, frame):
        decoded.append(frame.pts)
        begin_with(film, frame)

    monkeypatch.setattr(video_reader._Film, "_begin_with", count)
    assert len(read_video(path, start=80, end=82)[0]) == 2
    assert len(decoded) < 100


@pytest.mark.parametrize(
    "error",
    [MemoryError("full"), OSError(24, "Too many open files"), av.error.MemoryError(12, "Cannot allocate memory")],
    ids=["memory", "open-files", "decoder"],
)
def test_lack_of_resources_is_not_the_films_fault(error, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    write_index_video(tmp_path / "film.mp4", 24, preset="ultrafast")
    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(type(error)) as caught:
        read_video(tmp_path / "film.mp4")
    assert caught.value is error


def write_frames(folder, names):
    folder.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(index_frame(i)).save(folder / name)
    return folder


@pytest.mark.parametrize("name", ["frames", "100% [a] *?"])
@pytest.mark.parametrize("fps, shown", [(3, [0, 3, 6, 9]), (1, list(range(10))), (0.5, [i // 2 for i in range(20)])])
def test_a_folder_of_frames(name, fps, shown, tmp_path):
    folder = write_frames(tmp_path / name, [f"{i:03d}.png" for i in range(10)])
    (folder / "notes.txt").write_text("no frame")
    film = FrameFolder(str(folder), fps)
    assert [read_index(frame) for _, frame in iter_frames(film)] == shown
    times = [(time, read_index(frame)) for time, frame in iter_frames(film, start=2, end=4)]
    assert times == [(2, shown[2]), (3, shown[3])]


@pytest.mark.parametrize(
    "names, message",
    [
        (["1.png", "2.png", "10.png"], "frames are not in the order of their names: give them leading zeros"),
        (["1.png", "2.jpg"], r"must have images of one kind, .jpg or .png; got \['.jpg', '.png'\]"),
        ([], r"must have images of one kind, .jpg or .png; got \[\]"),
    ],
    ids=["order", "kinds", "empty"],
)
def test_folders_that_are_no_film(names, message, tmp_path):
    folder = write_frames(tmp_path / "frames", names)
    with pytest.raises(VideoReadError, match=message):
        list(iter_frames(FrameFolder(str(folder), 3)))
    with pytest.raises(VideoReadError, match="nowhere could not be opened"):
        list(iter_frames(FrameFolder(str(tmp_path / "nowhere"), 3)))
