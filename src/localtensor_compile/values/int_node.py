"""LocalIntNode: one int per rank behind a `torch.SymInt`.

The size of a tensor whose shards differ is `torch.SymInt(LocalIntNode({rank: size}))`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt

from ..errors import RankDivergence, ShardError
from .bool_node import LocalBoolNode
from .rank_node import (
    MAKERS,
    LocalNode,
    add_math,
    binary,
    one_value_text,
    symbol_of,
    unary,
    value_on_rank,
)


class LocalIntNode(LocalNode):
    """An int per rank: `torch.SymInt(LocalIntNode({0: 3, 1: 2}))`.

    Args:
        local_ints: rank -> int (or SymInt, while a dynamic shape is traced).

    With the same int on every rank the node is constant, and a SymInt of it behaves as that int.

    Raises:
        ShardError: no ranks.
    """

    pytype = int

    def __init__(self, local_ints: Mapping[int, Any], traced: bool = False) -> None:
        if not local_ints:
            raise ShardError("LocalIntNode needs the value of at least one rank, but got none.")
        super().__init__(local_ints, traced)
        # The expression of the symbol that Dynamo's ShapeEnv gave the outer dimension that this
        # node is the size of; set by LocalTensor.__tensor_unflatten__.
        self._outer_expr: Any = None

    @classmethod
    def _make(cls, values: Mapping[int, Any], traced: bool = False) -> LocalIntNode:
        """A LocalIntNode even where all ranks agree: torch's C++ wants one node class in a list."""
        node: LocalIntNode = object.__new__(cls)
        node.__init__(values, traced)  # type: ignore[misc]
        return node

    @property
    def _local_ints(self) -> dict[int, Any]:
        return self._values

    def is_int(self) -> bool:
        return True

    def is_nested_int(self) -> bool:
        # AOTAutograd adds no graph input for a nested int in an outer size: the inner sizes say it.
        return not self.is_constant()

    def nested_int(self) -> int:
        return symbol_of(self._values)[0]

    def nested_int_coeff(self) -> int:
        return 1

    def maybe_as_int(self) -> int | None:
        return self._uniform()

    def constant_int(self) -> int | None:
        return self._uniform()

    def guard_int(self, file: str, line: int) -> int:
        values = {r: int(v) for r, v in self._values.items()}  # guards on each rank's symbol
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        raise RankDivergence(one_value_text("int", values))

    def int_(self) -> int:
        return self.guard_int("", 0)

    def require_hint(self, fallback: Any = None) -> int:
        return self.guard_int("", 0)

    def bool_(self) -> bool:
        return bool(self.ne(self.wrap_int(0)).bool_())

    add = binary("int", operator.add)
    sub = binary("int", operator.sub)
    mul = binary("int", operator.mul)
    floordiv = int_floordiv = binary("int", operator.floordiv)
    mod = binary("int", operator.mod)
    pow = pow_by_natural = binary("int", operator.pow)
    lshift = binary("int", operator.lshift)
    rshift = binary("int", operator.rshift)
    bitwise_and = binary("int", operator.and_)
    bitwise_or = binary("int", operator.or_)
    bitwise_xor = binary("int", operator.xor)
    sym_max = binary("int", torch.sym_max)
    sym_min = binary("int", torch.sym_min)
    neg = unary("int", operator.neg)
    abs = unary("int", operator.abs)
    truediv = int_truediv = float_truediv = binary("float", operator.truediv)
    float_pow = binary("float", operator.pow)
    sym_float = unary("float", torch.sym_float)
    ge = binary("bool", operator.ge)
    gt = binary("bool", operator.gt)
    le = binary("bool", operator.le)
    lt = binary("bool", operator.lt)

    def pos(self) -> LocalIntNode:
        return self

    trunc = floor = ceil = sym_int = pos

    def round(self, ndigits: int | None = None) -> LocalIntNode:
        return self

    def is_integer(self) -> LocalBoolNode:
        return self.wrap_bool(True)

    def sym_sum(self, args: Iterable[Any]) -> Any:
        total = self.wrap_int(0)
        for arg in args:
            total = total.add(arg)
        return total

    def eq(self, other: Any) -> LocalBoolNode:
        if self._is_outer_symbol(other):
            return self.wrap_bool(True)
        result: LocalBoolNode = self._map(LocalBoolNode, operator.eq, other)
        result.when_mixed = False
        result.compared = (self, other)
        return result

    def ne(self, other: Any) -> LocalBoolNode:
        if self._is_outer_symbol(other):
            return self.wrap_bool(False)
        result: LocalBoolNode = self._map(LocalBoolNode, operator.ne, other)
        result.when_mixed = True
        return result

    def _is_outer_symbol(self, other: Any) -> bool:
        """Whether `other` is the symbol that Dynamo gave this very dimension (meta_utils.py)."""
        if self._outer_expr is None:
            return False
        node = other.node if isinstance(other, SymInt) else other
        return not isinstance(node, LocalNode) and getattr(node, "expr", None) == self._outer_expr

    # C++ asks the first symbolic node about the whole size and stride lists.
    def is_contiguous(self, sizes: Sequence[Any], strides: Sequence[Any]) -> LocalBoolNode:
        return self._layout(sizes, strides, _contiguous)

    def is_channels_last_contiguous_2d(
        self, sizes: Sequence[Any], strides: Sequence[Any]
    ) -> LocalBoolNode:
        return self._layout(sizes, strides, _channels_last)

    is_channels_last_contiguous_3d = is_channels_last_contiguous_2d
    is_channels_last_strides_2d = is_channels_last_strides_3d = is_channels_last_contiguous_2d

    def is_non_overlapping_and_dense(
        self, sizes: Sequence[Any], strides: Sequence[Any]
    ) -> LocalBoolNode:
        return self._layout(sizes, strides, _dense)

    def is_non_overlapping_and_dense_indicator(
        self, sizes: Sequence[Any], strides: Sequence[Any]
    ) -> LocalIntNode:
        flags = self._layout(sizes, strides, _dense)._values
        return LocalIntNode._make({r: int(v) for r, v in flags.items()}, self._traced)

    def _layout(
        self,
        sizes: Sequence[Any],
        strides: Sequence[Any],
        question: Callable[[list[Any], list[Any]], bool],
    ) -> LocalBoolNode:
        flags = {
            r: question(
                [value_on_rank(s, r) for s in sizes], [value_on_rank(s, r) for s in strides]
            )
            for r in self._values
        }
        result = LocalBoolNode(flags, self._traced)
        result.when_mixed = False  # a layout is what it is on every rank
        return result


