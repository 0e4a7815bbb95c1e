"""The command `plan`: the memory of a training step."""

import argparse
import dataclasses
import json

from transformers import PreTrainedConfig

from ..configuration_ma2mba import PRESETS, Ma2mbaConfig
from ..gradient_checkpointing import OPTIMIZERS, TrainingMemory, estimate_training_memory, format_memory_size
from .arguments import above_zero, count, read_config, reported


def add(commands):
    """Add the command."""
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
    length.add_argument("--seconds", type=above_zero, help="length of the film")
    length.add_argument("--tokens", type=count, help="length of the whole sequence, instead of --seconds")
    parser.add_argument("--fps", type=above_zero, help="frames per second of film (default: the configuration's)")
    parser.add_argument("--text_tokens", type=int, default=256, help="tokens of questions and answers (default: 256)")
    parser.add_argument("--batch_size", type=count, default=1, help="films in a batch (default: 1)")
    add_step_options(parser)

    def run(options):
        memory = training_memory(options)
        print(json.dumps(report(options, memory), indent=2) if options.json else table(options, memory))

    parser.set_defaults(run=reported(parser, run))


def add_step_options(parser: argparse.ArgumentParser):
    """Add the options about a training step that do not depend on its length."""
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
    parser.add_argument("--lora_rank", type=count, help="train adapters of this rank on all linear layers instead")
    parser.add_argument("--load_in_4bit", action="store_true", help="the weights under the adapters are in 4 bits")
    parser.add_argument("--offload", action="store_true", help="keep checkpoints in host memory")
    parser.add_argument("--fused", action="store_true", help="the layers run with mamba-ssm and causal-conv1d")
    parser.add_argument("--memory_budget", metavar="SIZE", help='memory of the whole GPU, such as "80GiB"')
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")


def training_memory(options: argparse.Namespace) -> TrainingMemory:
    """Estimate the memory of the training step that the options describe."""
    # The options have the names of the function's arguments.
    arguments = {name: getattr(options, name) for name in estimate_training_memory.__kwdefaults__}
    return estimate_training_memory(_config(options), **arguments)


def _config(options: argparse.Namespace) -> PreTrainedConfig:
    """Return the configuration that `plan` is about."""
    if options.preset is not None:
        return Ma2mbaConfig.from_preset(options.preset)
    return read_config(options.model, "plan", ("ma2mba", "mamba2"))


def report(options: argparse.Namespace, memory: TrainingMemory) -> dict:
    """Arrange the result of `plan` for JSON, with sizes in bytes."""
    given = {name: getattr(options, name) for name in ("seconds", "batch_size", "dtype", "optimizer")}
    arranged = {"model": options.preset or options.model, **given, **dataclasses.asdict(memory)}
    arranged["host_total"] = sum(memory.host.values())
    arranged["plan"]["extra_compute"] = memory.plan.extra_compute
    if memory.memory_budget is None:
        del arranged["longest_tokens"]
    if memory.memory_budget is None or memory.frame_rate is None:
        del arranged["longest_seconds"]
    if memory.bytes_with_offload is None:
        del arranged["bytes_with_offload"]
    return arranged


def table(options: argparse.Namespace, memory: TrainingMemory) -> str:
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
