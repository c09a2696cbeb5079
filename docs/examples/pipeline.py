"""A script written for torchrun: four pipeline stages train a small MLP with 1F1B.

    torchrun --nproc-per-node 4 docs/examples/pipeline.py
    localtensor run --nproc-per-node 4 docs/examples/pipeline.py

Nothing in it knows of a simulator. The second line runs its ranks as threads of one process; the
printed losses are the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

STEPS, BATCH, MICROBATCHES, WIDTH = 10, 64, 8, 16


def layer(rank: int, ranks: int) -> nn.Module:
    """The part of the model that one rank holds."""
    torch.manual_seed(rank)
    linear = nn.Linear(WIDTH, 1 if rank == ranks - 1 else WIDTH)
    return linear if rank == ranks - 1 else nn.Sequential(linear, nn.Tanh())


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return x, x[:, :4].sum(dim=1, keepdim=True).sin()


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    module = layer(rank, ranks)
    stage = PipelineStage(module, rank, ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=F.mse_loss)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(STEPS):
        x, target = data(step)
        losses: list[Tensor] = []
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        elif rank == ranks - 1:
            schedule.step(target=target, losses=losses)
            mean = torch.stack([loss.detach() for loss in losses]).mean()
            print(f"step {step}: loss {mean.item():.9f}", flush=True)
        else:
            schedule.step()
        optimizer.step()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
