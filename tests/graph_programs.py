"""Small programs whose graphs the tests of capture and goldens look at."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


class MLP(nn.Module):
    """Column- and row-parallel layers, 4 hidden features per rank."""

    def __init__(self, groups: Any) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(6, 4))
        self.down = nn.Parameter(torch.ones(4, 6))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(x @ self.up)
        return funcol.all_reduce(hidden @ self.down, "sum", self.groups)


def mlp(world: Any) -> dict[str, Any]:
    """The same on every rank."""
    step = world.compile(MLP(dist.group.WORLD))
    out = step(torch.ones(3, 6))
    out.sum().backward()
    return {"out": out}


def uneven(world: Any) -> dict[str, Any]:
    """A row less on the last rank, which DTensor pads to gather."""
    mesh = world.mesh()
    x = distribute_tensor(torch.ones(3 * world.size - 1, 2), mesh, [Shard(0)])
    return {"out": world.compile(lambda x: x.sin().full_tensor())(x)}


def offsets(world: Any) -> dict[str, Any]:
    """Every rank takes its own rows of what all have."""
    mesh = world.mesh()
    x = distribute_tensor(torch.ones(4 * world.size, 2), mesh, [Replicate()])
    cut = world.compile(lambda x: x.redistribute(placements=[Shard(0)]).to_local() * 2)
    return {"out": cut(x)}


def grid(world: Any) -> dict[str, Any]:
    """Sums over one dimension of a mesh, then over the other."""
    mesh = world.mesh((2, world.size // 2), ("dp", "tp"))

    def summed(x: Tensor) -> Tensor:
        return funcol.all_reduce(funcol.all_reduce(x, "sum", (mesh, 1)) * 2, "max", (mesh, 0))

    return {"out": world.compile(summed)(torch.ones(2))}
