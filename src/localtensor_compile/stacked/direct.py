"""Frequent ops written for stacks: a dimension further to the right, a matmul as a batch of them.

vmap does the same for all other ops. Here it costs less per call, and traced graphs say what was
meant. A rule that does not know a call leaves it to vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..values.rank_node import is_ranked
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap_stacked
from .batched import aliased
from .layout import wrap
from .plans import Ranks, Rule, plan_of, rule

aten = torch.ops.aten


def _stack(value: Any) -> Any:
    """The stack of a stacked LocalTensor, or None."""
    if type(value) is not LocalTensor:
        return None
    shards = value._local_tensors
    return shards.stack if type(shards) is ShardsOfStack else None


def _right(dim: Any, dims: int) -> int | None:
    """The dimension of the stack that is `dim` of its shards, or None where there is none."""
    if type(dim) is not int or not -dims <= dim < dims:
        return None
    return (dim + dims if dim < 0 else dim) + 1


# ---------------------------------------------------------------- views
def _views(*ops: Any) -> Callable[[Callable[..., Any]], Rule]:
    """The function makes the view of a stack from (func, stack, arguments), or gives None."""

    def register(fn: Callable[..., Any]) -> Rule:
        def run(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
            stack = _stack(args[0])
            out = None if stack is None or kwargs else fn(func, stack, *args[1:])
            if out is None:
                return NotImplemented
            shift = args[0]._local_tensors.shift
            if isinstance(out, Tensor):
                result: Any = _wrap_stacked(out, ranks, shift=shift)
            else:
                result = type(out)(_wrap_stacked(o, ranks, shift=shift) for o in out)
            return aliased(plan_of(func), args, kwargs, result)

        return rule(*ops)(run)

    return register


@_views(aten.t.default)
def _t(func: Any, stack: Tensor) -> Any:
    return stack.transpose(1, 2) if stack.dim() == 3 else None


@_views(aten.transpose.int)
def _transpose(func: Any, stack: Tensor, one: Any, other: Any) -> Any:
    dims = stack.dim() - 1
    first, second = _right(one, dims), _right(other, dims)
    return None if first is None or second is None else stack.transpose(first, second)


@_views(aten.permute.default)
def _permute(func: Any, stack: Tensor, order: Any) -> Any:
    dims = [_right(d, stack.dim() - 1) for d in order]
    return None if None in dims or len(dims) != stack.dim() - 1 else stack.permute(0, *dims)


@_views(aten.unsqueeze.default)
def _unsqueeze(func: Any, stack: Tensor, dim: Any) -> Any:
    at = _right(dim, stack.dim())
    return None if at is None else stack.unsqueeze(at)


@_views(aten.squeeze.dim)
def _squeeze(func: Any, stack: Tensor, dim: Any) -> Any:
    at = _right(dim, stack.dim() - 1)
    return None if at is None else stack.squeeze(at)


@_views(aten.select.int)
def _select(func: Any, stack: Tensor, dim: Any, index: Any) -> Any:
    at = _right(dim, stack.dim() - 1)
    if at is None or type(index) is not int:
        return None
    size = stack.shape[at]
    return stack.select(at, index) if type(size) is int and -size <= index < size else None


_INDEX = (int, type(None))


@_views(aten.slice.Tensor)
def _slice(
    func: Any, stack: Tensor, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Any:
    at = _right(dim, stack.dim() - 1)
    if at is None or not all(type(n) in _INDEX for n in (start, end, step)):
        return None
    return func(stack, at, start, end, step)


def _resized(func: Any, stack: Tensor, size: Any) -> Any:
    if type(stack.numel()) is not int or not stack.numel():
        return None
    try:
        return func(stack, [stack.shape[0], *size])
    except RuntimeError:
        return None


_views(aten.view.default)(_resized)


@_views(aten.expand.default)
def _expand(func: Any, stack: Tensor, size: Any) -> Any:
    missing = len(size) + 1 - stack.dim()
    if missing < 0 or not all(type(n) is int for n in size):
        return None
    for _ in range(missing):
        stack = stack.unsqueeze(1)
    if any(new not in (-1, old) and old != 1 for new, old in zip(size, stack.shape[1:])):
        return None
    return stack.expand(stack.shape[0], *size)


@_views(aten.detach.default, aten.alias.default)
def _detach(func: Any, stack: Tensor) -> Any:
    return func(stack)


@_views(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, stack: Tensor, sizes: Any, dim: Any = 0) -> Any:
    at = _right(dim, stack.dim() - 1)
    return None if at is None else func(stack, sizes, at)


@_views(aten.unbind.int)
def _unbind(func: Any, stack: Tensor, dim: Any = 0) -> Any:
    at = _right(dim, stack.dim() - 1)
    return None if at is None else func(stack, at)


# ---------------------------------------------------------------- matmuls
@rule(aten.mm.default)
def _mm(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    one, other = map(_stack, args)
    if one is None or other is None or not one.dim() == other.dim() == 3 or not _fit(one, other):
        return NotImplemented
    return wrap(torch.bmm(one, other), ranks)


def _fit(one: Tensor, other: Tensor) -> bool:
    return bool(one.shape[-1] == other.shape[-2]) and one.dtype is other.dtype


@rule(aten.bmm.default)
def _bmm(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    one, other = map(_stack, args)
    if one is None or other is None or not one.dim() == other.dim() == 4 or not _fit(one, other):
        return NotImplemented
    if one.shape[1] != other.shape[1]:
        return NotImplemented
    out = torch.bmm(one.flatten(0, 1), other.flatten(0, 1))
    return wrap(out.unflatten(0, one.shape[:2]), ranks)


@rule(aten.addmm.default)
def _addmm(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    bias, one, other = map(_stack, args)
    if bias is None or one is None or other is None or not one.dim() == other.dim() == 3:
        return NotImplemented
    if not _fit(one, other) or bias.dim() != 2 or bias.dtype is not one.dtype:
        return NotImplemented
    return wrap(torch.baddbmm(bias.unsqueeze(1), one, other, **kwargs), ranks)


# ---------------------------------------------------------------- along dimensions
@rule(aten.sum.default, aten.mean.default)
def _reduce_all(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    stack = _stack(args[0])
    if stack is None or stack.dim() == 1:
        return NotImplemented
    reduce = torch.sum if func is aten.sum.default else torch.mean
    return wrap(reduce(stack, list(range(1, stack.dim())), **kwargs), ranks)


@rule(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
def _reduce(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    stack = _stack(args[0])
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    if stack is None or not given or "dim" in kwargs:
        return NotImplemented
    dims = [_right(d, stack.dim() - 1) for d in given]
    if None in dims:
        return NotImplemented
    return wrap(func(stack, dims, *args[2:], **kwargs), ranks)


_ALONG = {
    aten._softmax.default: 1,
    aten._log_softmax.default: 1,
    aten._softmax_backward_data.default: 2,
    aten._log_softmax_backward_data.default: 2,
    aten.cumsum.default: 1,
}
"""Ops whose first arguments are that many tensors of one shape, and then the dimension."""


@rule(*_ALONG)
def _along(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    count = _ALONG[func]
    stacks = [_stack(a) for a in args[:count]]
    if any(s is None or s.dim() != stacks[0].dim() for s in stacks):
        return NotImplemented
    at = _right(args[count], stacks[0].dim() - 1)
    if at is None:
        return NotImplemented
    return wrap(func(*stacks, at, *args[count + 1 :], **kwargs), ranks)


@rule(aten.cat.default)
def _cat(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    stacks = [_stack(t) for t in args[0]]
    if not stacks or kwargs or any(s is None for s in stacks):
        return NotImplemented
    at = _right(args[1] if len(args) > 1 else 0, stacks[0].dim() - 1)
    if at is None or any(s.dim() != stacks[0].dim() for s in stacks):
        return NotImplemented
    return wrap(func(stacks, at), ranks)


# ---------------------------------------------------------------- new tensors
@rule(aten._unsafe_view.default)
def _unsafe_view(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    stack = _stack(args[0])
    out = None if stack is None else _resized(func, stack, args[1])
    return NotImplemented if out is None else _wrap_stacked(out, ranks)


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default, aten.new_full.default)
def _new(func: Any, ranks: Ranks, args: Any, kwargs: Any) -> Any:
    stack = _stack(args[0])
    if stack is None or not all(type(n) is int for n in args[1]):
        return NotImplemented
    if any(is_ranked(value) for value in args[2:]):
        return NotImplemented
    return wrap(func(stack, [len(ranks), *args[1]], *args[2:], **kwargs), ranks)
