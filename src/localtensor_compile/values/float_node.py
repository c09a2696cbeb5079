"""LocalFloatNode: one float per rank behind a `torch.SymFloat`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import SymFloat

from ..errors import RankDivergence
from .rank_node import MAKERS, LocalNode, add_math, binary, one_value_text, unary


class LocalFloatNode(LocalNode):
    """A float per rank."""

    pytype = float

    def is_float(self) -> bool:
        return True

    def is_constant(self) -> bool:
        return False  # SymFloat's methods unwrap constant int and bool nodes only (sym_node.py)

    def maybe_as_float(self) -> float | None:
        return self._uniform()

    def guard_float(self, file: str, line: int) -> float:
        values = {r: float(v) for r, v in self._values.items()}
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        raise RankDivergence(one_value_text("float", values))

    add = binary("float", operator.add)
    sub = binary("float", operator.sub)
    mul = binary("float", operator.mul)
    truediv = float_truediv = binary("float", operator.truediv)
    pow = float_pow = binary("float", operator.pow)
    floordiv = binary("float", operator.floordiv)
    mod = binary("float", operator.mod)
    sym_max = binary("float", torch.sym_max)
    sym_min = binary("float", torch.sym_min)
    neg = unary("float", operator.neg)
    abs = unary("float", operator.abs)
    sym_int = trunc = unary("int", torch.sym_int)
    floor = unary("int", lambda v: torch.sym_int(v // 1))
    ceil = unary("int", lambda v: -torch.sym_int(-v // 1))
    eq = binary("bool", operator.eq)
    ne = binary("bool", operator.ne)
    lt = binary("bool", operator.lt)
    le = binary("bool", operator.le)
    gt = binary("bool", operator.gt)
    ge = binary("bool", operator.ge)

    def sym_float(self) -> LocalFloatNode:
        return self


add_math(LocalFloatNode)
MAKERS["float"] = LocalFloatNode


def make_float(values: Mapping[int, Any], traced: bool = False) -> Any:
    """{rank: float or SymFloat} as one float or SymFloat."""
    first = next(iter(values.values()))
    if all(
        type(v) is float and (v == first or (v != v and first != first)) for v in values.values()
    ):
        return first
    return SymFloat(LocalFloatNode(values, traced))
