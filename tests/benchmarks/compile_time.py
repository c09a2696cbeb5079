"""How long compiling and the first step take, over the number of ranks; cold caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch._inductor.utils import clear_caches

from .graph_nodes import contestants
from .plot import Plot
from .report import Bound, Section, figure, progress
from .timing import Timed, once, single
from .worlds import PER_RANK, STACKED, compiled, process_group

RANKS = (1, 2, 8, 32, 64, 256, 1024)
BOUNDED = {64: 1.3, 256: 1.6}
BACKENDS = ("aot_eager", "inductor")
PROGRAMS = ("MLP", "block", "TP MLP", "FSDP MLP")


def compile_seconds(contestant: Callable[..., Timed], ranks: int, backend: str) -> float:
    """Seconds of the first step, which compiles forward and backward, with no cache to read."""
    torch._dynamo.reset()
    clear_caches()
    with process_group(ranks):
        context, step = contestant(ranks, make=compiled(backend))
        with context:
            return once(step)


def run(quick: bool) -> Section:
    worlds = (2, 4) if quick else RANKS
    backends = BACKENDS[:1] if quick else BACKENDS
    programs = PROGRAMS[:1] if quick else PROGRAMS
    per_rank = (2,) if quick else (2, 8, 32)
    found = contestants()
    curves: dict[str, dict[int, float]] = {}
    with torch.compiler.config.patch(force_disable_caches=True):
        for backend in backends:
            for program in programs:
                take_turns(found, curves, program, STACKED, backend, worlds, 1 if quick else 5)
            take_turns(found, curves, "MLP", PER_RANK, backend, per_rank, 1 if quick else 3)
    bounds = [
        Bound(f"{name}: W = {ranks} against W = 2", curve[ranks] / curve[2], at_most=most)
        for name, curve in curves.items()
        for ranks, most in BOUNDED.items()
        if ranks in curve
    ]
    rows = [
        [name, *(f"{figure(curve[r])} s" if r in curve else "" for r in worlds)]
        for name, curve in curves.items()
    ]
    return Section(
        "compile_time",
        "Compile time",
        "Seconds of the first step, forward and backward, in one process after a first compilation "
        "that is not counted; compiler caches are off and Dynamo is reset before each. Medians of "
        "five; the numbers of ranks take turns.",
        ("program, layout, backend", *(f"W = {r}" for r in worlds)),
        rows,
        bounds,
        Plot("First step", "seconds", curves),
    )


def take_turns(
    found: dict[str, tuple[Callable[..., Timed], bool]],
    curves: dict[str, dict[int, float]],
    program: str,
    layout: str,
    backend: str,
    worlds: tuple[int, ...],
    rounds: int,
) -> None:
    """Add the curve of one program to `curves`."""
    contestant, _ = found[f"{program}, {layout}"]
    compile_seconds(contestant, 2, backend)
    calls = {str(r): partial(compile_seconds, contestant, r, backend) for r in worlds}
    seconds = single(calls, rounds)
    name = f"{program}, {layout}, {backend}"
    curves[name] = {int(r): s for r, s in seconds.items()}
    progress("compile_time", [name, *(f"W = {r}: {figure(s)} s" for r, s in seconds.items())])
