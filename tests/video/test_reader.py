"""The video reader: sampled frames, their pixels, memory, and errors for bad files."""

import io
import math
import os
import shutil
import tracemalloc
from bisect import bisect_right
from fractions import Fraction

import av
import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from video_files import index_frame, index_video_bytes, moving_frames, read_index, write_index_video, write_video

from transformers_ma2mba.video import reader as video_reader
from transformers_ma2mba.video.reader import VideoReadError, iter_frames, probe, read_video

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # except warnings that a test expects

STEPPED = dict(preset="veryfast", g=48)  # with B-frames as references of other B-frames
RATES = [1, 2, 0.5, 3.7, 24, 60]


def expected_indices(times, end, rate) -> list[int]:
    """The frame on screen at 0, 1/rate, … before `end`, in exact arithmetic; frames appear at `times`."""
    times, rate = [Fraction(time) for time in times], Fraction(str(rate))
    samples = [index / rate for index in range(math.ceil(Fraction(end) * rate))]
    return [max(0, bisect_right(times, sample) - 1) for sample in samples]


def read_indices(source, frame_rate) -> list[int]:
    frames, timestamps = read_video(source, frame_rate, progress=False)
    assert timestamps.dtype == np.float64
    assert timestamps.tolist() == [index / frame_rate for index in range(len(frames))]
    return [read_index(frame) for frame in frames]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Ten seconds at 24 frames per second."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_index_video(path, 240, faststart=True, **STEPPED)
    return path


# Sampling


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
def test_indices_at_a_constant_rate(tmp_path, suffix, rate):
    write_index_video(tmp_path / f"film.{suffix}", 100, **STEPPED)
    times = [Fraction(index, 24) for index in range(100)]
    assert read_indices(tmp_path / f"film.{suffix}", rate) == expected_indices(times, Fraction(100, 24), rate)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_native_rate_of_television_gives_every_frame_once(tmp_path, suffix):
    path = tmp_path / f"film.{suffix}"
    write_index_video(path, 200, fps=30000 / 1001, **STEPPED)
    assert read_indices(path, probe(path).average_rate) == list(range(200))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_indices_at_a_variable_rate(tmp_path, suffix, rate):
    timestamps = [0, 40, 900, 1110, 1111, 1120, 5003, 5050, 5090, 7777, 7800]
    write_index_video(tmp_path / f"film.{suffix}", len(timestamps), timestamps=timestamps, preset="ultrafast")
    times = [Fraction(time, 1000) for time in timestamps]
    indices = read_indices(tmp_path / f"film.{suffix}", rate)
    # The container decides how long the last frame stays.
    assert indices == expected_indices(times, Fraction(len(indices)) / Fraction(str(rate)), rate)
    assert 7.8 < len(indices) / rate < 8.9 + 1 / rate


@settings(max_examples=25, deadline=None)
@given(
    num_frames=st.integers(1, 60),
    fps=st.sampled_from([Fraction(24), Fraction(25), Fraction(30000, 1001), Fraction(10)]),
    rate=st.sampled_from([0.1, 0.3, 1, 2, 2.5, 5, 10, 24, 25, 30, 50]),
)
@example(num_frames=1, fps=Fraction(30000, 1001), rate=30)
def test_any_length_and_rates(num_frames, fps, rate):
    film = index_video_bytes(num_frames, fps=fps, preset="ultrafast", bf=2)
    times = [index / fps for index in range(num_frames)]
    # Files round the end of a film to ticks: a sample 1/30 of a millisecond before the end, as above, may be left out.
    end = num_frames / fps - Fraction(1, 20_000)
    assert read_indices(film, rate) == expected_indices(times, end, rate)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_film_that_starts_late_starts_at_zero(tmp_path, suffix):
    write_index_video(tmp_path / f"film.{suffix}", 72, start=5.0, **STEPPED)
    assert read_indices(tmp_path / f"film.{suffix}", 2) == [0, 12, 24, 36, 48, 60]


def test_a_stream_without_timestamps_is_counted(tmp_path):
    write_index_video(tmp_path / "film.h264", 100, **STEPPED)
    assert read_indices(tmp_path / "film.h264", 2) == list(range(0, 100, 12))


