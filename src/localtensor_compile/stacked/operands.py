"""The stacked tensors, per-rank tensors and per-rank numbers among the arguments of an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..values.rank_node import LocalNode, is_ranked
from ..values.ranked import per_rank_values
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor
from .plans import Ranks

_SYM_TYPES = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Operands:
    __slots__ = ("mismatch", "numbers", "others", "ranks")

    def __init__(self) -> None:
        self.ranks: Ranks | None = None
        self.others: list[LocalTensor] = []
        self.numbers = False
        self.mismatch = False

    def leaf(self, value: Any) -> None:
        kind = type(value)
        if kind is LocalTensor:
            shards = value._local_tensors
            if type(shards) is ShardsOfStack:
                if self.ranks is None:
                    self.ranks = shards.ranks
                elif self.ranks is not shards.ranks and self.ranks != shards.ranks:
                    self.mismatch = True
            else:
                self.others.append(value)
        elif kind is list or kind is tuple or kind is torch.Size:
            for item in value:
                self.leaf(item)
        elif LocalNode.any_made and not self.numbers:
            if kind in _SYM_TYPES:
                self.numbers = is_ranked(value)
            elif kind is Tensor and per_rank_values(value) is not None:
                self.numbers = True


def operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operands:
    found = Operands()
    for a in args:
        found.leaf(a)
    if kwargs:
        for a in kwargs.values():
            found.leaf(a)
    if found.ranks is not None and any(
        tuple(o._local_tensors) != found.ranks for o in found.others
    ):
        found.mismatch = True
    return found


def mapped(
    fn: Callable[[LocalTensor], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with `fn` of every LocalTensor in them."""

    def leaf(value: Any) -> Any:
        kind = type(value)
        if kind is LocalTensor:
            return fn(value)
        if kind is list or kind is tuple:
            return kind(leaf(v) for v in value)
        return value

    return tuple(leaf(a) for a in args), {k: leaf(v) for k, v in kwargs.items()}
