"""Per-rank numbers as operands of ops on stacks.

A number that differs between ranks becomes a stack itself, of one element per rank, so that
arithmetic with it is one op. Where it says which part of a tensor each rank reads or writes, one
strided view of the stack, or one op of row_ops, does it for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from ..values.rank_node import is_ranked, value_on_rank
from ..values.ranked import per_rank_values
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap_stacked
from .row_ops import OPS, step_of

aten = torch.ops.aten
Ranks = tuple[int, ...]


class Done:
    """The result of an op that is done."""

    __slots__ = ("result",)

    def __init__(self, result: Any) -> None:
        self.result = result


def with_numbers(
    func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Done | None:
    """Run an op that has per-rank numbers among its arguments, or None where it goes per rank."""
    known = _BY_NUMBER.get(func)
    if known is not None:
        result = known(func, ranks, args, kwargs)
    else:
        result = _arithmetic(func, ranks, args, kwargs)
    return None if result is NotImplemented else Done(result)


# ---------------------------------------------------------------- as operands
_EXACT = frozenset({"add", "sub", "mul", "div"})
_OPERANDS = _EXACT | {
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "eq",
    "floor_divide",
    "fmod",
    "ge",
    "gt",
    "le",
    "lt",
    "maximum",
    "minimum",
    "ne",
    "remainder",
    "where",
}
# Others, such as pow, take another way for a Python number than for a tensor of numbers.


def number_values(value: Any, ranks: Ranks) -> list[Any] | None:
    """What each rank has of a per-rank number, in the order of the stack, as Python numbers."""
    if isinstance(value, LocalTensor):
        return None
    values = per_rank_values(value)
    if values is None or any(r not in values for r in ranks):
        return None
    found = [values[r] for r in ranks]
    return found if all(type(v) in (int, float, bool) for v in found) else None


def stacked_number(
    values: Sequence[Any], ranks: Ranks, dtype: torch.dtype, device: torch.device, dims: int = 0
) -> LocalTensor:
    """A stacked LocalTensor of shape [1] * dims with each rank's number."""
    if all(isinstance(v, int) for v in values):
        stack = OPS.stacked_ints.default(list(values), dtype, device)
    else:
        stack = OPS.stacked_floats.default([float(v) for v in values], dtype, device)
    if dims:
        stack = stack.view(len(ranks), *[1] * dims)
    return _wrap_stacked(stack, ranks)


def _number_dtype(values: Sequence[Any], like: torch.dtype) -> torch.dtype | None:
    """The dtype in which torch computes with a Python number and a tensor of dtype `like`."""
    if any(isinstance(v, float) for v in values):
        if like.is_floating_point or like.is_complex:
            return like
        return torch.get_default_dtype()
    if like is torch.bool:
        return like if all(isinstance(v, bool) for v in values) else torch.int64
    if not like.is_floating_point and not like.is_complex:
        limits = torch.iinfo(like)
        if any(not limits.min <= v <= limits.max for v in values):
            return None  # torch has its own ways with such a number
    return like


