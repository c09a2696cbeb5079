"""`lt.schedule`: run a program with ranks of its own, and write down what each calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..capture.graphs import CapturedGraphs
from ..check.engines import forked_rng, one_thread
from ..check.program import Program, ProgramFunction, World, as_program
from ..errors import CollectiveError, RunnerDeadlock
from ..runner.engine import Engine
from ..runner.scheduler import RankStopped
from .calls import RAISED, STUCK, RankRecord
from .captured import captured_schedule
from .lines import noting_return, raised_at
from .record import Recorder
from .schedule import Schedule, ScheduleError

TIMEOUT = 300.0


def schedule(
    program: Program | ProgramFunction | CapturedGraphs,
    world_size: int | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    timeout: float = TIMEOUT,
) -> Schedule:
    """What each rank calls of torch.distributed, in order, and what of it would go wrong.

    Each rank runs the program on its own, in a thread of this process, so that ranks may take
    other branches: dist.get_rank() is an int, tensors are plain. Nothing is compiled. Ranks that
    would hang are stopped; `findings` of the result says why.

    Args:
        program: a function program(world), as for `check`; or what `capture` returned, for the
            collectives of its graphs.
        world_size: number of ranks; of captured graphs it is known.
        seed: of torch.manual_seed, on every rank.
        device: where the program's World says tensors go.
        timeout: seconds that a rank may run without a call that lets others run.

    Raises:
        ScheduleError: no number of ranks.
        ProgramError: not a program.
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
    return _Run(as_program(program), world_size, seed, torch.device(device), timeout).run()


class _Run:
    def __init__(
        self, program: Program, size: int, seed: int, device: torch.device, timeout: float
    ) -> None:
        self.program = program
        self.seed = seed
        self.device = device
        self.engine = Engine(size, timeout=timeout, stop_on_error=False)
        self.recorder = Recorder(self.engine)
        self.records: dict[int, RankRecord] = {}

    def run(self) -> Schedule:
        with one_thread(), forked_rng(self.device), self.recorder.watching():
            torch.manual_seed(self.seed)
            try:
                self.engine.run(self._on_rank)
            except RunnerDeadlock as deadlock:
                self._add_waits(str(deadlock))
        return Schedule(self.engine.world_size, dict(sorted(self.records.items())))

    def _add_waits(self, report: str) -> None:
        """What the runner says of each rank that it has stopped."""
        for line in report.splitlines():
            word, _, rest = line.strip().partition(" ")
            number, _, state = rest.partition(" ")
            if word == "rank" and number.isdecimal() and self.records[int(number)].end == STUCK:
                record = self.records[int(number)]
                self.records[int(number)] = replace(record, error=record.error or state)

    def _on_rank(self, rank: int) -> None:
        function = self.program.function
        with noting_return(function) as returned, self._noting_end(rank):
            function(World(self.engine.world_size, self.device))
            source = returned[0] if returned else None
            self.records[rank] = self.recorder.ended(rank, source=source)

    @contextlib.contextmanager
    def _noting_end(self, rank: int) -> Iterator[None]:
        try:
            yield
        except RankStopped:
            self.records[rank] = self.recorder.ended(rank, STUCK)
            raise
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            name = f"{type(error).__name__}: {text}" if text else type(error).__name__
            # A CollectiveError is of a call that does not fit those of others.
            end = STUCK if isinstance(error, CollectiveError) else RAISED
            self.records[rank] = self.recorder.ended(rank, end, name, raised_at(error))
