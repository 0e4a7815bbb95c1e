"""Small films for tests, also films whose frames show their own numbers."""

import io
import itertools
from collections.abc import Iterable, Sequence
from fractions import Fraction

import av
import numpy as np

BITS, COLUMNS, BLOCK = 10, 5, 16


def write_video(
    path,
    frames: Iterable[np.ndarray],
    fps=24,
    codec="libx264",
    pixel_format="yuv420p",
    timestamps: Sequence[int] | None = None,
    start=0.0,
    sample_aspect_ratio=None,
    rotation=0,
    hflip=False,
    faststart=False,
    fragmented=False,
    with_sound=0.0,
    cover=False,
    file_format=None,
    **options,
):
    """Writes a film, in the container that the path's suffix or `file_format` names.

    Args:
        path: a path or a binary file object to write to.
        frames: each (height, width, 3) uint8 RGB, or (height, width) uint8 with `pixel_format="gray"`.
        fps: frames per second.
        timestamps: when each frame is shown, in milliseconds, in place of every 1/fps seconds.
        start: when the first frame is shown, in seconds.
        sample_aspect_ratio: width over height of a pixel.
        rotation, hflip: counter-clockwise degrees, and then mirroring, that a player has to apply.
        faststart: whether an MP4's index comes first, so that the start of the file can be played without the rest.
        fragmented: whether an MP4 is one of fragments, each with an index of its own.
        with_sound: seconds of silence in the film.
        cover: whether the file has a larger picture as its cover.
        options: for the encoder.
    """
    rate = Fraction(fps).limit_denominator(1001)
    tick = Fraction(1, 1000) if timestamps is not None else 1 / rate
    frames = iter(frames)
    first = next(frames)
    movflags = "faststart" if faststart else "frag_keyframe+empty_moov" if fragmented else None
    with av.open(path, "w", format=file_format, options={"movflags": movflags} if movflags else {}) as container:
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 640, 480, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream(codec, rate=rate, options={name: str(value) for name, value in options.items()})
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = tick
        if sample_aspect_ratio is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(sample_aspect_ratio)
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        sound = container.add_stream("aac", rate=8000, layout="mono") if with_sound else None
        silence = _silence(with_sound)
        sound_frame = next(silence, None)
        if cover:
            container.mux(picture.encode(av.VideoFrame(640, 480, "yuvj420p")) + picture.encode())
        for index, pixels in enumerate(itertools.chain([first], frames)):
            frame = av.VideoFrame.from_ndarray(pixels, format="gray" if pixels.ndim == 2 else "rgb24")
            frame.pts = round(start / tick) + (index if timestamps is None else timestamps[index])
            frame.time_base = tick
            container.mux(stream.encode(frame))
            while sound_frame is not None and sound_frame.time < frame.time:  # in turn, so that a cut loses both
                container.mux(sound.encode(sound_frame))
                sound_frame = next(silence, None)
        container.mux(stream.encode())
        while sound_frame is not None:
            container.mux(sound.encode(sound_frame))
            sound_frame = next(silence, None)
        if sound is not None:
            container.mux(sound.encode())


def _silence(seconds: float):
    """Yields audio frames of silence."""
    for start in range(0, int(seconds * 8000), 1024):
        sound_frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound_frame.rate, sound_frame.pts, sound_frame.time_base = 8000, start, Fraction(1, 8000)
        yield sound_frame


def index_frame(index: int, height=64, width=96) -> np.ndarray:
    """A (height, width, 3) picture of a number below 1024, in black and white blocks that survive compression."""
    frame = np.full((height, width, 3), 96, np.uint8)
    for bit in range(BITS):
        row, column = BLOCK * (bit // COLUMNS), BLOCK * (bit % COLUMNS)
        frame[row : row + BLOCK, column : column + BLOCK] = 255 * (index >> bit & 1)
    return frame


def read_index(frame: np.ndarray) -> int:
    """Reads the number in an `index_frame`."""
    half = BLOCK // 2
    index = 0
    for bit in range(BITS):
        row, column = BLOCK * (bit // COLUMNS) + half, BLOCK * (bit % COLUMNS) + half
        index |= int(frame[row - 2 : row + 2, column - 2 : column + 2].mean() > 128) << bit
    return index


def write_index_video(path, num_frames: int, height=64, width=96, **options):
    """Writes a film whose frames show 0, 1, 2, …; `options` are those of `write_video`."""
    write_video(path, (index_frame(index, height, width) for index in range(num_frames)), **options)


def index_video_bytes(num_frames: int, file_format="mp4", **options) -> bytes:
    """Returns the bytes of the file that `write_index_video` writes."""
    file = io.BytesIO()
    write_index_video(file, num_frames, file_format=file_format, **options)
    return file.getvalue()


def moving_frames(num_frames: int, height=96, width=160, seed=0):
    """Yields pictures of a moving, noisy background; no two are equal."""
    generator = np.random.default_rng(seed)
    background = generator.integers(0, 256, (height, width + 2 * num_frames, 3), np.uint8)
    background = background // 2 + 64 + generator.integers(0, 60, (height // 8, 1, 1), np.uint8).repeat(8, 0)
    for index in range(num_frames):
        yield np.ascontiguousarray(background[:, 2 * index : 2 * index + width])
