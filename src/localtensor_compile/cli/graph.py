"""`localtensor graph FILE[:FUNCTION]`: the graphs of all ranks, printed, compared and drawn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..bundle.errors import BundleError
from ..bundle.save import save_bundle
from ..capture.graphs import CapturedGraphs, CaptureError
from ..capture.record import STAGES
from ..capture.run import DEFAULT, capture
from ..check.program import ProgramError, load_program
from ..check.text import table
from ..compile.functional_nodes import ExtractError
from ..golden.diff import explanation
from ..golden.ranges import at_rank, rank_set
from ..golden.text import GoldenError, read
from .check import names


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "graph",
        help="print the graphs of all ranks, compare or draw them",
        description="Capture what a program compiles on simulated ranks and print it folded: a "
        "line per op of all ranks, with what differs between ranks marked. Exit code: 0 fine, 1 "
        "--diff found a difference, 2 the program or the arguments cannot be used.",
    )
    parser.add_argument(
        "program",
        metavar="FILE[:FUNCTION]",
        help="a Python file with a function program(world) that uses world.compile",
    )
    parser.add_argument(
        "--nproc-per-node", "--nproc_per_node", type=int, default=2, metavar="N",
        help="number of simulated ranks (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stage",
        type=names,
        default=DEFAULT,
        metavar="NAMES",
        help=f"graphs, with commas, of {', '.join(s for s in STAGES if s != 'dynamo')} "
        f"(default: {','.join(DEFAULT)})",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="only what this rank runs")
    parser.add_argument(
        "--diff",
        metavar="OTHER",
        help="a golden file, or another FILE.py[:FUNCTION]: say what is different in PROGRAM",
    )
    parser.add_argument(
        "--collectives", action="store_true", help="print a table of the collectives instead"
    )
    for flag, what in (("--svg", "as SVG"), ("--dot", "as GraphViz source text")):
        parser.add_argument(flag, metavar="FILE", help=f"draw them {what}, instead of printing")
    parser.add_argument(
        "--save-bundle",
        metavar="DIR",
        help="write each rank's programs with their inputs and results, for `localtensor replay`",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        graphs = _capture(arguments.program, arguments)
        if arguments.rank is not None:
            graphs.rank(arguments.rank)
        written = _draw(graphs, arguments)
        if arguments.save_bundle is not None:
            print(f"wrote {save_bundle(graphs, arguments.save_bundle)}")
            written = True
        if arguments.diff is not None:
            return _diff(graphs, arguments)
    except (ProgramError, CaptureError, ExtractError, GoldenError, BundleError) as error:
        print(f"localtensor graph: {error}", file=sys.stderr)
        return 2
    if arguments.collectives:
        print("\n".join(collectives_table(graphs)))
    elif written:
        pass
    elif arguments.rank is None:
        print(graphs, end="")
        for title, module in graphs.lowered.items():
            print(f"\n{title}, all ranks together\n{module.print_readable(print_output=False)}")
    else:
        print(_of_rank(str(graphs), arguments.rank), end="")
    return 0


def _capture(program: str, arguments: argparse.Namespace) -> CapturedGraphs:
    return capture(
        load_program(program),
        arguments.nproc_per_node,
        stage=arguments.stage,
        values=arguments.save_bundle is not None,
    )


def _draw(graphs: CapturedGraphs, arguments: argparse.Namespace) -> bool:
    """Write the drawings that were asked for; whether there were any."""
    drawn = [
        (file, to_text(rank=arguments.rank))
        for file, to_text in ((arguments.svg, graphs.to_svg), (arguments.dot, graphs.to_dot))
        if file is not None
    ]
    for file, text in drawn:
        try:
            Path(file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise CaptureError(
                f"cannot write {file}: {error.strerror}. Name a file in a folder that there is "
                "and that you may write to."
            ) from error
        print(f"wrote {file}")
    return bool(drawn)


def _diff(graphs: CapturedGraphs, arguments: argparse.Namespace) -> int:
    other = Path(arguments.diff)
    if other.suffix == ".py" or ".py:" in arguments.diff:
        before = str(_capture(arguments.diff, arguments))
    elif other.is_file():
        before = other.read_text()
    else:
        raise CaptureError(f"no such file: {arguments.diff}. Name a golden file or a program.")
    if before == str(graphs):
        print("no difference")
        return 0
    print(explanation(read(before, arguments.diff), graphs.document))
    return 1


def _of_rank(text: str, rank: int) -> str:
    """The lines that a rank has, with its own values."""
    kept = []
    for line in text.splitlines(keepends=True):
        body, at, ranks = line.rpartition(" @ ")
        if at and line.startswith("    "):
            held = ranks.split("  #")[0].strip()
            if f"{rank}" not in _expanded(held):
                continue
            line = body + line[len(body) + len(at) + len(held) :]
        kept.append(at_rank(line, rank) if line.startswith("    ") and "# " != line[4:6] else line)
    return "".join(kept)


def _expanded(ranks: str) -> list[str]:
    from ..golden.ranges import parse_ranks

    return [str(r) for r in parse_ranks(ranks)]


def collectives_table(graphs: CapturedGraphs) -> list[str]:
    """A line per collective: graph, op, group, ranks, bytes that a rank gives to it."""
    lines = [["graph", "op", "group", "ranks", "bytes per rank", "from"]]
    for c in graphs.collectives:
        sizes = sorted({-1 if b is None else b for b in c.bytes.values()})
        shown = "..".join("?" if s < 0 else str(s) for s in dict.fromkeys((sizes[0], sizes[-1])))
        lines.append([c.graph, c.op, c.group, rank_set(c.ranks), shown, c.source])
    return table(lines)
