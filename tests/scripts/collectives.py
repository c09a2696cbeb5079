"""Every collective of torch.distributed on odd sizes, as written for torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)
    return torch.randint(-50, 50, shape, dtype=dtype)


def on_group(group: dist.ProcessGroup, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    found = {}

    def keep(name: str, *tensors: torch.Tensor) -> None:
        for i, t in enumerate(tensors):
            found[f"{name}.{i}"] = t

    for op in (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
        x = draw(dtype, 7, 3)
        dist.all_reduce(x, op=op, group=group)
        y = draw(dtype, 11)
        dist.reduce(y, group_dst=size - 1, op=op, group=group)
        keep(f"reduce {op}", x, y)
    t = draw(dtype, 5, 6).t()
    work = dist.all_reduce(t, group=group, async_op=True)
    work.wait()
    keep("transposed", t)
    x = draw(dtype, 5)
    dist.broadcast(x, group_src=size - 1, group=group)
    keep("broadcast", x)
    parts = [torch.empty(3, 2, dtype=dtype) for _ in range(size)]
    dist.all_gather(parts, draw(dtype, 3, 2), group=group)
    keep("all_gather", *parts)
    at_root = [torch.empty(4, dtype=dtype) for _ in range(size)] if rank == 0 else None
    dist.gather(draw(dtype, 4), at_root, group_dst=0, group=group)
    keep("gather", *(at_root or ()))
    part = torch.empty(4, dtype=dtype)
    given = [draw(dtype, 4) for _ in range(size)] if rank == size - 1 else None
    dist.scatter(part, given, group_src=size - 1, group=group)
    keep("scatter", part)
    out = torch.empty(3, dtype=dtype)
    dist.reduce_scatter(out, [draw(dtype, 3) for _ in range(size)], group=group)
    keep("reduce_scatter", out)
    # Rank i sends j + 1 rows to rank j.
    sent, received = [j + 1 for j in range(size)], [rank + 1] * size
    rows = torch.empty(sum(received), 2, dtype=dtype)
    dist.all_to_all_single(rows, draw(dtype, sum(sent), 2), received, sent, group=group)
    keep("all_to_all_single", rows)
    x = draw(dtype, 6)
    keep("functional", funcol.all_reduce(x, "sum", group).clone())
    outs = funcol.all_reduce_coalesced([draw(dtype, 5), draw(dtype, 4)], "sum", group)
    keep("coalesced", *(o.clone() for o in outs))
    return found


def main() -> None:
    out = Path(sys.argv[1])
    dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    odd = list(range(1, size, 2))
    groups = {"world": dist.group.WORLD, "odd": dist.new_group(odd)}
    found = {}
    for name, group in groups.items():
        if name == "world" or rank in odd:
            for dtype in DTYPES:
                for key, value in on_group(group, dtype).items():
                    found[f"{name} {dtype} {key}"] = value
    dist.barrier()
    torch.save(found, out / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
