"""The command `transformers-ma2mba`: `plan` tells whether a training run fits a GPU, `ask` answers about a film."""

import argparse
import dataclasses
import json
import math
import os
import sys
import warnings

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

from .checkpoint_plan import CheckpointPlan, longest_sequence, plan_checkpoints, smallest_plan
from .configuration_ma2mba import PRESETS, Ma2mbaConfig
from .memory_size import format_memory_size, parse_memory_size
from .video_session import VideoStreamError

_OPTIMIZERS = {
    "adamw": "AdamW: two moments in float32, and a float32 copy of half-precision weights",
    "none": "no optimizer state",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; `arguments` are those of the command line unless given.

    Returns:
        The exit status. Mistakes in the arguments end in `SystemExit` with status 2 and a message.
    """
    parser = argparse.ArgumentParser(prog="transformers-ma2mba", description="Video-Ma²mba for Transformers.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    _add_plan(commands)
    _add_ask(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


def _add_plan(commands):
    parser = commands.add_parser(
        "plan",
        help="tell what memory training takes, and whether it fits",
        description="Tells what memory one training step on one GPU is expected to take with multi-axis gradient "
        "checkpointing (MA-GC), and whether it fits.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--preset", help=f"a published size: {', '.join(PRESETS)}")
    model.add_argument("--model", metavar="DIR", help="a directory with a config.json")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=_above_zero, help="length of the film")
    length.add_argument("--tokens", type=_count, help="length of the whole sequence instead")
    parser.add_argument("--frame_rate", type=_above_zero, help="frames per second (default: the configuration's)")
    parser.add_argument(
        "--text_tokens", type=int, default=256, help="tokens of questions and answers beside the film (default: 256)"
    )
    parser.add_argument("--batch_size", type=_count, default=1, help="films at a time (default: 1)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="default: bfloat16"
    )
    parser.add_argument(
        "--optimizer",
        default="adamw",
        choices=list(_OPTIMIZERS),
        help="; ".join(f"{name}: {what}" for name, what in _OPTIMIZERS.items()) + " (default: adamw)",
    )
    parser.add_argument("--freeze_vision", action="store_true", help="the vision tower is not trained")
    parser.add_argument("--offload", action="store_true", help="keep checkpoints in host memory")
    parser.add_argument("--fused", action="store_true", help="mamba-ssm and causal-conv1d are installed, for CUDA")
    parser.add_argument("--memory_budget", metavar="SIZE", help='all memory of the GPU, such as "80GiB"')
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")

    def run(options) -> int:
        try:
            report = plan_report(options)
        except ValueError as error:
            parser.error(str(error))
        print(json.dumps(report, indent=2) if options.json else _plan_table(report))
        return 0

    parser.set_defaults(run=run)


def plan_report(options: argparse.Namespace) -> dict:
    """What `plan` found, ready for JSON; sizes in bytes.

    Assumptions: gradients have the type of the weights; the optimizer is as `_OPTIMIZERS` says; weights, gradients and
    optimizer are whole on this GPU. The vision tower's backward comes when the language model's is over, so of the two
    the larger counts.

    Raises:
        ValueError: if an option makes no sense; the message is for the user.
    """
    budget = None if options.memory_budget is None else parse_memory_size(options.memory_budget)
    config = _load_config(options)
    text_config = getattr(config, "text_config", config)
    vision_config = getattr(config, "vision_config", None)
    sequence_length, frames, frame_rate = _sequence(options, config, vision_config)
    dtype = getattr(torch, options.dtype)
    parameters, trained = _count_parameters(config, options.freeze_vision)

    all_trained = sum(trained.values())
    device = {
        **{f"weights: {part}": count * dtype.itemsize for part, count in parameters.items()},
        "gradients": all_trained * dtype.itemsize,
        "optimizer state": all_trained * _optimizer_bytes(options.optimizer, dtype),
    }
    constant = sum(device.values())
    vision = 0
    if vision_config is not None and frames:
        passed = min(config.frames_per_vision_pass, options.batch_size * frames)
        vision = passed * _vision_bytes_per_frame(config, dtype, options.freeze_vision)
    plan_options = dict(batch_size=options.batch_size, dtype=dtype, offload=options.offload, fused=options.fused)
    plan_options["from_ids"] = plan_options["whole_output"] = vision_config is None
    # The gradient of the embeddings is all that is left of the language model when the vision tower's turn comes.
    embedding_bytes = options.batch_size * text_config.hidden_size * dtype.itemsize * (not options.offload)
    vision_moment = vision + sequence_length * embedding_bytes * (vision > 0)

    if budget is None:
        plan, fits = plan_checkpoints(config, sequence_length, **plan_options), None
        longest = {}
    else:
        room = budget - constant
        plan = smallest_plan(config, sequence_length, **plan_options)
        fits = max(plan.device_bytes, vision_moment) <= room
        if fits:
            plan = plan_checkpoints(config, sequence_length, room, **plan_options)
        tokens = longest_sequence(config, room, **plan_options) if room > vision else 0
        if vision and embedding_bytes and tokens:
            tokens = min(tokens, (room - vision) // embedding_bytes)
        longest = {"longest_tokens": tokens}
        if not fits and not options.offload:
            offloaded = smallest_plan(config, sequence_length, **{**plan_options, "offload": True})
            longest["bytes_with_offload"] = constant + max(offloaded.device_bytes, vision)
        if vision_config is not None:
            longest["longest_seconds"] = tokens and _seconds(tokens, options, config, frame_rate)

    device["activations of the language model (MA-GC)"] = plan.device_bytes
    device["vision tower"] = vision
    host = {"checkpoints": plan.host_bytes}
    if vision_config is not None:
        host["pixels (uint8)"] = options.batch_size * frames * 3 * vision_config.image_size**2
    return {
        "model": options.preset or options.model,
        "seconds": options.seconds,
        "frame_rate": frame_rate,
        "frames": frames,
        "tokens": sequence_length,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "optimizer": options.optimizer,
        "parameters": sum(parameters.values()),
        "trained_parameters": all_trained,
        "device": device,
        "device_before_activations": constant,
        "device_total": constant + max(plan.device_bytes, vision_moment),
        "host": host,
        "host_total": sum(host.values()),
        "plan": {**dataclasses.asdict(plan), "extra_compute": plan.extra_compute},
        "memory_budget": budget,
        "fits": fits,
        **longest,
    }


def _load_config(options):
    if options.preset is not None:
        return Ma2mbaConfig.from_preset(options.preset)
    if not os.path.isfile(os.path.join(options.model, "config.json")):
        raise ValueError(f"There is no config.json in {options.model!r}: --model takes the directory of a model.")
    try:
        config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    except Exception as error:  # its kind is up to Transformers and the field that is wrong
        raise ValueError(f"The configuration in {options.model!r} cannot be read: {error}") from error
    if config.model_type not in ("ma2mba", "mamba2"):
        raise ValueError(f"{options.model!r} holds a {config.model_type!r} model; plan knows ma2mba and mamba2.")
    return config


def _sequence(options, config, vision_config) -> tuple[int, int, float | None]:
    """Tokens and frames of a sample, and the frame rate."""
    if options.text_tokens < 0:
        raise ValueError(f"--text_tokens cannot be negative; got {options.text_tokens}.")
    if vision_config is None:
        if options.tokens is None:
            raise ValueError("This model has no vision tower: give --tokens instead of --seconds.")
        return options.tokens, 0, None
    frame_rate = options.frame_rate or config.frame_rate
    if options.tokens is not None:
        return options.tokens, options.tokens // config.tokens_per_frame, frame_rate
    frames = math.ceil(options.seconds * frame_rate)
    return frames * config.tokens_per_frame + options.text_tokens, frames, frame_rate


def _seconds(tokens: int, options, config, frame_rate: float) -> float:
    """Seconds of film that so many tokens hold."""
    return max(tokens - options.text_tokens, 0) // config.tokens_per_frame / frame_rate


def _count_parameters(config, freeze_vision: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters by part, all and those trained, of a model that takes no memory."""
    # Ma2mbaForVideoQA stands in AutoModel; of a stock Mamba-2, the form with a head is trained.
    auto_class = AutoModel if config.model_type == "ma2mba" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    counts, trained = {"language model": 0}, {"language model": 0}
    for name, parameter in model.named_parameters():
        part = "language model"
        if "vision_tower." in name or "multi_modal_projector." in name:
            part = "vision tower and projector"
        counts[part] = counts.get(part, 0) + parameter.numel()
        frozen = freeze_vision and "vision_tower." in name
        trained[part] = trained.get(part, 0) + parameter.numel() * (parameter.requires_grad and not frozen)
    return counts, trained


def _optimizer_bytes(optimizer: str, dtype: torch.dtype) -> int:
    """Bytes of optimizer state for one trained parameter."""
    return {"adamw": 8 + 4 * (dtype.itemsize < 4), "none": 0}[optimizer]


def _vision_bytes_per_frame(config, dtype: torch.dtype, frozen: bool) -> int:
    """Memory of one frame in the vision tower, with attention that keeps no matrix of scores.

    Autograd keeps, of each of a frame's patches in each layer, 8 tensors as wide as the residual (the inputs of both
    norms and their outputs, queries, keys, values, attention's output) and 3 as wide as the MLP. A frozen tower has
    one layer's at a time.
    """
    vision = config.vision_config
    # Features are taken below the last layers; those run too, but keep nothing.
    layers = 1 if frozen else max(config.vision_feature_layer % (vision.num_hidden_layers + 1), 1)
    patches = config.patches_per_side**2 + 1
    return patches * layers * (8 * vision.hidden_size + 3 * vision.intermediate_size) * dtype.itemsize


def _plan_table(report: dict) -> str:
    length = f"{report['tokens']:,} tokens"
    if report["frames"]:
        length = f"{report['frames']:,} frames, {length}"
    if report["seconds"] is not None:
        length = f"{report['seconds']:,.10g} s at {report['frame_rate']:g} FPS: {length}"
    rows = [("On the device", None), *report["device"].items(), ("in all", report["device_total"])]
    rows += [("In host memory", None), *report["host"].items(), ("in all", report["host_total"])]
    lines = [
        f"{report['model']}, {report['parameters'] / 1e9:.2f}B parameters, {report['dtype']}, "
        f"batch size {report['batch_size']}, optimizer {report['optimizer']}",
        length,
        "",
    ]
    for name, size in rows:
        lines.append(name if size is None else f"  {name:<44}{format_memory_size(size):>12}")
    lines += ["", str(CheckpointPlan(**{k: v for k, v in report["plan"].items() if k != "extra_compute"})), ""]
    lines.append(
        "Of language model and vision tower the larger counts: their activations are not needed at the same time."
    )
    lines.append(f"Optimizer: {_OPTIMIZERS[report['optimizer']]}.")
    if report["memory_budget"] is not None:
        verdict = "fits" if report["fits"] else "does not fit"
        plan = "" if report["fits"] else ", even with this plan, the smallest"
        lines.append(f"It {verdict} {format_memory_size(report['memory_budget'])}{plan}. {_longest(report)}")
    if "bytes_with_offload" in report:
        lines.append(f"With --offload it would take {format_memory_size(report['bytes_with_offload'])} at least.")
    return "\n".join(lines)


def _longest(report: dict) -> str:
    tokens, seconds = report["longest_tokens"], report.get("longest_seconds")
    if tokens is None:
        return "The length is not what limits memory on the device."
    if tokens == 0 or seconds == 0:
        constant = format_memory_size(report["device_before_activations"])
        return f"Nothing fits, however short: all but activations takes {constant}."
    film = "" if seconds is None else f"{seconds:,.0f} s of film, "
    return f"Up to {film}{tokens:,} tokens would fit."


def _add_ask(commands):
    parser = commands.add_parser(
        "ask",
        help="answer questions about a film",
        description="Watches a film once, and answers any number of questions about it. Ctrl-C while it is watched: "
        "answers about what was seen so far.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="film question",
        help="a path or URL, then questions; with --resume, questions only",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="a directory with model and processor (default: the toy model in the package)"
    )
    parser.add_argument("--candidates", nargs="+", metavar="ANSWER", help="answers to choose from, ranked")
    parser.add_argument(
        "--fps", type=_above_zero, help="frames per second of film to look at (default: the configuration's)"
    )
    parser.add_argument("--max_new_tokens", type=_count, metavar="N", help="the longest answer (default: 128 tokens)")
    parser.add_argument("--save", metavar="FILE", help="keep what was seen, for --resume")
    parser.add_argument("--resume", metavar="FILE", help="what --save kept, in place of a film")
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
    """What `ask` found out, ready for JSON.

    Raises:
        ValueError, OSError: if an option makes no sense, or a file cannot be read; the message is for the user.
    """
    film, questions = (None, options.inputs) if options.resume else (options.inputs[0], options.inputs[1:])
    if not questions:
        raise ValueError(f"There is no question: give one, or several, behind {film!r}.")
    if options.resume and (options.fps is not None or os.path.exists(questions[0])):
        given = f"--fps {options.fps:g}" if options.fps is not None else repr(questions[0])
        raise ValueError(f"What --resume takes has been watched already: leave out {given}, and give questions only.")
    if options.model is not None:
        _check_model(options.model)
    try:
        qa = pipeline("video-question-answering", model=options.model)
    except Exception as error:  # its kind is up to Transformers and the file that is wrong
        raise ValueError(f"The model in {options.model!r} cannot be loaded: {error}") from error
    if options.resume:
        watched = qa.resume(options.resume)
    else:
        try:
            watched = qa.watch(film, fps=options.fps)
        except VideoStreamError as error:
            warnings.warn(f"{error} Answers are about what was seen before.", UserWarning, stacklevel=2)
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


def _check_model(directory: str):
    if not os.path.isfile(os.path.join(directory, "config.json")):
        raise ValueError(f"There is no config.json in {directory!r}: --model takes the directory of a model.")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"The configuration in {directory!r} cannot be read: {error}") from error
    if config.model_type != "ma2mba":
        raise ValueError(f"{directory!r} holds a {config.model_type!r} model; ask knows ma2mba.")


def _ask_table(report: dict) -> str:
    lines = []
    for entry in report["answers"]:
        lines.append(entry["question"])
        lines += [f"  {result['score']:.3f}  {result['answer']}" for result in entry.get("candidates", [entry])]
    return "\n".join(lines)


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
