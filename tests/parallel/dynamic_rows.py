"""Programs whose number of rows is a symbol."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from .harness import draw, fill
from .tensor_parallel import MLP


def mlp(world: Any, hidden: int) -> dict[str, Any]:
    """Tensor parallel, any number of samples."""
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    model = parallelize_module(fill(MLP(8, hidden)), world.mesh(), plan)
    x = world.rank_map(lambda rank: draw(6, 8, seed=1)).requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)
    out = world.compile(model)(x)
    out.sum().backward()
    return {"out": out}


def uneven(world: Any) -> dict[str, Any]:
    """Rank r has its own number of rows, and computes with it."""
    x = world.rank_map(lambda rank: draw(3 + rank, 4, seed=rank)).requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)

    def step(x: Tensor) -> Tensor:
        return funcol.all_reduce((x.sin() * x.shape[0]).sum(0), "sum", dist.group.WORLD)

    out = world.compile(step)(x)
    out.sum().backward()
    return {"out": out}


def resharded(world: Any) -> dict[str, Any]:
    """Rows become columns; the last rank has fewer of both."""
    mesh = world.mesh()
    x = distribute_tensor(draw(4 * world.size - 1, 4), mesh, [Shard(0)]).requires_grad_()
    w = distribute_tensor(draw(4, 4, seed=1), mesh, [Replicate()]).requires_grad_()
    torch._dynamo.mark_dynamic(x, 0)
    step = world.compile(lambda x, w: (x @ w).sin().redistribute(placements=[Shard(1)]))
    out = step(x, w)
    out.sum().full_tensor().backward()
    return {"out": out.to_local()}
