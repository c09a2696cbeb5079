"""`lt.schedule`: run a program with ranks of its own, and write down what each calls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..capture.graphs import CapturedGraphs
from ..check.engines import forked_rng, one_thread
from ..check.program import Program, ProgramError, ProgramFunction, World, as_program
from ..golden.source import Source
from ..runner.engine import Engine
from ..runner.job import Job
from .captured import captured_schedule
from .lines import noting_return
from .schedule import Schedule, ScheduleError
from .watch import Watch

TIMEOUT = 300.0


def schedule(
    program: Program | ProgramFunction | CapturedGraphs | str | os.PathLike[str],
    world_size: int | None = None,
    *,
    args: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    timeout: float = TIMEOUT,
) -> Schedule:
    """What each rank calls of torch.distributed, in order, and what of it would go wrong.

    Each rank runs the program on its own, in a thread of this process, so that ranks may take
    other branches: dist.get_rank() is an int, tensors are plain. `world.compile` compiles nothing.
    Ranks that would hang are stopped; `findings` of the result says why.

    Args:
        program: a function program(world), as for `check`; the path of a script that was written
            for torchrun; or what `capture` returned, for the collectives of its graphs.
        world_size: number of ranks; of captured graphs it is known.
        args: of a script.
        seed: of torch.manual_seed on every rank of a program; a script sets its own.
        device: where a program's World says tensors go.
        timeout: seconds that a rank may run without a call that lets others run.

    Raises:
        ScheduleError: no number of ranks.
        ProgramError: not a program, or no such script.
        RunnerTimeout: a rank took too long.
        WorldError: ranks run in threads of this process already.
    """
    if isinstance(program, CapturedGraphs):
        if world_size not in (None, program.world_size):
            raise ScheduleError(
                f"these graphs are of {program.world_size} ranks, not of {world_size}. Leave out "
                "world_size, or capture the program again."
            )
        return captured_schedule(program)
    if world_size is None or world_size < 1:
        raise ScheduleError(
            f"world_size={world_size}: say how many ranks run the program, at least one."
        )
    with one_thread():
        if isinstance(program, (str, os.PathLike)):
            return _of_script(Path(program), world_size, args, timeout)
        with forked_rng(torch.device(device)):
            torch.manual_seed(seed)
            world = World(world_size, device)
            return _of_program(as_program(program), world, timeout)


def _of_program(program: Program, world: World, timeout: float) -> Schedule:
    def on_rank(rank: int) -> Source | None:
        with noting_return(program.function) as returned:
            program.function(World(world.size, world.device))
        return returned[0] if returned else None

    return Watch(Engine(world.size, timeout=timeout, stop_on_error=False)).run(on_rank)


def _of_script(path: Path, world_size: int, args: Sequence[str], timeout: float) -> Schedule:
    if not path.is_file():
        raise ProgramError(f"no such file: {path} (looked from {Path.cwd()}).")
    job = Job(str(path), world_size, args, timeout=timeout)
    return Watch(job.engine(stop_on_error=False)).run(lambda rank: job.execute())
