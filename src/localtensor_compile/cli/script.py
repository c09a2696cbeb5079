"""main(program) at the end of a file: checks the program, or under torchrun is one real rank."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..check.engines import run_on_this_rank
from ..check.program import (
    Program,
    ProgramError,
    ProgramFunction,
    World,
    as_program,
    is_importing,
)
from ..check.text import dtype_text, plural, table
from .check import add_options, run_check


def main(program: ProgramFunction, argv: Sequence[str] | None = None) -> None:
    """Run `program` the way this file was started. To be called at the end of the file.

    - `python FILE`: on simulated ranks and on real processes, compared as `localtensor check FILE`
      does, with the same options (`--nproc-per-node`, 4 if it is left out). Ends the process with
      the same exit code.
    - `torchrun FILE`: as this real rank, with gloo, or NCCL where every rank has a GPU of its own.
      Rank 0 prints its outputs. Options: `--backend`, `--seed`.
    - imported (by `localtensor check`, or by the real processes of a check): does nothing.

    Args:
        program: program(world) -> dict of named tensors or numbers.
        argv: options, sys.argv[1:] by default.
    """
    if is_importing():
        return
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _run_as_rank(program, argv)
        return
    parser = argparse.ArgumentParser(description="Check this program on every engine.")
    add_options(parser)
    arguments = parser.parse_args(argv)
    name = f"{os.path.relpath(sys.argv[0])}:{as_program(program).name}"
    try:
        code = run_check(Program(program, name), arguments)
    except ProgramError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _run_as_rank(program: ProgramFunction, argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Run this program on real ranks.")
    parser.add_argument("--backend", default="eager", help="eager, or one of torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        backend = None if arguments.backend == "eager" else arguments.backend
        world = World(dist.get_world_size(), device, backend)
        start = time.perf_counter()
        outputs = run_on_this_rank(program, world, arguments.seed)
        if dist.get_rank() == 0:
            print(_summary(outputs, arguments.backend, time.perf_counter() - start))
    finally:
        dist.destroy_process_group()


def _summary(outputs: Mapping[str, Tensor], engine: str, seconds: float) -> str:
    lines = [["output", "shard of rank 0", "value or norm"]]
    for name, value in outputs.items():
        shape = ", ".join(map(str, value.shape))
        wide = value.to(torch.complex128 if value.is_complex() else torch.float64)
        number = value.item() if value.numel() == 1 else float(torch.linalg.vector_norm(wide))
        lines.append([name, f"{dtype_text(value.dtype)}[{shape}]", f"{number:.8g}"])
    ranks = plural(dist.get_world_size(), "real rank")
    about = f"{ranks}, {dist.get_backend()}, {engine}, {seconds:.1f} s"
    return "\n".join([*table(lines), "", about])
