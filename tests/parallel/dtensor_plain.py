"""DTensors made of plain tensors: of a model that was built before its world."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import (
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)

from localtensor_compile import maybe_disable_local_tensor_mode

from .harness import draw, fill, gradients


class Tied(nn.Module):
    """Both layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sin())


def trained(world: Any) -> dict[str, Any]:
    """A train step of a replicated model; tied weights have one memory on real ranks."""
    with maybe_disable_local_tensor_mode():
        model = fill(Tied())
    mesh = world.mesh(names="d")
    distribute_module(model, mesh)
    x = distribute_tensor(draw(5, 6, seed=9), mesh, [Shard(0)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    out = world.compile(model)(x)
    out.square().sum().backward()
    grads = gradients(model)
    grads = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in grads.items()}
    optimizer.step()
    model.seen.to_local().add_(x.to_local().sum(0))
    found = {name: p.to_local() for name, p in model.named_parameters()}
    return {"out": out.to_local(), "seen": model.seen.to_local(), **grads, **found}


def written(world: Any) -> dict[str, Any]:
    """What each rank writes into a replica, its views and its transpose."""
    with maybe_disable_local_tensor_mode():
        whole = draw(4, 6)
        tensors = [whole, whole[1:3], whole.t(), whole[:, 2], whole.flatten()]
    mesh = world.mesh(names="d")
    rank = mesh.get_local_rank()
    found = {}
    for i, tensor in enumerate(tensors):
        for name, placement in (("replica", Replicate()), ("partial", Partial())):
            x = distribute_tensor(tensor, mesh, [placement])
            x.to_local().mul_(rank + 2)
            found[f"{name} {i}"] = x.to_local()
            found[f"{name} {i} is a leaf"] = torch.tensor([x.is_leaf, x.requires_grad])
    found["all"] = distribute_tensor(whole, mesh, [Replicate()], src_data_rank=None)
    return {k: v.to_local() if hasattr(v, "to_local") else v for k, v in found.items()}


def parameters(world: Any) -> dict[str, Any]:
    """Leaves that require grad, replicated and sharded on a mesh of two dimensions."""
    with maybe_disable_local_tensor_mode():
        weight = nn.Parameter(draw(5, 6))
        bias = draw(6, seed=1).requires_grad_()
    mesh = world.mesh((2, world.size // 2), ("a", "b"))
    w = nn.Parameter(distribute_tensor(weight, mesh, [Replicate(), Shard(0)]))
    b = distribute_tensor(bias, mesh, [Replicate(), Replicate()])
    x = distribute_tensor(draw(4, 6, seed=2), mesh, [Shard(0), Replicate()])
    loss = world.compile(lambda x, w, b: ((x + b) @ w.t()).sin().sum())(x, w, b)
    loss.backward()
    with torch.no_grad():
        for p in (w, b):
            p.to_local().add_(mesh.get_local_rank("a"))
            p.sub_(p.grad.redistribute(placements=p.placements))
    flags = torch.tensor([w.is_leaf, w.requires_grad, b.is_leaf, b.requires_grad])
    return {"loss": loss, "w": w.to_local(), "b": b.to_local(), "flags": flags}
