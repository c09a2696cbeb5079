"""Tensor parallelism inside FSDP2 on a DeviceMesh, as written for torchrun."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    out = Path(sys.argv[1])
    size = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(16, 24) for _ in range(2)), nn.Linear(16, 5))
    for block in model[:2]:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(mesh.get_local_rank("dp"))
    losses = []
    for _ in range(3):
        x, y = torch.randn(4, 16), torch.randint(5, (4,))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model[0].up.parameters(), 0.5).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        losses += [loss.detach(), norm.detach()]
    found = {"losses": torch.stack(losses)}
    for name, parameter in model.named_parameters():
        found[f"shard.{name}"] = parameter.to_local().detach()
        found[f"full.{name}"] = parameter.full_tensor().detach()
    big = distribute_tensor(torch.arange(12.0 * size).view(size * 3, 4), mesh, [Shard(0), Shard(1)])
    found["redistributed"] = big.redistribute(placements=[Shard(1), Replicate()]).to_local()
    found["coordinate"] = torch.tensor(mesh.get_coordinate())
    torch.save(found, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
