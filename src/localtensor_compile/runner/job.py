"""A script that was written for torchrun, run in this process: one thread per rank."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import LocalTensorError
from .engine import Engine
from .job_report import Failure, summary
from .job_streams import Streams
from .process_state import Attribute, Generators
from .scheduler import RankStopped
from .script_state import Environment, Folder, Logging, Modules
from .stacks import is_users


@dataclass
class Job:
    """What to run, and how.

    Attributes:
        target: path of a script, or name of a module.
        module: whether target is a module.
        arguments: of the script.
        ranks: how many.
        streams: where the ranks' output goes.
        master: address and port that the script sees.
        role, run_id: names that torchrun gives a job.
        seed: of the interleaving; None: ranks take turns.
        timeout: seconds that a rank may run without a call that lets others run.
    """

    target: str
    ranks: int
    arguments: Sequence[str] = ()
    module: bool = False
    streams: Streams = field(default_factory=Streams)
    master: tuple[str, int] = ("127.0.0.1", 29500)
    role: str = "default"
    run_id: str = "none"
    seed: int | None = None
    timeout: float | None = None

    def run(self) -> int:
        """Run all ranks. Returns torchrun's exit code: 0, or 1 if a rank failed or on a signal."""
        first: Failure | None = None
        with contextlib.ExitStack() as stack:
            stack.enter_context(_one_thread_each(self.ranks))
            stack.enter_context(_signals())
            engine = self.engine()
            try:
                engine.run(self._run_rank)
            except RankFailed as error:
                first = error.failure
            except LocalTensorError as error:
                first = Failure(None, 1, str(error))
            except (KeyboardInterrupt, Stopped) as error:
                reason = str(error) or "interrupted"
                where = engine.scheduler.report_when_stopped
                print(f"localtensor run: {reason}. The ranks were:\n{where}", file=sys.stderr)
                return 1
            finally:
                self.streams.finish()
        if first is None:
            return 0
        print(summary(self.target, first), file=sys.stderr)
        return 1

    def engine(self, stop_on_error: bool = True) -> Engine:
        """The engine for the ranks; `execute` is what each runs."""
        return Engine(
            self.ranks,
            seed=self.seed,
            timeout=self.timeout,
            init_group=False,
            pieces=self._pieces(),
            stop_on_error=stop_on_error,
            script=True,
        )

    # ---- one rank
    def _run_rank(self, rank: int) -> None:
        code, text = 0, ""
        try:
            self.execute()
        except SystemExit as stop:
            code = _exit_code(stop)
            text = f"SystemExit: {stop.code}"
        except RankStopped:
            raise
        except BaseException as error:
            error = error.with_traceback(_from_users_code(error.__traceback__))
            code, text = 1, "".join(traceback.format_exception(error))
            sys.excepthook(type(error), error, error.__traceback__)
        if code:
            raise RankFailed(Failure(rank, code, text.strip()))

    def execute(self) -> None:
        """Run the script in this thread, which is a rank."""
        if self.module:
            sys.argv = ["-m", *self.arguments]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(self.target, run_name="__main__", alter_sys=True)
            return
        path = self.target
        sys.argv = [path, *self.arguments]
        if os.path.isdir(path):
            runpy.run_path(path, run_name="__main__")
            return
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
        main = sys.modules["__main__"]
        main.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=None)
        # Compiled per rank: what torch.compile makes of it is each rank's own.
        exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)

    # ---- what each rank has its own of
    def _pieces(self) -> list[Any]:
        out, err = sys.stdout, sys.stderr
        return [
            Environment(self._environment),
            Folder(),
            Modules(),
            Logging(),
            Attribute(sys, "argv", lambda rank: [self.target]),
            Attribute(sys, "path", lambda rank: [*sys.path]),
            Attribute(sys, "stdout", lambda rank: self.streams.out(rank, out)),
            Attribute(sys, "stderr", lambda rank: self.streams.err(rank, err)),
            _OfNewProcesses(),
        ]

    def _environment(self, rank: int) -> dict[str, str]:
        size = str(self.ranks)
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "ROLE_RANK": str(rank),
            "ROLE_NAME": self.role,
            "ROLE_WORLD_SIZE": size,
            "MASTER_ADDR": self.master[0],
            "MASTER_PORT": str(self.master[1]),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": self.run_id,
        }


class RankFailed(Exception):
    """Stops the ranks after one failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.rank)
        self.failure = failure


class Stopped(Exception):
    """The process got a signal that ends it."""


class _OfNewProcesses(Generators):
    """Random numbers of processes that start now: torch's are alike, Python's and numpy's differ
    from rank to rank, as those of processes do, but not from run to run."""

    def fresh(self, rank: int) -> Any:
        import random

        numpy = sys.modules.get("numpy.random")
        return (
            [(torch.default_generator, torch.Generator().get_state())],
            random.Random(f"rank {rank}").getstate(),
            None if numpy is None else numpy.RandomState(rank).get_state(),
        )


def _exit_code(stop: SystemExit) -> int:
    """The exit code of a process that ends with sys.exit(...)."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def _from_users_code(place: TracebackType | None) -> TracebackType | None:
    """The traceback without our own frames at its start."""
    found = place
    while found is not None and not is_users(found.tb_frame.f_code.co_filename):
        found = found.tb_next
    return found or place


@contextlib.contextmanager
def _one_thread_each(ranks: int) -> Iterator[None]:
    """torchrun gives each of several ranks one thread to compute with, unless told otherwise."""
    if ranks == 1 or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    before = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("OMP_NUM_THREADS", None)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The signals on which torchrun stops its workers stop the ranks."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(f"got signal {signal.Signals(number).name}, stopped the ranks")

    before = {}
    try:
        for name in ("SIGTERM", "SIGHUP", "SIGQUIT"):
            number = getattr(signal, name, None)
            if number is not None:
                before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread, which gets no signals
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
