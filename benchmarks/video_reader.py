"""Compares `read_video` with Transformers' own loader on a long film, by time and by memory.

    python benchmarks/video_reader.py                  # two hours of 640x360; Transformers' loader takes 13 GB
    python benchmarks/video_reader.py --seconds 600    # a shorter film

Each reader has a process of its own, one after the other. Memory is the highest resident size above that which the
process reached by its imports. Writes `benchmarks/results/video_reader.json` and `video_reader.md`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, FRAMES_PER_SECOND = 640, 360, 24
CLIP_SECONDS = 60
RESULTS = Path(__file__).parent / "results"
READERS = {
    "stock": '`transformers.video_utils.load_video(film, fps=1, backend="pyav")`, not resized',
    "ours-336": "`read_video(film, frame_rate=1)`, each frame resized to 336x336",
    "ours-32": "`read_video(film, frame_rate=1)`, each frame resized to 32x32",
}


def texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A (height, width, 3) uint8 picture with detail at every scale, as photographs have."""
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
    """Shots of six seconds: a camera pan over a texture, three things that move before it, and film grain."""
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
    """An H.264 film of `seconds` seconds: one clip is encoded and its packets repeated with later timestamps."""
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


def peak_memory() -> int:
    """The highest resident size that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(reader: str, film: str) -> dict:
    """Reads the film once in this process: seconds, CPU seconds, bytes returned, and bytes taken at most."""
    if reader == "stock":
        from transformers.video_utils import load_video

        def read():
            return load_video(film, fps=1, backend="pyav")[0]
    else:
        import torch
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        from transformers_ma2mba.video_reader import read_video

        torch.set_num_threads(1)
        side = int(reader.removeprefix("ours-"))

        def shrink(frame: np.ndarray) -> np.ndarray:
            pixels = torch.from_numpy(frame).permute(2, 0, 1)
            return resize(pixels, [side, side], InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()

        def read():
            return read_video(film, 1.0, shrink, progress=False)[0]

    imports = peak_memory()
    start, cpu_start = time.perf_counter(), time.process_time()
    frames = read()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    taken = peak_memory() - imports
    return {
        "reader": reader,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "frames": list(frames.shape),
        "returned_bytes": frames.nbytes,
        "peak_bytes": taken,
        "peak_over_returned": round(taken / frames.nbytes, 3),
    }


def environment() -> dict:
    """What the figures depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = {package: version(package) for package in ("av", "torch", "torchvision", "transformers", "numpy")}
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def report(results: dict) -> str:
    """The results as a Markdown page."""
    where = results["environment"]
    packages = ", ".join(f"{name} {where[name]}" for name in ("av", "torch", "torchvision", "transformers", "numpy"))
    film = results["film"]
    lines = [
        f"A film of {film['seconds']} seconds, {WIDTH}x{HEIGHT}, {FRAMES_PER_SECOND} frames per second, H.264 at "
        f"{film['kilobits_per_second']} kbit/s, read at one frame per second.",
        "",
        "| reader | seconds | CPU seconds | frames | bytes returned | peak memory | over what is returned |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["readers"]:
        shape = "x".join(str(length) for length in row["frames"])
        lines.append(
            f"| {READERS[row['reader']]} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {shape} "
            f"| {row['returned_bytes'] / 1e6:,.0f} MB | {row['peak_bytes'] / 1e6:,.0f} MB "
            f"| {(row['peak_bytes'] - row['returned_bytes']) / 1e6:,.0f} MB |"
        )
    lines += [
        "",
        "Peak memory is above that of the same process after its imports; it includes the decoder's.",
        "",
        f"{where['cpu']}, {where['cores']} cores; Python {where['python']}, {packages}; `{results['command']}`.",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=7200, help="length of the film (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder that keeps the film for the next run (default: temporary)")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), help="default: all")
    parser.add_argument("--measure", nargs=2, metavar=("READER", "FILM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        film = work / f"film_{arguments.seconds}s.mp4"
        if not film.exists():
            print(f"Making {film.name} ...", flush=True)
            write_film(film, arguments.seconds)
        rows = []
        for reader in arguments.readers:
            print(f"Reading it with {reader} ...", flush=True)
            command = [sys.executable, __file__, "--measure", reader, str(film)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append(json.loads(output.splitlines()[-1]))
        kilobits = round(film.stat().st_size * 8 / arguments.seconds / 1000)
    results = {
        "command": f"python benchmarks/video_reader.py --seconds {arguments.seconds}",
        "film": {"seconds": arguments.seconds, "kilobits_per_second": kilobits},
        "environment": environment(),
        "readers": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "video_reader.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "video_reader.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
