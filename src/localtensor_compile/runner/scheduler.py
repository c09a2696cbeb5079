"""One thread per rank, of which exactly one runs: it holds the baton until it has to wait.

Who is next is drawn from a seeded generator, or goes round: the same seed gives the same
interleaving. Knows nothing of torch: what has to be exchanged when the baton changes hands is done
by the `on_switch` object. A rank that waits says so with a `Wait`; when all do, that is a deadlock,
reported at once.
"""

from __future__ import annotations

import contextvars
import ctypes
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import LocalTensorError, RunnerDeadlock, RunnerTimeout, UnsupportedError
from .stacks import where_thread_is


class RankStopped(BaseException):
    """Unwinds a rank's thread after another failed. Not an Exception, so that nobody catches it."""


class Wait(Protocol):
    """What a rank waits for."""

    def ready(self) -> bool:
        """Whether the rank can go on."""

    def text(self) -> str:
        """'recv from rank 1 at a.py:3, ...' for the report of a deadlock."""


class OnSwitch(Protocol):
    """State of the process that each rank has its own of. `None` stands for the caller."""

    def save(self, rank: int | None) -> None: ...

    def load(self, rank: int | None) -> None: ...

    def pinned(self) -> str | None:
        """Why no other rank may run now, or None."""


POLLS = 1000
"""So often a rank may poll in a row while nobody else can run (and for `Scheduler.patience`)."""


