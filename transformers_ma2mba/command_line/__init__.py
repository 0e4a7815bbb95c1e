"""The command `transformers-ma2mba`.

`plan` tells whether a training step fits a GPU, `check-data` reads a list without training, `ask` answers about a
film, and `build`, `convert` and `export` make checkpoints from published weights and the other way round.
"""

import argparse

from . import ask, check_data, plan, weights


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
    plan.add(commands)
    check_data.add(commands)
    ask.add(commands)
    weights.add_build(commands)
    weights.add_convert(commands)
    weights.add_export(commands)
    options = parser.parse_args(arguments)
    return options.run(options)
