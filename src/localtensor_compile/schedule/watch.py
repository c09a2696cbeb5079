"""Runs ranks and says what each did, however it ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from ..errors import CollectiveError, RunnerDeadlock
from ..golden.source import Source
from ..runner.engine import Engine
from ..runner.scheduler import RankStopped
from .calls import RAISED, RETURNED, STUCK, RankRecord
from .lines import raised_at
from .record import Recorder
from .schedule import Schedule

OnRank = Callable[[int], Source | None]
"""Runs a rank. Returns the line from which its program returned, if that is known."""


class Watch:
    """Runs the ranks of an engine, of which one that fails must not stop the others."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._recorder = Recorder(engine)
        self._records: dict[int, RankRecord] = {}

    def run(self, on_rank: OnRank) -> Schedule:
        """Run every rank.

        Raises:
            RunnerTimeout: a rank took too long.
            WorldError: ranks run in threads of this process already.
        """

        def run_rank(rank: int) -> None:
            with self._noting_end(rank):
                source = on_rank(rank)
                self._end(rank, RETURNED, source=source)

        with self._recorder.watching():
            try:
                self._engine.run(run_rank)
            except RunnerDeadlock as deadlock:
                self._add_waits(str(deadlock))
        return Schedule(self._engine.world_size, dict(sorted(self._records.items())))

    def _end(self, rank: int, end: str, error: str = "", source: Source | None = None) -> None:
        self._records[rank] = self._recorder.ended(rank, end, error, source)

    @contextlib.contextmanager
    def _noting_end(self, rank: int) -> Iterator[None]:
        try:
            yield
        except RankStopped:
            self._end(rank, STUCK)
            raise
        except SystemExit as stop:
            if stop.code in (None, 0):
                self._end(rank, RETURNED, source=raised_at(stop))
            else:
                self._end(rank, RAISED, f"SystemExit: {stop.code}", raised_at(stop))
        except Exception as error:
            text = str(error).strip().split("\n")[0]
            name = f"{type(error).__name__}: {text}" if text else type(error).__name__
            # A CollectiveError is of a call that does not fit those of others.
            end = STUCK if isinstance(error, CollectiveError) else RAISED
            self._end(rank, end, name, raised_at(error))

    def _add_waits(self, report: str) -> None:
        """What the runner says of each rank that it has stopped."""
        for line in report.splitlines():
            word, _, rest = line.strip().partition(" ")
            number, _, state = rest.partition(" ")
            if word == "rank" and number.isdecimal():
                record = self._records[int(number)]
                if record.end == STUCK and not record.error:
                    self._records[int(number)] = replace(record, error=state)
