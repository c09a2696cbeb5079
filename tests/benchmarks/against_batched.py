"""A step against the same program written by hand on [W, ...] tensors, and against a plain loop."""

from __future__ import annotations

import torch

from .models import SMALL_BLOCK, SMALL_MLP, Model, block_model, mlp_model
from .plot import Plot
from .report import Bound, Section, milliseconds, progress, ratio
from .timing import Timed, medians
from .worlds import (
    BATCHED,
    LOOP,
    STACKED,
    Compile,
    batched,
    compiled,
    eager,
    loop,
    ours,
    process_group,
)

RANKS = (2, 8, 64, 256, 1024)
LARGE_RANKS = (8, 64)
MODELS = (mlp_model(64, 256, 512), block_model(1, 64, 256))
BOUNDED, MOST = 64, 1.1
MOST_LOOP = 8


def steps(model: Model, ranks: int, make: Compile) -> dict[str, Timed]:
    calls = {STACKED: ours(model, ranks, make=make), BATCHED: batched(model, ranks, make)}
    if ranks <= MOST_LOOP:
        calls[LOOP] = loop(model, ranks, make)
    return calls


def run(quick: bool) -> Section:
    worlds, rounds = ((2, 4), 2) if quick else (RANKS, 9)
    small = (SMALL_MLP, SMALL_BLOCK)
    models = small[:1] if quick else (*MODELS, *small)
    backends = {"eager": eager} if quick else {"eager": eager, "inductor": compiled("inductor")}
    rows, bounds = [], []
    curves: dict[str, dict[int, float]] = {}
    for backend, make in backends.items():
        for model, ranks in ((m, r) for m in models for r in worlds):
            if model in MODELS and ranks not in LARGE_RANKS:
                continue
            torch._dynamo.reset()
            with process_group(ranks):
                found = medians(steps(model, ranks, make), rounds if model in small else 5)
            mine = found[STACKED]
            against = mine / found[BATCHED]
            name = f"{model.name}, {model.size}"
            alone = ratio(found[LOOP] / mine) if LOOP in found else ""
            rows.append([name, backend, str(ranks), milliseconds(mine), ratio(against), alone])
            progress("against_batched", rows[-1])
            curves.setdefault(f"{model.name}, {model.size.partition(',')[0]}, {backend}", {})[
                ranks
            ] = against
            if ranks == BOUNDED and model in MODELS:
                bounds.append(Bound(f"{name}, {backend}: W = {ranks}", against, at_most=MOST))
    return Section(
        "against_batched",
        "Against the hand-written batched program",
        "One step, forward and backward, of the stacked layout against plain torch on tensors "
        "`[W, ...]`: `bmm` for each matmul, attention on `W * batch`, weights of its own on every "
        "rank. Sizes are those of one rank. *against batched*: how many times as long the stacked "
        "layout takes. *plain loop*: how many times as long a loop over the ranks takes as the "
        "stacked layout, compiled once for one rank. Bounds are for the larger sizes; the small "
        "ones show the overhead of a step.",
        ("step", "backend", "W", "stacked", "against batched", "plain loop"),
        rows,
        bounds,
        Plot("Step time against the batched program", "times as long", curves),
    )
