"""Medians of calls that take turns, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

Timed = tuple[AbstractContextManager[object], Callable[[], object]]
"""A context to be in, and a call; entering the context is not timed."""

ROUNDS = 9
LEAST = 0.01  # seconds that one timing takes at least, by repeating a short call


def medians(calls: Mapping[str, Timed], rounds: int = ROUNDS) -> dict[str, float]:
    """{name: median seconds of one call}, the calls taking turns in every round."""
    repeats = {}
    for name, (context, call) in calls.items():
        with context:
            call()
            repeats[name] = max(1, min(200, int(LEAST / max(once(call), 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (context, call) in calls.items():
            with context:
                if repeats[name] > 1:
                    call()
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    call()
                times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(t) for name, t in times.items()}


def single(calls: Mapping[str, Callable[[], float]], rounds: int = 5) -> dict[str, float]:
    """{name: median of what it returns}, taking turns; each call measures itself.

    For what can be timed once only, such as a compilation: nothing is repeated within a round.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
    return {name: statistics.median(values) for name, values in found.items()}


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
