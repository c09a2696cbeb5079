"""Tensors that autograd's own C++ makes while it runs backward.

A missing gradient becomes zeros of the output's size, and some derivatives start from ones. Where
that size differs between ranks, torch.zeros in C++ fails, and no LocalTensor among its arguments
brings it here. So while backward runs from LocalTensors, a dispatch mode looks for ops with a
per-rank number and without a tensor. Backward of plain tensors runs without it: autograd uses other
formulas for some derivatives, with other rounding, where a dispatch mode is active.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .._torch import is_functorch_wrapped_tensor
from ..values.op_table import handler_of
from ..values.ranked import ranks_of
from ..values.tensor import sizes_differ


class RankSizes(TorchDispatchMode):
    """Runs ops that get a per-rank number, but no tensor, once per rank."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if types or ranks_of((args, kwargs)) is None:
            return func(*args, **kwargs)
        return handler_of(func)(func, args, kwargs)


def _is_plain(root: Any) -> bool:
    return type(root) is Tensor and not is_functorch_wrapped_tensor(root)


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement): autograd's engine."""
    import torch.autograd as autograd
    import torch.autograd.graph as graph

    original = graph._engine_run_backward

    @functools.wraps(original)
    def engine_run_backward(roots: Any, *args: Any, **kwargs: Any) -> Any:
        if not sizes_differ.ever or all(map(_is_plain, roots)):
            return original(roots, *args, **kwargs)
        with RankSizes():
            return original(roots, *args, **kwargs)

    return [
        (graph, "_engine_run_backward", engine_run_backward),
        (autograd, "_engine_run_backward", engine_run_backward),
    ]
