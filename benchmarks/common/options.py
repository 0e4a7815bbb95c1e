"""Command-line options of the benchmarks of training steps, and the job that workers get."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable

import torch

from common.methods import METHODS
from common.recording import RESULTS, new_parser, parse

# A published shape, but smaller. `n_groups` is that of the published models; Mamba2Config's own default is not.
SMALL = dict(num_hidden_layers=16, hidden_size=256, num_heads=8, n_groups=1, vocab_size=8)
# The shape of a rehearsal on the CPU.
TINY = dict(num_hidden_layers=4, hidden_size=32, num_heads=4, head_dim=16, state_size=16, n_groups=1, vocab_size=384)
TINY["chunk_size"] = 16
TINY_LENGTHS = [64, 130]


def base_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks of training steps have."""
    parser = new_parser(description)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", help="shape of 0.7b, 1.8b or 3.1b (default: 3.1b on a GPU, else a small one)")
    parser.add_argument("--num_hidden_layers", type=int, help="in place of the shape's number")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, help="in tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on the CPU (default: %(default)s)")
    parser.add_argument("--layer_interval", type=int, help="of MA-GC (default: planned)")
    parser.add_argument("--sequence_interval", type=int, help="of MA-GC (default: planned)")
    parser.add_argument("--order", choices=["layer-major", "sequence-major"], help="of MA-GC (default: planned)")
    parser.add_argument("--memory_budget", help='budget of MA-GC\'s plans, such as "20GiB" (default: none)')
    parser.add_argument("--step", choices=["embeddings", "tokens"], help="default: tokens on a GPU, else embeddings")
    parser.add_argument("--most_steps", type=int, default=3, help="steps of a length, on a GPU (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="measure only rows that an earlier run lacks")
    parser.add_argument("--tiny", action="store_true", help="rehearse a GPU's run on the CPU; needs --output_dir")
    return parser


def parse_step(
    parser: argparse.ArgumentParser,
    worker: Callable[[dict], Iterable[dict]],
    gpu_lengths: list[int] | None = None,
    cpu_lengths: list[int] | None = None,
) -> argparse.Namespace:
    """Return the options of a benchmark of training steps, or run its worker (see [`parse`]).

    Args:
        worker: yields the rows of a job.
        gpu_lengths: defaults of `--lengths` on a GPU.
        cpu_lengths: the same on a CPU; without them the benchmark needs a GPU or `--tiny`.
    """
    arguments = parse(parser, worker)
    if arguments.tiny:
        arguments.device = "cpu"
        if arguments.output_dir.resolve() == RESULTS.resolve():
            parser.error("--tiny measures nothing of worth: give it an --output_dir of its own.")
    elif arguments.device == "cpu" and cpu_lengths is None:
        sys.exit("This benchmark measures a GPU: --device cuda, or --tiny to rehearse it.")
    defaults = TINY_LENGTHS if arguments.tiny else gpu_lengths if arguments.device == "cuda" else cpu_lengths
    arguments.lengths = sorted(arguments.lengths or defaults or [])
    return arguments


def goes_by_method(arguments: argparse.Namespace) -> bool:
    """Return whether one process measures all lengths of a method: on a GPU, or in a rehearsal of such a run."""
    return arguments.device == "cuda" or arguments.tiny


def base_job(arguments: argparse.Namespace) -> dict:
    """Return the entries that all jobs of a run share."""
    on_gpu = arguments.device == "cuda"
    preset = arguments.preset or ("3.1b" if on_gpu else None)
    shape = TINY if arguments.tiny else SMALL
    if preset is not None:
        from transformers_ma2mba import Ma2mbaConfig

        shape = Ma2mbaConfig.from_preset(preset).text_config.to_dict()
    if arguments.num_hidden_layers:
        shape = {**shape, "num_hidden_layers": arguments.num_hidden_layers}
    names = ("layer_interval", "sequence_interval", "order", "memory_budget")
    return {
        "device": arguments.device,
        "dtype": "bfloat16" if on_gpu else "float32",
        "threads": arguments.threads,
        "shape": shape,
        "step": arguments.step or ("tokens" if goes_by_method(arguments) else "embeddings"),
        "ma_gc": {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None},
    }