add_math(LocalIntNode)
MAKERS["int"] = LocalIntNode._make


def make_int(values: Mapping[int, Any], traced: bool = False) -> Any:
    """{rank: int or SymInt} as one int or SymInt: a plain one where all ranks agree.

    `traced` says that the values come from fake tensors.
    """
    it = iter(values.values())
    first = next(it)
    if isinstance(first, SymInt):
        if not isinstance(first.node, LocalNode):
            expr = first.node.expr
            # One symbol on all ranks is an ordinary dynamic size.
            if all(isinstance(v, SymInt) and v.node.expr == expr for v in it):
                return first
        traced = True
    elif all(type(v) is int and v == first for v in it):
        return first
    else:
        traced = traced or any(isinstance(v, SymInt) for v in values.values())
    return SymInt(LocalIntNode._make(values, traced))


def _packed(sizes: Sequence[Any], strides: Sequence[Any], inner_first: Iterable[int]) -> bool:
    """Whether memory has no gaps when dimensions nest in this order."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if any(guard_or_false(s == 0) for s in sizes):
        return True
    expected: Any = 1
    for d in inner_first:
        if guard_or_false(sizes[d] == 1):
            continue
        if not guard_or_false(strides[d] == expected):
            return False
        expected = expected * sizes[d]
    return True


def _contiguous(sizes: list[Any], strides: list[Any]) -> bool:
    return _packed(sizes, strides, reversed(range(len(sizes))))


def _channels_last(sizes: list[Any], strides: list[Any]) -> bool:
    ndim = len(sizes)
    return ndim in (4, 5) and _packed(sizes, strides, (1, *range(ndim - 1, 1, -1), 0))


def _dense(sizes: list[Any], strides: list[Any]) -> bool:
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if _contiguous(sizes, strides):
        return True
    # Inner dimensions have smaller strides: insertion sort, for symbols have no total order.
    order: list[int] = []
    for d in range(len(sizes)):
        at = len(order)
        while at and guard_or_false(strides[d] < strides[order[at - 1]]):
            at -= 1
        order.insert(at, d)
    return _packed(sizes, strides, order)
