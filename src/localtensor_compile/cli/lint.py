"""`localtensor lint FILE[:FUNCTION]`: what would hang or go wrong between ranks on a cluster."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..check.program import ProgramError, load_program
from ..check.text import plural
from ..errors import RunnerTimeout
from ..schedule.run import TIMEOUT, schedule
from ..schedule.schedule import Schedule, ScheduleError
from . import terminal
from .check import positive_int


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
        help="a Python file with a function program(world), as for `localtensor check`",
    )
    parser.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        type=positive_int,
        default=4,
        metavar="N",
        help="number of ranks, as torchrun spells it (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="for torch.manual_seed (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="for the whole program (default: %(default)g)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the findings there too, '-' for standard output"
    )
    parser.add_argument(
        "--schedule", action="store_true", help="print first what all ranks call, in order"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        program = load_program(arguments.program)
        found = schedule(
            program,
            arguments.nproc_per_node,
            seed=arguments.seed,
            timeout=arguments.timeout,
        )
    except (ProgramError, ScheduleError, RunnerTimeout) as error:
        print(f"localtensor lint: {error}", file=sys.stderr)
        return 2
    if arguments.json == "-":
        print(_json(program.name, found))
    else:
        if arguments.schedule:
            print(found)
        terminal.show(report(program.name, found))
        if arguments.json is not None:
            Path(arguments.json).write_text(f"{_json(program.name, found)}\n", encoding="utf-8")
    return 1 if found.findings else 0


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
