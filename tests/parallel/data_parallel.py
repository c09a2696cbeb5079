"""DistributedDataParallel, `replicate` and parametrizations that shard (SimpleFSDP)."""

# No postponed annotations: DDP looks at those of communication hooks.
import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from .fsdp import Net, parameters, rank_input, train
from .harness import draw, fill, gradients


class Wide(nn.Module):
    """More than one bucket: 1.1 MiB and 2.3 MiB of weights, and small ones around them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.up = nn.Linear(7, 530)
        self.mid = nn.Linear(530, 560)
        self.wide = nn.Linear(560, 1030)
        self.down = nn.Linear(1030, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.wide(F.gelu(self.mid(self.up(self.norm(x)))))))


def ddp(
    world: Any, model: str = "Net", optimizer: str = "SGD", steps: int = 3, **options: Any
) -> dict[str, Any]:
    module = fill(Net(7, 10) if model == "Net" else Wide())
    wrapped = DistributedDataParallel(module, **options)
    made = getattr(torch.optim, optimizer)(wrapped.parameters(), lr=0.1)
    return train(world, wrapped, made, 7, steps=steps)


def start_from_rank_zero(world: Any) -> dict[str, Any]:
    """Parameters and buffers that differ are those of rank 0 after wrapping."""
    module: Any = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        for i, tensor in enumerate([*module.parameters(), module[1].running_mean]):
            tensor.copy_(
                world.rank_map(lambda r, i=i, s=tuple(tensor.shape): draw(*s, seed=10 * r + i))
            )
    wrapped = DistributedDataParallel(module)
    return {**parameters(wrapped), "mean": module[1].running_mean.clone()}


def batch_norm(world: Any, broadcast: bool = True) -> dict[str, Any]:
    """Statistics of rank 0's data reach all ranks before each forward, or stay each rank's own."""
    module: Any = fill(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))
    wrapped = DistributedDataParallel(module, forward_sync_buffers=broadcast)
    results = train(world, wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1), 7, steps=3)
    return {**results, **{n: b.clone() for n, b in module.named_buffers()}}


def accumulation(world: Any, **options: Any) -> dict[str, Any]:
    wrapped = DistributedDataParallel(fill(Net(7, 10)), **options)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    results: dict[str, Any] = {}
    for step in range(3):
        for micro in range(3):
            with wrapped.no_sync() if micro < 2 else contextlib.nullcontext():
                x = rank_input(world, 7, seed=1 + 3 * step + micro)
                wrapped(x).square().sum().backward()
            results |= gradients(wrapped, f"step {step}.{micro}")
            results = {k: v.clone() for k, v in results.items()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=not options)
    return {**results, **parameters(wrapped)}


class Branches(nn.Module):
    """The second half of the layers is used only with `both`."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 4), nn.Linear(7, 4)

    def forward(self, x: Tensor, both: bool) -> tuple[Tensor, Tensor]:
        first = self.one(x)
        return first, (self.two(x) if both else first)


def unused(world: Any, **options: Any) -> dict[str, Any]:
    """Parameters that some iterations leave out, and outputs that the loss leaves out."""
    wrapped = DistributedDataParallel(fill(Branches()), find_unused_parameters=True, **options)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    results: dict[str, Any] = {}
    for step, both in enumerate([False, True, True, False]):
        first, second = wrapped(rank_input(world, 7, seed=step + 1), both)
        loss = first.square().sum() + (second.sin().sum() if step != 2 else 0)
        loss.backward()
        for name, parameter in wrapped.named_parameters():
            missing = parameter.grad is None
            results[f"{step} {name}"] = torch.zeros(1) if missing else parameter.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return {**results, **parameters(wrapped)}


def unused_undetected(world: Any) -> dict[str, Any]:
    wrapped = DistributedDataParallel(fill(Branches()))
    for step in range(2):
        wrapped(rank_input(world, 7, seed=step + 1), False)[0].square().sum().backward()
    return gradients(wrapped)


