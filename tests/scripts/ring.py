"""Point-to-point calls, object collectives and groups, as written for torchrun."""

import os
import sys
from pathlib import Path

import ring_state
import torch
import torch.distributed as dist


def ring(x: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, passed around."""
    rank, size = dist.get_rank(), dist.get_world_size()
    total, passed = x.clone(), x
    for _ in range(size - 1):
        got = torch.empty_like(passed)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, passed, (rank + 1) % size),
                dist.P2POp(dist.irecv, got, (rank - 1) % size),
            ]
        )
        for work in works:
            work.wait()
        total, passed = total + got, got
    return total


def main() -> None:
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    x = torch.randn(5)
    found = {"ring": ring(x)}

    # Rank 0 hands out work to whoever asks, and the answers come back by tag.
    if rank == 0:
        answers = torch.zeros(size)
        for _ in range(1, size):
            who = torch.zeros(1, dtype=torch.int64)
            source = dist.recv(who)
            dist.send(torch.full((2,), float(source)), source, tag=source)
        for other in range(1, size):
            answer = torch.zeros(1)
            dist.recv(answer, other, tag=100 + other)
            answers[other] = answer
        found["answers"] = answers
    else:
        dist.send(torch.tensor([rank]), 0)
        task = torch.zeros(2)
        dist.recv(task, 0, tag=rank)
        dist.send(task.sum().view(1) * 3, 0, tag=100 + rank)

    names = [None] * size
    dist.all_gather_object(names, {"rank": rank, "local": os.environ["LOCAL_RANK"]})
    box = [{"seed": 7, "names": [n["rank"] for n in names]}] if rank == 1 else [None]
    dist.broadcast_object_list(box, src=1)
    found["names"] = torch.tensor(box[0]["names"])
    mine = [None]
    dist.scatter_object_list(mine, [(i, i * i) for i in range(size)] if rank == 0 else None, src=0)
    found["mine"] = torch.tensor(mine[0])

    ring_state.make_groups()
    y = x.clone()
    dist.all_reduce(y, group=ring_state.pair())
    found["pair"] = y
    z = torch.zeros(4)
    if rank % 2 == 0 and rank + 1 < size:
        dist.isend(torch.arange(4.0) + rank, group=ring_state.pair(), group_dst=1).wait()
    elif rank % 2:
        dist.irecv(z, group=ring_state.pair(), group_src=0).wait()
    found["from_pair"] = z
    found["calls"] = torch.tensor(ring_state.calls())
    store = dist.distributed_c10d._get_default_store()
    if rank == size - 1:
        store.set("last", str(rank))
    found["last"] = torch.tensor(int(store.get("last")))
    dist.monitored_barrier()
    torch.save(found, out / f"rank{rank}.pt")
    print(f"rank {rank} of {size} done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
