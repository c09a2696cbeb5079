"""The command line: `localtensor COMMAND ...`. One module per command, listed in COMMANDS."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import check, graph, lint, matrix, replay, run, scoreboard

# Each has add_parser(subparsers), which sets the default `run`: (arguments) -> exit code.
COMMANDS = (check, graph, lint, matrix, replay, run, scoreboard)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 fine, 1 the command found a failure, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="localtensor",
        description="Simulate every rank of a distributed PyTorch program in one process.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code
