"""DTensors of several sizes through one compiled function."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from .harness import draw

ROWS = (8, 12, 20, 28)
UNEVEN_ROWS = (7, 9, 11, 13, 17)


def sizes(world: Any, rows: tuple[int, ...], dynamic: bool | None, mark: bool) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    w = distribute_tensor(draw(4, 6), mesh, [Replicate()])

    def step(x: Any) -> Any:
        return (x @ w).relu().redistribute(placements=[Shard(1)]).to_local() * 2

    step = world.compile(step, dynamic=dynamic)
    found: dict[str, Any] = {}
    for n in rows:
        x = distribute_tensor(draw(n, 4, seed=n), mesh, [Shard(0)]).requires_grad_()
        if mark:
            torch._dynamo.mark_dynamic(x, 0)
        out = step(x)
        out.square().sum().backward()
        found[f"out {n}"], found[f"grad {n}"] = out, x.grad
    return found


def graphs(world: Any, rows: tuple[int, ...], dynamic: bool | None, mark: bool) -> int:
    """How many graphs Dynamo needs for all sizes."""
    torch.compiler.reset()
    counters.clear()
    sizes(world, rows, dynamic, mark)
    return counters["stats"]["unique_graphs"]
