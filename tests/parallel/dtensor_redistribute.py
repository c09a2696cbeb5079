"""Redistribution between all pairs of placements, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard

from .harness import draw

REDUCE_OPS = ("sum", "avg", "min", "max", "product")

Placements = tuple[Placement, ...]
Pair = tuple[Placements, Placements]


def placed(world: Any, mesh: Any, placements: Placements, shape: Sequence[int], seed: int) -> Any:
    """A DTensor of global `shape`; what each rank holds of a Partial is a draw of its own."""
    whole = draw(*shape, seed=seed)
    if not any(p.is_partial() for p in placements):
        return distribute_tensor(whole, mesh, placements)
    pieces = distribute_tensor(
        whole, mesh, [Replicate() if p.is_partial() else p for p in placements]
    ).to_local()
    # Ranks that differ only along a partial dimension hold different addends.
    index = [mesh.get_local_rank(d) if p.is_partial() else 0 for d, p in enumerate(placements)]
    scale = 1.0
    for d, i in enumerate(index):
        scale = scale + i * (0.25 + d)
    local = pieces * scale
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def outcome(
    world: Any,
    mesh: Any,
    pairs: Sequence[Pair],
    shape: Sequence[int],
    per_graph: int = 64,
    dynamic: bool | None = None,
) -> dict[str, Any]:
    """Every pair's redistributed shard and gradient, `per_graph` pairs per compiled function."""
    found: dict[str, Any] = {}
    for start in range(0, len(pairs), per_graph):
        batch = pairs[start : start + per_graph]
        leaves = [
            placed(world, mesh, src, shape, start + i).detach().requires_grad_()
            for i, (src, _) in enumerate(batch)
        ]
        redistribute = _redistribute_each([dst for _, dst in batch])
        results = world.compile(redistribute, dynamic=dynamic)(leaves)
        loss = sum(r.mul(r.detach()).sum() for r in results)
        loss.backward()
        for (src, dst), result, leaf in zip(batch, results, leaves):
            name = f"{text(src)} -> {text(dst)}"
            found[name] = result
            found[f"grad {name}"] = leaf.grad.to_local()
            found[f"grad {name} is partial"] = float(
                any(p.is_partial() for p in leaf.grad.placements)
            )
    return found


def _redistribute_each(targets: Sequence[Placements]) -> Callable[..., Any]:
    def redistribute(leaves: Sequence[Any]) -> list[Any]:
        return [
            leaf.redistribute(placements=dst).sin().to_local()
            if not any(p.is_partial() for p in dst)
            else leaf.redistribute(placements=dst).to_local()
            for leaf, dst in zip(leaves, targets)
        ]

    return redistribute


def text(placements: Placements) -> str:
    return ", ".join(map(str, placements))


def allowed(src: Placements, dst: Placements) -> bool:
    """Whether redistribute accepts the pair: a Partial can be kept but not made."""
    return (
        all(not b.is_partial() or a == b for a, b in zip(src, dst))
        and len({p for p in src if p.is_partial()}) < 2
    )


def pairs_between(sources: Sequence[Placement], ndim: int) -> list[Pair]:
    combinations = list(itertools.product(sources, repeat=ndim))
    return [p for p in itertools.product(combinations, combinations) if allowed(*p)]


def one_dim(world: Any, shape: Sequence[int]) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    ends = [Shard(0), Shard(-1), Replicate(), *(Partial(op) for op in REDUCE_OPS)]
    return outcome(world, mesh, pairs_between(ends, 1), shape)


def more_dims(
    world: Any,
    mesh_shape: Sequence[int],
    shape: Sequence[int],
    every: int = 1,
    first: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Every `every`-th pair, from the `first` on, on a mesh of two or three dimensions."""
    mesh = world.mesh(mesh_shape, ("a", "b", "c")[: len(mesh_shape)])
    ends = [Shard(0), Shard(1), Replicate(), Partial()]
    pairs = pairs_between(ends, len(mesh_shape))[first::every]
    return outcome(world, mesh, pairs, shape, **options)


def strided_alone(world: Any) -> dict[str, Any]:
    mesh = world.mesh((2, world.size // 2), ("a", "b"))
    x = distribute_tensor(draw(8, 4), mesh, [_StridedShard(0, split_factor=2), Shard(0)])
    return {"x": world.compile(lambda x: x.redistribute(placements=[Replicate()] * 2))(x)}


def strided(world: Any, mesh_shape: Sequence[int], shape: Sequence[int]) -> dict[str, Any]:
    """The pairs with a _StridedShard that torch can do: of even shards, not to every target."""
    mesh = world.mesh(mesh_shape, ("a", "b"))
    fsdp_and_tp = (_StridedShard(0, split_factor=mesh_shape[-1]), Shard(0))
    columns = (_StridedShard(1, split_factor=2), Replicate())
    replicated = (Replicate(), Replicate())
    plain = list(itertools.product([Shard(0), Shard(1), Replicate()], repeat=2))
    pairs: list[Pair] = [(src, dst) for src in plain for dst in (fsdp_and_tp, columns)]
    if all(n % (k * k) == 0 for n, k in zip(shape, mesh_shape)):
        reached = [
            replicated,
            (Replicate(), Shard(0)),
            (Shard(0), Replicate()),
            (Shard(1), Replicate()),
        ]
        pairs += itertools.product((fsdp_and_tp, columns), reached)
        pairs += [((_StridedShard(0, split_factor=2), Partial()), replicated)]
    return outcome(world, mesh, pairs, shape)


def uneven_strided(world: Any) -> dict[str, Any]:
    mesh = world.mesh((2, world.size // 2), ("a", "b"))
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    x = distribute_tensor(draw(7, 5), mesh, placements)
    return {"x": world.compile(lambda x: x.redistribute(placements=[Replicate()] * 2))(x)}


def conjugates(world: Any) -> dict[str, Any]:
    """Ranks whose shard is padded carry the conjugation out, the others gather a view."""
    mesh = world.mesh(names="d")
    real = distribute_tensor(draw(4, 2 * world.size - 1, 6), mesh, [Shard(1)]).requires_grad_()
    x = distribute_tensor(draw(2 * world.size - 1, 2) + 1j, mesh, [Shard(0)])

    def whole(real: Any, x: Any) -> Any:
        inverse = torch.fft.ifft(real, norm="ortho").full_tensor()
        return inverse, x.conj().full_tensor()

    inverse, conjugate = world.compile(whole)(real, x)
    inverse.abs().sum().backward()
    return {"inverse": inverse, "conj": conjugate, "grad": real.grad}
