"""`localtensor lint FILE[:FUNCTION]`: what would hang or go wrong between ranks on a cluster."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from ..check.program import DEFAULT_FUNCTION, ProgramError, load_program
from ..check.text import plural
from ..errors import RunnerTimeout
from ..schedule.run import TIMEOUT, schedule
from ..schedule.schedule import Schedule, ScheduleError
from . import terminal
from .check import add_ranks


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "lint",
        help="find collectives and messages that would hang or corrupt data",
        description="Run a program with ranks of its own, one thread per rank in this process, and "
        "compare what ranks call of torch.distributed: other collectives or another order, other "
        "shapes, dtypes, reduce ops, roots or splits, sends that nobody receives, ranks that wait "
        "for each other. Exit code: 0 nothing found, 1 something found, 2 the program or the "
        "arguments cannot be used.",
    )
    parser.add_argument(
        "program",
        metavar="FILE[:FUNCTION]",
        help="a Python file with a function program(world), as for `localtensor check`; without "
        "such a function, a script for torchrun, which is run as it is",
    )
    add_ranks(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="for torch.manual_seed (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long a rank may run without a call that lets others run (default: %(default)g)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the findings there too, '-' for standard output"
    )
    parser.add_argument(
        "--schedule", action="store_true", help="print first what all ranks call, in order"
    )
    parser.add_argument(
        "--args",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="arguments of a script: all that follow",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the ranks print is no result
            name, found = _schedule(arguments)
    except (ProgramError, ScheduleError, RunnerTimeout) as error:
        print(f"localtensor lint: {error}", file=sys.stderr)
        return 2
    if arguments.json == "-":
        print(_json(name, found))
    else:
        if arguments.schedule:
            print(found)
        terminal.show(report(name, found))
        if arguments.json is not None:
            Path(arguments.json).write_text(f"{_json(name, found)}\n", encoding="utf-8")
    return 1 if found.findings else 0


def _schedule(arguments: argparse.Namespace) -> tuple[str, Schedule]:
    """The name of what was run, and what it did."""
    size, timeout = arguments.nproc_per_node, arguments.timeout
    path = Path(arguments.program)
    if path.is_file() and not defines(path, DEFAULT_FUNCTION):
        return str(path), schedule(path, size, args=arguments.args, timeout=timeout)
    program = load_program(arguments.program)
    return program.name, schedule(program, size, seed=arguments.seed, timeout=timeout)


def defines(path: Path, name: str) -> bool:
    """Whether a Python file defines or imports a name at its top level. It is not run."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return True  # whoever imports it says what is wrong
    for node in body:
        names: list[str | None] = [getattr(node, "name", None)]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.asname or a.name for a in node.names]
        elif isinstance(node, ast.Assign):
            names = [getattr(t, "id", None) for t in node.targets]
        elif isinstance(node, ast.AnnAssign):
            names = [getattr(node.target, "id", None)]
        if name in names:
            return True
    return False


def report(name: str, found: Schedule) -> str:
    """The findings, and a line that sums them up."""
    calls = sum(len(found.rank(r)) for r in found.records)
    about = f"{name}: {plural(calls, 'call')} of {plural(found.world_size, 'rank')}"
    total = len(found.findings)
    verdict = f"FAIL  {about}, {plural(total, 'finding')}" if total else f"PASS  {about}"
    return "\n\n".join([*map(str, found.findings), verdict])


def _json(name: str, found: Schedule) -> str:
    return json.dumps(
        {
            "program": name,
            "world_size": found.world_size,
            "ok": not found.findings,
            "findings": [f.to_dict() for f in found.findings],
        },
        indent=2,
    )
