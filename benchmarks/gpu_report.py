"""All that has been measured on a GPU on one page, beside the paper's figures.

    python benchmarks/gpu_report.py
    python benchmarks/gpu_report.py --output_dir elsewhere

Reads whichever results `benchmarks/gpu.sh` has left in `benchmarks/results`, and writes `gpu.md`, `memory_cuda.png`
and `speed_cuda.png` there.
"""

import argparse
import json
from pathlib import Path

import breakdown
import film
import longest
import memory
import side_by_side
import speed
from recording import RESULTS

SECTIONS = {
    "memory_cuda": ("Memory of a training step", memory),
    "speed_cuda": ("Speed of a training step", speed),
    "side_by_side": ("Beside the authors' code", side_by_side),
    "longest": ("The longest step in 80 GB", longest),
    "film": ("A film through the whole model", film),
    "breakdown": ("Where the time goes", breakdown),
}


def write_report(output_dir: Path) -> Path | None:
    """The page; None if nothing has been measured."""
    text = []
    for name, (title, module) in SECTIONS.items():
        path = output_dir / f"{name}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        text += [f"## {title}", ""]
        if hasattr(module, "draw"):
            module.draw(results, path.with_suffix(".png"))
            if path.with_suffix(".png").exists():
                text += [f"![{title}]({name}.png)", ""]
        text += [module.report(results)]
    if not text:
        return None
    page = output_dir / "gpu.md"
    page.write_text("\n".join(["# Measured on a GPU", "", *text]))
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    page = write_report(parser.parse_args().output_dir)
    if page is None:
        raise SystemExit("Nothing has been measured on a GPU yet: benchmarks/gpu.sh does it.")
    print(page.read_text())


if __name__ == "__main__":
    main()
