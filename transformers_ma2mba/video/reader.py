"""The video reader: frames of a film at a steady rate, in memory bounded by the frames that are kept.

`iter_frames` and `read_video` sample the frame on screen at 0, 1, 2, … seconds, or at any other rate, upright and with
square pixels. Only sampled frames are converted to RGB, `transform` gets each of them at once, and only its results
stay in memory. FFmpeg decodes, through PyAV.
"""

import errno
import glob
import io
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import BinaryIO

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from transformers.utils.logging import tqdm

from .frames import Clip, FrameFolder

Source = str | os.PathLike | bytes | BinaryIO
Transform = Callable[[np.ndarray], np.ndarray]

# Errors of PyAV, and of a file object that fails while it is read.
_READ_ERRORS = (av.FFmpegError, OSError)
# The fault of the machine and not of the file: too little memory, too many open files, a full disk.
_LACKS = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT}
# Containers with an index of keyframes and their times. In others a time may occur twice, or be only guessed.
_INDEXED = {"mov", "mp4", "matroska", "webm"}
# Containers round times to the ticks of their clocks: 1 ms in Matroska, far less in MP4 and MPEG-TS. A tick of AVI is
# a whole frame, and times in it are not rounded, so that the reader expects no rounding to more than this (seconds).
_MAX_TICK = 1e-3
# The reader does not warn about a film that lacks no more than this many seconds at its end.
_NEGLIGIBLE_LOSS = 0.5
# The most memory that is reserved because of the length in a file's header.
_MAX_RESERVED_BYTES = 2**32


class VideoReadError(ValueError):
    """A file that cannot be read as a video. The message names the file, the reason and the remedy."""


@dataclass(frozen=True)
class VideoInfo:
    """The result of `probe`.

    Attributes:
        width, height: the size of the frames as shown, upright and with square pixels.
        duration: the length in seconds that the file states, in Matroska perhaps that of the sound; None if missing.
        average_rate: frames per second; None if unknown.
        rotation: counter-clockwise degrees, 0 to 359, that turn the stored frames upright.
        codec: FFmpeg's name of the decoder, such as "h264".
    """

    width: int
    height: int
    duration: float | None
    average_rate: float | None
    rotation: int
    codec: str


def probe(source: Source) -> VideoInfo:
    """Describe a film; decode only its first frame. For `source` and errors see `iter_frames`."""
    with _open(source) as film:
        _, frame = next(film.frames(frame_rate=1.0))
        height, width, _ = film.picture(frame).shape
        return VideoInfo(width, height, film.duration, film.average_rate, frame.rotation % 360, film.codec.name)


