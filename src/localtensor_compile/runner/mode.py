"""LocalRunnerMode: `fn(i)` in a thread per i, which may send to and receive from each other.

The name and calls are those of torch.distributed._local_tensor. There each thread runs an SPMD
function on LocalTensors; here a thread may also be one rank, with a process group of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from ..errors import WorldError
from .engine import Engine
from .scheduler import Scheduler
from .stacks import user_line


class _RunnerContext(threading.local):
    id: int = -1


class _WaitsForObject:
    def __init__(self, mode: LocalRunnerMode, src: int, dst: int) -> None:
        self.mode, self.src, self.dst, self.line = mode, src, dst, user_line()

    def ready(self) -> bool:
        return any(self.mode._recv_objects[self.dst][p] for p in self.mode._peers(self.src))

    def text(self) -> str:
        source = "any rank" if self.src == -1 else f"rank {self.src}"
        return f"recv of rank {self.dst} at {self.line}, for a send of {source}"


class LocalRunnerMode:
    """Context manager: runs `fn(0)` ... `fn(concurrency - 1)`, each in a thread, one at a time.

    Entering starts them, leaving waits until all have ended. What a thread calls of
    torch.distributed is its own rank's call, if there is a thread per rank (`concurrency` equals
    the number of ranks): dist.get_rank() is `i`, a default process group exists, collectives, send
    and recv meet those of the other threads. With fewer threads than ranks each is expected to
    enter a LocalTensorMode, and sends shards with local_p2p_op.

    Args:
        ranks: the number of ranks, or the ranks.
        concurrency: the number of threads.
        fn: called with the number of its thread.
        seed: draws who runs next at every call that may wait; the same seed gives the same
            interleaving. None: threads take turns, each runs until it must wait.
        timeout: seconds that a thread may run without a call that lets others run.

    Raises:
        WorldError: on entry, if a LocalRunnerMode is active; with no ranks, or more threads than
            ranks.
        Exception: on leaving, what the first thread to fail raised; the others are stopped.
        RunnerDeadlock: on leaving, if all threads waited for each other.
        RunnerTimeout: on leaving.
    """

    runner_context = _RunnerContext()

    def __init__(
        self,
        ranks: Collection[int] | int,
        concurrency: int,
        fn: Callable[[int], Any],
        *,
        seed: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self._ranks = frozenset(range(ranks) if isinstance(ranks, int) else ranks)
        if not self._ranks or not 1 <= concurrency <= len(self._ranks):
            raise WorldError(
                f"LocalRunnerMode got {len(self._ranks)} ranks and {concurrency} threads. It needs "
                "at least one rank, and between one thread and one per rank."
            )
        self._concurrency, self._fn = concurrency, fn
        self._seed, self._timeout = seed, timeout
        self._engine: Engine | None = None
        self._recv_objects: dict[int, dict[int, deque[Any]]] = {}
        self.results: dict[int, Any] = {}
        """After leaving: what `fn` returned, by thread."""

    def __repr__(self) -> str:
        return f"LocalRunnerMode(ranks={sorted(self._ranks)}, concurrency={self._concurrency})"

    def __enter__(self) -> LocalRunnerMode:
        if self._engine is not None:
            raise WorldError("this LocalRunnerMode is already running. Make another one.")
        one_per_rank = self._concurrency == len(self._ranks)
        ids = sorted(self._ranks) if one_per_rank else range(self._concurrency)
        ranks = sorted(self._ranks)
        self._recv_objects = {d: {s: deque() for s in ranks} for d in ranks}
        engine = Engine(list(ids), seed=self._seed, timeout=self._timeout, init_group=one_per_rank)
        with contextlib.ExitStack() as stack:
            engine.install()
            stack.callback(engine.uninstall)
            _set_active(self)
            stack.callback(_set_active, None)
            self._engine = engine
            engine.start(self._run)
            stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        engine = self._engine
        if engine is None:
            raise WorldError("this LocalRunnerMode is not running.")
        try:
            if exc_val is not None:
                engine.scheduler.stop(exc_val)
            self.results = engine.join()
        finally:
            _set_active(None)
            engine.uninstall()
            self._engine = None

    def _run(self, id: int) -> Any:
        LocalRunnerMode.runner_context.id = id
        return self._fn(id)

    @staticmethod
    def active() -> bool:
        """Whether a LocalRunnerMode is active in this process."""
        return _active is not None

    @staticmethod
    def current() -> LocalRunnerMode:
        """The active LocalRunnerMode. Raises WorldError if there is none."""
        if _active is None:
            raise WorldError(
                "LocalRunnerMode is not enabled: this call needs a program per rank. Run it in "
                "LocalRunnerMode(ranks, concurrency, fn)."
            )
        return _active

    # ---- the run lock: the baton, by its name in torch
    @property
    def _scheduler(self) -> Scheduler:
        if self._engine is None:
            raise WorldError("this LocalRunnerMode is not running.")
        return self._engine.scheduler

    def _acquire_run_lock(self) -> None:
        """Wait until this thread may run again, after `_release_run_lock`."""
        self._scheduler.acquire()

    def _release_run_lock(self) -> None:
        """Let the other threads run; this one must touch nothing of theirs meanwhile."""
        self._scheduler.release()

    def _assert_holds_run_lock(self) -> None:
        if self._engine is None or not self._scheduler.holds():
            raise WorldError("Calling thread does not hold the run lock")

    # ---- objects from rank to rank
    def _peers(self, src: int) -> list[int]:
        return sorted(self._ranks) if src == -1 else [src]

    def _get_recv_object(self, src: int, dst: int) -> object | None:
        """What `src` (-1: any rank) sent to `dst` first, or None."""
        for peer in self._peers(src):
            if self._recv_objects[dst][peer]:
                return self._recv_objects[dst][peer].popleft()
        return None

    def _signal_send(self, src: int, dst: int, obj: object) -> None:
        """Send an object, which must not be None, from `src` to `dst`. Does not wait."""
        if obj is None:
            raise WorldError("Cannot signal None: _get_recv_object returns it for no object.")
        self._recv_objects[dst][src].append(obj)
        self._scheduler.pause()

    def _wait_recv(self, src: int, dst: int, post: Callable[[object], None]) -> None:
        """Wait for an object of `src` (-1: any rank) to `dst` and call `post` with it."""
        self._scheduler.wait(_WaitsForObject(self, src, dst))
        post(self._get_recv_object(src, dst))


_active: LocalRunnerMode | None = None


def _set_active(mode: LocalRunnerMode | None) -> None:
    global _active
    _active = mode
