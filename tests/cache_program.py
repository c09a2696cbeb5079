"""Compiles a few functions and prints the cache counters; run by test_caching in processes."""

import json
import sys

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from localtensor_compile import LocalTensorMode, rank_map


def main(world: int, shape: tuple[int, ...]) -> None:
    results = []
    with LocalTensorMode(world):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
        group = mesh.get_group("a")

        def reduced(x):
            return funcol.all_reduce(x.sin() * 2, "sum", group).relu()

        x = rank_map(lambda r: torch.arange(4.0) + r).requires_grad_()
        y = torch.compile(reduced, fullgraph=True)(x)
        y.sum().backward()
        results.append([t.tolist() for t in y._local_tensors.values()])

        uneven = rank_map(lambda r: torch.ones(2 + r, 3)).requires_grad_()
        z = torch.compile(lambda t: t.cos() @ t.t(), fullgraph=True)(uneven)
        z.sum().backward()

        d = distribute_tensor(torch.ones(8, 4), mesh["a"], [Shard(0)]).requires_grad_()
        torch.compile(lambda t: t.cos() * 3, fullgraph=True)(d).to_local().sum().backward()

        made = torch.compile(lambda: torch.ones(3) * dist.get_rank(), fullgraph=True)()
        results.append([t.tolist() for t in made._local_tensors.values()])
    names = ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")
    counts = {n: counters["aot_autograd"][n] for n in names}
    names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    counts |= {n: counters["inductor"][n] for n in names}
    print(json.dumps({"counts": counts, "results": results}))


if __name__ == "__main__":
    main(int(sys.argv[1]), tuple(int(a) for a in sys.argv[2].split(",")))
