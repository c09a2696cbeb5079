"""An eager step against torch's own LocalTensor and against a plain loop over ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .models import SMALL_BLOCK, SMALL_MLP, Model, block_model, mlp_model, pointwise
from .plot import Plot
from .report import Bound, Section, milliseconds, ratio
from .timing import Timed, medians
from .worlds import (
    LOOP,
    OWN,
    PER_RANK,
    STACKED,
    local,
    loop,
    mode,
    ours,
    own,
    process_group,
    upstream,
)

RANKS = (1, 2, 8, 32, 64)
LARGER = (mlp_model(64, 256, 512), block_model(1, 64, 128))
BOUNDS = {
    ("MLP", 8): 10,
    ("MLP", 64): 15,
    ("block", 8): 10,
    ("block", 64): 15,
    ("pointwise", 64): 50,
}


def steps(model: Model, ranks: int) -> dict[str, Timed]:
    return {
        STACKED: ours(model, ranks),
        PER_RANK: ours(model, ranks, PER_RANK),
        OWN: own(model, ranks),
        LOOP: loop(model, ranks),
    }


def pointwise_steps(ranks: int) -> dict[str, Timed]:
    """Four elementwise ops on 8 x 8, without grad."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, ranks, 8, 8, generator=generator)
    calls: dict[str, Timed] = {}
    for layout in (STACKED, PER_RANK):
        world = mode(ranks, layout)
        with world:
            operands = [local(world, t) for t in (a, b)]
        calls[layout] = world, lambda operands=operands: pointwise(*operands)
    theirs = [upstream.LocalTensor({r: t[r].clone() for r in range(ranks)}) for t in (a, b)]
    context: Any = upstream.LocalTensorMode(ranks)
    calls[OWN] = context, lambda: pointwise(*theirs)
    plain = [(a[r].clone(), b[r].clone()) for r in range(ranks)]

    def each() -> None:
        for x, y in plain:
            pointwise(x, y)

    calls[LOOP] = contextlib.nullcontext(), each
    return calls


def run(quick: bool) -> Section:
    worlds, rounds = ((2, 4), 2) if quick else (RANKS, 9)
    rows, bounds = [], []
    curves: dict[str, dict[int, float]] = {}
    larger = () if quick else LARGER
    for ranks in worlds:
        with process_group(ranks):
            timed = {
                f"{model.name}, {model.size}": steps(model, ranks)
                for model in (SMALL_MLP, SMALL_BLOCK, *(larger if ranks in (8, 64) else ()))
            }
            timed["pointwise, 8 x 8"] = pointwise_steps(ranks)
            for name, calls in timed.items():
                found = medians(calls, rounds)
                mine = found[STACKED]
                others = [found[key] / mine for key in (OWN, PER_RANK, LOOP)]
                rows.append([name, str(ranks), milliseconds(mine), *map(ratio, others)])
                least = BOUNDS.get((name.partition(",")[0], ranks))
                small = not any(name.endswith(model.size) for model in LARGER)
                if small:
                    for key, seconds in found.items():
                        if name.startswith("MLP"):
                            curves.setdefault(key, {})[ranks] = seconds * 1e3
                if least is not None and small:
                    bounds.append(Bound(f"{name}: W = {ranks}", others[0], at_least=least))
    return Section(
        "against_torch",
        "Eager, against torch's own LocalTensor",
        "One step: forward and backward of the MLP (`relu(x @ w1) @ w2`) and of a transformer "
        "block, or four elementwise ops without grad. Each inside its own mode, which is entered "
        "outside the clock; contestants take turns. Ratios say how many times longer the other one "
        "takes than the stacked layout. Larger sizes are dominated by the matmuls, which all of "
        "them do.",
        ("step", "W", "stacked", OWN, PER_RANK, LOOP),
        rows,
        bounds,
        Plot(f"Eager MLP step, {SMALL_MLP.size}", "ms", curves),
    )
