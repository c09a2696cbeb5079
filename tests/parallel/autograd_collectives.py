"""torch.distributed.nn: collectives that autograd differentiates."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn

from .harness import draw


def _input(world: Any, rows: int = 2) -> Any:
    return world.rank_map(lambda r: draw(rows, 3, seed=r)).requires_grad_()


def collective(world: Any, name: str) -> dict[str, Any]:
    x = _input(world, world.size)
    rank = dist.get_rank()
    call = {
        "all_reduce": lambda: dist_nn.all_reduce(x),
        "all_reduce max": lambda: dist_nn.all_reduce(x, op=dist.ReduceOp.MAX),
        "broadcast": lambda: dist_nn.broadcast(x, 1),
        "reduce": lambda: dist_nn.reduce(x, 1),
        "all_gather": lambda: torch.cat(dist_nn.all_gather(x)),
        "gather": lambda: torch.cat(dist_nn.gather(x, 1)),
        "scatter": lambda: dist_nn.scatter(list(x.unbind(0)), 1),
        "reduce_scatter": lambda: dist_nn.reduce_scatter(torch.empty(3), list(x.unbind(0))),
        "all_to_all": lambda: torch.stack(
            dist_nn.all_to_all([torch.empty(3) for _ in range(world.size)], list(x.unbind(0)))
        ),
        "all_to_all_single": lambda: dist_nn.all_to_all_single(torch.empty_like(x), x),
    }[name]
    out = call()
    (out * (rank + 1)).square().sum().backward()
    return {"out": out, "grad": x.grad}


NAMES = (
    "all_reduce", "all_reduce max", "broadcast", "reduce", "all_gather", "gather", "scatter",
    "reduce_scatter", "all_to_all", "all_to_all_single",
)  # fmt: skip
