"""Reductions over groups of rows of a stack: bit for bit what reduction.py gives per group.

`rows` has the shape [outer, size, inner, *local]: dimension 1 counts the members of a group in
group-rank order, and there are outer * inner groups. All groups are reduced at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reduction
from .reduction import (
    COMBINE,
    SUMS,
    all_reduce_chunk,
    factors_of,
    finished,
    prepared,
    reduce_chunk,
)

_EXACT = {"sum": torch.sum, "product": torch.prod}
_EXTREME = {"min": torch.amin, "max": torch.amax}


def reduce_rows(
    rows: Tensor, op: str, *, order: str = "gloo", factor: Any = None, complex_parts: bool = True
) -> Tensor:
    """`reduce_shards` of each group.

    Args:
        rows: [outer, size, inner, *local]; the rest is as for `reduce_shards`.

    Returns:
        New contiguous tensor [outer, inner, *local].

    Raises:
        CollectiveError: an op that the dtype does not have.
    """
    data = _prepared(rows, op, order, factor)
    total = _fold(data, SUMS.get(op, op), order)
    return finished(total, rows.dtype, rows.shape[1], op, complex_parts)


def reduce_rows_to_root(rows: Tensor, op: str, root: int, *, order: str = "gloo") -> Tensor:
    """`reduce_to_root` of each group: a new tensor of the shape of `rows`."""
    data = _prepared(rows, op, order, None)
    name, size = SUMS.get(op, op), rows.shape[1]
    if order == "gloo" and size > 1:
        return finished(_ring_reduce(data, name, root), rows.dtype, size, op, False)
    result = rows.clone(memory_format=torch.contiguous_format)
    total = finished(_fold(data, name, order), rows.dtype, size, op, False)
    result.select(1, root).copy_(total)
    return result


def _prepared(rows: Tensor, op: str, order: str, factor: Any) -> Tensor:
    if op == "premul_sum" and isinstance(factor, Sequence):
        each = torch.stack(factors_of(rows.unbind(1), factor))
        rows = rows * each.view(-1, *[1] * (rows.dim() - 2))
        op, factor = "sum", None
    return prepared([rows], op, order, factor)[0][0]


def _accumulate(name: str, own: Tensor, total: Tensor) -> None:
    """total = combine(own, total), in place."""
    if name == "sum":
        torch.add(own, total, out=total)
    elif name == "product":
        torch.mul(own, total, out=total)
    else:
        total.copy_(COMBINE[name](own, total))


def _fold(rows: Tensor, name: str, order: str) -> Tensor:
    size = rows.shape[1]
    if size == 1 or not rows.numel():
        return rows.select(1, 0).clone(memory_format=torch.contiguous_format)
    exact = not rows.dtype.is_floating_point
    if exact and name in _EXACT:
        return _EXACT[name](rows, 1, dtype=rows.dtype)
    if exact and name in _EXTREME:
        return _EXTREME[name](rows, 1)
    commutes = size == 2 and name not in _EXTREME
    if order == "rank_order" or exact or commutes:
        total = rows.select(1, 0).clone(memory_format=torch.contiguous_format)
        for k in range(1, size):
            _accumulate(name, rows.select(1, k), total)
        return total
    flat, shape = _flat(rows)
    chunk = all_reduce_chunk(flat.shape[-1], flat.element_size(), size)
    if flat.numel() * flat.element_size() <= reduction.SMALL:
        return _ring_few_ops(flat, name, chunk).reshape(shape)
    total = flat.new_empty(flat.shape[0], *flat.shape[2:])
    for _ in _ring(flat, total, name, chunk):
        pass
    return total.view(shape)


def _flat(rows: Tensor) -> tuple[Tensor, list[int]]:
    """`rows` as [outer, size, inner, elements], and the shape of a total."""
    outer, size, inner, *local = rows.shape
    return rows.reshape(outer, size, inner, -1), [outer, inner, *local]


def _ring(rows: Tensor, total: Tensor, name: str, chunk: int) -> Iterable[int]:
    """Folds k = 1, 2, ... size ranks into `total` [outer, inner, elements], and stops at each.

    Chunk c is folded from rank c-1 downwards. The k-th step takes it from rank c-k: a diagonal.
    """
    for k in range(1, rows.shape[1] + 1):
        for own, whole in zip(_diagonal(rows, chunk, k), _pieces(total, chunk, k)):
            if k == 1:
                whole.copy_(own)
            else:
                _accumulate(name, own, whole)
        yield k


def _runs(count: int, chunk: int, k: int) -> list[tuple[int, int]]:
    """The whole chunks in runs [first, last) over which rank c-k grows without wrapping round."""
    full = count // chunk
    turn = min(k, full)
    return [run for run in ((0, turn), (turn, full)) if run[0] < run[1]]


def _diagonal(rows: Tensor, chunk: int, k: int) -> list[Tensor]:
    """Chunk c of rank c-k for all c: views [outer, inner, chunks, chunk], last the short chunk."""
    outer, size, inner, count = rows.shape
    by_outer, by_rank, by_inner, by_one = rows.stride()
    stride = (by_outer, by_inner, by_rank + chunk * by_one, by_one)
    found = []
    for first, last in _runs(count, chunk, k):
        start = (first - k) % size * by_rank + first * chunk * by_one
        shape = (outer, inner, last - first, chunk)
        found.append(rows.as_strided(shape, stride, rows.storage_offset() + start))
    full, rest = divmod(count, chunk)
    if rest:
        found.append(rows.select(1, (full - k) % size).narrow(-1, full * chunk, rest))
    return found


def _pieces(total: Tensor, chunk: int, k: int) -> list[Tensor]:
    """The parts of `total` that belong to those of `_diagonal`."""
    full, rest = divmod(total.shape[-1], chunk)
    found = [
        total.narrow(-1, first * chunk, (last - first) * chunk).unflatten(-1, (-1, chunk))
        for first, last in _runs(total.shape[-1], chunk, k)
    ]
    if rest:
        found.append(total.narrow(-1, full * chunk, rest))
    return found


def _ring_few_ops(rows: Tensor, name: str, chunk: int) -> Tensor:
    """What `_ring` folds, in two ops per rank: of the rows written twice no diagonal wraps."""
    outer, size, inner, count = rows.shape
    twice = torch.cat([rows, rows], 1)
    # Where the last chunk is short, its row runs on into other data, which is cut off at the end.
    shape = (outer, inner, -(-count // chunk), chunk)
    stride = (2 * size * inner * count, count, inner * count + chunk, 1)
    start = (size - 1) * inner * count
    total = twice.as_strided(shape, stride, start).clone(memory_format=torch.contiguous_format)
    for k in range(2, size + 1):
        start = (size - k) * inner * count
        _accumulate(name, twice.as_strided(shape, stride, start), total)
    return total.flatten(2).narrow(-1, 0, count)


def _ring_reduce(data: Tensor, name: str, root: int) -> Tensor:
    """What gloo's reduce leaves in each rank's memory: see `_ring_reduce` of reduction.py."""
    if not data.numel():
        return data.clone(memory_format=torch.contiguous_format)
    rows, _ = _flat(data)
    outer, size, inner, count = rows.shape
    chunk, surplus = reduce_chunk(count, rows.element_size(), size)
    total = rows.new_empty(outer, inner, count)
    result = rows.new_empty(rows.shape)
    for k in _ring(rows, total, name, chunk):
        for left, fold in zip(_diagonal(result, chunk, k), _pieces(total, chunk, k)):
            left.copy_(fold)
    if surplus:
        last = _pieces(total, chunk, 1)
        for left, fold in zip(_diagonal(result, chunk, 1), last):
            count = min(surplus, left.shape[-1])
            part = left.narrow(-1, 0, count)
            part.copy_(COMBINE[name](part, fold.narrow(-1, 0, count)))
    result.select(1, root).copy_(total)
    return result.view(data.shape)
