"""FSDP2: fully_shard in its variants, two or three optimizer steps each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from .harness import draw, fill, gradients


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A residual network; `head.bias` of size 1 leaves every rank but the first without rows."""

    def __init__(self, dim: int = 8, hidden: int = 12, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, hidden) for _ in range(blocks)])
        self.head = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


EVEN = {"dim": 12, "hidden": 24}
UNEVEN = {"dim": 7, "hidden": 10}


def local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def parameters(module: nn.Module, prefix: str = "param") -> dict[str, Tensor]:
    return {f"{prefix} {n}": local(p).detach().clone() for n, p in module.named_parameters()}


def sharded(mesh: Any, size: dict[str, int], **options: Any) -> nn.Module:
    """Every block and the whole model wrapped, as trainers do."""
    model = fill(Net(**size))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def rank_input(world: Any, width: int, seed: int) -> Tensor:
    """Other data on every rank."""
    return world.rank_map(lambda rank: draw(5, width, seed=100 * seed + rank))


def train(
    world: Any, model: nn.Module, optimizer: Any, width: int, steps: int = 2
) -> dict[str, Any]:
    """Losses, the last gradients and the final parameters of every rank."""
    results: dict[str, Any] = {}
    for step in range(steps):
        loss = model(rank_input(world, width, seed=step + 1)).square().sum()
        loss.backward()
        results[f"loss {step}"] = loss.detach()
        if step == steps - 1:
            results |= gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return {**results, **parameters(model)}


def steps(
    world: Any, size: str = "UNEVEN", optimizer: str = "SGD", options: Any = (), **kw: Any
) -> dict[str, Any]:
    sizes = globals()[size]
    model = sharded(world.mesh(names="dp"), sizes, **kw)
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **dict(options))
    return train(world, model, made, sizes["dim"])


def mixed_precision(world: Any, param: str, reduce: str | None, **options: Any) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, param),
        reduce_dtype=getattr(torch, reduce) if reduce else None,
        **options,
    )
    return steps(world, mp_policy=policy)


