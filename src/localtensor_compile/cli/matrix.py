"""`localtensor matrix FILE[:FUNCTION]`: one program under several degrees of parallelism."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..check.matrix import matrix
from ..check.program import ProgramError, load_program
from ..check.runner import BACKENDS
from . import terminal
from .check import names


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "matrix",
        help="compare several degrees of parallelism with the unsharded model",
        description="Run one program with every combination of degrees of data, tensor and "
        "pipeline parallelism, eager and compiled, on simulated ranks, and compare what every rank "
        "computes with the unsharded model. The program asks world.degree('dp') and so on. Exit "
        "code: 0 all equal or close, 1 a value is wrong or a run failed, 2 the program or the "
        "arguments cannot be used.",
    )
    parser.add_argument(
        "program",
        metavar="FILE[:FUNCTION]",
        help="a Python file with a function program(world) that returns a dict of named tensors",
    )
    for name, of, default in (
        ("dp", "data", (1, 2)),
        ("tp", "tensor", (1, 2)),
        ("pp", "pipeline", (1,)),
    ):
        parser.add_argument(
            f"--{name}",
            type=_degrees,
            default=default,
            metavar="N,...",
            help=f"degrees of {of} parallelism (default: {','.join(map(str, default))})",
        )
    parser.add_argument(
        "--backend",
        type=names,
        default=BACKENDS,
        metavar="NAMES",
        help="engines, with commas: eager, dynamo, and backends of torch.compile "
        f"(default: {','.join(BACKENDS)})",
    )
    parser.add_argument(
        "--oracle",
        choices=("gloo", "none"),
        default="gloo",
        help="where the unsharded model runs: in a real process, or simulated (default: gloo)",
    )
    parser.add_argument(
        "--rtol",
        type=float,
        metavar="X",
        help="largest difference that counts as close, relative to an output's largest value "
        "(default: by dtype, 2e-5 for float32)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="for torch.manual_seed (default: %(default)s)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the whole report there too, '-' for standard output"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        program = load_program(arguments.program)
        with terminal.StepProgress() as progress:
            report = matrix(
                program,
                dp=arguments.dp,
                tp=arguments.tp,
                pp=arguments.pp,
                backends=arguments.backend,
                oracle=None if arguments.oracle == "none" else arguments.oracle,
                seed=arguments.seed,
                rtol=arguments.rtol,
                progress=progress,
            )
    except ProgramError as error:
        print(f"localtensor matrix: {error}", file=sys.stderr)
        return 2
    if arguments.json == "-":
        print(report.to_json())
    else:
        terminal.show(report.text())
        if arguments.json is not None:
            Path(arguments.json).write_text(f"{report.to_json()}\n", encoding="utf-8")
    return 0 if report.ok else 1


def _degrees(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers or any(n < 1 for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of degrees: ints from 1, as in 1,2")
    return numbers
