"""Peak memory of compiling and running the tensor-parallel MLP, over the number of ranks."""

from __future__ import annotations

import json
import sys

import torch

from .apart import run_apart
from .machine import peak_memory
from .models import Model, mlp_model, tp_mlp
from .plot import Plot
from .report import Section, figure
from .worlds import (
    BATCHED,
    OWN,
    PER_RANK,
    STACKED,
    batched,
    compiled,
    eager,
    module,
    ours,
    own,
    process_group,
)

RANKS = (1, 2, 8, 32, 64, 256, 1024)
GROWING = 64  # the most ranks of what grows with them
SIZE = (16, 64, 128)  # tokens, width and hidden width of one rank
TP_SIZE = (16, 256, 4096)


def model() -> Model:
    return mlp_model(*SIZE)


def peak(what: str, ranks: int) -> float:
    """MiB that two steps take, above what torch and this package take by themselves."""
    _, name, backend = what.split(", ")
    make = eager if backend == "eager" else compiled(backend)
    before = peak_memory()
    with process_group(ranks):
        if what.startswith("TP"):
            context, step = module(tp_mlp, ranks, *TP_SIZE, layout=name, make=make)
        elif name == BATCHED:
            context, step = batched(model(), ranks, make)
        elif name == OWN:
            context, step = own(model(), ranks, make, inside=backend == "eager")
        else:
            context, step = ours(model(), ranks, name, make)
        with context:
            step()
            step()
    return peak_memory() - before


CONTESTANTS = (
    f"MLP, {STACKED}, eager",
    f"MLP, {STACKED}, aot_eager",
    f"TP MLP, {STACKED}, aot_eager",
    f"MLP, {PER_RANK}, aot_eager",
    f"MLP, {OWN}, aot_eager",
    f"MLP, {BATCHED}, eager",
)


def run(quick: bool) -> Section:
    worlds, contestants = ((2,), CONTESTANTS[:1]) if quick else (RANKS, CONTESTANTS)
    curves: dict[str, dict[int, float]] = {}
    for name in contestants:
        grows = f", {PER_RANK}," in name or f", {OWN}," in name
        for ranks in worlds:
            if grows and ranks > GROWING:
                continue
            used = peak(name, ranks) if quick else run_apart("memory", name, ranks)
            curves.setdefault(name, {})[ranks] = max(used, 0.1)
    rows = [
        [name, *(figure(curve[r]) if r in curve else "" for r in worlds)]
        for name, curve in curves.items()
    ]
    tokens, width, hidden = SIZE
    tp = TP_SIZE
    return Section(
        "memory",
        "Peak memory",
        "MiB at the peak of two steps, forward and backward, with compiling, above what the "
        "process held once torch and the package were imported; each figure has a process of its "
        "own. The "
        f"MLP has {tokens} x {width}, {hidden} hidden on each rank, with weights of its own "
        f"({(2 * width * hidden) / 2**18:.2g} MiB of weights per rank); the TP MLP has "
        f"{tp[0]} x {tp[1]}, {tp[2]} hidden on all ranks together.",
        ("program, contestant, backend", *(f"W = {r}" for r in worlds)),
        rows,
        plot=Plot("Peak memory of two steps", "MiB", curves),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
