"""H.264 films with moving pictures, for readers of videos."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, FRAMES_PER_SECOND = 640, 360, 24
CLIP_SECONDS = 60


def texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a (height, width, 3) uint8 picture with detail at every scale, as in a photograph."""
    picture = np.zeros((height, width, 3), np.float32)
    for cell in (4, 8, 16, 32, 64, 128):
        coarse = generator.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        rows, columns = np.arange(height) / cell, np.arange(width) / cell
        top, left = rows.astype(int), columns.astype(int)
        down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
        upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
        lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
        picture += (upper * (1 - down) + lower * down) * cell**0.7
    picture -= picture.min()
    return (picture * (255 / picture.max())).astype(np.uint8)


def clip_frames(num_frames: int):
    """Yield shots of six seconds: a camera pan over a texture, three things moving in front of it, and film grain."""
    generator = np.random.default_rng(0)
    grain = generator.normal(scale=4.0, size=(HEIGHT * 2, WIDTH * 2, 1)).astype(np.int16)
    for index in range(num_frames):
        shot_index = index % (6 * FRAMES_PER_SECOND)
        if shot_index == 0:
            background = texture(generator, HEIGHT + 160, WIDTH + 320)
            things = [texture(generator, size, size) for size in (48, 96, 144)]
            paths = generator.uniform(0.5, 3.0, size=(3, 2))
        top, left = shot_index // 2, shot_index * 2
        frame = background[top : top + HEIGHT, left : left + WIDTH].copy()
        for thing, (down, right) in zip(things, paths, strict=True):
            size = len(thing)
            row, column = int(shot_index * down) % (HEIGHT - size), int(shot_index * right) % (WIDTH - size)
            frame[row : row + size, column : column + size] = thing
        row, column = generator.integers(HEIGHT), generator.integers(WIDTH)
        yield np.clip(frame + grain[row : row + HEIGHT, column : column + WIDTH], 0, 255).astype(np.uint8)


def write_film(path: Path, seconds: int) -> None:
    """Write an H.264 film of `seconds` seconds: packets of one encoded clip, repeated with later timestamps."""
    clip_path = path.with_suffix(".clip.mp4")
    with av.open(str(clip_path), "w") as clip:
        stream = clip.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index, pixels in enumerate(clip_frames(min(seconds, CLIP_SECONDS) * FRAMES_PER_SECOND)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FRAMES_PER_SECOND)
            clip.mux(stream.encode(frame))
        clip.mux(stream.encode())
    partial_path = path.with_suffix(".partial.mp4")
    with av.open(str(partial_path), "w") as film:
        stream = None
        for start in range(0, seconds, CLIP_SECONDS):
            with av.open(str(clip_path)) as clip:
                source = clip.streams.video[0]
                stream = stream or film.add_stream_from_template(source)
                for packet in clip.demux(source):
                    if packet.dts is None or packet.pts * packet.time_base + start >= seconds:
                        continue
                    shift = int(start / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                    film.mux(packet)
    clip_path.unlink()
    partial_path.rename(path)


def film_of(folder: Path, seconds: int) -> Path:
    """Return the path of a film of `seconds` seconds in the folder, and write the film if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"film_{seconds}s.mp4"
    if not path.exists():
        print(f"Making {path.name} ...", flush=True)
        write_film(path, seconds)
    return path
