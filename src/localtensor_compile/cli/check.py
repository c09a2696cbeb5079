"""`localtensor check FILE[:FUNCTION]`: one program on every engine, and a table of what differs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..check.program import Program, ProgramError, load_program
from ..check.runner import BACKENDS, check
from ..world.mode import LAYOUTS
from . import terminal


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "check",
        help="compare eager, compiled and real processes, rank by rank",
        description="Run one SPMD program eager, compiled and on real gloo processes, and compare "
        "every output on every rank. Exit code: 0 all agree, 1 values differ or an engine failed, "
        "2 the program or the arguments cannot be used.",
    )
    parser.add_argument(
        "program",
        metavar="FILE[:FUNCTION]",
        help="a Python file with a function program(world) that returns a dict of named tensors",
    )
    add_options(parser)
    parser.set_defaults(run=_run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of a check, for this command and for files that end in main(program)."""
    add_ranks(parser)
    parser.add_argument(
        "--backend",
        type=names,
        default=BACKENDS,
        metavar="NAMES",
        help="engines to compare, with commas: eager, dynamo, and backends of torch.compile "
        f"(default: {','.join(BACKENDS)})",
    )
    parser.add_argument(
        "--oracle",
        choices=("gloo", "none"),
        default="gloo",
        help="what eager is compared with (default: %(default)s, real processes)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the whole report there too, '-' for standard output"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="for torch.manual_seed (default: %(default)s)"
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="per_rank",
        help="of the simulated ranks: stacked runs each op once for all of them (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for the real processes (default: %(default)g)",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="a line per engine, output and rank"
    )


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """--nproc-per-node, as torchrun spells it."""
    parser.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        type=positive_int,
        default=4,
        metavar="N",
        help="number of ranks, as torchrun spells it (default: %(default)s)",
    )


def run_check(program: Program, arguments: argparse.Namespace) -> int:
    """Check, show the report. Returns the exit code.

    Raises:
        ProgramError: the program or the arguments cannot be used.
    """
    with terminal.EngineProgress() as progress:
        report = check(
            program,
            arguments.nproc_per_node,
            backends=arguments.backend,
            oracle=None if arguments.oracle == "none" else arguments.oracle,
            seed=arguments.seed,
            timeout=arguments.timeout,
            progress=progress,
            layout=arguments.layout,
        )
    if arguments.json == "-":
        print(report.to_json())
    else:
        terminal.show(report.text(terminal.width(), arguments.verbose))
        if arguments.json is not None:
            Path(arguments.json).write_text(f"{report.to_json()}\n", encoding="utf-8")
    return 0 if report.ok else 1


def _run(arguments: argparse.Namespace) -> int:
    try:
        return run_check(load_program(arguments.program), arguments)
    except ProgramError as error:
        print(f"localtensor check: {error}", file=sys.stderr)
        return 2


def positive_int(text: str) -> int:
    """A number of ranks."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of ranks: at least 1")
    return number


def names(text: str) -> tuple[str, ...]:
    """The names in a list with commas."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError("name at least one backend")
    return found
