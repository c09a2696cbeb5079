"""The rows of a stack, group by group: [ranks, *local] as [outer, size, inner, *local] and back.

Groups that are the fibres of a dimension of a mesh are a view of the stack. Others are picked by
index.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowGroups(NamedTuple):
    """Groups of rows.

    Attributes:
        outer, size, inner: outer * inner groups of `size` rows each.
        picked: the rows in the order of the groups; None where the stack is a view of them all.
        where: where every row is in some group: for each row its place in `picked`.
        part: (first, stop, step) of the rows where they are a slice of the stack.
    """

    outer: int
    size: int
    inner: int
    picked: tuple[int, ...] | None = None
    where: tuple[int, ...] | None = None
    part: tuple[int, int, int] | None = None


def row_groups(groups: Sequence[int], size: int, count: int) -> RowGroups:
    """How `groups`, positions among `count` rows, `size` of them per group, lie in a stack."""
    return _found(tuple(groups), size, count)


@functools.lru_cache(maxsize=512)
def _found(groups: tuple[int, ...], size: int, count: int) -> RowGroups:
    ordered = sorted(groups)
    if ordered == list(range(count)):
        inner = groups[1] - groups[0] if size > 1 else 1
        if inner > 0 and count % (size * inner) == 0 and _is_grid(groups, size, inner):
            return RowGroups(count // (size * inner), size, inner)
        place = {row: i for i, row in enumerate(groups)}
        where = tuple(place[row] for row in range(count))
        return RowGroups(len(groups) // size, size, 1, groups, where)
    step = groups[1] - groups[0] if len(groups) > 1 else 1
    part = None
    if step > 0 and groups == tuple(range(groups[0], groups[-1] + 1, step)):
        part = (groups[0], groups[-1] + 1, step)
    return RowGroups(len(groups) // size, size, 1, groups, None, part)


def _is_grid(groups: tuple[int, ...], size: int, inner: int) -> bool:
    for i in range(0, len(groups), size):
        first = groups[i]
        if first // inner % size or groups[i : i + size] != tuple(
            range(first, first + size * inner, inner)
        ):
            return False
    return True


def is_whole(groups: Sequence[int], count: int) -> bool:
    """Whether every row is in some group."""
    return len(groups) == count


def index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def split_rows(stack: Tensor, plan: RowGroups) -> Tensor:
    """The rows of all groups [outer, size, inner, *local]; a view where that is possible."""
    if plan.part is not None:
        first, stop, step = plan.part
        stack = torch.ops.aten.slice.Tensor(stack, 0, first, stop, step)
    elif plan.picked is not None:
        stack = stack.index_select(0, index(plan.picked, stack))
    return stack.unflatten(0, (plan.outer, plan.size, plan.inner))


def joined_rows(rows: Tensor, plan: RowGroups, stack: Tensor) -> Tensor:
    """A new contiguous stack of the groups' rows; rows of `stack` in no group keep their value."""
    if plan.picked is None:
        copy = rows.clone(memory_format=torch.contiguous_format)
        return copy.view(stack.shape[0], *rows.shape[3:])
    flat = rows.reshape(len(plan.picked), *rows.shape[3:])
    if plan.where is not None:
        return flat.index_select(0, index(plan.where, flat))
    whole = stack.contiguous()
    if plan.part is not None:
        return torch.slice_scatter(whole, flat, 0, *plan.part)
    return whole.index_copy(0, index(plan.picked, flat), flat)
