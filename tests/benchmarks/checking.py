"""Checking a program against starting real gloo processes and running it there."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import localtensor_compile as lt
from localtensor_compile.check.gloo import GlooPool

from .apart import ROOT
from .models import tp_mlp
from .plot import Plot
from .report import Bound, Section, figure, ratio
from .timing import once, single
from .worlds import PER_RANK, STACKED

_LAYOUTS = "layout" in inspect.signature(lt.check).parameters

RANKS = (8,)
BOUNDED, LEAST = 8, 10.0


def program(world: Any) -> dict[str, Any]:
    """The tensor-parallel MLP; outputs, loss and gradients are compared."""
    model = tp_mlp(world.size, 64, 64 * 4)
    x = torch.randn(16, 64)
    y = world.compile(model)(x)
    loss = y.square().mean()
    loss.backward()
    return {"y": y, "loss": loss, **{n: p.grad for n, p in model.named_parameters()}}


def simulated(ranks: int, layout: str, backend: str) -> float:
    """Seconds of a check without real processes: eager and one backend, compared."""
    options: dict[str, Any] = {"layout": layout} if _LAYOUTS else {}

    def check() -> None:
        report = lt.check(program, ranks, backends=("eager", backend), oracle=None, **options)
        report.raise_if_failed()

    return once(check)


def processes(ranks: int) -> float:
    """Seconds from starting `ranks` Python processes until all have run the program."""
    return once(lambda: launch(ranks))


def launch(ranks: int) -> None:
    """As torchrun starts them, without its agent.

    Raises:
        RuntimeError: one of them failed.
    """
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", f"{__package__}.real_rank"]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, cwd=ROOT, env={**shared, "RANK": str(rank)})
        for rank in range(ranks)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError("a real rank failed; its traceback stands above")


def pool(ranks: int) -> float:
    """Seconds of the package's own pool, started cold: torch is imported once, workers fork."""

    def run() -> None:
        with GlooPool(0) as fresh:
            fresh.run(f"{Path(__file__).with_name('real_rank.py')}:run", ranks)

    return once(run)


def run(quick: bool) -> Section:
    worlds, rounds = ((2,), 1) if quick else (RANKS, 5)
    rows, bounds = [], []
    curves: dict[str, dict[int, float]] = {}
    real, cold_pool = "gloo processes, cold", "pool of gloo processes, cold"
    checked = f"check, {STACKED}, aot_eager"
    for ranks in worlds:
        calls = {
            checked: lambda: simulated(ranks, STACKED, "aot_eager"),
            f"check, {PER_RANK}, aot_eager": lambda: simulated(ranks, PER_RANK, "aot_eager"),
        }
        if not quick:
            calls |= {real: lambda: processes(ranks), cold_pool: lambda: pool(ranks)}
        simulated(2, STACKED, "aot_eager")  # what the first compilation of a process loads
        found = single(calls, rounds)
        for key, seconds in found.items():
            curves.setdefault(key, {})[ranks] = seconds
            against = ratio(seconds / found[checked])
            rows.append([key, str(ranks), f"{figure(seconds)} s", against])
        if ranks == BOUNDED:
            bounds.append(
                Bound(f"gloo processes: W = {ranks}", found[real] / found[checked], at_least=LEAST)
            )
    return Section(
        "checking",
        "Checking a program, against real processes",
        "The tensor-parallel MLP (16 x 64, 256 hidden; outputs, loss and gradients). *check*: "
        '`lt.check(program, W, backends=("eager", "aot_eager"), oracle=None)` in a process that '
        "has compiled before: two runs of the program and their comparison. *gloo processes*: W "
        "Python processes from their start to their end, eager, one run. *pool*: those of this "
        "package, which import torch once and fork. The last column is against the check in the "
        "stacked layout.",
        ("what", "W", "seconds", "against check"),
        rows,
        bounds,
        None if quick else Plot("Checking a program", "seconds", curves),
    )
