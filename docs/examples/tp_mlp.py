"""A tensor-parallel MLP whose hidden size, 30, does not divide by 4 ranks: 8, 8, 8 and 6.

localtensor check docs/examples/tp_mlp.py --nproc-per-node 4
torchrun --nproc-per-node 4 docs/examples/tp_mlp.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import localtensor_compile as lt


def program(world: lt.World) -> dict[str, Tensor]:
    model = nn.Sequential(nn.Linear(16, 30), nn.GELU(), nn.Linear(30, 16)).to(world.device)
    plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
    parallelize_module(model, world.mesh(world.size, "tp"), plan)
    x = torch.randn(8, 16, device=world.device)
    y = world.compile(model)(x)
    loss = y.square().mean()
    loss.backward()
    return {"y": y, "loss": loss, **{f"grad.{n}": p.grad for n, p in model.named_parameters()}}


if __name__ == "__main__":
    lt.main(program)
