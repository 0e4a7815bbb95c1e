"""The commands `build`, `convert` and `export`: checkpoints of all layouts."""

import argparse

import torch

from ..checkpoints import LAYOUTS, add_shim, build_model, convert_published, export_model
from .arguments import reported, size


def add_build(commands):
    """Add the command `build`."""
    parser = commands.add_parser(
        "build",
        help="put a new model together from a language model and a vision encoder",
        description="Writes a new model from a published Mamba-2 and a published CLIP or SigLIP. The projector "
        "between them is random and must be trained. The weights pass through memory one by one.",
    )
    parser.add_argument(
        "--language_model",
        metavar="DIR",
        required=True,
        help="a Mamba-2 in the original layout, in Transformers' or in Codestral's",
    )
    parser.add_argument(
        "--vision_model", metavar="DIR", required=True, help="a CLIP or SigLIP in Transformers' layout"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="a folder or hub name (default: the language model's folder)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights (default: 0)")
    _add_output(parser)

    def write(options):
        build_model(
            options.language_model,
            options.vision_model,
            options.output,
            seed=options.seed,
            **_written(options),
        )

    _write(parser, write)


def add_convert(commands):
    """Add the command `convert`."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint of the authors' layout in this package's",
        description="Writes a Video-Ma²mba in its authors' layout (model type llava_mamba, or mamba2 with mm_* keys) "
        "in this package's. The weights pass through memory one by one.",
    )
    parser.add_argument("source", metavar="SOURCE", help="the folder of the checkpoint")
    parser.add_argument(
        "--vision_model", metavar="DIR", help="the vision encoder's folder (default: mm_vision_tower in config.json)"
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="a folder or hub name (default: the checkpoint's, or the one it names)"
    )
    _add_output(parser)

    def write(options):
        convert_published(
            options.source,
            options.output,
            vision_model=options.vision_model,
            **_written(options),
        )

    _write(parser, write)


def add_export(commands):
    """Add the command `export`."""
    parser = commands.add_parser(
        "export",
        help="write a saved model, or its language model, in another layout",
        description="Writes a saved model in another layout, bit by bit. The weights pass through memory one by one.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the folder of a saved model")
    parser.add_argument(
        "--layout",
        required=True,
        choices=list(LAYOUTS),
        help="; ".join(f"{name}: {meaning}" for name, meaning in LAYOUTS.items()),
    )
    parser.add_argument(
        "--vision_tower", metavar="NAME", help="for the published layout: the vision encoder's hub name or folder"
    )
    _add_folder(parser)

    def write(options):
        export_model(
            options.checkpoint,
            options.output,
            options.layout,
            vision_tower=options.vision_tower,
            max_shard_size=options.max_shard_size,
        )

    _write(parser, write)


def _add_folder(parser: argparse.ArgumentParser):
    """Add the options of commands that write a folder."""
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder for the model")
    parser.add_argument(
        "--max_shard_size", metavar="SIZE", type=size, default="5GB", help="of a safetensors file (default: 5GB)"
    )


def _add_output(parser: argparse.ArgumentParser):
    """Add the options of commands that write a checkpoint in this package's layout."""
    _add_folder(parser)
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="of all weights (default: the stored weights')"
    )
    parser.add_argument(
        "--with_shim", action="store_true", help="make the checkpoint load with trust_remote_code=True, too"
    )


def _written(options: argparse.Namespace) -> dict:
    """Return the arguments of functions that write a checkpoint in this package's layout."""
    dtype = options.dtype and getattr(torch, options.dtype)
    return {"tokenizer": options.tokenizer, "dtype": dtype, "max_shard_size": options.max_shard_size}


def _write(parser: argparse.ArgumentParser, write):
    """Make `write`, which writes a folder, what the command does."""

    def run(options):
        write(options)
        if getattr(options, "with_shim", False):
            add_shim(options.output)
        print(f"Wrote {options.output}.")

    parser.set_defaults(run=reported(parser, run))
