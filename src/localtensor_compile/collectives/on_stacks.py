"""Apply the localtensor::stacked_* ops to stacked LocalTensors, in their place in apply.py.

What a stack cannot hold, or what differs between ranks, goes once per rank, and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..stacked import counts
from ..stacked.layout import can_join, is_stacked, join
from ..values.stack import stack_of
from ..values.tensor import LocalTensor, _wrap_stacked
from .groups import Groups
from .row_groups import index, row_groups
from .stacked_ops import OPS as _OPS

_STACKED: dict[Any, tuple[Any, bool]] = {
    _OPS.all_reduce.default: (_OPS.stacked_all_reduce.default, False),
    _OPS.reduce.default: (_OPS.stacked_reduce.default, False),
    _OPS.broadcast.default: (_OPS.stacked_broadcast.default, False),
    _OPS.reduce_scatter.default: (_OPS.stacked_reduce_scatter.default, True),
    _OPS.all_gather.default: (_OPS.stacked_all_gather.default, True),
    _OPS.shard_dim_alltoall.default: (_OPS.stacked_shard_dim_alltoall.default, True),
}
"""Per-rank op -> the op on stacks, and whether that needs every rank in a group."""


def ranks_of(tensor: LocalTensor) -> tuple[int, ...]:
    return tuple(tensor._local_tensors)


def run(op: Any, tensor: LocalTensor, groups: Groups, options: tuple[Any, ...]) -> Any:
    """What localtensor::`op` gives, or NotImplemented where it must run per rank."""
    stack = stack_of(tensor._local_tensors)
    known = _STACKED.get(op)
    if stack is None or known is None:
        return NotImplemented
    own, needs_all = known
    if needs_all and len(groups.positions) != stack.shape[0]:
        return NotImplemented
    if op is _OPS.shard_dim_alltoall.default and tensor.shape[options[1]] % groups.size:
        return NotImplemented
    counts.counts.stacked += 1
    out = own(stack, *options, list(groups.positions), groups.size)
    return _wrap_stacked(out, ranks_of(tensor))


def back(op: Any, result: LocalTensor) -> LocalTensor:
    """The result of a per-rank op on stacked operands, joined again where its shards are alike."""
    name = op._schema.name
    counts.went_per_rank(name, "the ranks send or receive different shapes, or not all take part")
    if can_join(result):
        return join(result, name)
    counts.left(name)
    return result


def equal_all_to_all(tensor: LocalTensor, splits: Iterable[Any], groups: Groups) -> Any:
    """all_to_all_single where all splits are one number, or NotImplemented."""
    stack = stack_of(tensor._local_tensors)
    if stack is None or len(groups.positions) != stack.shape[0]:
        return NotImplemented
    rows = stack.shape[1]
    for given in splits:
        if given and (
            len(given) != groups.size
            or any(type(n) is not int or n * groups.size != rows for n in given)
        ):
            return NotImplemented
    if rows % groups.size:
        return NotImplemented
    counts.counts.stacked += 1
    op = _OPS.stacked_all_to_all_single.default
    return _wrap_stacked(op(stack, list(groups.positions), groups.size), ranks_of(tensor))


def cat_flat(tensors: Sequence[LocalTensor]) -> LocalTensor | None:
    """All elements of each rank's tensors in one row, or None where a tensor is not stacked."""
    stacks = [stack_of(t._local_tensors) for t in tensors]
    if any(s is None for s in stacks) or len({ranks_of(t) for t in tensors}) > 1:
        return None
    rows = [s.reshape(s.shape[0], -1) for s in stacks if s is not None]
    return _wrap_stacked(torch.cat(rows, 1), ranks_of(tensors[0]))


def split_flat(joined: LocalTensor, tensors: Sequence[LocalTensor]) -> list[LocalTensor]:
    """The parts of `cat_flat`, in the tensors' shapes and fresh memory."""
    stack, ranks = joined._stack, ranks_of(joined)
    sizes = [t._stack.shape for t in tensors]
    parts = torch.split(stack, [t._stack[0].numel() for t in tensors], 1)
    return [_wrap_stacked(p.reshape(s).clone(), ranks) for p, s in zip(parts, sizes)]


