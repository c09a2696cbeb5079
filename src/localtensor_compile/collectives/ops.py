"""localtensor::* custom ops: one graph node per collective, on the shards of all ranks.

Each op takes the shards of all ranks, in rank order, and the groups as flat positions into that
list (`int[] groups`, `group_size` each; nested lists would not survive torch.export.save). Shards
outside every group come back as copies. Results never alias operands or each other. Just before
Inductor a decomposition turns the ops into tensor math, where they fuse (compile/lowering.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CollectiveError
from .reduction import reduce_shards, reduce_to_root


class _Settings(threading.local):
    order = "gloo"
    """Association order of floating point reductions when an op runs; LocalTensorMode sets it.

    Not an argument of the ops: a compiled artifact follows the mode that it runs in."""


settings = _Settings()

NAMESPACE = "localtensor"
library = torch.library.Library(NAMESPACE, "DEF")

Shards = Sequence[Tensor]
_kernels: dict[str, Callable[..., list[Tensor]]] = {}


def chunks(groups: Sequence[int], size: int) -> list[Sequence[int]]:
    return [groups[i : i + size] for i in range(0, len(groups), size)]


def _op(
    schema: str, fake: Callable[..., list[Tensor]]
) -> Callable[[Callable[..., list[Tensor]]], Callable[..., list[Tensor]]]:
    """Define localtensor::<schema>, run by the decorated kernel and faked by `fake`."""
    name = schema.partition("(")[0]

    def register(kernel: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        library.define(f"{schema} -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        _kernels[name] = kernel
        return kernel

    return register


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _like(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _with_rows(t: Tensor, rows: Any) -> Tensor:
    return t.new_empty((rows, *t.shape[1:]))


# ---------------------------------------------------------------- reductions
def _fake_same(shards: Shards, *rest: Any, **options: Any) -> list[Tensor]:
    return [_like(t) for t in shards]


@_op("all_reduce(Tensor[] shards, str op, int[] groups, int group_size)", _fake_same)
def all_reduce(shards: Shards, op: str, groups: Sequence[int], group_size: int) -> list[Tensor]:
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        result = reduce_shards([shards[i] for i in group], op, order=settings.order)
        for k, i in enumerate(group):
            out[i] = _copy(result) if k else result
    return _fill(out, shards)


def _fill(out: list[Any], shards: Shards) -> list[Tensor]:
    """Shards outside every group keep their value."""
    return [_copy(t) if o is None else o for o, t in zip(out, shards)]


@_op(
    "reduce(Tensor[] shards, str op, int root, int[] groups, int group_size)",
    _fake_same,
)
def reduce(
    shards: Shards,
    op: str,
    root: int,
    groups: Sequence[int],
    group_size: int,
) -> list[Tensor]:
    """What each rank's tensor holds afterwards; only that of `root`, a group rank, is defined."""
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        left = reduce_to_root([shards[i] for i in group], op, root, order=settings.order)
        for i, t in zip(group, left):
            out[i] = t
    return _fill(out, shards)


