"""The command `check-data`: what a list would train on, without training."""

import argparse
import dataclasses
import json
import math
import warnings
from collections.abc import Callable

from transformers import AutoProcessor

from ..configuration_ma2mba import PRESETS, Ma2mbaConfig
from ..data import BrokenSamples, RowLength, check_rows, count_text_tokens, files_in, histogram, load_rows
from . import plan
from .arguments import above_zero, read_config, reported

_NAMED = 20


def add(commands):
    """Add the command."""
    parser = commands.add_parser(
        "check-data",
        help="read lists of training data, and say what is wrong with them and how long they are",
        description="Reads lists of training data without training: what is wrong with each row and file, how long "
        "the rows are, and the plan for the longest.",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="a JSON list, JSON Lines, Parquet, a folder or a pattern"
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", help=f"a published size, whose text is not counted: {', '.join(PRESETS)}")
    model.add_argument("--model", metavar="DIR", help="a directory with model and processor")
    parser.add_argument("--video_folder", metavar="DIR", help="where paths start (default: the list's folder)")
    parser.add_argument("--no_group", action="store_true", help="do not join the questions about one video")
    parser.add_argument("--interleave", action="store_true", help="join the segments of a video and their captions")
    parser.add_argument("--decode", action="store_true", help="decode each film to its end, which takes long")
    parser.add_argument(
        "--tokens_per_second", type=above_zero, metavar="N", help="of training; tells how long an epoch takes"
    )
    plan.add_step_options(parser)

    def run(options):
        report, longest_plan = _report(options)
        print(
            json.dumps(report, indent=2, ensure_ascii=False) if options.json else _table(options, report, longest_plan)
        )

    parser.set_defaults(run=reported(parser, run))


def _report(options: argparse.Namespace) -> tuple[dict, str]:
    """Read the lists; arrange what is found for JSON, and the plan for the longest row for people."""
    config, fps, count_text = _model(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report has all of them
        broken = BrokenSamples()
        rows = load_rows(
            options.files,
            options.video_folder,
            group=not options.no_group,
            interleave=options.interleave,
            broken=broken,
        )
        found = check_rows(rows, fps, config.tokens_per_frame, count_text, broken, options.decode)
    report = {
        "rows": len(found.lengths),
        "answers": found.num_answers,
        "videos": found.num_videos,
        "images": found.num_images,
        "broken": [{"row": name, "reason": reason} for name, reason in found.broken],
        "notes": [{"file": name, "note": note} for name, note in found.notes],
    }
    for unit in ("seconds", "tokens"):
        values = [getattr(length, unit) for length in found.lengths]
        report[unit] = {"total": sum(values), "longest": max(values, default=0), "histogram": histogram(values)}
    if options.tokens_per_second:
        report["hours_per_epoch"] = report["tokens"]["total"] / options.tokens_per_second / 3600
    if (longest := found.longest) is None:
        return report, ""
    step = _step(options, config, fps, longest)
    memory = plan.training_memory(step)
    report["longest"] = {**dataclasses.asdict(longest), "plan": plan.report(step, memory)}
    return report, plan.table(step, memory)


def _model(options: argparse.Namespace) -> tuple[Ma2mbaConfig, float, Callable[[list[dict]], int]]:
    """Return the model's configuration, its frame rate in training, and a function that counts a row's text tokens."""
    if options.preset is not None:
        config = Ma2mbaConfig.from_preset(options.preset)
        return config, config.frame_rate, lambda messages: 0
    config = read_config(options.model, "check-data", ("ma2mba",))
    processor = AutoProcessor.from_pretrained(options.model)
    # A placeholder stands for each file in the text.
    fps = processor.video_processor.fps
    return config, fps, lambda messages: count_text_tokens(processor, messages) - len(files_in(messages))


def _step(options: argparse.Namespace, config: Ma2mbaConfig, fps: float, longest: RowLength) -> argparse.Namespace:
    """Return the options of `plan` for a step on a row."""
    text_tokens = longest.tokens - longest.frames * config.tokens_per_frame
    if longest.frames:
        length = {"seconds": longest.frames / fps, "tokens": None, "text_tokens": text_tokens}
    else:
        length = {"seconds": None, "tokens": longest.tokens, "text_tokens": 0}
    return argparse.Namespace(**vars(options), **length, batch_size=1, fps=fps)


def _table(options: argparse.Namespace, report: dict, longest_plan: str) -> str:
    """Arrange the report for people."""
    files = f"{report['videos']:,} videos, {report['images']:,} images"
    lines = [f"{report['rows']:,} rows with {report['answers']:,} answers; {files}"]
    for title, entries in (("broken, which training would leave out", "broken"), ("to look at", "notes")):
        found = [": ".join(entry.values()) for entry in report[entries]]
        if found:
            lines += ["", f"{len(found):,} {title}", *(f"  {line}" for line in found[:_NAMED])]
            lines += [f"  and {len(found) - _NAMED:,} more; --json lists all"] * (len(found) > _NAMED)
    if not report["rows"]:
        return "\n".join(lines)
    for unit in ("seconds", "tokens"):
        lines += ["", *_bars(unit, report[unit])]
    if options.preset is not None:
        lines.append("Text is not counted: give --model, whose tokenizer counts it.")
    if "hours_per_epoch" in report:
        hours = f"{report['hours_per_epoch']:,.2f} hours at {options.tokens_per_second:,g} tokens per second"
        lines += ["", f"An epoch takes {hours}."]
    lines += ["", f"The longest row is {report['longest']['name']}. A training step on it:", "", longest_plan]
    return "\n".join(lines)


def _bars(unit: str, lengths: dict) -> list[str]:
    """Draw a histogram."""
    bins = lengths["histogram"]
    most = max(count for _, _, count in bins)
    names = ["0" if high == 0 else f"{low:,g} to {high:,g}" for low, high, _ in bins]
    lines = [f"{unit} of a row; {lengths['total']:,.0f} in all, {lengths['longest']:,.0f} at most"]
    for name, (_, _, count) in zip(names, bins, strict=True):
        lines.append(f"  {name:>24} {'#' * math.ceil(32 * count / most):<32} {count:,}")
    return lines
