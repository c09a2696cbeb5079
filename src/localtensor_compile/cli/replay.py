"""`localtensor replay DIR`: the programs of a bundle, all ranks in one process."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..bundle.errors import BundleError
from ..bundle.load import load_bundle
from ..errors import CollectiveError
from ..replay.report import lines, verdict
from ..replay.simulated import replay


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "replay",
        help="run the programs of a bundle, all ranks in one process",
        description="Run each rank's program of a bundle (`localtensor graph FILE --save-bundle "
        "DIR`) in lock-step with the others and compare with what was captured, bit for bit. On "
        "real processes: `torchrun --nproc-per-node N -m localtensor_compile.replay DIR`. Exit "
        "code: 0 equal, 1 different, 2 the bundle cannot be used.",
    )
    parser.add_argument("directory", metavar="DIR", help="what `save_bundle` wrote")
    parser.add_argument("--any-torch", action="store_true", help="also a bundle of another torch")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        bundle = load_bundle(arguments.directory, any_torch=arguments.any_torch)
        outcomes = [o for replayed in replay(bundle) for o in replayed.outcomes]
    except (BundleError, CollectiveError) as error:
        print(f"localtensor replay: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(bundle, outcomes, "one process, in lock-step")))
    return verdict(outcomes)
