"""Tensor and sequence parallelism, loss parallelism."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from .harness import draw, fill, gradients


class MLP(nn.Module):
    def __init__(self, dim: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def mlp(world: Any, hidden: int = 12) -> dict[str, Any]:
    mesh = world.mesh(names="tp")
    model = fill(MLP(hidden=hidden))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    out = world.compile(model)(draw(4, 8, seed=9))
    out.square().sum().backward()
    return {"out": out, **gradients(model)}
