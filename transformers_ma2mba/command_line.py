"""The command `transformers-ma2mba`.

`plan` tells whether a training step fits a GPU, `ask` answers about a film, and `build`, `convert` and `export` make
checkpoints from published weights and the other way round.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import warnings

import torch
from transformers import AutoConfig, PreTrainedConfig, pipeline

from .checkpoints import LAYOUTS, add_shim, build_model, convert_published, export_model
from .configuration_ma2mba import PRESETS, Ma2mbaConfig
from .gradient_checkpointing import (
    OPTIMIZERS,
    TrainingMemory,
    estimate_training_memory,
    format_memory_size,
    parse_memory_size,
)
from .session import VideoStreamError


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command and its options; None means those of the command line.

    Returns:
        The exit status.

    Raises:
        SystemExit: with status 2 and a message, if an argument is wrong.
    """
    parser = argparse.ArgumentParser(prog="transformers-ma2mba", description="Video-Ma²mba for Transformers.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    _add_plan(commands)
    _add_ask(commands)
    _add_build(commands)
    _add_convert(commands)
    _add_export(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


def _add_plan(commands):
    parser = commands.add_parser(
        "plan",
        help="compute the memory of training, and whether it fits",
        description="Computes the expected memory of one training step on one GPU with multi-axis gradient "
        "checkpointing (MA-GC), and whether it fits.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", help=f"a published size: {', '.join(PRESETS)}")
    model.add_argument("--model", metavar="DIR", help="a directory with a config.json")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=_above_zero, help="length of the film")
    length.add_argument("--tokens", type=_count, help="length of the whole sequence, instead of --seconds")
    parser.add_argument("--fps", type=_above_zero, help="frames per second of film (default: the configuration's)")
    parser.add_argument("--text_tokens", type=int, default=256, help="tokens of questions and answers (default: 256)")
    parser.add_argument("--batch_size", type=_count, default=1, help="films in a batch (default: 1)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="default: bfloat16"
    )
    parser.add_argument(
        "--optimizer",
        default="adamw",
        choices=list(OPTIMIZERS),
        help="; ".join(f"{name}: {state}" for name, state in OPTIMIZERS.items()) + " (default: adamw)",
    )
    parser.add_argument("--freeze_vision", action="store_true", help="do not train the vision tower")
    parser.add_argument("--offload", action="store_true", help="keep checkpoints in host memory")
    parser.add_argument("--fused", action="store_true", help="the layers run with mamba-ssm and causal-conv1d")
    parser.add_argument("--memory_budget", metavar="SIZE", help='memory of the whole GPU, such as "80GiB"')
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")

    def run(options) -> int:
        try:
            # The options have the names of the function's arguments.
            arguments = {name: getattr(options, name) for name in estimate_training_memory.__kwdefaults__}
            memory = estimate_training_memory(_plan_config(options), **arguments)
        except ValueError as error:
            parser.error(str(error))
        print(json.dumps(_plan_report(options, memory), indent=2) if options.json else _plan_table(options, memory))
        return 0

    parser.set_defaults(run=run)


def _plan_config(options: argparse.Namespace) -> PreTrainedConfig:
    """Return the configuration that `plan` is about."""
    if options.preset is not None:
        return Ma2mbaConfig.from_preset(options.preset)
    return _read_config(options.model, "plan", ("ma2mba", "mamba2"))


def _read_config(directory: str, command: str, known: tuple[str, ...]) -> PreTrainedConfig:
    """Read the configuration of a saved model, whose type must be one that the command knows."""
    if not os.path.isfile(os.path.join(directory, "config.json")):
        raise ValueError(f"There is no config.json in {directory!r}: --model takes the directory of a model.")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # its class depends on Transformers and on the wrong field
        raise ValueError(f"The configuration in {directory!r} cannot be read: {error}") from error
    if config.model_type not in known:
        raise ValueError(f"{directory!r} holds a {config.model_type!r} model; {command} knows {' and '.join(known)}.")
    return config


def _plan_report(options: argparse.Namespace, memory: TrainingMemory) -> dict:
    """Arrange the result of `plan` for JSON, with sizes in bytes."""
    given = {name: getattr(options, name) for name in ("seconds", "batch_size", "dtype", "optimizer")}
    report = {"model": options.preset or options.model, **given, **dataclasses.asdict(memory)}
    report["host_total"] = sum(memory.host.values())
    report["plan"]["extra_compute"] = memory.plan.extra_compute
    if memory.memory_budget is None:
        del report["longest_tokens"]
    if memory.memory_budget is None or memory.frame_rate is None:
        del report["longest_seconds"]
    if memory.bytes_with_offload is None:
        del report["bytes_with_offload"]
    return report


def _plan_table(options: argparse.Namespace, memory: TrainingMemory) -> str:
    """Arrange the result of `plan` for people."""
    length = f"{memory.tokens:,} tokens"
    if memory.frames:
        length = f"{memory.frames:,} frames, {length}"
    if options.seconds is not None:
        length = f"{options.seconds:,.10g} s at {memory.frame_rate:g} FPS: {length}"
    lines = [
        f"{options.preset or options.model}, {memory.parameters / 1e9:.2f}B parameters, {options.dtype}, "
        f"batch size {options.batch_size}, optimizer {options.optimizer}",
        length,
        "",
    ]
    places = {
        "On the device": {**memory.device, "in all": memory.device_total},
        "In host memory": {**memory.host, "in all": sum(memory.host.values())},
    }
    for place, sizes in places.items():
        lines += [place, *(f"  {name:<44}{format_memory_size(size):>12}" for name, size in sizes.items())]
    lines += [
        "",
        str(memory.plan),
        "",
        "Of language model and vision tower the larger counts: their activations are not needed at the same time.",
        f"Optimizer: {OPTIMIZERS[options.optimizer]}.",
    ]
    if memory.memory_budget is not None:
        verdict = "fits" if memory.fits else "does not fit"
        plan = "" if memory.fits else ", even with this plan, the smallest"
        lines.append(f"It {verdict} {format_memory_size(memory.memory_budget)}{plan}. {_longest(memory)}")
    if memory.bytes_with_offload is not None:
        lines.append(f"With --offload it would take {format_memory_size(memory.bytes_with_offload)} at least.")
    return "\n".join(lines)


def _longest(memory: TrainingMemory) -> str:
    tokens, seconds = memory.longest_tokens, memory.longest_seconds
    if tokens is None:
        return "The length is not what limits memory on the device."
    if tokens == 0 or seconds == 0:
        constant = format_memory_size(memory.device_before_activations)
        return f"Nothing fits, however short: all but activations takes {constant}."
    film = "" if seconds is None else f"{seconds:,.0f} s of film, "
    return f"Up to {film}{tokens:,} tokens would fit."


def _add_ask(commands):
    parser = commands.add_parser(
        "ask",
        help="answer questions about a film",
        description="Watches a film once, and answers any number of questions about it. Ctrl-C ends the watching "
        "early; the answers are then about the part watched so far.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="film question",
        help="a path or URL of a film, then questions; with --resume, questions only",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="a directory with model and processor (default: the toy model in the package)"
    )
    parser.add_argument("--candidates", nargs="+", metavar="ANSWER", help="answers to choose from, ranked")
    parser.add_argument("--fps", type=_above_zero, help="frames per second of film (default: the configuration's)")
    parser.add_argument(
        "--max_new_tokens", type=_count, metavar="N", help="length limit of an answer (default: 128 tokens)"
    )
    parser.add_argument("--save", metavar="FILE", help="save the state after the film, for --resume")
    parser.add_argument("--resume", metavar="FILE", help="a state saved with --save, in place of a film")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(options) -> int:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = lambda message, *_: print(f"{parser.prog}: warning: {message}", file=sys.stderr)
                report = ask_report(options)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted", file=sys.stderr)
            return 130
        print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else _ask_table(report))
        return 0

    parser.set_defaults(run=run)


