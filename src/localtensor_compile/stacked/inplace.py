"""Ops that change the metadata of a stacked LocalTensor in place, and as_strided.

The stack's metadata is changed in place too: functionalization has to see it. What a rank's tensor
of its own could do with its memory, and a row of a stack cannot, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..values.rank_node import is_ranked, value_on_rank
from ..values.ranked import pick_tree
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap, _wrap_stacked
from . import counts
from .batched import aliased
from .plans import Ranks, plan_of, rule
from .row_ops import step_of

aten = torch.ops.aten


def _dim(dim: int, dims: int) -> int:
    """The dimension of the stack that a dimension of its shards is."""
    return (dim + dims if dim < 0 else dim) + 1


def _stack(tensor: LocalTensor) -> Tensor:
    return tensor._local_tensors.stack  # type: ignore[attr-defined]


@rule(aten.t_.default)
def _t(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if x.dim() > 2:
        return NotImplemented
    if x.dim() == 2:
        _stack(x).transpose_(1, 2)
        x._sync_meta()
    return x


@rule(aten.transpose_.default, aten.swapaxes_.default, aten.swapdims_.default)
def _transpose(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x, one, other = args
    dims = x.dim()
    if not all(-dims <= d < dims for d in (one, other)):
        return NotImplemented
    _stack(x).transpose_(_dim(one, dims), _dim(other, dims))
    x._sync_meta()
    return x


@rule(aten.unsqueeze_.default)
def _unsqueeze(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x, dim = args
    if not -x.dim() - 1 <= dim <= x.dim():
        return NotImplemented
    _stack(x).unsqueeze_(_dim(dim, x.dim() + 1))
    x._sync_meta()
    return x


@rule(aten.squeeze_.default, aten.squeeze_.dim, aten.squeeze_.dims)
def _squeeze(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x, *given = args
    dims = x.dim()
    wanted = given[0] if given else range(dims)
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    if not all(-max(dims, 1) <= d < max(dims, 1) for d in wanted):
        return NotImplemented
    if dims:
        stack = _stack(x)
        stack.squeeze_([d for d in (_dim(w, dims) for w in wanted) if stack.shape[d] == 1])
        x._sync_meta()
    return x


@rule(aten.as_strided.default)
def _as_strided(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x, size, stride, offset = _strided(*args, **kwargs)
    rows = None if any(is_ranked(n) for n in (*size, *stride)) else _rows(x, ranks, offset)
    if rows is None:
        counts.went_per_rank(str(func), "the ranks' views are not alike")
        return aliased(plan_of(func), args, kwargs, _wrap(_each_row(func, x, size, stride, offset)))
    stack = _stack(x)
    out = func(stack, [stack.shape[0], *size], [rows.stride, *stride], rows.offset)
    return aliased(plan_of(func), args, kwargs, _wrap_stacked(out, ranks, shift=rows.shift))


def _each_row(func: Any, x: LocalTensor, size: Any, stride: Any, offset: Any) -> dict[int, Tensor]:
    """{rank: view of its row}. torch counts offsets from where the memory of the stack begins."""
    held: Any = x._local_tensors
    pitch = held.stack.stride(0) - held.shift
    found = {}
    for i, (rank, row) in enumerate(held.items()):
        own_size, own_stride, own_offset = pick_tree((list(size), list(stride), offset), rank)
        if own_offset is not None:
            own_offset = own_offset + i * pitch
        found[rank] = func(row, own_size, own_stride, own_offset)
    return found


class _Rows(NamedTuple):
    """Where the rows of a view lie: the first one's offset, their stride, and the view's shift."""

    offset: Any
    stride: Any
    shift: int


def _rows(x: LocalTensor, ranks: Ranks, offset: Any) -> _Rows | None:
    """Rows that lie `offset` elements into the memory of each rank, by default where x's lie."""
    held: Any = x._local_tensors
    if offset is None:
        return _Rows(None, held.stack.stride(0), held.shift)
    shift: Any = 0
    if is_ranked(offset):
        offsets = [value_on_rank(offset, r) for r in ranks]
        shift = step_of(offsets) if all(type(n) is int for n in offsets) else None
        if shift is None:
            return None
        offset = offsets[0]
    return _Rows(offset, held.stack.stride(0) - held.shift + shift, shift)


