"""Medians of calls that take turns, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

Timed = tuple[AbstractContextManager[object], Callable[[], object]]
"""A context to be in, and a call; entering the context is not timed."""


def medians(calls: dict[str, Timed], rounds: int = 15) -> dict[str, float]:
    """{name: median seconds of one call}, the calls taking turns in every round."""
    repeats = {}
    for name, (context, call) in calls.items():
        with context:
            call()
            repeats[name] = max(1, min(200, int(0.01 / max(once(call), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (context, call) in calls.items():
            with context:
                call()
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    call()
                times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(t) for name, t in times.items()}


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