# ---------------------------------------------------------------- in place
def members_only(tensor: LocalTensor, groups: Groups) -> tuple[LocalTensor, Groups]:
    """The rows of the ranks that take part, group after group, and the groups among them.

    In-place collectives leave the memory of the other ranks alone.
    """
    stack = stack_of(tensor._local_tensors)
    if stack is None or len(groups.positions) == stack.shape[0]:
        return tensor, groups
    ranks = tuple(r for group in groups.ranks for r in group)
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    rows = _rows(stack, [groups.positions[i] for i in order])
    place = {i: k for k, i in enumerate(order)}
    positions = tuple(place[i] for i in range(len(ranks)))
    among = Groups(positions, groups.size, groups.ranks, groups.family)
    return _wrap_stacked(rows, tuple(sorted(ranks))), among


def _rows(stack: Tensor, positions: Sequence[int]) -> Tensor:
    part = row_groups(positions, len(positions), stack.shape[0]).part
    if part is not None:
        return torch.ops.aten.slice.Tensor(stack, 0, *part)
    return stack.index_select(0, index(positions, stack))


def write_rows(target: Tensor, ranks: tuple[int, ...], at: Sequence[int], source: Tensor) -> None:
    """Copy the rows of `source` into the rows of `target` that belong to the ranks `at`."""
    if tuple(at) == ranks:
        target.copy_(source)
        return
    place = {r: i for i, r in enumerate(ranks)}
    positions = [place[r] for r in at]
    plan = row_groups(positions, len(positions), len(ranks))
    if plan.part is not None:
        torch.ops.aten.slice.Tensor(target, 0, *plan.part).copy_(source)
    else:
        target.index_copy_(0, index(positions, target), source)


def copy_into(target: LocalTensor, result: LocalTensor, ranks: Iterable[int]) -> bool:
    """Whether `result` was written into `target` at once, on the ranks that `result` has."""
    into, rows = stack_of(target._local_tensors), stack_of(result._local_tensors)
    if into is None or rows is None or into.dtype != rows.dtype:
        return False
    own, at = ranks_of(target), ranks_of(result)
    if set(ranks) != set(at) or not set(at) <= set(own) or into is rows:
        return False
    if into.shape[1:] != rows.shape[1:]:
        if target.numel() != result.numel():
            return False
        rows = rows.reshape(rows.shape[0], *into.shape[1:])
    write_rows(into, own, at, rows)
    return True


def all_stacked(tensors: Iterable[Any], ranks: tuple[int, ...]) -> bool:
    """Whether all are stacked tensors of these ranks, of one shape and dtype."""
    listed = list(tensors)
    return (
        all(is_stacked(t) and ranks_of(t) == ranks for t in listed)
        and len({(t.dtype, *t.shape) for t in listed}) == 1
    )


def entries(tensors: Sequence[LocalTensor]) -> LocalTensor:
    """A list of stacked tensors as one, its entries along a new first dimension."""
    stack = torch.stack([t._stack for t in tensors], 1)
    return _wrap_stacked(stack, ranks_of(tensors[0]))


def on_entries(name: str, entries: LocalTensor, groups: Groups, *options: Any) -> LocalTensor:
    """localtensor::stacked_`name` on the members of the groups."""
    entries, groups = members_only(entries, groups)
    counts.counts.stacked += 1
    op = getattr(_OPS, f"stacked_{name}").default
    out = op(entries._stack, *options, list(groups.positions), groups.size)
    return _wrap_stacked(out, ranks_of(entries))


def gather_into(
    outputs: Sequence[LocalTensor], tensor: LocalTensor, root: int, groups: Groups
) -> None:
    """Every member's shard into the outputs of the root, a group rank."""
    counts.counts.stacked += 1
    rows = _OPS.stacked_gather.default(tensor._stack, list(groups.positions), groups.size)
    order = sorted(range(len(groups.ranks)), key=lambda g: groups.ranks[g][root])
    roots = tuple(groups.ranks[g][root] for g in order)
    if order != list(range(len(order))):
        rows = rows.index_select(0, index(order, rows))
    for output, given in zip(outputs, rows.unbind(1)):
        write_rows(output._stack, ranks_of(output), roots, given)


def per_rank(what: str, tensors: Iterable[Any]) -> None:
    """Count a collective with a stacked operand that runs per rank."""
    if any(is_stacked(t) for t in tensors):
        counts.went_per_rank(what, "its tensors are not all stacked, or differ in shape or dtype")


def write_entries(outputs: Sequence[LocalTensor], result: LocalTensor) -> None:
    """Entry k of `result` [entries, ...] into output k, on the ranks of `result`."""
    for output, rows in zip(outputs, result._stack.unbind(1)):
        write_rows(output._stack, ranks_of(output), ranks_of(result), rows)
