"""`make bench`: one script per claim, each in a process of its own.

python -m tests.benchmarks [NAME ...] [--quick] [--docs DIR]

Prints a section of docs/benchmarks.md per script and writes it there; --quick takes tiny sizes and
few rounds, to see that everything runs, and writes nothing. Against JAX: JAX_PYTHON names a Python
that has jax.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

from .report import DOCS, Section, write

NAMES = (
    "graph_nodes",
    "compile_time",
    "against_torch",
    "against_batched",
    "against_jax",
    "per_rank_compile",
    "thousand_ranks",
    "checking",
    "memory",
)


def run(name: str, quick: bool) -> Section | str:
    """The section, or why there is none."""
    return importlib.import_module(f"{__package__}.{name}").run(quick)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes; write nothing")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where benchmarks.md is")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if len(options.names) == 1:
        found = run(options.names[0], options.quick)
        if isinstance(found, str):
            print(f"{options.names[0]}: skipped: {found}")
            return 0
        print(found.markdown(), flush=True)
        if not options.quick:
            write(found, NAMES, options.docs)
        return 0
    failed = []
    for name in options.names or NAMES:
        command = [sys.executable, "-m", __package__, name, "--docs", str(options.docs)]
        if subprocess.run([*command, *["--quick"] * options.quick], env=os.environ).returncode:
            failed.append(name)
        print(flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
