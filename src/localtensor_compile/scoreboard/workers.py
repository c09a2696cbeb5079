"""Measures many ops in worker processes, and goes on when one of them hangs or dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from . import ops
from .measure import Plan, Steps, measure
from .store import Record

# A worker that has grown beyond this gives way to a new one: compiled code is never unloaded.
_LARGEST = 4 << 30
# After so many steps of one op have hung or died, the op is given up.
_LOSSES = 12
# For a process to import torch and the op database, in seconds.
_STARTING = 300.0
# For one without work to close what it holds.
_LEAVING = 10.0
_IDLE = "idle"


@dataclass(frozen=True)
class Task:
    """One op in one world."""

    op: str
    world_size: int


Measure = Callable[[str, int, Plan, Steps], Record]


@dataclass
class _Worker:
    process: Any
    channel: Connection
    task: Task
    step: str
    deadline: float


def run(
    tasks: Iterable[Task],
    plan: Plan,
    *,
    jobs: int,
    timeout: float,
    done: Callable[[Record], None],
    at: Callable[[Task, str], None] = lambda task, step: None,
    how: Measure = measure,
) -> None:
    """Measure all tasks. `done` gets each record, `at` each step that begins.

    A step that takes longer than `timeout` seconds, or that ends its process, counts as failed
    with that text: the op is measured again in a new process, without the step.
    """
    waiting = list(tasks)[::-1]
    lost: dict[Task, dict[str, str]] = {}
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_start(waiting.pop(), plan, how, lost))
            soonest = min(w.deadline for w in workers) - time.monotonic()
            ready = wait([w.channel for w in workers], max(0.0, soonest))
            for worker in list(workers):
                if worker.channel in ready:
                    kind, value = _receive(worker)
                elif time.monotonic() > worker.deadline:
                    kind, value = "lost", f"timed out after {timeout:g} s"
                else:
                    continue
                if kind == "step":
                    worker.step, worker.deadline = value, time.monotonic() + timeout
                    at(worker.task, value)
                    continue
                if kind == "record":
                    worker.step = _IDLE
                    done(value[0])
                    if waiting and value[1] < _LARGEST:
                        _give(worker, waiting.pop(), lost)
                        continue
                else:
                    steps = lost.setdefault(worker.task, {})
                    steps[worker.step] = value
                    if len(steps) < _LOSSES:
                        waiting.append(worker.task)
                    else:
                        done(_given_up(worker.task, plan, value))
                _end(worker)
                workers.remove(worker)
    finally:
        for worker in workers:
            _end(worker)


def _start(task: Task, plan: Plan, how: Measure, lost: dict[Task, dict[str, str]]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, plan, how), daemon=False)
    process.start()
    theirs.close()
    worker = _Worker(process, ours, task, "starting", 0.0)
    _give(worker, task, lost)
    return worker


def _give(worker: _Worker, task: Task, lost: dict[Task, dict[str, str]]) -> None:
    worker.task, worker.step = task, "starting"
    worker.deadline = time.monotonic() + _STARTING
    with contextlib.suppress(OSError):  # one that has just died is noticed when it is read from
        worker.channel.send((task, lost.get(task, {})))


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = worker.channel.recv()
        return message
    except (EOFError, OSError):
        worker.process.join(5)
        code = worker.process.exitcode
        if code is not None and code < 0:
            return "lost", f"the process was killed by {signal.Signals(-code).name}"
        return "lost", f"the process ended with exit code {code}"


def _end(worker: _Worker) -> None:
    """Let the worker go; one that hangs is killed with the compilers that it has started.

    Real ranks notice by themselves that the process they belong to is gone.
    """
    worker.channel.close()
    if worker.step == _IDLE:
        worker.process.join(_LEAVING)
    with contextlib.suppress(OSError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.kill()
    worker.process.join()


def _given_up(task: Task, plan: Plan, reason: str) -> Record:
    return {
        "op": task.op,
        "world_size": task.world_size,
        "dtype": str(ops.dtype_of(task.op)).removeprefix("torch."),
        "plan": plan.as_json(),
        "reason": f"given up after {_LOSSES} steps that hung or died; the last {reason}",
        "cases": [],
        "seconds": 0.0,
    }


def _work(channel: Connection, plan: Plan, how: Measure) -> None:
    """In the worker's process."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    torch.set_num_threads(1)
    # Compilers print what they think of a program; what counts is in the record.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    if not os.environ.get("LOCALTENSOR_SCOREBOARD_STDERR"):
        os.dup2(silence, 2)
    while True:
        try:
            task, lost = channel.recv()
        except EOFError:
            return
        steps = Steps(lambda name: channel.send(("step", name)), lost)
        record = how(task.op, task.world_size, plan, steps)
        channel.send(("record", (record, _memory())))


def _memory() -> int:
    """The largest this process has been, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size << 10
