"""Data parallel training, as written for torchrun: a checkpoint of rank 0, a log file per rank."""

import argparse
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    logging.basicConfig(filename=args.out / f"log{rank}.txt", format="%(message)s", level="INFO")
    if rank == 0:
        print(f"training on {dist.get_world_size()} ranks")

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(96, 12), torch.randint(3, (96,)))
    sampler = DistributedSampler(data, shuffle=True, seed=1)
    loader = DataLoader(data, batch_size=8, sampler=sampler)
    torch.manual_seed(100 + rank)
    model = DistributedDataParallel(Net(), bucket_cap_mb=0.001)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    losses = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for step, (x, y) in enumerate(loader):
            # Gradients are accumulated over two steps.
            last = step % 2 == 1
            with torch.enable_grad() if last else model.no_sync():
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        scheduler.step()
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean, op=dist.ReduceOp.AVG)
        logging.info("epoch %d mean loss %.6f", epoch, mean.item())
        if rank == 0:
            state = {"model": model.module.state_dict(), "epoch": epoch}
            torch.save(state, args.out / "checkpoint.pt")
        dist.barrier()
    state = torch.load(args.out / "checkpoint.pt")
    model.module.load_state_dict(state["model"])
    result = {"losses": torch.stack(losses), "mean": mean, "draw": torch.rand(3)}
    result |= {f"param.{n}": p.detach() for n, p in model.module.named_parameters()}
    result |= {f"buffer.{n}": b for n, b in model.module.named_buffers()}
    torch.save(result, args.out / f"rank{local_rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
