"""`read_video` beside Transformers' own loader on a long film, by time and by memory.

    python benchmarks/video_reader.py                  # two hours of 640x360; Transformers' loader takes 13 GB
    python benchmarks/video_reader.py --seconds 600    # a shorter film
    python benchmarks/video_reader.py --plot_only      # tabulate the results again

Each reader has a process of its own, one after the other. Memory is the highest resident size above that of the
process after its imports (Linux only). Writes `video_reader.json` and `video_reader.md` to `benchmarks/results`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common.films import FRAMES_PER_SECOND, HEIGHT, WIDTH, film_of
from common.memory_use import PeakMemory
from common.recording import (
    VIDEO_PACKAGES,
    Stopwatch,
    describe_environment,
    describe_run,
    new_parser,
    page,
    parse,
    publish,
    require_row,
    table,
)

READERS = {
    "stock": '`transformers.video_utils.load_video(film, fps=1, backend="pyav")`, not resized',
    "ours-336": "`read_video(film, frame_rate=1)`, each frame resized to 336x336",
    "ours-32": "`read_video(film, frame_rate=1)`, each frame resized to 32x32",
}


def make_reader(name: str):
    """Return a function that reads a film to an array of frames."""
    if name == "stock":
        from transformers.video_utils import load_video

        return lambda film: load_video(film, fps=1, backend="pyav")[0]
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    from transformers_ma2mba import read_video

    side = int(name.removeprefix("ours-"))

    def shrink(frame: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(frame).permute(2, 0, 1)
        return resize(pixels, [side, side], InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()

    return lambda film: read_video(film, 1.0, shrink, progress=False)[0]


def measure_reader(job: dict) -> Iterator[dict]:
    """Yield a row of reading the job's film once: seconds, bytes returned, and peak memory."""
    torch.set_num_threads(job["threads"])
    read = make_reader(job["reader"])
    peak, stopwatch = PeakMemory(torch.device("cpu")), Stopwatch()
    frames = read(job["film"])
    row = {"reader": job["reader"], **stopwatch.read(), **peak.read()}
    row |= {"frames": list(frames.shape), "returned_bytes": frames.nbytes}
    yield {**row, "peak_over_returned": round(row["peak_bytes"] / frames.nbytes, 3)}


def report(results: dict) -> str:
    """Return the results as a Markdown page."""
    film = results["film"]
    lines = []
    for row in results["readers"]:
        sizes = (row["returned_bytes"], row["peak_bytes"], row["peak_bytes"] - row["returned_bytes"])
        times = [f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", "x".join(map(str, row["frames"]))]
        lines.append([READERS[row["reader"]], *times, *(f"{size / 1e6:,.0f} MB" for size in sizes)])
    header = [
        "reader",
        "seconds",
        "CPU seconds",
        "frames",
        "bytes returned",
        "peak memory",
        "beyond the bytes returned",
    ]
    return page(
        f"A film of {film['seconds']} seconds, {WIDTH}x{HEIGHT}, {FRAMES_PER_SECOND} frames per second, H.264 at "
        f"{film['kilobits_per_second']} kbit/s, read at one frame per second.",
        table(header, lines),
        "Peak memory is above that of the same process after its imports; it includes the decoder's.",
        describe_environment(results),
    )


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--seconds", type=int, default=7200, help="length of the film (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder that keeps the film for the next run (default: temporary)")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS), help="default: all")
    arguments = parse(parser, measure_reader)

    def measure() -> dict:
        with tempfile.TemporaryDirectory() as temporary:
            film = film_of(arguments.work or Path(temporary), arguments.seconds)
            rows = [
                require_row(__file__, {"threads": 1, "reader": reader, "film": str(film)})
                for reader in arguments.readers
            ]
            kilobits = round(film.stat().st_size * 8 / arguments.seconds / 1000)
        return {
            **describe_run(__file__, packages=VIDEO_PACKAGES),
            "film": {"seconds": arguments.seconds, "kilobits_per_second": kilobits},
            "readers": rows,
        }

    publish(arguments, "video_reader", measure, report, markdown=True)


if __name__ == "__main__":
    main()
