"""Whether all ranks hold the same value, and that one value: in eager and in compiled code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import RankDivergence, per_rank_text
from .stack import ShardsOfStack, stack_of


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two shards are equal; NaN equals NaN."""
    if a is b:
        return True
    if a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    return bool(torch.all((a == b) | (torch.isnan(a) & torch.isnan(b))))


def require_equal(shards: Mapping[int, Tensor], caller: str) -> None:
    """Raise RankDivergence unless all shards are equal (NaN equals NaN)."""
    stack = stack_of(shards)
    if stack is not None and same_values(stack, stack[:1].expand_as(stack)):
        return
    items = iter(shards.items())
    first_rank, first = next(items)
    for rank, shard in items:
        if same_values(first, shard):
            continue
        if first.shape != shard.shape:
            found = _shapes(first_rank, first, rank, shard)
        elif first.numel() <= 4:
            found = per_rank_text({r: t.tolist() for r, t in shards.items()})
        else:
            found = f"rank {rank} differs from rank {first_rank}"
        raise _divergence(caller, found)


def _shapes(one_rank: int, one: Tensor, other_rank: int, other: Tensor) -> str:
    return (
        f"shape {tuple(one.shape)} on rank {one_rank} and {tuple(other.shape)} on rank {other_rank}"
    )


def _divergence(caller: str, found: str) -> RankDivergence:
    return RankDivergence(
        f"{caller} needs the same value on every rank, but the shards differ: {found}. "
        "Look at one rank's shard with tensor_map, or make the ranks agree first, e.g. "
        "with an all_gather or all_reduce."
    )


# ---------------------------------------------------------------- in a traced program
_library = torch.library.Library("localtensor", "FRAGMENT")
_library.define(
    "reconcile(Tensor[] shards, int[] ranks) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _reconcile(shards: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    require_equal(dict(zip(ranks, shards)), "reconcile()")
    return shards[0].clone()


def _fake_reconcile(shards: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    for rank, shard in zip(ranks, shards):
        if shard.shape != shards[0].shape:
            found = _shapes(ranks[0], shards[0], rank, shard)
            raise _divergence("reconcile()", found)
    return torch.empty_like(shards[0])


_library.impl("reconcile", _reconcile, "CompositeExplicitAutograd")
torch.library.register_fake("localtensor::reconcile", _fake_reconcile, lib=_library)
_library.define(
    "reconcile_stack(Tensor stack, int[] ranks) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def _reconcile_stack(stack: Tensor, ranks: Sequence[int]) -> Tensor:
    require_equal(ShardsOfStack(stack, tuple(ranks)), "reconcile()")
    return stack[0].clone()


_library.impl("reconcile_stack", _reconcile_stack, "CompositeExplicitAutograd")
torch.library.register_fake(
    "localtensor::reconcile_stack", lambda stack, ranks: torch.empty_like(stack[0]), lib=_library
)
# The comparison stays where nobody uses the value.
torch.fx.node.has_side_effect(torch.ops.localtensor.reconcile.default)
torch.fx.node.has_side_effect(torch.ops.localtensor.reconcile_stack.default)


def reconcile_when_run(shards: Mapping[int, Tensor]) -> Tensor:
    """The value that all ranks share, compared when the traced program runs."""
    stack = stack_of(shards)
    if stack is not None:
        return torch.ops.localtensor.reconcile_stack(stack, list(shards))
    return torch.ops.localtensor.reconcile(list(shards.values()), list(shards))