class Reused(nn.Module):
    """A layer that is used twice, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.last = nn.Linear(7, 7), nn.Linear(2, 2), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def static_graph(world: Any, **options: Any) -> dict[str, Any]:
    wrapped = DistributedDataParallel(fill(Reused()), static_graph=True, **options)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    results: dict[str, Any] = {}
    for step in range(4):
        wrapped(rank_input(world, 7, seed=step + 1)).square().sum().backward()
        found = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
        results |= {f"{step} {n}": g for n, g in found.items()}
        optimizer.step()
        optimizer.zero_grad()
    return {**results, **parameters(wrapped)}


def halved(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of a user: sums, and halves what comes back."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0] / 2)


def hook(world: Any, name: str, **options: Any) -> dict[str, Any]:
    wrapped = DistributedDataParallel(fill(Wide()), **options)
    if name == "halved":
        wrapped.register_comm_hook(None, halved)
    elif name == "wrapped":
        compressed = default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)
        wrapped.register_comm_hook(None, compressed)
    elif name.isupper():
        wrapped._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, name))
    else:
        wrapped.register_comm_hook(dist.group.WORLD, getattr(default_hooks, name))
    return train(world, wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.01), 7, steps=3)


def joined(world: Any) -> dict[str, Any]:
    wrapped = DistributedDataParallel(fill(Net(7, 10)))
    with wrapped.join():
        out = wrapped(rank_input(world, 7, seed=1))
    return {"out": out}


# ---------------------------------------------------------------- compiled
def ddp_compiled(
    world: Any, outside: bool = True, model: str = "Net", **options: Any
) -> dict[str, Any]:
    """DDP compiled from outside, or a compiled module inside DDP; in how many graphs."""
    from torch._dynamo.utils import counters

    before = counters["aot_autograd"]["total"]
    module: Any = fill(Net(7, 10) if model == "Net" else Wide())
    if outside:
        wrapped = world.compile(DistributedDataParallel(module, **options), fullgraph=False)
    else:
        wrapped = DistributedDataParallel(world.compile(module), **options)
    found = train(world, wrapped, torch.optim.SGD(module.parameters(), lr=0.1), 7, steps=3)
    graphs = counters["aot_autograd"]["total"] - before
    return {**found, "graphs": torch.tensor(graphs)}


def replicated(world: Any, compiled: bool = False, **options: Any) -> dict[str, Any]:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    mesh = world.mesh(names="dp")
    model = fill(Net(7, 10))
    for i, block in enumerate(model.blocks):
        if compiled:
            model.blocks[i] = world.compile(block)
        replicate(model.blocks[i], mesh=mesh, **options)
    replicate(model, mesh=mesh, **options)
    return train(world, model, torch.optim.Adam(model.parameters(), lr=0.1), 7)


def replicated_by_ddp(world: Any) -> dict[str, Any]:
    """The composable form of DDP."""
    from torch.distributed._composable.replicate import replicate

    model = fill(Net(7, 10))
    replicate(model)
    return train(world, model, torch.optim.SGD(model.parameters(), lr=0.1), 7)


def over_tensor_parallel(world: Any, hidden: int = 12) -> dict[str, Any]:
    """DDP over one dimension of a mesh, tensor parallelism over the other."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = world.mesh((world.size // 2, 2), ("dp", "tp"))
    model = fill(Net(8, hidden))
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    wrapped = DistributedDataParallel(model, device_mesh=mesh["dp"])
    results: dict[str, Any] = {}
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(2):
        x = world.rank_map(lambda rank, s=step: draw(5, 8, seed=50 * s + rank // 2))
        loss = wrapped(x).square().sum()
        loss.backward()
        results |= {f"loss {step}": loss.detach(), **gradients(wrapped)}
        optimizer.step()
        optimizer.zero_grad()
    return {**results, **parameters(wrapped)}


# ---------------------------------------------------------------- SimpleFSDP
class Unshard(nn.Module):
    """Parametrization: a sharded DTensor as the whole tensor it stands for.

    Its gradient comes back reduced and scattered: mean over the mesh.
    """

    def __init__(self, mode: str, compute: Any = None, recompute: bool = False) -> None:
        super().__init__()
        self.mode, self.compute, self.recompute = mode, compute, recompute

    def whole(self, x: Any) -> Tensor:
        from torch.distributed.tensor import Partial, Replicate

        placements = [Replicate()] * x.device_mesh.ndim
        mean = [Partial("avg")] * x.device_mesh.ndim
        whole = x.redistribute(placements=placements, forward_dtype=self.compute)
        return whole.to_local(grad_placements=mean)

    def forward(self, x: Any) -> Tensor:
        if not self.recompute:
            return self.whole(x)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.whole, x, use_reentrant=False)


def simple_fsdp(
    world: Any, mode: str = "shard", size: int = 7, half: bool = False, recompute: bool = False
) -> dict[str, Any]:
    """Every parameter a DTensor that is made whole by a parametrization; compiled as one graph."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.nn.utils import parametrize

    if mode == "hybrid":
        mesh = world.mesh((2, world.size // 2), ("replicate", "shard"))
        placements: list[Any] = [Replicate(), Shard(0)]
    else:
        mesh = world.mesh(names="dp")
        placements = [Shard(0) if mode == "shard" else Replicate()]
    model = fill(Net(size, 10))
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.detach(), mesh, placements)
            module.register_parameter(name, nn.Parameter(sharded))
            whole = Unshard(mode, torch.bfloat16 if half else None, recompute)
            parametrize.register_parametrization(module, name, whole, unsafe=True)
    compiled = world.compile(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, foreach=False)
    results: dict[str, Any] = {}
    for step in range(2):
        x = rank_input(world, size, seed=step + 1)
        loss = compiled(x.bfloat16() if half else x).float().square().sum()
        loss.backward()
        results |= {f"loss {step}": loss.detach(), **gradients(model)}
        results = {k: v.clone() for k, v in results.items()}
        optimizer.step()
        optimizer.zero_grad()
    return {**results, **parameters(model)}


class Scale(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.shift = nn.Parameter(weight), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum() + self.shift


def other_sizes_per_group(world: Any) -> dict[str, Any]:
    """Parameters that are alike within each group of DDP, but not between the groups."""
    mesh = world.mesh((world.size // 2, 2), ("dp", "tp"))
    module = Scale(world.rank_map(lambda rank: draw(3 + rank % 2)))
    wrapped = DistributedDataParallel(module, process_group=mesh.get_group("dp"))
    for step in range(2):
        x = world.rank_map(lambda rank, s=step: draw(3 + rank % 2, seed=rank + 10 * s))
        wrapped(x).square().sum().backward()
    return {**gradients(wrapped), **parameters(wrapped)}