def ask_report(options: argparse.Namespace) -> dict:
    """Watch the film, answer the questions, and arrange the result of `ask` for JSON.

    Raises:
        ValueError: if an option is wrong; the message is for the user.
        OSError: if a file cannot be read.
    """
    film, questions = (None, options.inputs) if options.resume else (options.inputs[0], options.inputs[1:])
    if not questions:
        raise ValueError(f"There is no question: give one or several after {film!r}.")
    if options.resume and (options.fps is not None or os.path.exists(questions[0])):
        given = f"--fps {options.fps:g}" if options.fps is not None else repr(questions[0])
        raise ValueError(f"The film of --resume has been watched already: leave out {given}, and give questions only.")
    if options.model is not None:
        _read_config(options.model, "ask", ("ma2mba",))
    try:
        qa = pipeline("video-question-answering", model=options.model)
    except Exception as error:  # its class depends on Transformers and on the wrong file
        raise ValueError(f"The model in {options.model!r} cannot be loaded: {error}") from error
    if options.resume:
        watched = qa.resume(options.resume)
    else:
        try:
            watched = qa.watch(film, fps=options.fps)
        except VideoStreamError as error:
            warnings.warn(f"{error} The answers are about the part before that.", UserWarning, stacklevel=2)
            watched = error.session
    if options.save:
        watched.save(options.save)
    limit = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    results = watched.ask(questions, candidates=options.candidates, **limit)
    return {
        "film": film or options.resume,
        "model": qa.model.name_or_path,
        "seconds": watched.seconds,
        "frames": watched.num_frames,
        "tokens": watched.num_tokens,
        "answers": [
            {"question": question, **({"candidates": result} if options.candidates else result)}
            for question, result in zip(questions, results, strict=True)
        ],
    }


