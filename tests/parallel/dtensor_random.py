"""Random numbers of DTensors: real CPU ranks draw with their own generator into their own shard."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor._random import OffsetBasedRNGTracker, manual_seed
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from .harness import draw, fill, gradients

R = Replicate()


def inputs(world: Any) -> tuple[Any, ...]:
    mesh = world.mesh(names="d")
    rows = distribute_tensor(draw(7, 4), mesh, [Shard(0)])
    columns = distribute_tensor(draw(3, 2 * world.size, seed=1), mesh, [Shard(1)])
    same = distribute_tensor(draw(5, 3, seed=2), mesh, [R])
    return tuple(t.detach().requires_grad_() for t in (rows, columns, same))


def dropout(world: Any) -> dict[str, Any]:
    leaves = inputs(world)

    def step(*leaves: Any) -> list[Any]:
        dropped = [F.dropout(t, 0.4) for t in leaves]
        dropped.append(F.dropout(dropped[0] * 2, 0.3))
        return [t.redistribute(placements=[R]).to_local() for t in dropped]

    results = world.compile(step)(*leaves)
    sum(r.square().sum() for r in results).backward()
    found: dict[str, Any] = {f"dropped {i}": r for i, r in enumerate(results)}
    found.update({f"grad {i}": t.grad.to_local() for i, t in enumerate(leaves)})
    found["after"] = torch.rand(3)
    return found


def dropout_of_partial(world: Any) -> dict[str, Any]:
    x = DTensor.from_local(draw(4, 3), world.mesh(), [Partial()], run_check=False)
    return {"out": F.dropout(x, 0.4)}


def seeded_per_rank(world: Any) -> dict[str, Any]:
    """Ranks with seeds of their own, as torchrun programs often set them."""
    torch.manual_seed(11 + torch.distributed.get_rank())
    return dropout(world)


def drawn(world: Any) -> dict[str, Any]:
    """Every draw that DTensor knows, in place and as a factory, functional ones compiled."""
    rows, columns, same = (t.detach() for t in inputs(world))

    def step(rows: Any, columns: Any, same: Any) -> list[Any]:
        return [
            torch.rand_like(rows),
            torch.randn_like(columns),
            torch.randint_like(same, 10),
            torch.randint_like(rows, 3, 9),
            torch.bernoulli(rows.sigmoid()),
            rows.clone().uniform_(-1, 1),
            columns.clone().normal_(2, 3),
            same.clone().bernoulli_(0.3),
        ]

    return {f"draw {i}": t for i, t in enumerate(world.compile(step)(rows, columns, same))}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.up = nn.Linear(8, 10)
        self.drop = nn.Dropout(0.25)
        self.down = nn.Linear(10, 8)
        self.norm = nn.LayerNorm(8)

    def init_weights(self) -> None:
        for linear in (self.up, self.down):
            linear.reset_parameters()
        nn.init.trunc_normal_(self.down.weight, std=0.5, a=-0.6, b=0.6)
        nn.init.xavier_uniform_(self.up.weight)
        self.embedding.reset_parameters()
        self.norm.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.down(self.drop(F.gelu(self.up(self.embedding(tokens))))))


def parallel_block(world: Any) -> tuple[nn.Module, Any]:
    mesh = world.mesh(names="tp")
    block = fill(Block())
    up = ColwiseParallel(use_local_output=False)
    parallelize_module(block, mesh, {"up": up, "down": RowwiseParallel()})
    return block, mesh


def initialized(world: Any) -> dict[str, Any]:
    """init_weights of a parallelized model, then a compiled step with dropout on its shards."""
    block, _ = parallel_block(world)
    block.init_weights()
    out = world.compile(block)(torch.arange(6).reshape(2, 3))
    out.square().sum().backward()
    weights = {
        f"weight {name}": p.to_local() if isinstance(p, DTensor) else p
        for name, p in block.named_parameters()
    }
    return {"out": out, **weights, **gradients(block)}


def reseeded(world: Any) -> dict[str, Any]:
    """DTensor's manual_seed does nothing for a CPU mesh."""
    mesh = world.mesh()
    before = torch.rand(3)
    manual_seed(5, mesh)
    torch.manual_seed(6)
    x = distribute_tensor(draw(5, 4), mesh, [Shard(0)]).uniform_()
    generator = torch.Generator().manual_seed(7)
    # DTensor takes the generator away from a draw of a CPU tensor.
    y = x.clone().normal_(generator=generator)
    return {"before": before, "x": x, "y": y, "after": torch.rand(2, generator=generator)}


def independent(world: Any, placement: Any = None) -> dict[str, Any]:
    """Only draws: nothing that depends on the order of a sum."""
    block, mesh = parallel_block(world)
    block.init_weights()
    for child in (block.embedding,):
        child.weight = nn.Parameter(distribute_tensor(child.weight.detach(), mesh, [Shard(0)]))
        child.reset_parameters()
    found: dict[str, Any] = {
        name: p for name, p in block.named_parameters() if isinstance(p, DTensor)
    }
    x = distribute_tensor(draw(7, 5), mesh, [Shard(0) if placement is None else placement])
    x = x.detach().requires_grad_()

    def step(x: Any) -> list[Any]:
        y = F.dropout(x, 0.4)
        z = torch.rand_like(x) + torch.randn_like(x) + torch.randint_like(x, 2, 9)
        return [y.detach(), F.dropout(y * z, 0.3), torch.empty_like(x).uniform_(-1, 2).detach()]

    results = world.compile(step)(x)
    results[1].sum().full_tensor().backward()
    found["rand"] = torch.distributed.tensor.rand(5, 3, device_mesh=mesh, placements=[Shard(0)])
    return {**found, "grad": x.grad, **{f"result {i}": r for i, r in enumerate(results)}}


class _Generator:
    """In the place of a CUDA device's generator: its 16 bytes of state, seed and offset."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def get_rng_state(self, device: Any = None) -> Any:
        return self.state.clone()

    def set_rng_state(self, state: Any, device: Any = None) -> None:
        self.state = state.clone()


def cuda_offsets(world: Any) -> dict[str, Any]:
    """Where DTensor's tracker of CUDA devices lets the draws of each rank start and end."""
    mesh = world.mesh((2, world.size // 2), ("dp", "tp"))
    state = world.rank_map(lambda rank: torch.arange(16, dtype=torch.uint8))
    generator = _Generator(state)
    tracker = object.__new__(OffsetBasedRNGTracker)  # __init__ wants a CUDA device
    tracker._device, tracker._device_handle = torch.device("cpu"), generator
    tracker._use_distribute_region = True
    found = {}
    for shape in ((8, 12), (7, 5), (1, 3)):
        for placements in itertools.product((Shard(0), Shard(1), R), repeat=2):
            x = distribute_tensor(torch.zeros(shape), mesh, placements)
            with (
                mock.patch.object(torch.cpu, "get_rng_state", generator.get_rng_state, create=True),
                mock.patch.object(torch.cpu, "set_rng_state", generator.set_rng_state, create=True),
                tracker._distribute_region(x._spec),
            ):
                found[f"{shape} {placements} inside"] = generator.get_rng_state()
            found[f"{shape} {placements} after"] = generator.get_rng_state()
    return found
