"""Custom ops whose arguments differ between the rows of a stack: one node, whatever the ranks.

`starts` holds an int per row; `dim` counts the dimensions of the stack, of which 0 is the ranks.
Results are fresh memory. Just before Inductor they become index arithmetic (compile/lowering.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("localtensor", "FRAGMENT")
OPS = torch.ops.localtensor


def _op(schema: str, fake: Callable[..., Tensor]) -> Callable[[Any], Any]:
    """Define localtensor::<schema>, run by the decorated kernel and faked by `fake`."""
    name = schema.partition("(")[0]

    def register(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _library.define(f"{schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"localtensor::{name}", fake, lib=_library)
        return kernel

    return register


# ---------------------------------------------------------------- a number per rank
def _fake_numbers(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(len(values), dtype=dtype, device=device)


@_op("stacked_ints(int[] values, ScalarType dtype, Device device)", _fake_numbers)
def stacked_ints(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor [ranks] of ints."""
    return torch.tensor(values, dtype=dtype, device=device)


@_op("stacked_floats(float[] values, ScalarType dtype, Device device)", _fake_numbers)
def stacked_floats(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor [ranks] of floats."""
    return torch.tensor(values, dtype=dtype, device=device)


# ---------------------------------------------------------------- a slice per rank
def step_of(starts: Sequence[int]) -> int | None:
    """The distance between the starts of neighbours, or None where it is not one distance."""
    if len(starts) < 2:
        return 0
    step = starts[1] - starts[0]
    return step if all(b - a == step for a, b in itertools.pairwise(starts)) else None


def strided(stack: Tensor, dim: int, starts: Sequence[int], length: Any) -> Tensor | None:
    """A view of `length` elements from each row's start, where one stride leads to all of them."""
    step = step_of(starts)
    if step is None:
        return None
    size, stride = list(stack.shape), list(stack.stride())
    size[dim] = length
    offset = stack.storage_offset() + starts[0] * stride[dim]
    stride[0] = stride[0] + step * stride[dim]
    return stack.as_strided(size, stride, offset)


def _chunks(stack: Tensor, dim: int, starts: Sequence[int], length: int) -> Any:
    """The stack with `dim` cut into chunks, and an index of one chunk per row, or None."""
    if not length or stack.shape[dim] % length or any(s % length for s in starts):
        return None
    cut = stack.unflatten(dim, (stack.shape[dim] // length, length))
    index: list[Tensor | None] = [None] * dim + [_tensor([s // length for s in starts], stack)]
    index[0] = torch.arange(stack.shape[0], device=stack.device)
    return cut, index


def _tensor(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)


def _fake_narrow(stack: Tensor, dim: int, starts: Sequence[int], length: Any) -> Tensor:
    size = list(stack.shape)
    size[dim] = length
    return stack.new_empty(size)


@_op("stacked_narrow(Tensor stack, int dim, int[] starts, SymInt length)", _fake_narrow)
def stacked_narrow(stack: Tensor, dim: int, starts: Sequence[int], length: int) -> Tensor:
    """`row.narrow(dim - 1, start, length)` of each row."""
    view = strided(stack, dim, starts, length)
    if view is not None:
        return view.clone(memory_format=torch.contiguous_format)
    found = _chunks(stack, dim, starts, length)
    if found is not None:
        cut, index = found
        return torch.ops.aten.index.Tensor(cut, index).contiguous()
    rows = [row.narrow(dim - 1, s, length) for row, s in zip(stack.unbind(), starts)]
    return torch.stack(rows)


def _fake_place(stack: Tensor, dim: int, starts: Sequence[int], size: Any) -> Tensor:
    return _fake_narrow(stack, dim, starts, size)


@_op("stacked_place(Tensor stack, int dim, int[] starts, SymInt size)", _fake_place)
def stacked_place(stack: Tensor, dim: int, starts: Sequence[int], size: int) -> Tensor:
    """Zeros of `size` along `dim`, with each row of `stack` at its start."""
    shape = list(stack.shape)
    shape[dim] = size
    out = stack.new_zeros(shape)
    _write(out, stack, dim, starts)
    return out


def _fake_write(stack: Tensor, source: Tensor, dim: int, starts: Sequence[int]) -> Tensor:
    return stack.new_empty(stack.shape)


@_op("stacked_write(Tensor stack, Tensor source, int dim, int[] starts)", _fake_write)
def stacked_write(stack: Tensor, source: Tensor, dim: int, starts: Sequence[int]) -> Tensor:
    """A copy of `stack` with each row of `source` written at its start."""
    out = stack.clone(memory_format=torch.contiguous_format)
    _write(out, source, dim, starts)
    return out


def _write(out: Tensor, source: Tensor, dim: int, starts: Sequence[int]) -> None:
    length = source.shape[dim]
    view = strided(out, dim, starts, length)
    if view is not None:
        view.copy_(source)
        return
    found = _chunks(out, dim, starts, length)
    if found is not None:
        cut, index = found
        torch.ops.aten.index_put_.default(cut, index, source)
        return
    for row, values, start in zip(out.unbind(), source.unbind(), starts):
        row.narrow(dim - 1, start, length).copy_(values)


# ---------------------------------------------------------------- as index arithmetic
def ints_as_math(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`stacked_ints`: one line through all values needs no constant."""
    step = step_of(values)
    if step is None or not step:
        return torch.tensor(values, dtype=dtype, device=device)
    line = torch.arange(len(values), dtype=torch.int64, device=device) * step + values[0]
    return line.to(dtype)


def _taken(stack: Tensor, dim: int, at: Tensor) -> Tensor:
    """stack[r, ..., at[r, i], ...] for the dimension `dim`."""
    index: list[Tensor | None] = [None] * dim + [at]
    index[0] = torch.arange(stack.shape[0], device=stack.device).unsqueeze(1)
    return torch.ops.aten.index.Tensor(stack, index).movedim(1, dim)


def _starts(starts: Sequence[int], device: torch.device) -> Tensor:
    return ints_as_math(starts, torch.int64, device).unsqueeze(1)


def narrow_as_math(stack: Tensor, dim: int, starts: Sequence[int], length: int) -> Tensor:
    """`stacked_narrow` as indexing."""
    at = _starts(starts, stack.device) + torch.arange(length, device=stack.device)
    return _taken(stack, dim, at)


def place_as_math(stack: Tensor, dim: int, starts: Sequence[int], size: int) -> Tensor:
    """`stacked_place` as indexing and a choice."""
    inside, rows = _placed(stack, dim, starts, size)
    return torch.where(inside, rows, torch.zeros((), dtype=stack.dtype, device=stack.device))


def write_as_math(stack: Tensor, source: Tensor, dim: int, starts: Sequence[int]) -> Tensor:
    """`stacked_write` as indexing and a choice."""
    if not source.shape[dim]:
        return stack.clone()
    inside, rows = _placed(source, dim, starts, stack.shape[dim])
    return torch.where(inside, rows, stack)


def _placed(source: Tensor, dim: int, starts: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    length = source.shape[dim]
    at = torch.arange(size, device=source.device) - _starts(starts, source.device)
    inside = (at >= 0) & (at < length)
    shape = [1] * source.dim()
    shape[0], shape[dim] = inside.shape
    if not length:  # nothing to take from
        empty = list(source.shape)
        empty[dim] = size
        return inside.view(shape), source.new_zeros(empty)
    return inside.view(shape), _taken(source, dim, at.clamp(0, length - 1))


DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    OPS.stacked_ints.default: ints_as_math,
    OPS.stacked_floats.default: lambda values, dtype, device: torch.tensor(
        values, dtype=dtype, device=device
    ),
    OPS.stacked_narrow.default: narrow_as_math,
    OPS.stacked_place.default: place_as_math,
    OPS.stacked_write.default: write_as_math,
}
"""For Inductor's table; it must be complete before anything compiles."""
