"""The command `ask`: answers about a film."""

import argparse
import json
import os
import warnings

from transformers import pipeline

from ..session import VideoStreamError
from .arguments import above_zero, count, read_config, reported


def add(commands):
    """Add the command."""
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
    parser.add_argument("--fps", type=above_zero, help="frames per second of film (default: the configuration's)")
    parser.add_argument(
        "--max_new_tokens", type=count, metavar="N", help="length limit of an answer (default: 128 tokens)"
    )
    parser.add_argument("--save", metavar="FILE", help="save the state after the film, for --resume")
    parser.add_argument("--resume", metavar="FILE", help="a state saved with --save, in place of a film")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(options):
        report = _report(options)
        print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else _table(report))

    parser.set_defaults(run=reported(parser, run))


def _report(options: argparse.Namespace) -> dict:
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
        read_config(options.model, "ask", ("ma2mba",))
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


def _table(report: dict) -> str:
    lines = []
    for entry in report["answers"]:
        lines.append(entry["question"])
        lines += [f"  {result['score']:.3f}  {result['answer']}" for result in entry.get("candidates", [entry])]
    return "\n".join(lines)