def _arithmetic(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arithmetic and comparison with the number as a tensor, in the dtype of a Python number."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    inplace = name.endswith("_")
    base = name.rstrip("_")
    if func.namespace != "aten" or base not in _OPERANDS:
        return NotImplemented
    if any(number_values(v, ranks) is not None for v in kwargs.values()):
        return NotImplemented
    if kwargs.get("alpha", 1) != 1:
        return NotImplemented
    tensors = [a for a in args if type(a) is LocalTensor or _is_operand(a)]
    operands = [t for t in tensors if not (base == "where" and t is args[0])]
    if not operands:
        return NotImplemented
    like = operands[0].dtype
    if any(t.dtype is not like for t in operands):
        return NotImplemented
    dims = max(t.dim() for t in tensors)
    half = like in (torch.float16, torch.bfloat16) and base in _EXACT
    if half:  # torch computes in float32, and rounds once
        like = torch.float32
    changed: list[Any] = []
    for a in args:
        values = number_values(a, ranks)
        if values is not None:
            dtype = _number_dtype(values, like)
            if dtype is None:
                return NotImplemented
            a = stacked_number(values, ranks, dtype, operands[0].device, dims)
        elif half and isinstance(a, Tensor):
            a = a.float()
        changed.append(a)
    overload = func._overloadname
    packet = getattr(aten, name)
    if base == "where":
        call = aten.where.self
    else:
        call = getattr(packet, overload.replace("Scalar", "Tensor"), None)
    if call is None:
        return NotImplemented
    if half:
        made = getattr(aten, base).__getattr__(call._overloadname)(*changed, **kwargs)
        made = made.to(operands[0].dtype)
        return args[0].copy_(made) if inplace else made
    return call(*changed, **kwargs)


def _is_operand(value: Any) -> bool:
    return isinstance(value, Tensor) and per_rank_values(value) is None


def _subtracted(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """rsub: number - tensor."""
    x, number, *alpha = args
    if alpha or kwargs or x.dtype is torch.bool:
        return NotImplemented
    return _arithmetic(aten.sub.Tensor, ranks, (number, x), {})


def _fill(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, value = args
    if type(target) is not LocalTensor:
        return NotImplemented
    number = _cast(value, ranks, target)
    return NotImplemented if number is None else target.copy_(number)


def _full(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """full_like, new_full: made with one value, then filled."""
    *rest, value = args
    if number_values(value, ranks) is None or _holds_ranked(rest):
        return NotImplemented  # a size per rank
    made = func(*rest, 0, **kwargs)
    number = _cast(value, ranks, made)
    return NotImplemented if number is None else made.copy_(number)


def _holds_ranked(values: Sequence[Any]) -> bool:
    return any(_holds_ranked(v) if isinstance(v, (list, tuple)) else is_ranked(v) for v in values)


def _masked_fill(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, mask, value = args
    number = _cast(value, ranks, x)
    if number is None:
        return NotImplemented
    filled = torch.where(mask, number, x)
    return x.copy_(filled) if func._schema.name.endswith("_") else filled


def _cast(value: Any, ranks: Ranks, like: Tensor) -> LocalTensor | None:
    """A per-rank number in the dtype of `like`, where that takes it without loss of range."""
    values = number_values(value, ranks)
    if values is None:
        return None
    dtype = _number_dtype(values, like.dtype)
    if dtype is not like.dtype and like.dtype is not torch.bool:
        return None
    return stacked_number(values, ranks, like.dtype, like.device, like.dim())


# ---------------------------------------------------------------- as positions
class _Part(NamedTuple):
    """Elements `starts[i]` to `starts[i] + length` of dimension `dim` of row i of a stack."""

    dim: int
    starts: list[int]
    length: int


def _bounds(ranks: Ranks, dim: int, size: Any, start: Any, end: Any, step: Any) -> _Part | None:
    """What slice(start, end, step) of a dimension of length `size` is on each rank."""
    if step != 1 or not isinstance(size, int):
        return None
    columns = []
    for bound in (start, end):
        if bound is None or isinstance(bound, int):
            columns.append([bound] * len(ranks))
        elif is_ranked(bound):
            columns.append([value_on_rank(bound, r) for r in ranks])
        else:
            return None
    starts, lengths = [], set()
    for one, other in zip(*columns):
        if not all(v is None or type(v) is int for v in (one, other)):
            return None
        begin, stop, _ = slice(one, other).indices(size)
        starts.append(begin)
        lengths.add(max(stop - begin, 0))
    return _Part(dim, starts, lengths.pop()) if len(lengths) == 1 else None


def _dim(dim: int, dims: int) -> int:
    return (dim + dims if dim < 0 else dim) + 1


def _sliced(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    return x, dim, start, end, step


def _part_of(ranks: Ranks, x: Any, dim: int, start: Any, end: Any, step: Any) -> _Part | None:
    if type(x) is not LocalTensor or type(x._local_tensors) is not ShardsOfStack:
        return None
    if not -x.dim() <= dim < x.dim():
        return None
    place = _dim(dim, x.dim())
    return _bounds(ranks, place, x.shape[place - 1], start, end, step)


def _one_element(ranks: Ranks, x: Any, dim: int, index: Any) -> _Part | None:
    """select(dim, index) as a part of length 1, where the index is inside on every rank."""
    if type(x) is not LocalTensor or not -x.dim() <= dim < x.dim():
        return None
    return _element(ranks, _dim(dim, x.dim()), x.shape[dim], index)


def _element(ranks: Ranks, place: int, size: Any, index: Any) -> _Part | None:
    values = number_values(index, ranks)
    if values is None or not isinstance(size, int) or not all(-size <= v < size for v in values):
        return None
    return _Part(place, [v + size if v < 0 else v for v in values], 1)


def _stack(x: LocalTensor) -> Tensor:
    return x._local_tensors.stack  # type: ignore[attr-defined]


def _view(func: Any, ranks: Ranks, args: Any, kwargs: Any, part: _Part | None, drop: bool) -> Any:
    """The part as one strided view of the stack: its rows lie one step further apart, or nearer."""
    if part is None:
        return NotImplemented
    x = args[0]
    step = step_of(part.starts)
    stack = _stack(x)
    size, stride = list(stack.shape), list(stack.stride())
    if step is None or not all(isinstance(s, int) for s in stride):
        return NotImplemented
    shift = step * stride[part.dim]
    offset = stack.storage_offset() + part.starts[0] * stride[part.dim]
    stride[0] += shift
    if stride[0] < 0:
        return NotImplemented
    size[part.dim] = part.length
    if drop:
        del size[part.dim], stride[part.dim]
    out = stack.as_strided(size, stride, offset)
    result = _wrap_stacked(out, ranks, shift=x._local_tensors.shift + shift)
    return return_and_correct_aliasing(func, args, kwargs, result)


def _slice(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    part = _part_of(ranks, *_sliced(*args, **kwargs))
    return _view(func, ranks, args, kwargs, part, False)


def _select(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _view(func, ranks, args, kwargs, _one_element(ranks, *args, **kwargs), True)


def _copied(x: LocalTensor, part: _Part) -> Tensor:
    return OPS.stacked_narrow.default(_stack(x), part.dim, part.starts, part.length)


def _slice_copy(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    part = _part_of(ranks, *_sliced(*args, **kwargs))
    return NotImplemented if part is None else _wrap_stacked(_copied(args[0], part), ranks)


def _narrow_copy(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim, start, length = args
    return _slice_copy(func, ranks, (x, dim, start, start + length), {})


def _select_copy(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    part = _one_element(ranks, *args, **kwargs)
    if part is None:
        return NotImplemented
    return _wrap_stacked(_copied(args[0], part).squeeze(part.dim), ranks)


def _slice_backward(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    grad, sizes, dim, start, end, step = args
    place = _dim(dim, len(sizes))
    return _placed(ranks, grad, _bounds(ranks, place, sizes[place - 1], start, end, step), sizes)


def _select_backward(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    grad, sizes, dim, index = args
    place = _dim(dim, len(sizes))
    return _placed(ranks, grad, _element(ranks, place, sizes[place - 1], index), sizes, True)


def _placed(ranks: Ranks, grad: Any, part: Any, sizes: Any, dropped: bool = False) -> Any:
    if part is None or type(grad) is not LocalTensor:
        return NotImplemented
    stack = _stack(grad)
    if dropped:
        stack = stack.unsqueeze(part.dim)
    size = sizes[part.dim - 1]
    return _wrap_stacked(OPS.stacked_place.default(stack, part.dim, part.starts, size), ranks)


def _slice_scatter(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, source, *rest = args
    part = _part_of(ranks, *_sliced(x, *rest, **kwargs))
    return _written(ranks, x, source, part)


def _select_scatter(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, source, dim, index = args
    return _written(ranks, x, source, _one_element(ranks, x, dim, index), True)


def _written(ranks: Ranks, x: Any, source: Any, part: Any, dropped: bool = False) -> Any:
    if part is None or source.dtype is not x.dtype:
        return NotImplemented
    if type(source) is LocalTensor:
        stack = _stack(source)
    else:  # autograd's zeros
        stack = source.unsqueeze(0).expand(len(ranks), *source.shape)
    if dropped:
        stack = stack.unsqueeze(part.dim)
    if stack.dim() != x.dim() + 1 or stack.shape[part.dim] != part.length:
        return NotImplemented
    return _wrap_stacked(OPS.stacked_write.default(_stack(x), stack, part.dim, part.starts), ranks)


_Rule = Callable[[Any, Ranks, tuple[Any, ...], dict[str, Any]], Any]
_BY_NUMBER: dict[Any, _Rule] = {
    aten.fill_.Scalar: _fill,
    aten.full_like.default: _full,
    aten.new_full.default: _full,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill_.Scalar: _masked_fill,
    aten.narrow_copy.default: _narrow_copy,
    aten.rsub.Scalar: _subtracted,
    aten.select.int: _select,
    aten.select_backward.default: _select_backward,
    aten.select_copy.int: _select_copy,
    aten.select_scatter.default: _select_scatter,
    aten.slice.Tensor: _slice,
    aten.slice_backward.default: _slice_backward,
    aten.slice_copy.Tensor: _slice_copy,
    aten.slice_scatter.default: _slice_scatter,
}