def output_dtype(world: Any) -> dict[str, Any]:
    """A block in bfloat16 that hands float32 on to one of its own precision."""
    mesh = world.mesh(names="dp")
    model = fill(Net(**UNEVEN))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model.blocks[0], mesh=mesh, mp_policy=policy)
    fully_shard(model.blocks[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(world, model, torch.optim.Adam(model.parameters(), lr=0.1), 7)


def accumulation(world: Any, mixed: bool = False) -> dict[str, Any]:
    """Three micro batches, gradients reduced with the last one."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else None
    options = {"mp_policy": policy} if policy else {}
    model: Any = sharded(world.mesh(names="dp"), UNEVEN, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        for micro in range(3):
            last = micro == 2
            model.set_requires_gradient_sync(last)
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last)
            model(rank_input(world, 7, seed=1 + 3 * step + micro)).square().sum().backward()
        found = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return {**found, **parameters(model)}


def accumulated_after_reduction(world: Any) -> dict[str, Any]:
    """Every micro batch is reduced, and added to what was reduced before."""
    model = sharded(world.mesh(names="dp"), UNEVEN)
    for micro in range(3):
        model(rank_input(world, 7, seed=1 + micro)).square().sum().backward()
    return gradients(model)


def prefetch(world: Any) -> dict[str, Any]:
    model: Any = sharded(world.mesh(names="dp"), UNEVEN)
    model.set_modules_to_forward_prefetch([model.blocks[0]])
    model.blocks[0].set_modules_to_forward_prefetch([model.blocks[1]])
    model.blocks[1].set_modules_to_backward_prefetch([model.blocks[0]])
    model.set_unshard_in_backward(True)
    return train(world, model, torch.optim.SGD(model.parameters(), lr=0.1), 7)


class Tied(nn.Module):
    """An output layer that shares the embedding's weight."""

    def __init__(self, vocabulary: int = 11, dim: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.block = Block(dim, 9)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


def shared_parameters(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="dp")
    model = fill(Tied())
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    results: dict[str, Any] = {}
    for step in range(2):
        tokens = world.rank_map(lambda rank, s=step: (torch.arange(5) * (rank + 2) + s) % 11)
        loss = F.cross_entropy(model(tokens), tokens)
        loss.backward()
        results |= {f"loss {step}": loss.detach(), **gradients(model)}
        optimizer.step()
        optimizer.zero_grad()
    return {**results, **parameters(model)}


def frozen(world: Any) -> dict[str, Any]:
    """A whole block and one bias without gradients."""
    mesh = world.mesh(names="dp")
    model = fill(Net(**UNEVEN))
    model.blocks[0].requires_grad_(False)
    model.blocks[1].up.bias.requires_grad_(False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(rank_input(world, 7, seed=1)).square().sum().backward()
    none = [n for n, p in model.named_parameters() if p.grad is None]
    found = {n: local(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "without": torch.tensor(len(none)), **parameters(model)}


def meta_device(world: Any) -> dict[str, Any]:
    """Built without memory, sharded, given memory, and initialised as shards."""
    mesh = world.mesh(names="dp")
    with torch.device("meta"):
        model = Net(**UNEVEN)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            shape = tuple(parameter.shape)

            def shard(rank: int, shape: Any = shape, seed: int = i) -> Tensor:
                whole = draw(*shape, seed=seed) / 3
                rows = -(-shape[0] // world.size)
                return whole[rank * rows : (rank + 1) * rows]

            parameter.to_local().copy_(world.rank_map(shard))
    return train(world, model, torch.optim.SGD(model.parameters(), lr=0.1), 7)


def placement(world: Any, dim: int = 1, **options: Any) -> dict[str, Any]:
    """Weights sharded along another dimension."""
    from torch.distributed.tensor import Shard

    def place(parameter: nn.Parameter) -> Any:
        return (
            Shard(dim) if parameter.ndim == 2 and parameter.shape[dim] % world.size == 0 else None
        )

    return steps(world, size="EVEN", shard_placement_fn=place, **options)


def ignored(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="dp")
    model = fill(Net(**UNEVEN))
    kept = {model.head.weight, model.blocks[0].norm.weight}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    return train(world, model, torch.optim.SGD(model.parameters(), lr=0.1), 7)


def divide_factor(world: Any, factor: float) -> dict[str, Any]:
    model: Any = sharded(world.mesh(names="dp"), UNEVEN)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(factor)
            module.set_force_sum_reduction_for_comms(True)
    return train(world, model, torch.optim.SGD(model.parameters(), lr=0.1), 7)


def by_hand(world: Any, async_op: bool = False) -> dict[str, Any]:
    """unshard, read, reshard; then a step that does it by itself."""
    model: Any = sharded(world.mesh(names="dp"), UNEVEN, reshard_after_forward=False)
    block = model.blocks[0]
    handle = block.unshard(async_op=async_op)
    if handle is not None:
        handle.wait()
    whole = {f"whole {n}": p.detach().clone() for n, p in block.named_parameters()}
    block.reshard()
    shards = parameters(block, "shard")
    out = model(rank_input(world, 7, seed=1))
    unsharded = parameters(model, "after forward")
    out.square().sum().backward()
    return {**whole, **shards, **unsharded, **gradients(model), **parameters(model)}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) * 2

    def encode(self, x: Tensor) -> Tensor:
        return self.block(x).sin()


def forward_method(world: Any) -> dict[str, Any]:
    from torch.distributed.fsdp import register_fsdp_forward_method

    model = fill(Encoder())
    fully_shard(model, mesh=world.mesh(names="dp"))
    register_fsdp_forward_method(model, "encode")
    out = model.encode(rank_input(world, 7, seed=1))
    out.square().sum().backward()
    return {"out": out, **gradients(model)}


def cpu_offload(world: Any) -> dict[str, Any]:
    return steps(world, offload_policy=CPUOffloadPolicy(pin_memory=False), optimizer="Adam")


def saved_state(world: Any) -> dict[str, Any]:
    """A state dict follows training; one that is loaded makes the next step the same."""
    mesh = world.mesh(names="dp")
    model = sharded(mesh, UNEVEN)
    early = model.state_dict()  # before the first forward: aliases the parameters
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    results = train(world, model, optimizer, 7, steps=1)
    results |= {f"early {n}": local(v).clone() for n, v in early.items()}
    saved = {n: v.detach().clone() for n, v in model.state_dict().items()}
    results |= {f"full {n}": v.full_tensor() for n, v in saved.items()}
    for assign in (False, True):
        other = sharded(mesh, UNEVEN)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0)
        other.load_state_dict(saved, assign=assign)
        trained = train(world, other, torch.optim.SGD(other.parameters(), lr=0.1), 7)
        results |= {f"assign={assign} {n}": v for n, v in trained.items()}
    return results


def clipped(world: Any, norm_type: float = 2.0, foreach: bool | None = None) -> dict[str, Any]:
    model = sharded(world.mesh(names="dp"), UNEVEN)
    model(rank_input(world, 7, seed=1)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3, norm_type, foreach=foreach)
    total = nn.utils.get_total_norm([p.grad for p in model.parameters()], norm_type)
    return {"norm": norm.full_tensor(), "after": total.full_tensor(), **gradients(model)}


def checkpointed(world: Any, wrapper: bool) -> dict[str, Any]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.utils.checkpoint import checkpoint

    class Recomputed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    mesh = world.mesh(names="dp")
    model = fill(Net(**UNEVEN))
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block) if wrapper else Recomputed(block)
        fully_shard(model.blocks[i], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(world, model, torch.optim.SGD(model.parameters(), lr=0.1), 7)


def evaluated(world: Any) -> dict[str, Any]:
    """Forward without gradients, in both ways, then a step."""
    model = sharded(world.mesh(names="dp"), UNEVEN)
    with torch.no_grad():
        first = model(rank_input(world, 7, seed=1))
    with torch.inference_mode():
        second = model(rank_input(world, 7, seed=2)).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {"no_grad": first, "inference": second, **train(world, model, optimizer, 7)}


def hsdp(world: Any, **options: Any) -> dict[str, Any]:
    mesh = world.mesh((2, world.size // 2), ("replicate", "shard"))
    model = sharded(mesh, UNEVEN, **options)
    model(rank_input(world, 7, seed=1)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    found = {"norm": norm.full_tensor(), **gradients(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    return {**found, **train(world, model, optimizer, 7)}


def hsdp_accumulation(world: Any) -> dict[str, Any]:
    """All-reduce over the replicas only with the last micro batch."""
    mesh = world.mesh((2, world.size // 2), ("replicate", "shard"))
    model: Any = sharded(mesh, UNEVEN)
    for micro in range(2):
        model.set_requires_all_reduce(micro == 1)
        model(rank_input(world, 7, seed=1 + micro)).square().sum().backward()
    return gradients(model)


def tensor_parallel(
    world: Any, hidden: int = 12, dim: int = 8, sequence: bool = False, **options: Any
) -> dict[str, Any]:
    """fully_shard over a tensor-parallel model: weights sharded twice along one dimension."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = world.mesh((world.size // 2, 2), ("dp", "tp"))
    model = fill(Net(dim=dim, hidden=hidden))
    for block in model.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"], **options)
    fully_shard(model, mesh=mesh["dp"], **options)
    results: dict[str, Any] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        x = world.rank_map(lambda rank, s=step: draw(5, dim, seed=50 * s + rank // 2))
        loss = model(x).square().sum()
        loss.backward()
        groups: dict[Any, list[Tensor]] = {}
        for parameter in model.parameters():
            groups.setdefault(parameter.grad.device_mesh, []).append(parameter.grad)
        norms = [nn.utils.get_total_norm(g).full_tensor() for g in groups.values()]
        total = torch.linalg.vector_norm(torch.stack(norms))
        for grads in groups.values():
            of_mesh = [p for p in model.parameters() if any(p.grad is g for g in grads)]
            nn.utils.clip_grads_with_norm_(of_mesh, 1.0, total)
        results |= {f"loss {step}": loss.detach(), f"norm {step}": total, **gradients(model)}
        optimizer.step()
        optimizer.zero_grad()
    full = {f"full {n}": p.full_tensor().detach() for n, p in model.named_parameters()}
    return {**results, **parameters(model), **full}


def uneven_placement(world: Any) -> dict[str, Any]:
    from torch.distributed.tensor import Shard

    def place(parameter: nn.Parameter) -> Any:
        return Shard(1) if parameter.ndim == 2 else None

    return steps(world, shard_placement_fn=place)


# ---------------------------------------------------------------- compiled
def block_by_block(
    world: Any, size: str = "UNEVEN", hybrid: bool = False, recompute: bool = False, **options: Any
) -> dict[str, Any]:
    """Each block compiled whole, then sharded: what trainers do."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    if hybrid:
        mesh = world.mesh((2, world.size // 2), ("replicate", "shard"))
    else:
        mesh = world.mesh(names="dp")
    sizes = globals()[size]
    model = fill(Net(**sizes))
    for i, block in enumerate(model.blocks):
        wrapped = checkpoint_wrapper(block) if recompute else block
        model.blocks[i] = world.compile(wrapped)
        fully_shard(model.blocks[i], mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return train(world, model, torch.optim.Adam(model.parameters(), lr=0.1), sizes["dim"])


def block_by_block_mixed(world: Any) -> dict[str, Any]:
    return block_by_block(world, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def whole_model(world: Any, **options: Any) -> dict[str, Any]:
    """A sharded model compiled from outside: Dynamo leaves FSDP's hooks to Python."""
    model = sharded(world.mesh(names="dp"), UNEVEN, **options)
    compiled = world.compile(model, fullgraph=False)
    return train(world, compiled, torch.optim.SGD(model.parameters(), lr=0.1), 7)


def tensor_parallel_blocks(world: Any, dim: int = 8, hidden: int = 12) -> dict[str, Any]:
    """Tensor-parallel blocks, compiled, then sharded."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = world.mesh((world.size // 2, 2), ("dp", "tp"))
    model = fill(Net(dim=dim, hidden=hidden))
    for i, block in enumerate(model.blocks):
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        model.blocks[i] = world.compile(block)
        fully_shard(model.blocks[i], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    results: dict[str, Any] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    for step in range(2):
        x = world.rank_map(lambda rank, s=step: draw(5, dim, seed=50 * s + rank // 2))
        loss = model(x).square().sum()
        loss.backward()
        results |= {f"loss {step}": loss.detach(), **gradients(model)}
        optimizer.step()
        optimizer.zero_grad()
    return {**results, **parameters(model)}
