"""`torchrun --nproc-per-node N -m localtensor_compile.replay DIR`: a bundle on real processes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..bundle.errors import BundleError
from ..bundle.load import Bundle, load_bundle
from .real import replay_on_this_rank, require_world
from .report import lines, verdict
from .results import Outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Replay on this rank; rank 0 prints what all ranks found. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="torchrun -m localtensor_compile.replay",
        description="Run the programs of a bundle on real processes, one rank each, and compare "
        "with what was captured, bit for bit. Exit code: 0 equal, 1 different, 2 the bundle "
        "cannot be used.",
    )
    parser.add_argument("directory", metavar="DIR", help="what `save_bundle` wrote")
    parser.add_argument("--backend", help="gloo or nccl (default: as the bundle's device asks)")
    parser.add_argument("--any-torch", action="store_true", help="also a bundle of another torch")
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        print(
            "localtensor_compile.replay: this is one real rank of several; start it with torchrun. "
            "`localtensor replay DIR` simulates all ranks in one process.",
            file=sys.stderr,
        )
        return 2
    try:
        bundle = load_bundle(arguments.directory, any_torch=arguments.any_torch)
        require_world(bundle, int(os.environ["WORLD_SIZE"]))
    except BundleError as error:  # the same on every rank: one says so
        if os.environ["RANK"] == "0":
            print(f"localtensor_compile.replay: {error}", file=sys.stderr)
        return 2
    return _replay(bundle, arguments.backend)


def _replay(bundle: Bundle, backend: str | None) -> int:
    cuda = torch.device(bundle.manifest.device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend or ("nccl" if cuda else "gloo"))
    try:
        found = replay_on_this_rank(bundle)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found)
        outcomes: list[Outcome] = [o for of_rank in gathered for o in of_rank]
        if dist.get_rank() == 0:
            engine = f"{dist.get_world_size()} processes, {dist.get_backend()}"
            print("\n".join(lines(bundle, outcomes, engine)))
        return verdict(outcomes)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
