"""Elementwise calls that go straight from LocalTensorMode's function mode to the shards.

Inside the mode torch hands every call to the mode first and dispatches it afterwards. Between the
two stand autograd, autocast, transforms and other modes. Where none of them has anything to do
with an elementwise op, it is run on the shards right away, at about half of the cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import only_autograd_listens
from ..stacked import counts
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap_fresh, _wrap_stacked

_NUMBERS = (int, float, bool)

_NAMES = (
    *("abs", "add", "ceil", "cos", "div", "erf", "exp", "floor", "log", "maximum", "minimum"),
    *("mul", "neg", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt"),
    *("sub", "tanh"),
)
SHORTCUTS = frozenset(getattr(owner, name) for name in _NAMES for owner in (Tensor, torch))
"""Functions that make one new tensor, out of tensors of their own sizes, with one aten op."""


def run_shortcut(func: Any, args: tuple[Any, ...]) -> Any:
    """The result of `func(*args)`, or NotImplemented where it has to go the usual way."""
    first = args[0]
    if type(first) is not LocalTensor:
        return NotImplemented
    needs_grad = first.requires_grad
    if len(args) == 1:
        second = None
    elif len(args) == 2:
        second = args[1]
        if type(second) is LocalTensor:
            if second._ranks != first._ranks:
                return NotImplemented
            needs_grad = needs_grad or second.requires_grad
        elif type(second) not in _NUMBERS:
            return NotImplemented
    else:
        return NotImplemented
    if (needs_grad and torch.is_grad_enabled()) or not only_autograd_listens():
        return NotImplemented
    shards = first._local_tensors
    if type(shards) is ShardsOfStack:
        return _on_stacks(func, first, shards, second)
    if second is not None and type(getattr(second, "_local_tensors", None)) is ShardsOfStack:
        return NotImplemented
    with torch._C.DisableTorchFunction():
        if second is None:
            results = {r: func(x) for r, x in shards.items()}
        elif type(second) is LocalTensor:
            others = second._local_tensors
            results = {r: func(x, others[r]) for r, x in shards.items()}
        else:
            results = {r: func(x, second) for r, x in shards.items()}
        return _wrap_fresh(results, first._ranks)


def _on_stacks(func: Any, first: LocalTensor, shards: ShardsOfStack, second: Any) -> Any:
    with torch._C.DisableTorchFunction():
        if second is None:
            out = func(shards.stack)
        elif type(second) is LocalTensor:
            others = second._local_tensors
            if (
                type(others) is not ShardsOfStack
                or second._size != first._size
                or second.dtype is not first.dtype
            ):
                return NotImplemented
            out = func(shards.stack, others.stack)
        else:
            out = func(shards.stack, second)
        if not out.is_contiguous() or type(out) is not Tensor:
            return NotImplemented
        counts.counts.stacked += 1
        return _wrap_stacked(out, shards.ranks)