def _fake_reduce_scatter(
    shards: Shards, op: str, groups: Sequence[int], group_size: int
) -> list[Tensor]:
    members = set(groups)
    return [
        _with_rows(t, t.shape[0] // group_size) if i in members else _like(t)
        for i, t in enumerate(shards)
    ]


@_op(
    "reduce_scatter(Tensor[] shards, str op, int[] groups, int group_size)",
    _fake_reduce_scatter,
)
def reduce_scatter(shards: Shards, op: str, groups: Sequence[int], group_size: int) -> list[Tensor]:
    """Equal chunks along dimension 0 of the group's reduction."""
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        result = reduce_shards([shards[i] for i in group], op, order=settings.order)
        rows = result.shape[0] // group_size
        for k, i in enumerate(group):
            out[i] = _copy(result.narrow(0, k * rows, rows))
    return _fill(out, shards)


def _fake_reduce_scatter_list(
    shards: Shards, op: str, groups: Sequence[int], group_size: int
) -> list[Tensor]:
    return [
        _like(shards[i * group_size + k])
        for group in chunks(groups, group_size)
        for k, i in enumerate(group)
    ]


@_op(
    "reduce_scatter_list(Tensor[] shards, str op, int[] groups, int group_size)",
    _fake_reduce_scatter_list,
)
def reduce_scatter_list(
    shards: Shards, op: str, groups: Sequence[int], group_size: int
) -> list[Tensor]:
    """`shards[p*group_size + k]` is what position p sends to member k of its group.

    One result per group member, group after group.
    """
    return [
        reduce_shards([shards[i * group_size + k] for i in group], op, order=settings.order)
        for group in chunks(groups, group_size)
        for k in range(group_size)
    ]


# ---------------------------------------------------------------- data movement
def _fake_all_gather(shards: Shards, groups: Sequence[int], group_size: int) -> list[Tensor]:
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        rows = sum(shards[i].shape[0] for i in group)
        for i in group:
            out[i] = _with_rows(shards[i], rows)
    return [_like(t) if o is None else o for o, t in zip(out, shards)]


@_op("all_gather(Tensor[] shards, int[] groups, int group_size)", _fake_all_gather)
def all_gather(shards: Shards, groups: Sequence[int], group_size: int) -> list[Tensor]:
    """The group's shards joined along dimension 0."""
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        result = torch.cat([shards[i] for i in group], 0)
        for k, i in enumerate(group):
            out[i] = result.clone() if k else result
    return _fill(out, shards)


def _fake_all_gather_list(shards: Shards, groups: Sequence[int], group_size: int) -> list[Tensor]:
    return [_like(shards[i]) for group in chunks(groups, group_size) for _ in group for i in group]


@_op("all_gather_list(Tensor[] shards, int[] groups, int group_size)", _fake_all_gather_list)
def all_gather_list(shards: Shards, groups: Sequence[int], group_size: int) -> list[Tensor]:
    """For each group member, group after group: a copy of every member's shard."""
    return [_copy(shards[i]) for group in chunks(groups, group_size) for _ in group for i in group]


def _fake_broadcast(
    shards: Shards, root: int, groups: Sequence[int], group_size: int
) -> list[Tensor]:
    out = [_like(t) for t in shards]
    for group in chunks(groups, group_size):
        for i in group:
            out[i] = _like(shards[group[root]])
    return out


@_op("broadcast(Tensor[] shards, int root, int[] groups, int group_size)", _fake_broadcast)
def broadcast(shards: Shards, root: int, groups: Sequence[int], group_size: int) -> list[Tensor]:
    """`root` is a group rank."""
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        for i in group:
            out[i] = _copy(shards[group[root]])
    return _fill(out, shards)


def require_agreement(sent: Any, received: Any, what: str, sender: str, receiver: str) -> None:
    """Numbers of rows. Of numbers that depend on data a trace keeps a check for later.

    Raises:
        CollectiveError: `sender` sends another number of rows than `receiver` expects.
    """
    known = isinstance(sent, int) and isinstance(received, int)
    if sent is received or (known and sent == received):
        return

    def message() -> str:
        return (
            f"{what}: {sender} sends {sent} rows to {receiver}, but {receiver} expects {received} "
            "rows from it. On real processes this hangs or corrupts data: exchange the splits "
            "first, e.g. with an all_to_all_single of the split sizes."
        )

    if known:
        raise CollectiveError(message())
    torch._check(sent == received, message)


def _fake_all_to_all(
    shards: Shards,
    sent: Sequence[Any],
    received: Sequence[Any],
    groups: Sequence[int],
    group_size: int,
) -> list[Tensor]:
    out = [_like(t) for t in shards]
    for i in groups:
        rows = sum(received[i * group_size : (i + 1) * group_size])
        out[i] = _with_rows(shards[i], rows)
    return out


@_op(
    "all_to_all_single(Tensor[] shards, SymInt[] sent, SymInt[] received, int[] groups, "
    "int group_size)",
    _fake_all_to_all,
)
def all_to_all_single(
    shards: Shards,
    sent: Sequence[Any],
    received: Sequence[Any],
    groups: Sequence[int],
    group_size: int,
) -> list[Tensor]:
    """Rows go from position p to member k of its group: `sent[p*group_size + k]` of them.

    The other way round `received[p*group_size + k]` rows come to p from member k. Numbers that a
    trace could not compare are compared here.
    """
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        for k, dst in enumerate(group):
            for j, src in enumerate(group):
                given, expected = sent[src * group_size + k], received[dst * group_size + j]
                who = f"position {src}", f"position {dst}"
                require_agreement(given, expected, "all_to_all_single", *who)
        parts = {
            i: torch.split(shards[i], list(sent[i * group_size : (i + 1) * group_size]))
            for i in group
        }
        for k, dst in enumerate(group):
            out[dst] = torch.cat([parts[src][k] for src in group])
    return _fill(out, shards)


def _fake_all_to_all_list(shards: Shards, groups: Sequence[int], group_size: int) -> list[Tensor]:
    return [
        _like(shards[src * group_size + k])
        for group in chunks(groups, group_size)
        for k in range(group_size)
        for src in group
    ]


@_op("all_to_all_list(Tensor[] shards, int[] groups, int group_size)", _fake_all_to_all_list)
def all_to_all_list(shards: Shards, groups: Sequence[int], group_size: int) -> list[Tensor]:
    """`shards[p*group_size + k]` is what position p sends to member k of its group.

    For each group member, group after group: what it receives from each member.
    """
    return [
        _copy(shards[src * group_size + k])
        for group in chunks(groups, group_size)
        for k in range(group_size)
        for src in group
    ]


def _fake_shard_dim_alltoall(
    shards: Shards, gather_dim: int, shard_dim: int, groups: Sequence[int], group_size: int
) -> list[Tensor]:
    out = [_like(t) for t in shards]
    for i in groups:
        size = list(shards[i].shape)
        size[shard_dim] //= group_size
        size[gather_dim] *= group_size
        out[i] = shards[i].new_empty(size)
    return out


@_op(
    "shard_dim_alltoall(Tensor[] shards, int gather_dim, int shard_dim, int[] groups, "
    "int group_size)",
    _fake_shard_dim_alltoall,
)
def shard_dim_alltoall(
    shards: Shards, gather_dim: int, shard_dim: int, groups: Sequence[int], group_size: int
) -> list[Tensor]:
    """DTensor's Shard(gather_dim) -> Shard(shard_dim) in one all_to_all."""
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        parts = {i: torch.chunk(shards[i], group_size, shard_dim) for i in group}
        for k, dst in enumerate(group):
            out[dst] = torch.cat([parts[src][k] for src in group], gather_dim)
    return _fill(out, shards)


OPS = torch.ops.localtensor


# ---------------------------------------------------------------- autograd
# Met only where a graph with these nodes is traced again, above autograd: ordinary code differen-
# tiates the functional collectives themselves.
def _keep_options(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.options = inputs[1:]


def _autograd(name: str, backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=_keep_options, lib=library
    )


def _all_reduce_backward(ctx: Any, grads: Any) -> Any:
    op, groups, size = ctx.options
    if op not in ("sum", "avg"):
        raise NotImplementedError(f"the backward of localtensor::all_reduce with op {op!r}")
    return OPS.all_reduce(list(grads), op, groups, size), None, None, None


def _all_gather_backward(ctx: Any, grads: Any) -> Any:
    groups, size = ctx.options
    return OPS.reduce_scatter(list(grads), "sum", groups, size), None, None


def _reduce_scatter_backward(ctx: Any, grads: Any) -> Any:
    op, groups, size = ctx.options
    if op not in ("sum", "avg"):
        raise NotImplementedError(f"the backward of localtensor::reduce_scatter with op {op!r}")
    out = OPS.all_gather(list(grads), groups, size)
    return [g / size for g in out] if op == "avg" else out, None, None, None


def _all_to_all_backward(ctx: Any, grads: Any) -> Any:
    sent, received, groups, size = ctx.options
    out = OPS.all_to_all_single(list(grads), received, sent, groups, size)
    return out, None, None, None, None


def _shard_dim_alltoall_backward(ctx: Any, grads: Any) -> Any:
    gather_dim, shard_dim, groups, size = ctx.options
    out = OPS.shard_dim_alltoall(list(grads), shard_dim, gather_dim, groups, size)
    return out, None, None, None, None


_autograd("all_reduce", _all_reduce_backward)
_autograd("all_gather", _all_gather_backward)
_autograd("reduce_scatter", _reduce_scatter_backward)
_autograd("all_to_all_single", _all_to_all_backward)
_autograd("shard_dim_alltoall", _shard_dim_alltoall_backward)
