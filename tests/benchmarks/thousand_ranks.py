"""1024 ranks of the tensor-parallel MLP: compile and one train step, in a process of its own."""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from .apart import run_apart
from .machine import peak_memory
from .models import tp_mlp
from .report import Bound, Section, figure
from .worlds import mode

RANKS, TOKENS, WIDTH, HIDDEN = 1024, 16, 256, 4096


def train(ranks: int, tokens: int, width: int, hidden: int, backend: str) -> dict[str, float]:
    """Build, compile and train for one step; seconds, and MiB at the peak."""
    before, begin = peak_memory(), time.perf_counter()
    with mode(ranks):
        torch.manual_seed(0)
        model = tp_mlp(ranks, width, hidden)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x = torch.randn(tokens, width)
        step = torch.compile(model, backend=backend, fullgraph=True)
        built = time.perf_counter()
        step(x).square().sum().backward()
        optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        step(x).square().sum().backward()
        optimizer.step()
        again = time.perf_counter()
    return {
        "build": built - begin,
        "step": end - built,
        "again": again - end,
        "peak": peak_memory(),
        "own": peak_memory() - before,
    }


def run(quick: bool) -> Section:
    sizes = (4, 2, 8, 16) if quick else (RANKS, TOKENS, WIDTH, HIDDEN)
    rows, bounds = [], []
    for backend in ("aot_eager",) if quick else ("aot_eager", "inductor"):
        if quick:
            runs = [train(*sizes, backend)]
        else:
            runs = [
                run_apart(
                    "thousand_ranks",
                    *sizes,
                    backend,
                    env={"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
                )
                for _ in range(5)
            ]
        found = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        rows.append(
            [
                backend,
                *(f"{figure(found[key])} s" for key in ("build", "step", "again")),
                f"{figure(found['peak'] / 1024)} GiB",
                f"{figure(found['own'] / 1024)} GiB",
            ]
        )
        seconds = found["build"] + found["step"]
        bounds.append(Bound(f"{backend}: seconds", seconds, at_most=60, unit=" s"))
        bounds.append(Bound(f"{backend}: peak", found["peak"] / 1024, at_most=4, unit=" GiB"))
    ranks, tokens, width, hidden = sizes
    return Section(
        "thousand_ranks",
        f"{ranks} ranks",
        f"The tensor-parallel MLP ({tokens} x {width}, {hidden} hidden, all ranks together) on "
        f"{ranks} ranks: making the model, compiling it with the first train step (forward, "
        "backward, SGD), and a second step. A fresh process, caches off; the peak is the whole "
        "process, and what it is above a process that has imported torch.",
        ("backend", "build", "compile + step", "second step", "peak", "above torch"),
        rows,
        bounds,
    )


if __name__ == "__main__":
    print(json.dumps(train(*map(int, sys.argv[1:5]), sys.argv[5])))
