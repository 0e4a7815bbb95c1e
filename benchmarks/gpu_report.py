"""A page of all measurements on a GPU, beside the paper's figures.

    python benchmarks/gpu_report.py
    python benchmarks/gpu_report.py --output_dir elsewhere

Reads the results that `benchmarks/gpu.sh` has left in `benchmarks/results`, and writes `gpu.md`, `memory_cuda.png` and
`speed_cuda.png` there.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from common.recording import RESULTS

# Name of the results, title, script.
SECTIONS = [
    ("memory_cuda", "Memory of a training step", "memory.py"),
    ("speed_cuda", "Speed of a training step", "speed.py"),
    ("side_by_side", "Beside the authors' code", "side_by_side.py"),
    ("longest", "The longest step in 80 GB", "longest.py"),
    ("film", "A film through the whole model", "film.py"),
    ("breakdown", "Where the time goes", "breakdown.py"),
]


def write_report(output_dir: Path) -> Path | None:
    """Write the page from the reports that the scripts print, and return its path, or None without any results."""
    reports = {}
    for name, title, script in SECTIONS:
        if (output_dir / f"{name}.json").exists():
            command = [sys.executable, str(Path(__file__).with_name(script)), "--device", "cuda", "--plot_only"]
            command += ["--output_dir", str(output_dir)]
            reports[name, title] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if not reports:
        return None
    text = ["# Measured on a GPU", ""]
    for (name, title), process in reports.items():
        report, _ = process.communicate()
        if process.returncode:
            sys.exit(f"{name}.json could not be reported.")
        picture = [f"![{title}]({name}.png)", ""] if (output_dir / f"{name}.png").exists() else []
        text += [f"## {title}", "", *picture, report.removesuffix("\n")]
    page = output_dir / "gpu.md"
    page.write_text("\n".join(text))
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    page = write_report(parser.parse_args().output_dir)
    if page is None:
        raise SystemExit("Nothing has been measured on a GPU yet: run benchmarks/gpu.sh.")
    print(page.read_text())


if __name__ == "__main__":
    main()
