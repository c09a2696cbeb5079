"""A per-rank number as an operand of plain tensors, where no LocalTensorMode handles it.

torch hands `tensor * SymInt` to its kernels as a tensor that holds a placeholder (7777777) and
carries the number as `_wrapped_number`: tracing replaces it, a kernel computes with it. Whenever
torch attaches a per-rank number, the next arithmetic op is looked at on its way to the kernels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import is_functorch_wrapped_tensor, tracing_active
from ..errors import RankDivergence, per_rank_text
from ..values.rank_node import is_ranked

aten = torch.ops.aten
_NAME = "_wrapped_number"
_KEY = "TESTING_ONLY_GenericMode"
"""A dispatch key above autograd and composite ops that torch itself has no use for."""
_PLAIN = (Tensor, torch.nn.Parameter)

# The functions that take a number in place of a tensor (python_arg_parser.cpp,
# should_allow_numbers_as_tensors); others refuse it, or ask for its one value.
_NAMES = (
    *("add", "div", "divide", "floor_divide", "mul", "multiply", "sub", "subtract"),
    *("true_divide", "copy", "copy_", "add_", "div_", "divide_", "floor_divide_", "mul_"),
    *("multiply_", "sub_", "subtract_", "true_divide_"),
)


class _WrappedNumber:
    """Tensor._wrapped_number: notices per-rank numbers."""

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        if tensor is None:
            return self
        try:
            return tensor.__dict__[_NAME]
        except KeyError:
            raise AttributeError(_NAME) from None

    def __set__(self, tensor: Any, number: Any) -> None:
        tensor.__dict__[_NAME] = number
        if not is_ranked(number):
            return
        if _seen.numbers:
            _seen.numbers -= 1
        elif not tracing_active():
            torch._C._dispatch_tls_set_dispatch_key_included(_KEY_ID, True)

    def __delete__(self, tensor: Any) -> None:
        del tensor.__dict__[_NAME]


_KEY_ID = torch._C._dispatch_key_parse(_KEY)


class _Seen(threading.local):
    numbers = 0  # per-rank numbers that torch is about to attach once more, to the same op


_seen = _Seen()


def _looked_at(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        """A wrapped number gets here as the number itself."""
        torch._C._dispatch_tls_set_dispatch_key_included(_KEY_ID, False)
        operands = (*args, *kwargs.values())
        numbers = [n for n in operands if is_ranked(n)]
        if any(_not_plain(t) for t in operands if isinstance(t, Tensor)):
            _seen.numbers = len(numbers)
            try:
                return op(*args, **kwargs)
            finally:
                _seen.numbers = 0
        for number in numbers:
            if not number.node.is_constant():
                raise _one_value(op, number)
        return op(*map(_plain_number, args), **{k: _plain_number(v) for k, v in kwargs.items()})

    return kernel


def _not_plain(tensor: Tensor) -> bool:
    return type(tensor) not in _PLAIN or is_functorch_wrapped_tensor(tensor)


def _plain_number(value: Any) -> Any:
    return value.node._uniform() if is_ranked(value) else value


def _one_value(op: Any, number: Any) -> RankDivergence:
    return RankDivergence(
        f"{op} got a plain tensor and a number that differs between ranks "
        f"({per_rank_text(number.node._values)}): its result would differ too, and a plain tensor "
        "holds one value. Call it inside LocalTensorMode, or make the tensor a LocalTensor first, "
        "with replicate(tensor, ranks)."
    )


def register() -> Callable[[], None]:
    """Start looking; returns the function that stops it."""
    library = torch.library.Library("aten", "IMPL")
    for name in _NAMES:
        packet = getattr(aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if sum(str(a.type) == "Tensor" for a in op._schema.arguments) >= 2:
                library.impl(op, _looked_at(op), _KEY)
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, _KEY)
    Tensor._wrapped_number = _WrappedNumber()

    def stop() -> None:
        del Tensor._wrapped_number
        library._destroy()
        others._destroy()

    return stop