def _ask_table(report: dict) -> str:
    lines = []
    for entry in report["answers"]:
        lines.append(entry["question"])
        lines += [f"  {result['score']:.3f}  {result['answer']}" for result in entry.get("candidates", [entry])]
    return "\n".join(lines)


def _add_build(commands):
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

    def run(options):
        build_model(
            options.language_model,
            options.vision_model,
            options.output,
            seed=options.seed,
            **_written(options),
        )

    parser.set_defaults(run=_reported(parser, run))


def _add_convert(commands):
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

    def run(options):
        convert_published(
            options.source,
            options.output,
            vision_model=options.vision_model,
            **_written(options),
        )

    parser.set_defaults(run=_reported(parser, run))


def _add_export(commands):
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

    def run(options):
        export_model(
            options.checkpoint,
            options.output,
            options.layout,
            vision_tower=options.vision_tower,
            max_shard_size=options.max_shard_size,
        )

    parser.set_defaults(run=_reported(parser, run))


def _add_folder(parser: argparse.ArgumentParser):
    """Add the options of commands that write a folder."""
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder for the model")
    parser.add_argument(
        "--max_shard_size", metavar="SIZE", type=_size, default="5GB", help="of a safetensors file (default: 5GB)"
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


def _reported(parser: argparse.ArgumentParser, run):
    """Wrap a command that writes a folder: errors end it with a message, and success names the folder."""

    def reported(options) -> int:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = lambda message, *_: print(f"{parser.prog}: warning: {message}", file=sys.stderr)
                run(options)
                if getattr(options, "with_shim", False):
                    add_shim(options.output)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted", file=sys.stderr)
            return 130
        print(f"Wrote {options.output}.")
        return 0

    return reported


def _size(text: str) -> int:
    try:
        return parse_memory_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number above 0; got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"it must be a whole number above 0; got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