@pytest.mark.parametrize("codec, tolerance", [("mpeg4", 0), ("libx264", 2)])
def test_avi(tmp_path, codec, tolerance):
    write_index_video(tmp_path / "film.avi", 240, codec=codec)
    # AVI stores only the order of decoding, so that the times of B-frames are wrong by their change of places.
    np.testing.assert_allclose(read_indices(tmp_path / "film.avi", 1), range(0, 240, 24), atol=tolerance)


def test_joined_recordings_keep_the_first_size(tmp_path):
    write_index_video(tmp_path / "one.ts", 60, **STEPPED)
    write_index_video(tmp_path / "two.ts", 60, height=96, width=144, **STEPPED)
    with open(tmp_path / "both.ts", "wb") as both:
        both.write((tmp_path / "one.ts").read_bytes() + (tmp_path / "two.ts").read_bytes())
    frames, _ = read_video(tmp_path / "both.ts", 1, progress=False)
    assert frames.shape == (5, 64, 96, 3)
    assert [read_index(frame) for frame in frames[:3]] == [0, 24, 48]


@pytest.mark.parametrize(
    "options",
    [
        dict(preset="medium"),
        dict(preset="veryfast", bf=8, **{"b-pyramid": "none"}),
        dict(preset="fast", bf=5, refs=4, g=12, **{"x264-params": "open-gop=1"}),
        dict(preset="veryfast", tune="zerolatency"),
        dict(preset="veryfast", bf=3, pixel_format="yuv420p10le"),
        dict(codec="libx265", preset="ultrafast", bf=4, **{"x265-params": "log-level=none"}),
    ],
    ids=["b-frames", "no-pyramid", "open-gop", "no-b-frames", "10-bit", "hevc"],
)
def test_skipped_frames_change_no_pixel(tmp_path, options):
    """The sampled frames equal those of plain PyAV, which decodes every frame."""
    path = tmp_path / "film.mkv"
    write_video(path, moving_frames(130), **options)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    times = [Fraction(index, 24) for index in range(130)]
    for rate in (1, 0.3, 3.7, 24):
        frames, _ = read_video(path, rate, progress=False)
        expected = [every[index] for index in expected_indices(times, Fraction(130, 24), rate)]
        assert np.array_equal(frames, expected), f"at {rate} frames per second"


def test_same_frames_as_the_loader_of_transformers(film):
    stock, _ = transformers.video_utils.load_video(str(film), fps=1, backend="pyav")
    frames, _ = read_video(film, 1)
    assert np.array_equal(frames, stock)


# Pixels


