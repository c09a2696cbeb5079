"""Tensor factories per rank: torch.zeros and its siblings make a LocalTensor inside a world.

A torch function mode, because Dynamo traces those, and because nothing below it wraps: what
AOTAutograd, Inductor or an op's own implementation allocates stays plain. Ops that get a per-rank
number pass through here too, on their way to rank_numbers.py. Random factories are drawn in
dispatch/random_ops.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedError, per_rank_text
from ..values.int_node import is_ranked
from ..values.ranked import pick
from ..values.tensor import LocalTensor, _checked_shards, _wrap
from .rank_numbers import BY_INDEX, MAY_HOLD_NUMBERS, call_with_numbers, holds_rank_number
from .state import local_tensor_mode
from .torch_hooks.factories import (
    answered_by_dynamo,
    default_device_while_tracing,
    rewritten_while_tracing,
)

Ranks = tuple[int, ...]
Builder = Callable[[Any, Ranks, tuple[Any, ...], dict[str, Any]], Any]
"""build(torch function, ranks, args, kwargs) -> LocalTensor, or what the function itself gives."""


class FactoryMode(TorchFunctionMode):
    """Makes factories per rank while `mode` is enabled and is the innermost world of its thread.

    A factory that is given no tensor makes a shard per rank; sizes, values and bounds may be
    per-rank numbers. What takes a tensor follows that tensor: `zeros_like(plain)`,
    `plain.new_zeros(2)` and `plain.clone()` stay plain, which stands for the same value on every
    rank. `torch.from_numpy`, `torch.frombuffer`, `torch.from_dlpack` and the legacy constructors
    `torch.Tensor(...)`, `torch.FloatTensor(...)` cannot be overridden and stay plain;
    `as_tensor(plain)` is `plain` itself. Plain tensors cannot be written with per-rank data:
    dispatch raises PlainTensorError.

    Factories called by torch's own machinery (compiler, optimizers, device meshes) stay plain.

    Args:
        mode: has `ranks`, a set of ints, and `_disable`, a bool that is read at each call.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode
        self.ranks: Ranks = tuple(sorted(mode.ranks))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        if torch.compiler.is_dynamo_compiling():
            name = rewritten(func, args, kwargs)
            if name is None:
                return func(*args, **kwargs)
            device = default_device()
            if self.mode._disable:
                return as_written(name, args, kwargs, device)
            return on_ranks(name, self.ranks, args, kwargs, device)
        build = _BUILDERS.get(func)
        if build is not None:
            if (
                self.mode._disable
                or self.mode is not local_tensor_mode()
                or _is_internal(sys._getframe(1).f_globals.get("__name__"))
            ):
                return func(*args, **kwargs)
            return build(func, self.ranks, args, kwargs)
        for arg in args:
            if arg.__class__ in MAY_HOLD_NUMBERS and holds_rank_number(arg):
                return call_with_numbers(func, args, kwargs)
        if kwargs:
            for arg in kwargs.values():
                if arg.__class__ in MAY_HOLD_NUMBERS and holds_rank_number(arg):
                    return call_with_numbers(func, args, kwargs)
        by_index = BY_INDEX.get(func)
        if by_index is not None:
            return by_index(func, args, kwargs)
        return func(*args, **kwargs)
