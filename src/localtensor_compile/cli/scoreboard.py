"""`localtensor scoreboard`: every op of torch's OpInfo database, sharded, on every engine."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..scoreboard.attribution import FAULTS, OURS
from ..scoreboard.measure import BACKENDS, Plan
from ..scoreboard.store import Record, Store
from . import terminal


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "scoreboard",
        help="DTensor's ops: eager, compiled, even and uneven shards, against the unsharded op",
        description="Run every op of torch's OpInfo database on DTensors of simulated ranks and "
        "compare it with the unsharded op. What fails runs again without this package, to find "
        "whose fault it is. A run that is stopped goes on where it was. Exit code: 0 nothing is "
        "our fault, 1 something is, 2 the arguments cannot be used.",
    )
    parser.add_argument(
        "--ops", type=_regex, default=re.compile(""), metavar="REGEX", help="ops by name"
    )
    parser.add_argument(
        "--world-size",
        type=_sizes,
        default=(2, 4),
        metavar="N,...",
        help="numbers of ranks (default: 2,4)",
    )
    parser.add_argument(
        "--backend",
        type=_backends,
        default=BACKENDS,
        metavar="NAMES",
        help=f"engines, with commas, of {', '.join(BACKENDS)} (default: all; eager always runs)",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="run the I-th of N parts, 1/N to N/N; the parts may share a file of results",
    )
    parser.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=60,
        metavar="SECONDS",
        help="for one step, as the compilation of an op's cases (default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("scoreboard.jsonl"),
        metavar="FILE",
        help="where results are kept, a JSON line per op and number of ranks; what is there "
        "already is not measured again (default: %(default)s)",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the table in Markdown there"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    # The op database is torch's test code and takes seconds to import.
    from ..scoreboard import ops, table, workers

    names = [name for name in ops.database() if arguments.ops.search(name)]
    if not names:
        print(f"error: no op matches {arguments.ops.pattern!r}.", file=sys.stderr)
        return 2
    plan = Plan(backends=arguments.backend)
    store = Store(arguments.results, plan.as_json(), str(torch.__version__))
    index, count = arguments.shard
    # Largest worlds first, as they take longest.
    worlds = sorted(arguments.world_size, reverse=True)
    part = [workers.Task(n, w) for w in worlds for n in names][index - 1 :: count]
    missing = [t for t in part if (t.op, t.world_size) not in store.records]
    with terminal.TaskProgress(len(part), len(part) - len(missing)) as progress:

        def done(record: Record) -> None:
            store.add(record)
            progress.advance(_line(record))

        workers.run(
            missing,
            plan,
            jobs=arguments.jobs,
            timeout=arguments.timeout,
            done=done,
            at=lambda task, step: progress.at(f"{task.op} on {task.world_size}: {step}"),
        )
    records = [
        store.records[name, world]
        for world in worlds
        for name in names
        if (name, world) in store.records
    ]
    if arguments.report is not None:
        arguments.report.write_text(table.table(records, ops.database(), ops.SIZES))
    return _verdict(records)


def _verdict(records: list[Record]) -> int:
    faults = Counter(fault for record in records for fault in _faults(record))
    text = ", ".join(f"{fault} {faults[fault]}" for fault in FAULTS)
    terminal.show(f"{'FAIL' if faults[OURS] else 'PASS'}: cases at fault: {text}")
    return 1 if faults[OURS] else 0


def _line(record: Record) -> str:
    where = f"{record['op']} on {record['world_size']} ranks"
    if not record["cases"]:
        return f"{where}: not measured, {record['reason']}"
    faults = Counter(_faults(record))
    text = ", ".join(f"{fault} {count}" for fault, count in faults.items()) or "all right"
    return f"{where}: {len(record['cases'])} cases in {record['seconds']:.1f} s, {text}"


def _faults(record: Record) -> list[str]:
    return [
        v["fault"]
        for case in record["cases"]
        for pair in case["results"].values()
        for v in pair
        if "fault" in v
    ]


# ---------------------------------------------------------------- arguments
def _regex(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(dict.fromkeys(_positive(part) for part in text.split(",")))
    if min(sizes) < 2:
        raise argparse.ArgumentTypeError("a world of 1 shards nothing: give at least 2 ranks")
    return sizes


def _backends(text: str) -> tuple[str, ...]:
    given = text.split(",")
    unknown = [name for name in given if name not in BACKENDS]
    if unknown:
        known = ", ".join(BACKENDS)
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)!r}: there are {known}")
    return tuple(b for b in BACKENDS if b == "eager" or b in given)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is none of 1/N to N/N")
    return int(match[1]), int(match[2])