def iter_frames(
    source: Source,
    frame_rate: float = 1.0,
    transform: Transform | None = None,
    format: str | None = None,
    options: dict[str, str] | None = None,
    timeout: float | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the frames that a film shows at 0, 1/frame_rate, 2/frame_rate, … seconds, up to its end.

    With `start` or `end`, yield those at start, start + 1/frame_rate, … up to the end of this clip, but at least one.
    Reading then begins at the last keyframe before the clip, if the file is an MP4 or a Matroska that can seek.

    The frame at time t is the last one whose presentation time is at most t; the time of the first frame is 0. A frame
    that is on screen at several of these times is yielded as the same array.

    Args:
        source: a path, a URL (any string with "://" goes to FFmpeg unchanged), the bytes of a file, or a binary file
            object, read from its beginning if it can seek.
        frame_rate: frames per second of film, above 0.
        transform: called once for each sampled frame, for example to resize it.
        format: FFmpeg's name of the container or device, such as "v4l2", if FFmpeg cannot recognise it; `source` then
            goes to FFmpeg unchanged.
        options: options of FFmpeg's demuxer, such as `{"video_size": "640x360"}`.
        timeout: seconds after which a source that opens or sends nothing counts as ended; by default it never does.
        start: seconds from the start of the film to that of the clip; the film's start by default.
        end: seconds from the start of the film to the end of the clip; the film's end by default, and at most.

    Yields:
        (time, frame): seconds from the start of the film, and (height, width, 3) uint8 RGB or the result of
        `transform`. Frames are upright and have square pixels. If a film changes its size, its frames keep that of the
        first.

    Raises:
        FileNotFoundError: if the file does not exist.
        VideoReadError: if it is not a video that can be decoded, or ends before the clip starts.
        ValueError: if `frame_rate` is not a finite number above 0, or the clip does not end after its start; raised by
            the call itself.
        MemoryError, OSError: if there is too little memory, or too many files are open.

    Warns:
        UserWarning: if the film ends earlier than its file states, or damaged packets were skipped.
    """
    frame_rate, clip = checked_frame_rate(frame_rate), Clip(source, start, end)

    def frames():
        with _open_clip(clip, frame_rate, format, options, timeout) as film:
            yield from _sample(film, frame_rate, transform, clip)

    return frames()


def read_video(
    source: Source,
    frame_rate: float = 1.0,
    transform: Transform | None = None,
    progress: bool | None = None,
    start: float | None = None,
    end: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read the frames of `iter_frames` into one array, in hardly more memory than the array takes.

    Args:
        source, frame_rate, transform, start, end: as for `iter_frames`; `transform` must return one shape for all
            frames.
        progress: whether to show a bar, in seconds of film. By default it appears if reading takes over 2 seconds.

    Returns:
        frames: (num_frames, height, width, 3) uint8 RGB, or (num_frames, *shape) from `transform`.
        timestamps: (num_frames,) float64 seconds from the start of the film.

    Raises:
        ValueError: if `transform` returns different shapes; for other errors and warnings see `iter_frames`.
    """
    frame_rate, clip = checked_frame_rate(frame_rate), Clip(source, start, end)
    num_frames = 0
    with _open_clip(clip, frame_rate) as film:
        seconds = max(0.0, min(film.duration or 0, math.inf if end is None else end) - (start or 0))
        with progress_bar(os.path.basename(film.name), seconds, progress) as bar:
            for time, frame in _sample(film, frame_rate, transform, clip):
                frame = np.asarray(frame)
                if num_frames == 0:
                    # The system provides memory when it is written to, so that reserving too much costs nothing.
                    reserved = min(math.ceil(seconds * frame_rate), _MAX_RESERVED_BYTES // max(frame.nbytes, 1)) + 1
                    frames = np.empty((reserved, *frame.shape), frame.dtype)
                elif frame.shape != frames.shape[1:]:
                    raise ValueError(
                        f"transform must return one shape for all frames of {film.name}; it returned {frame.shape} at "
                        f"{time:g} seconds and {frames.shape[1:]} before."
                    )
                elif num_frames == len(frames):
                    # By a tenth only: resize writes zeros to the added memory.
                    frames.resize((num_frames + num_frames // 10 + 16, *frame.shape), refcheck=False)
                frames[num_frames] = frame
                bar.update(int(num_frames / frame_rate) - int(max(0, num_frames - 1) / frame_rate))
                num_frames += 1
    frames.resize((num_frames, *frames.shape[1:]), refcheck=False)
    return frames, (start or 0) + np.arange(num_frames) / frame_rate


def progress_bar(name: str, seconds: float | None, progress: bool | None):
    """A bar in seconds of film.

    Args:
        seconds: the length of the film, or None.
        progress: whether to show the bar; None shows it after two seconds.
    """
    total = round(seconds or 0) or None
    return tqdm(desc=name, total=total, unit="s", delay=0 if progress else 2, disable=progress is False)


def _sample(film: "_Film", frame_rate: float, transform: Transform | None, clip: Clip):
    """Sample and hold: a frame stays on screen until the time of the next, and the last one until the film ends."""
    start, wanted = clip.start or 0.0, math.inf
    if clip.end is not None:  # a millionth of a sample allows for inexact arithmetic
        wanted = max(1, math.ceil((clip.end - start) * frame_rate - 1e-6))
    index, on_screen = 0, None
    for until, next_frame in film.frames(frame_rate):
        picture = None
        while on_screen is not None and index < wanted and start + index / frame_rate < until - film.tolerance:
            if picture is None:
                picture = film.picture(on_screen)
                if transform is not None:
                    picture = transform(picture)
            yield start + index / frame_rate, picture
            index += 1
        if index == wanted:
            return film.warn_of_damage()
        on_screen = next_frame
    if index == 0:
        raise VideoReadError(f"{film.name} ends at {until:.2f} seconds, before the clip starts at {start:g} seconds.")


class _Film:
    """The best video stream of an open container; `name` stands for the file in messages."""

    def __init__(self, container: av.container.InputContainer, name: str, can_seek: bool):
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise VideoReadError(f"{name} has no video, only sound or a cover picture: give a file that has one.")
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise VideoReadError(f"{name} is in a format that this FFmpeg cannot decode: convert it, say, to H.264.")
        stream.thread_type = "AUTO"  # decodes several frames at a time if the codec allows
        rate = stream.average_rate or stream.guessed_rate
        self.container, self.stream, self.codec, self.name = container, stream, stream.codec_context, name
        self.average_rate = float(rate) if rate else None
        self.tick = float(stream.time_base)
        self.tolerance = 0.6 * min(self.tick, _MAX_TICK)  # seconds: half a tick, and some for a rounded rate
        self._has_index = can_seek and not _INDEXED.isdisjoint(container.format.name.split(","))
        self.first_sample = 0.0  # seconds from the film's start to that of a clip
        self._start = None  # the first frame's timestamp, in ticks
        self._is_interlaced = False  # whether any frame so far was interlaced
        self._size = None  # the first frame's (width, height) in square pixels, before it is turned upright
        self._reformatter = VideoReformatter()
        self._from_keyframe = None  # the frames from that of `seek` on
        self._num_packets = self._num_damaged = 0
        self._other_packet = None  # the last packet of another stream
        self._failure = None  # the error that ended reading

    @property
    def duration(self) -> float | None:
        """The length in seconds that the file states for the video, or else for the whole file."""
        if (self.stream.duration or 0) > 0:
            return self.stream.duration * self.tick
        # Matroska and Flash count from 0, whenever the film starts.
        length = (self.container.duration or 0) - max(self.container.start_time or 0, 0)
        return length / av.time_base if length > 0 else None

    def picture(self, frame: av.VideoFrame) -> np.ndarray:
        """Convert a decoded frame to (height, width, 3) uint8 RGB, upright, with square pixels."""
        interpolation = None if self._size == (frame.width, frame.height) else "BICUBIC"
        rgb = self._reformatter.reformat(frame, *self._size, format="rgb24", interpolation=interpolation)
        pixels = rgb.to_ndarray()
        if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
            # The matrix moves the pixel at column x and row y to column a x + c y and row b x + d y, plus an offset.
            a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
            if abs(b) > abs(a):
                pixels, a, d = pixels.swapaxes(0, 1), c, b
            pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return np.ascontiguousarray(pixels)

    def seek(self, frame_rate: float) -> bool:
        """Go on from the last keyframe before the first sample, if the file has an index of keyframes.

        Returns:
            Whether `frames` gives the same samples as without seeking. If not, open the film again.
        """
        start = self.first_sample
        if start == 0 or not self._has_index:
            return True
        first = next(self._decode(frame_rate, self._packets()), None)
        if first is None or first.pts is None:
            return False
        self._begin_with(first)
        self._start = first.pts
        try:
            self.container.seek(self._start + math.floor((start + self.tolerance) / self.tick), stream=self.stream)
        except _READ_ERRORS:
            return False
        self._num_packets = self._num_damaged = 0
        packets = self._packets()
        key = next(packets, None)
        if key is None or key.pts is None or start < self._seconds(key.pts) - self.tolerance:
            return False
        for frame in (decoded := self._decode(frame_rate, chain([key], packets))):
            # In an open group of pictures, frames that are shown before the keyframe need the group before.
            if frame.pts is None or frame.pts >= key.pts:
                self._from_keyframe = chain([frame], decoded)
                return frame.pts == key.pts and frame.key_frame
        return False

    def frames(self, frame_rate: float) -> Iterator[tuple[float, av.VideoFrame | None]]:
        """Yield (seconds from the start, frame) in the order shown, and at last (seconds at the film's end, None).

        Frames that leave the screen before the next sample at `frame_rate` may be missing.
        """
        usual_length = 1 / (self.average_rate or 25)
        frame, time, end = None, 0.0, 0.0
        for frame in self._from_keyframe or self._decode(frame_rate, self._packets()):
            self._begin_with(frame)
            if frame.pts is None:
                time = end
            else:
                if self._start is None or self._seconds(frame.pts) < time - 1:
                    # The film starts, or a second recording joined to it continues where the first one ended.
                    self._start = frame.pts - round(end / self.tick)
                # AVI stores no presentation times, and the times that FFmpeg infers may step back a little.
                time = max(time, self._seconds(frame.pts))
            end = time + (self.tick * (frame.duration or 0) or usual_length)
            yield time, frame
        if frame is None:
            raise VideoReadError(
                f"Not one frame of {self.name} could be decoded: the file is damaged or encrypted; copy it again."
            )
        # The last frame's time and length may both be rounded up. Even the shortest film must show its first frame.
        yield max(end - self.tolerance, 2 * self.tolerance), None
        self._warn_of_losses(end)

    def _begin_with(self, frame: av.VideoFrame):
        """Keep the first frame's size, and whether any frame is interlaced."""
        self._is_interlaced |= frame.interlaced_frame
        if self._size is None:
            self._size = max(1, round(frame.width * (self.stream.sample_aspect_ratio or 1))), frame.height

    def _seconds(self, pts: int) -> float:
        return (pts - self._start) * self.tick

    def _decode(self, frame_rate: float, packets: Iterable[av.Packet]) -> Iterator[av.VideoFrame]:
        """Decode intact packets, except hidden frames from which no other frame is predicted.

        A frame is hidden if a later one, already in the decoder, replaces it on screen before the next sample. Only
        H.264 marks references reliably. Interlaced frames are never left out, because the two fields of one may be in
        separate packets.
        """
        latest_pts = None
        for packet in packets:
            hidden = False
            marks_references = self.codec.name == "h264" and not self._is_interlaced
            if marks_references and None not in (packet.pts, latest_pts, self._start) and packet.pts < latest_pts:
                # Is there no sample between the two? Half a tolerance on both sides allows for inexact arithmetic.
                first = self._seconds(packet.pts) - 1.5 * self.tolerance - self.first_sample
                last = self._seconds(latest_pts) - 0.5 * self.tolerance - self.first_sample
                hidden = last < 0 or math.floor(first * frame_rate) == math.floor(last * frame_rate)
            self.codec.skip_frame = "NONREF" if hidden else "DEFAULT"
            try:
                frames = packet.decode()
            except _READ_ERRORS as error:
                self._count_damage(error)
                continue
            if packet.pts is not None and (latest_pts is None or packet.pts > latest_pts):
                latest_pts = packet.pts
            yield from frames
        try:
            frames = self.codec.decode(None)  # frames that the decoder held back to put them in order
        except _READ_ERRORS as error:
            self._count_damage(error)
        else:
            yield from frames

    def _count_damage(self, error: Exception):
        if lacks_resources(error):
            raise error
        self._num_damaged += 1

    def _packets(self) -> Iterator[av.Packet]:
        """Yield the video's intact packets until the file ends or reading fails."""
        packets = self.container.demux()
        while True:
            try:
                packet = next(packets, None)
            except _READ_ERRORS as error:
                if lacks_resources(error):
                    raise
                self._failure = error
                return
            if packet is None:
                return
            if packet.stream_index != self.stream.index:
                self._other_packet = packet if packet.pts is not None else self._other_packet
            elif packet.size:  # to the decoder an empty packet means the end
                self._num_packets += 1
                if packet.is_corrupt:
                    self._num_damaged += 1
                else:
                    yield packet

    def _warn_of_losses(self, end: float):
        """Warns, once, if a film that ended at `end` seconds should be longer, or had damaged packets."""
        if (other := self._other_packet) is not None:  # the stated duration may be that of the sound
            reached = max(end, float(other.pts * other.time_base) - (self._start or 0) * self.tick)
        else:
            reached = end
        is_whole = 0 < self.stream.frames <= self._num_packets
        losses = []
        if self.duration is not None and reached < self.duration - _NEGLIGIBLE_LOSS and not is_whole:
            losses.append(f"ends early: {end:.1f} of {self.duration:.1f} seconds could be decoded")
        elif self._failure is not None:
            losses.append(f"ends early: after {end:.1f} seconds reading failed ({_reason(self._failure)})")
        self.warn_of_damage(losses)

    def warn_of_damage(self, losses: Sequence[str] = ()):
        """Warn, once, if packets were damaged, or of other losses."""
        if self._num_damaged:
            damage = f"is damaged: {self._num_damaged} of {self._num_packets} packets could not be decoded"
            losses = [*losses, damage]
        if losses:
            warnings.warn(f"{self.name} {' and '.join(losses)}.", UserWarning, stacklevel=2)


@contextmanager
def _open_clip(clip: Clip, frame_rate: float, *options) -> Iterator[_Film]:
    """Open a film at the last keyframe before a clip, or at its beginning, and close it at the end."""
    with _open(clip.source, *options) as film:
        film.first_sample = clip.start or 0.0
        if film.seek(frame_rate):
            yield film
            return
    with _open(clip.source, *options) as film:
        film.first_sample = clip.start or 0.0
        yield film


@contextmanager
def _open(source: Source, format=None, options=None, timeout=None) -> Iterator[_Film]:
    """Open a film, and close it at the end."""
    if isinstance(source, FrameFolder):
        source, format, options = (
            _frame_pattern(source),
            "image2",
            {"pattern_type": "glob", "framerate": str(source.fps)},
        )
    file, name = (source, source) if format is not None and isinstance(source, str) else _file_and_name(source)
    try:
        container = av.open(file, mode="r", format=format, options=options, timeout=timeout, metadata_errors="ignore")
    except av.error.InvalidDataError as error:
        advice = "is not a video that FFmpeg can read: check what it is, or convert it to MP4."
        if _first_bytes(file)[4:8] == b"ftyp":  # an MP4 after all
            advice = "has no index (moov atom), as if recording or copying it was cut short: make or copy it again."
        raise VideoReadError(f"{name} {advice}") from error
    except _READ_ERRORS as error:
        if lacks_resources(error):
            raise
        raise VideoReadError(f"{name} could not be opened ({_reason(error)}): check access to it.") from error
    with container:
        yield _Film(container, name, can_seek=format is None and _can_seek(file))


def _frame_pattern(folder: FrameFolder) -> str:
    """The pattern of the images of a folder, for FFmpeg."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith((".jpg", ".jpeg", ".png")))
    except OSError as error:
        raise VideoReadError(f"{folder.path} could not be opened ({_reason(error)}): check access to it.") from error
    suffixes = {os.path.splitext(name)[1] for name in names}
    if len(suffixes) != 1:
        raise VideoReadError(f"{folder.path} must have images of one kind, .jpg or .png; got {sorted(suffixes)}.")
    numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in names]
    if numbers != sorted(numbers):
        raise VideoReadError(
            f"The frames in {folder.path} are not in the order of their names: give them leading zeros."
        )
    return os.path.join(glob.escape(os.path.abspath(folder)), "*" + suffixes.pop())


def _file_and_name(source: Source) -> tuple[str | BinaryIO, str]:
    """Return the argument for PyAV, and the name for messages."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if "://" in path:
            return path, path
        if os.path.isdir(path):
            raise VideoReadError(f"{path} is a directory: give the path of one video file, or `fps` if it has frames.")
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no file {path}: check its path.")
        if os.path.isfile(path) and os.path.getsize(path) == 0:
            raise VideoReadError(f"{path} is empty (0 bytes): make or copy it again.")
        return os.path.abspath(path), path  # FFmpeg takes a relative path with a colon in it for a URL
    name = f"<{type(source).__name__}>"
    if isinstance(source, bytes):
        return io.BytesIO(source), name
    if not hasattr(source, "read") or isinstance(source, io.TextIOBase):
        raise TypeError(f"A video must be a path, a URL, bytes, or a file opened in binary mode; got {name}.")
    _rewind(source)
    return source, source.name if isinstance(getattr(source, "name", None), str) else name


def _first_bytes(file: str | BinaryIO) -> bytes:
    """The bytes that show a file's type, or none if the file cannot be read twice."""
    if isinstance(file, str):
        if not os.path.isfile(file):
            return b""
        with open(file, "rb") as opened:
            return opened.read(12)
    return file.read(12) if _rewind(file) else b""


def _can_seek(file: str | BinaryIO) -> bool:
    if isinstance(file, str):
        return "://" in file or os.path.isfile(file)
    return file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")


def _rewind(file: BinaryIO) -> bool:
    if can_seek := _can_seek(file):
        file.seek(0)
    return can_seek


def lacks_resources(error: Exception) -> bool:
    """Whether an error is the fault of the machine and not of a file: no memory, no room, too many open files."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _LACKS


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def checked_frame_rate(frame_rate: float, name: str = "frame_rate") -> float:
    """Return a frame rate as a float.

    Raises:
        ValueError: if it is not a finite number above 0; the message calls it `name`.
    """
    if not isinstance(frame_rate, Real) or not 0 < frame_rate < math.inf:
        raise ValueError(f"{name} must be a finite number of frames per second above 0; got {frame_rate!r}.")
    return float(frame_rate)