class Task:
    """One rank's thread."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.gate = threading.Semaphore(0)
        self.thread: threading.Thread | None = None
        self.wait: Wait | None = None
        self.done = False
        self.started = False
        self.away = False
        self.polls, self.polling_since = 0, 0.0
        self.result: Any = None
        self.error: BaseException | None = None

    def __repr__(self) -> str:
        state = "ended" if self.done else "waits" if self.wait else "can run"
        return f"Task(rank={self.rank}, {state})"


class _Here(threading.local):
    task: Task | None = None
    scheduler: Scheduler | None = None


_here = _Here()


def current_scheduler() -> Scheduler | None:
    """The scheduler whose rank this thread is, or None."""
    return _here.scheduler


def current_rank() -> int | None:
    """The rank that this thread is, or None."""
    return None if _here.task is None else _here.task.rank


class Scheduler:
    """Runs `fn(rank)` in a thread per rank.

    Args:
        ranks: the ranks; fn gets each.
        seed: of the generator that draws who runs next at every call that may wait. None: ranks
            take turns, each runs until it must wait.
        timeout: seconds that a rank may run without a call that lets others run, while others
            wait; None is no limit.
        on_switch: state to exchange when the baton changes hands.
        stop_on_error: whether an error of one rank stops the others.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        *,
        seed: int | None = None,
        timeout: float | None = None,
        on_switch: OnSwitch | None = None,
        stop_on_error: bool = True,
    ) -> None:
        self.tasks = {r: Task(r) for r in ranks}
        self.seed, self.timeout = seed, timeout
        self.failed: int | None = None
        self.paused_clock = False
        self._draw = None if seed is None else random.Random(seed)
        self._on_switch = on_switch
        self._stop_on_error = stop_on_error
        self._finished = threading.Event()
        self._stopping: BaseException | None = None
        self._running: Task | None = None
        self._switched = time.monotonic()
        self.switches = 0
        self.report_when_stopped = ""
        self.patience = 5.0

    # ---- called by the caller's thread
    def run(self, fn: Callable[[int], Any]) -> dict[int, Any]:
        """{rank: fn(rank)}.

        Raises:
            BaseException: what the first rank to fail raised.
            RunnerDeadlock: all ranks wait.
            RunnerTimeout: a rank ran for longer than the time-out while others waited.
        """
        self.start(fn)
        return self.join()

    def start(self, fn: Callable[[int], Any]) -> None:
        """Start the threads; the first rank runs."""
        if self._on_switch is not None:
            self._on_switch.save(None)
        for task in self.tasks.values():
            # What the caller set for itself, such as torch's configuration, holds in the threads.
            run = contextvars.copy_context().run
            name = f"localtensor rank {task.rank}"
            task.thread = threading.Thread(target=run, args=(self._thread, task, fn), name=name)
            task.thread.daemon = True  # a rank that never comes back must not keep the process
        for task in self.tasks.values():
            task.thread.start()  # type: ignore[union-attr]
        first = self._next(None)
        if first is None:
            self._finished.set()
        else:
            self._give(first)

    def join(self) -> dict[int, Any]:
        """Wait until all ranks are done. Returns {rank: result} or raises, as `run` says."""
        try:
            self._watch()
        except BaseException as error:  # Ctrl-C, or the time-out
            self.report_when_stopped = self.report()
            self.stop(error)
            self._interrupt_running()
            self._leave(grace=5.0)
            raise
        self._leave(grace=10.0)
        if self.failed is not None and self._stop_on_error:
            raise self.tasks[self.failed].error  # type: ignore[misc]
        if isinstance(self._stopping, LocalTensorError):
            raise self._stopping
        return {r: t.result for r, t in self.tasks.items()}

    def _watch(self) -> None:
        while not self._finished.wait(None if self.timeout is None else 0.05):
            running = self._running
            waited = time.monotonic() - self._switched
            if self.paused_clock or running is None or waited <= self.timeout:  # type: ignore[operator]
                continue
            raise RunnerTimeout(
                f"rank {running.rank} has run for {waited:.1f} s without a call that lets other "
                f"ranks run (the time-out is {self.timeout} s), {where_thread_is(running.thread)}."
                f"\n{self.report()}\nIf it computes, raise the time-out; if it waits for another "
                "rank by polling a file or a variable, use a barrier or send and recv."
            )

    def _leave(self, grace: float) -> None:
        self._finished.wait(grace)
        for task in self.tasks.values():
            if task.done and task.thread is not None:
                task.thread.join(grace)
        if self._on_switch is not None:
            self._on_switch.load(None)

    def stop(self, error: BaseException) -> None:
        """Unwind every rank's thread: its next call, or the one it waits in, raises RankStopped."""
        if self._stopping is None:
            self._stopping = error

    def _interrupt_running(self) -> None:
        """Raise RankStopped in the rank that runs: the others are reached when it ends."""
        task = self._running
        if task is not None and not task.done and task.thread is not None:
            set_error = ctypes.pythonapi.PyThreadState_SetAsyncExc
            set_error(ctypes.c_ulong(task.thread.ident or 0), ctypes.py_object(RankStopped))

    # ---- called by a rank's thread
    def wait(self, wait: Wait) -> None:
        """Let other ranks run until `wait` is ready.

        Raises:
            RankStopped: another rank failed, or all ranks wait for each other.
        """
        task = self._own()
        while not wait.ready():
            why = self._pinned()
            if why is not None and self._stopping is None:
                raise UnsupportedError(
                    f"rank {task.rank} must wait while {why}, where no other rank can run: it "
                    f"waits in {wait.text()}. Do it before or after."
                )
            task.wait = wait
            try:
                self._switch(task)
            finally:
                task.wait = None
            self._require_running()
        self._require_running()

    def pause(self) -> None:
        """A place where another rank may run: with a seed, whoever is drawn goes on."""
        task = self._own()
        task.polls = 0
        self._require_running()
        if self._draw is not None and self._pinned() is None:
            self._switch(task)
            self._require_running()

    def give_way(self) -> None:
        """Let every other rank that can run have a turn: for ranks that poll."""
        task = self._own()
        before = self.switches
        if self._pinned() is None:
            self._switch(task, others=True)
        if self.switches == before:
            self._polled_in_vain(task)
        else:
            task.polls = 0
        self._require_running()

    def _polled_in_vain(self, task: Task) -> None:
        """Nobody else can run: a rank that keeps polling without another call never ends."""
        now = time.monotonic()
        if task.polls == 0:
            task.polling_since = now
        task.polls += 1
        if task.polls >= POLLS and now - task.polling_since >= self.patience:
            alive = [t for t in self.tasks.values() if not t.done]
            self.stop(RunnerDeadlock(self._deadlock_text(alive)))

    def check_running(self) -> None:
        """Raise RankStopped if the run is being stopped."""
        self._own()
        self._require_running()

    def release(self) -> None:
        """The rank does not need to be the one that runs until it calls `acquire`."""
        self._own().away = True

    def acquire(self) -> None:
        """Be the one that runs, after the others had a turn."""
        task = self._own()
        if task.away:
            task.away = False
            self.give_way()

    def holds(self) -> bool:
        """Whether the calling thread is the rank that runs."""
        task = _here.task
        return task is not None and task is self._running and not task.away

    def _pinned(self) -> str | None:
        return None if self._on_switch is None else self._on_switch.pinned()

    def _own(self) -> Task:
        task = _here.task
        if task is None or _here.scheduler is not self:
            raise LocalTensorError(
                "a call of one rank's process group was made in a thread that is no rank. Call "
                "torch.distributed in the thread that the rank started in."
            )
        return task

    def _require_running(self) -> None:
        if self._stopping is not None:
            raise RankStopped

    def _thread(self, task: Task, fn: Callable[[int], Any]) -> None:
        _here.task, _here.scheduler = task, self
        task.gate.acquire()
        task.started = True
        try:
            self._load(task)
            self._require_running()
            task.result = fn(task.rank)
        except RankStopped:
            pass
        except BaseException as error:
            self._failed(task, error)
        finally:
            self._end(task)

    def _failed(self, task: Task, error: BaseException) -> None:
        task.error = error
        if self._stopping is None and self.failed is None:
            self.failed = task.rank
        if self._stop_on_error:
            self.stop(error)

    def _end(self, task: Task) -> None:
        _here.task = _here.scheduler = None
        if self._on_switch is not None:
            self._on_switch.save(task.rank)
        task.done = True
        following = self._next(task)
        if following is None:
            self._running = None
            self._finished.set()
        else:
            self._give(following)

    # ---- the baton
    def _switch(self, task: Task, others: bool = False) -> None:
        following = self._next(task, others)
        if following is task or following is None:
            return
        if self._on_switch is not None:
            self._on_switch.save(task.rank)
        self._give(following)
        task.gate.acquire()
        self._load(task)

    def _give(self, task: Task) -> None:
        self._running, self._switched = task, time.monotonic()
        self.paused_clock = False
        self.switches += 1
        task.gate.release()

    def _load(self, task: Task) -> None:
        if self._on_switch is not None:
            self._on_switch.load(task.rank)

    def _next(self, task: Task | None, others: bool = False) -> Task | None:
        """Who runs now. None: nobody is left."""
        alive = [t for t in self.tasks.values() if not t.done]
        if not alive:
            return None
        ready = [t for t in alive if self._stopping or t.wait is None or t.wait.ready()]
        if not ready:
            self.stop(RunnerDeadlock(self._deadlock_text(alive)))
            ready = alive
        if others and len(ready) > 1:
            ready = [t for t in ready if t is not task]
        if self._draw is not None and self._stopping is None:
            return self._draw.choice(ready)
        if task is None:
            return ready[0]
        order = list(self.tasks.values())
        here = order.index(task)
        turn = {id(t): (order.index(t) - here - 1) % len(order) for t in ready}
        return min(ready, key=lambda t: turn[id(t)])

    # ---- reports
    def _deadlock_text(self, waiting: Sequence[Task]) -> str:
        return (
            "all ranks wait: on real processes this hangs until the time-out.\n"
            f"{self.report()}\n"
            "Make every rank of a group call the same collectives in the same order, and give "
            "every send its recv."
        )

    def report(self) -> str:
        """One line per rank: what it waits for, or where it runs."""
        lines = []
        for rank, task in self.tasks.items():
            if task.done:
                failed = task.error is not None
                state = "has failed" if failed else "has ended" if task.started else "never started"
            elif task.wait is not None:
                state = f"waits in {task.wait.text()}"
            elif task is self._running:
                verb = "polls" if task.polls else "runs"
                state = f"{verb} {where_thread_is(task.thread)}"
            else:
                state = "could run"
            lines.append(f"  rank {rank} {state}")
        return "\n".join(lines)