@pytest.mark.parametrize("hflip", [False, True], ids=["", "mirrored"])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotated_frames_are_turned_upright(tmp_path, rotation, hflip):
    write_index_video(tmp_path / "stored.mp4", 10)
    write_index_video(tmp_path / "turned.mp4", 10, rotation=rotation, hflip=hflip)
    stored, _ = read_video(tmp_path / "stored.mp4", 4)
    turned, _ = read_video(tmp_path / "turned.mp4", 4)
    expected = np.rot90(stored, rotation // 90, axes=(1, 2))
    assert np.array_equal(turned, expected[:, :, ::-1] if hflip else expected)
    info = probe(tmp_path / "turned.mp4")
    assert (info.height, info.width) == turned.shape[1:3]
    if not hflip:
        assert info.rotation == rotation


@pytest.mark.parametrize("ratio, width", [("4/3", 128), ("1/2", 48), ("1", 96)])
def test_pixels_become_square(tmp_path, ratio, width):
    write_index_video(tmp_path / "film.mp4", 3, sample_aspect_ratio=ratio)
    frames, _ = read_video(tmp_path / "film.mp4")
    assert frames.shape == (1, 64, width, 3)
    assert (probe(tmp_path / "film.mp4").width, probe(tmp_path / "film.mp4").height) == (width, 64)


def test_odd_sizes(tmp_path):
    write_index_video(tmp_path / "film.mp4", 30, height=67, width=101, pixel_format="yuv444p")
    frames, _ = read_video(tmp_path / "film.mp4", 8)
    assert frames.shape == (10, 67, 101, 3)
    assert [read_index(frame) for frame in frames] == list(range(0, 30, 3))


def test_grayscale(tmp_path):
    write_video(tmp_path / "film.mkv", (index_frame(i)[..., 0] for i in range(30)), pixel_format="gray", codec="ffv1")
    frames, _ = read_video(tmp_path / "film.mkv", 8)
    assert np.array_equal(frames, [index_frame(index) for index in range(0, 30, 3)])


@pytest.mark.parametrize("suffix, codec", [("webm", "libvpx-vp9"), ("avi", "mjpeg"), ("mov", "libx265")])
def test_other_codecs(tmp_path, suffix, codec):
    options = {"mjpeg": dict(pixel_format="yuvj420p"), "libx265": {"x265-params": "log-level=none"}}.get(codec, {})
    write_index_video(tmp_path / f"film.{suffix}", 30, codec=codec, **options)
    assert read_indices(tmp_path / f"film.{suffix}", 8) == list(range(0, 30, 3))


def test_frames_are_contiguous_and_writable(tmp_path):
    write_index_video(tmp_path / "film.mp4", 3, rotation=90)
    ((time, frame),) = iter_frames(tmp_path / "film.mp4")
    assert time == 0
    assert frame.flags.c_contiguous and frame.flags.writeable and frame.dtype == np.uint8


def test_probe(film):
    assert vars(probe(film)) == dict(width=96, height=64, duration=10.0, average_rate=24.0, rotation=0, codec="h264")


# Conversion, transform and memory


def test_transform_sees_each_kept_frame_once(tmp_path):
    write_index_video(tmp_path / "film.mp4", 6, timestamps=[0, 500, 900, 3100, 3200, 3900])
    seen = []

    def shrink(frame):
        seen.append(read_index(frame))
        return frame[::2, ::2, 0].astype(np.float32)

    frames, timestamps = read_video(tmp_path / "film.mp4", 1, shrink)
    assert seen == [0, 2]  # frame 2 is on screen at 1, 2 and 3 seconds
    assert frames.shape == (4, 32, 48) and frames.dtype == np.float32
    assert np.array_equal(frames[1], frames[2]) and np.array_equal(frames[1], frames[3])
    assert timestamps.tolist() == [0, 1, 2, 3]


def test_only_kept_frames_are_converted(film, monkeypatch):
    converted = []

    class Reformatter:
        def __init__(self):
            self.real = av.video.reformatter.VideoReformatter()

        def reformat(self, frame, *args, **kwargs):
            converted.append(frame.pts)
            return self.real.reformat(frame, *args, **kwargs)

    monkeypatch.setattr(video_reader, "VideoReformatter", Reformatter)
    read_video(film, 0.5)
    assert len(converted) == 5


def test_hidden_frames_are_not_decoded(film):
    """Frames that other frames depend on, and frames about to be shown, are decoded."""
    with video_reader._open(film) as opened:
        assert 10 < sum(1 for _ in opened.frames(1.0)) < 180


def test_an_error_in_transform_is_passed_on_unchanged(film):
    error = ValueError("mine")

    def fail(frame):
        raise error

    with pytest.raises(ValueError) as caught:
        read_video(film, transform=fail)
    assert caught.value is error and error.__cause__ is None


def test_transform_must_return_one_shape(film):
    def crop(frame):
        return frame[: 10 + read_index(frame)]

    with pytest.raises(
        ValueError, match=r"one shape for all frames of .*film.mp4; it returned \(34, 96, 3\) at 1 sec"
    ):
        read_video(film, transform=crop)


@pytest.mark.parametrize("suffix", ["mp4", "h264"], ids=["length-known", "length-unknown"])
def test_memory_is_that_of_the_array(tmp_path, suffix):
    write_index_video(tmp_path / f"film.{suffix}", 900, preset="ultrafast")
    tracemalloc.start()
    try:
        frames, _ = read_video(tmp_path / f"film.{suffix}", 24, progress=False)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(frames) == 900
    assert held < 1.02 * frames.nbytes
    assert peak < 1.15 * frames.nbytes


def test_closing_the_generator_early_closes_the_file(film):
    def is_open():
        return str(film) in {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc to see which files are open")
    frames = iter_frames(film)
    next(frames)
    assert is_open()
    frames.close()
    assert not is_open()


# Sources


@pytest.mark.parametrize("kind", ["str", "path", "bytes", "file", "memory", "pipe", "url"])
def test_sources(film, kind, tmp_path):
    class Pipe(io.RawIOBase):
        """A stream that cannot seek."""

        def __init__(self, file):
            self.file = file

        def readable(self):
            return True

        def read(self, size=-1):
            return self.file.read(size)

    with open(film, "rb") as file:
        source = {
            "str": lambda: str(film),
            "path": lambda: film,
            "bytes": film.read_bytes,
            "file": lambda: file,
            "memory": lambda: io.BytesIO(film.read_bytes()),
            "pipe": lambda: Pipe(file),
            "url": film.as_uri,
        }[kind]()
        assert read_indices(source, 1) == list(range(0, 240, 24))
        if kind in ("file", "memory"):
            assert not source.closed
            assert read_indices(source, 0.5) == list(range(0, 240, 48))  # from its beginning again


def test_names_that_look_like_protocols(film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(film, "talk: part 1.mp4")
    assert len(read_video("talk: part 1.mp4")[0]) == 10


def test_sound_and_cover_pictures_are_ignored(tmp_path):
    write_index_video(tmp_path / "sound.mkv", 48, with_sound=5.0)
    write_index_video(tmp_path / "cover.mp4", 48, cover=True)
    assert read_indices(tmp_path / "sound.mkv", 1) == [0, 24]
    assert read_indices(tmp_path / "cover.mp4", 1) == [0, 24]


# The progress bar


@pytest.fixture
def progress_bars():
    """Turns on the progress bars of Transformers for a test."""
    was_enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.enable_progress_bar()
    yield
    if not was_enabled:
        transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("progress, shown", [(True, True), (False, False), (None, False)])
def test_progress_bar(film, capsys, progress_bars, progress, shown):
    """By default a bar appears after two seconds, and reading this film takes less."""
    read_video(film, progress=progress)
    assert ("film.mp4" in capsys.readouterr().err) is shown


def test_progress_bar_obeys_the_switch_of_transformers(film, capsys, progress_bars):
    transformers.utils.logging.disable_progress_bar()
    try:
        read_video(film, progress=True)
    finally:
        transformers.utils.logging.enable_progress_bar()
    assert capsys.readouterr().err == ""


# Bad arguments and bad files


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf, "1", None, 1j])
@pytest.mark.parametrize("read", [iter_frames, read_video])
def test_bad_frame_rate(read, rate):
    with pytest.raises(ValueError, match="frame_rate must be a finite number .* above 0; got") as caught:
        read("no such file", rate)
    assert repr(rate) in str(caught.value)


@pytest.mark.parametrize("read", [probe, read_video, lambda source: next(iter_frames(source))])
def test_missing_file(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere\.mp4: check its path"):
        read(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("source", [12, None, ["a.mp4"], io.StringIO("text")])
def test_values_that_are_no_source(source):
    with pytest.raises(TypeError, match="must be a path, a URL, bytes, or a file opened in binary mode; got <"):
        read_video(source)


def bad_directory(path):
    path.mkdir()


def bad_text(path):
    path.write_text("Fade in. A room.\n" * 100)


def bad_empty(path):
    path.touch()


def bad_no_index(path):
    film = index_video_bytes(100)
    path.write_bytes(film[: len(film) // 2])


def bad_sound_only(path, cover=False):
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        picture = container.add_stream("mjpeg", rate=1) if cover else None
        if picture is not None:
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        for start in range(0, 8000, 1024):
            piece = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            piece.rate, piece.pts = 8000, start
            container.mux(sound.encode(piece))
        container.mux(sound.encode())
        if picture is not None:
            container.mux(picture.encode(av.VideoFrame(64, 48, "yuvj420p")))
            container.mux(picture.encode())


def bad_cover(path):
    bad_sound_only(path, cover=True)


def bad_no_frame(path):
    """Writes a film and overwrites every packet."""
    write_index_video(path, 20)
    overwrite_packets(path, range(20))


def overwrite_packets(path, numbers):
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for number in numbers:
        position, size = places[number]
        content[position : position + size] = bytes(size)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (bad_directory, "is a directory: give the path of one video file"),
        (bad_text, "is not a video that FFmpeg can read: check"),
        (bad_empty, r"is empty \(0 bytes\): make or copy it again"),
        (bad_no_index, r"has no index \(moov atom\).*: make or copy it again"),
        (bad_sound_only, "has no video, only sound or a cover picture: give"),
        (bad_cover, "has no video, only sound or a cover picture: give"),
        (bad_no_frame, "could be decoded: .*; copy it again"),
    ],
)
@pytest.mark.parametrize("read", [probe, read_video])
def test_unreadable_files(tmp_path, read, spoil, message):
    path = tmp_path / "bad film.mp4"
    spoil(path)
    with pytest.raises(VideoReadError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_bytes_and_addresses():
    with pytest.raises(VideoReadError, match="<bytes> is not a video that FFmpeg can read"):
        read_video(b"")
    with pytest.raises(VideoReadError, match="<bytes> is not a video that FFmpeg can read"):
        read_video(b"not a film")
    with pytest.raises(VideoReadError, match=r"nosuch://film could not be opened \(Protocol not found\): check"):
        read_video("nosuch://film")


@pytest.mark.parametrize("sound", [0.0, 10.0], ids=["silent", "with-sound"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_film_cut_short_is_read_up_to_the_cut(tmp_path, suffix, sound):
    path = tmp_path / f"film.{suffix}"
    write_video(path, moving_frames(240), faststart=suffix == "mp4", with_sound=sound, preset="veryfast")
    whole, _ = read_video(path, 2)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(
        UserWarning, match=r"film\.\w+ ends early: [3-6]\.\d of 10\.\d seconds could be decoded"
    ) as caught:
        frames, timestamps = read_video(path, 2)
    assert len(caught) == 1
    assert 6 < len(frames) == len(timestamps) < 14
    assert np.array_equal(frames[:-1], whole[: len(frames) - 1])  # B-frames before the last frame may be missing


def test_a_broadcast_cut_short_is_read_up_to_the_cut(tmp_path):
    """MPEG-TS stores no total length, so that no warning is possible."""
    path = tmp_path / "film.ts"
    write_video(path, moving_frames(240), preset="veryfast")
    whole, _ = read_video(path, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, _ = read_video(path, 2)
    assert 6 < len(frames) < 14
    assert np.array_equal(frames[:-1], whole[: len(frames) - 1])


def test_a_source_that_fails_midway(tmp_path):
    write_video(tmp_path / "film.mkv", moving_frames(240), preset="veryfast")
    content = (tmp_path / "film.mkv").read_bytes()

    class Dying(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > len(content) // 2:
                raise ConnectionError("the line is dead")
            return super().read(size)

        def seekable(self):
            return False

    with pytest.warns(UserWarning, match=r"<Dying> ends early: [3-6]\.\d of 10\.0 seconds could be decoded"):
        frames, _ = read_video(Dying(content), 2)
    assert 6 < len(frames) < 14


def test_damaged_packets_are_skipped(tmp_path):
    path = tmp_path / "film.mp4"
    write_index_video(path, 240, preset="ultrafast", g=24, bf=0)
    overwrite_packets(path, [60, 61, 130])
    with pytest.warns(UserWarning, match=r"film\.mp4 is damaged: 3 of 240 packets could not be decoded") as caught:
        indices = read_indices(path, 1)
    assert len(caught) == 1
    assert indices == list(range(0, 240, 24))


def test_nothing_is_printed_about_damage(tmp_path, capfd):
    path = tmp_path / "film.mp4"
    write_index_video(path, 48, preset="ultrafast")
    overwrite_packets(path, [20])
    level = av.logging.get_level()
    with pytest.warns(UserWarning):
        read_video(path, progress=False)
    assert capfd.readouterr().err == ""
    assert av.logging.get_level() == level


def test_an_abandoned_film_is_not_warned_about(film):
    frames = iter_frames(film.read_bytes()[: film.stat().st_size // 2])
    next(frames)
    frames.close()