def _strided(self: Any, size: Any, stride: Any, storage_offset: Any = None) -> Any:
    return self, size, stride, storage_offset


@rule(aten.as_strided_.default)
def _as_strided_(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x, size, stride, offset = _strided(*args, **kwargs)
    rows = None if any(is_ranked(n) for n in (*size, *stride)) else _rows(x, ranks, offset)
    if rows is None:
        counts.went_per_rank(str(func), "the ranks' views are not alike")
        x._local_tensors = _each_row(aten.as_strided.default, x, size, stride, offset)
        x._sync_meta()
        return x
    stack = _stack(x)
    stack.as_strided_([stack.shape[0], *size], [rows.stride, *stride], rows.offset)
    x._local_tensors = ShardsOfStack(stack, ranks, rows.shift)
    x._sync_meta()
    return x


@rule(aten.as_strided_scatter.default)
def _as_strided_scatter(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x, source, size, stride, *rest = args
    offset = rest[0] if rest else kwargs.get("storage_offset")
    if type(x) is not LocalTensor or type(source) is not LocalTensor:
        return NotImplemented
    stack = _stack(x)
    rows = None
    if stack.is_contiguous() and not any(is_ranked(n) for n in (*size, *stride)):
        rows = _rows(x, ranks, offset)
    if rows is None:
        counts.went_per_rank(str(func), "the ranks' views are not alike")
        sources = source._local_tensors

        def scatter(row: Tensor, *place: Any) -> Tensor:
            return func(row, next(each), *place).clone()

        each = iter([sources[r] for r in x._local_tensors])
        return _wrap(_each_row(scatter, x, size, stride, offset))
    place = [stack.shape[0], *size], [rows.stride, *stride], rows.offset
    return _wrap_stacked(func(stack, _stack(source), *place), ranks)


# ---------------------------------------------------------------- other memory
@rule(aten.resize_.default)
def _resize(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x, size = args
    if kwargs.get("memory_format") not in (None, torch.contiguous_format, torch.preserve_format):
        return NotImplemented
    resize(x, ranks, size)
    return x


@rule(aten.resize_as_.default)
def _resize_as(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    return _resize(func, ranks, (args[0], tuple(args[1].shape)), kwargs)


def resize(x: LocalTensor, ranks: Ranks, size: Sequence[Any]) -> None:
    """Each shard gets this size, contiguous, and keeps its elements.

    Raises:
        UnsupportedError: the shards would need more memory than their rows of the stack have.
    """
    if tuple(x.shape) == tuple(size):
        return
    stack = _stack(x)
    stride = _contiguous(size)
    numel = 1
    for n in size:
        numel *= n
    if stack.numel() == 0:
        x._local_tensors = ShardsOfStack(stack.new_empty((len(ranks), *size)), ranks)
    elif len(ranks) == 1:
        stack.resize_([1, *size])
    elif _room(x, len(ranks)) >= numel:
        stack.as_strided_([len(ranks), *size], [stack.stride(0), *stride], stack.storage_offset())
    else:
        raise UnsupportedError(
            f"resize_ to {tuple(size)} needs more memory than a shard of shape {tuple(x.shape)} "
            "has, and in the stacked layout the next rank's shard follows it. Make a new tensor, "
            'or use LocalTensorMode(..., layout="per_rank").'
        )
    x._sync_meta()


def _room(x: LocalTensor, count: int) -> Any:
    """How many elements fit between the start of a shard and the memory of the next rank."""
    held: Any = x._local_tensors
    first = held.stack.storage_offset()
    # A shard may be part of its rank's memory, and another part on each rank.
    return held.stack.stride(0) - held.shift - max(first, first + (count - 1) * held.shift)


def _contiguous(size: Sequence[Any]) -> list[Any]:
    stride: list[Any] = []
    step: Any = 1
    for n in reversed(size):
        stride.insert(0, step)
        step = step * n
    return stride


@rule(aten.set_.source_Tensor)
def _set(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    x, source = args
    if type(x._local_tensors) is not ShardsOfStack or type(source) is not LocalTensor:
        return NotImplemented
    _stack(x).set_(_stack(source))
    x._sync_meta()
    return x
