"""Ops through vmap over the rank dimension, and views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from .. import _torch_vmap
from ..errors import LocalTensorError
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap_stacked
from .layout import expanded, wrap
from .operands import mapped
from .plans import Plan, Ranks


def batched(plan: Plan, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op through vmap over the rank dimension, or NotImplemented."""
    views = plan.views
    count = len(ranks)
    shift = shift_of(args) if views else 0

    def finish(stack: Tensor, own: bool) -> LocalTensor:
        if views:
            return _wrap_stacked(stack, ranks, shift=shift)
        return wrap(stack if own else expanded(stack.select(0, 0), count), ranks)

    try:
        out = call_batched(plan.func, count, args, kwargs, None if plan.inplace else finish)
    except LocalTensorError:
        raise
    except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
        if _torch_vmap.FALLBACK_REFUSED in str(error):
            plan.batches = False
        return NotImplemented  # per rank the op works, or says in its own words what is wrong
    if plan.inplace:
        return args[0] if plan.writes[0][0] < len(args) else kwargs[plan.writes[0][1]]
    return aliased(plan, args, kwargs, out) if views else out


def call_batched(
    func: Any,
    count: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    finish: Callable[[Tensor, bool], Any] | None,
) -> Any:
    """Call `func` under vmap, its LocalTensors as batched tensors.

    Args:
        finish: makes the result of a stack, and of whether its rows are memory of their own each;
            without it nothing is returned.
    """
    with _torch_vmap.one_level(count) as level:

        def enter(tensor: LocalTensor) -> Tensor:
            return _torch_vmap.batch(tensor._local_tensors.stack, level)  # type: ignore[attr-defined]

        batched_args, batched_kwargs = mapped(enter, args, kwargs)
        out = func(*batched_args, **batched_kwargs)
        if finish is None:
            return None
        left = _each(Tensor, lambda t: _Left(*_torch_vmap.unbatch(t, level, count)), out)
    return _each(_Left, lambda item: finish(*item), left)


class _Left(NamedTuple):
    stack: Tensor
    own: bool


def _each(kind: Any, fn: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(kind, fn, v) for v in value)
    return value


def shift_of(args: tuple[Any, ...]) -> int:
    """The shift of the stack that an op makes a view of (see ShardsOfStack)."""
    shards = args[0]._local_tensors if args and type(args[0]) is LocalTensor else None
    return shards.shift if type(shards) is ShardsOfStack else 0


def aliased(plan: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """`result`, which is a view, with the storage of what it is a view of."""
    if torch.is_inference_mode_enabled() and not args[0].is_inference():
        # A view of a normal tensor is a normal tensor: autograd gives it its base's version.
        with torch.inference_mode(False):
            result = _again(result)
    return return_and_correct_aliasing(plan.func, args, kwargs, result)


def _again(result: Any) -> Any:
    if type(result) is LocalTensor:
        shards = result._local_tensors
        return _wrap_stacked(shards.stack, shards.ranks, shift=shards.shift)
    if isinstance(result, (list, tuple)):
        return type(result)(_again(r) for r in result)
    return result
