"""Arguments and messages that several commands share."""

import argparse
import math
import os
import sys
import warnings
from contextlib import contextmanager

from transformers import AutoConfig, PreTrainedConfig

from ..gradient_checkpointing import parse_memory_size


def read_config(directory: str, command: str, known: tuple[str, ...]) -> PreTrainedConfig:
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


def size(text: str) -> int:
    """Read a memory size, such as "80GiB", in bytes."""
    try:
        return parse_memory_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it must be a number above 0; got {text!r}")
    return value


def count(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"it must be a whole number above 0; got {text!r}")
    return int(text)


def reported(parser: argparse.ArgumentParser, run):
    """Wrap a command: warnings become lines on standard error, and errors end it with a message.

    Args:
        run: takes the options; prints its result.
    """

    def command(options) -> int:
        try:
            with _printed_warnings(parser.prog):
                run(options)
        except (ValueError, OSError, ImportError) as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            print(f"{parser.prog}: interrupted", file=sys.stderr)
            return 130
        return 0

    return command


@contextmanager
def _printed_warnings(prog: str):
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"{prog}: warning: {message}", file=sys.stderr)
        yield
