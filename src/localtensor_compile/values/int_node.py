"""LocalIntNode: one int per rank behind a `torch.SymInt`, with bool and float siblings.

The size of a tensor whose shards differ is `torch.SymInt(LocalIntNode({rank: size}))`. The node
speaks the SymNode protocol that Dynamo, FakeTensor, ShapeEnv and FX ask for; each rank's value is
an int, or a SymInt of its own while a dynamic shape is traced. Arithmetic is per rank. Guards are
installed per rank on the inner symbols. Where one Python value is needed and the ranks disagree,
RankDivergence is raised: nothing here ever picks the value of one rank.
"""

from __future__ import annotations

import itertools
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import sympy
import torch
from torch import SymBool, SymFloat, SymInt

from .._torch import proxy_mode
from ..errors import RankDivergence, ShardError, per_rank_text
from . import broadcast

_SYM_TYPES = (SymInt, SymBool, SymFloat)
Text = str  # LocalNode has a method called str


def is_ranked(value: object) -> bool:
    """Whether `value` is a SymInt, SymBool or SymFloat with a value per rank."""
    return isinstance(value, _SYM_TYPES) and isinstance(value.node, LocalNode)


def value_on_rank(value: Any, rank: int) -> Any:
    """The value of a number, a Sym* or a symbolic node on `rank` (an int, float, bool or Sym*)."""
    node = value.node if isinstance(value, _SYM_TYPES) else value
    if isinstance(node, LocalNode):
        try:
            return node._values[rank]
        except KeyError:
            raise RankDivergence(
                f"a per-rank number ({node}) has no value for rank {rank}: it was made for ranks "
                f"{sorted(node._values)}. Combine only values of one set of ranks."
            ) from None
    if isinstance(node, (int, float, bool)):
        return node
    if node.is_constant():
        return node.maybe_as_int() if node.is_int() else _as_sym(node)
    return _as_sym(node)


def _as_sym(node: Any) -> Any:
    if node.is_int():
        return SymInt(node)
    return SymFloat(node) if node.is_float() else SymBool(node)


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


def make_bool(values: Mapping[int, Any], traced: bool = False) -> Any:
    """{rank: bool or SymBool} as one bool or SymBool."""
    first = next(iter(values.values()))
    if all(type(v) is bool and v == first for v in values.values()):
        return first
    return SymBool(LocalBoolNode(values, traced))


def make_float(values: Mapping[int, Any], traced: bool = False) -> Any:
    """{rank: float or SymFloat} as one float or SymFloat."""
    first = next(iter(values.values()))
    if all(
        type(v) is float and (v == first or (v != v and first != first)) for v in values.values()
    ):
        return first
    return SymFloat(LocalFloatNode(values, traced))


class _RankSymbol(sympy.Symbol):
    """The `expr` of a LocalIntNode.

    A Symbol, so that guards take the dimension as its own definition, and not a number, so that
    Dynamo counts the dimension as dynamic. It reports no free symbols, so that Dynamo never tries
    to lift it to a graph input.
    """

    @property
    def free_symbols(self) -> set[Any]:
        return set()

    def has(self, *patterns: Any) -> bool:
        # "Cannot be rebuilt from other FX nodes": keeps runtime asserts from replacing the size of
        # an intermediate by arithmetic on input sizes (symbolic_shapes.py, runtime_assert.py).
        from torch.utils._sympy.functions import TruncToInt

        return True if TruncToInt in patterns else bool(super().has(*patterns))


_symbol_ids = itertools.count()
_symbols: dict[Any, tuple[int, _RankSymbol]] = {}


def _symbol_of(values: Mapping[int, Any]) -> tuple[int, _RankSymbol]:
    """An id and a sympy symbol, interned on the per-rank values: equal values, equal exprs."""
    key = tuple((r, v.node.expr if isinstance(v, _SYM_TYPES) else v) for r, v in values.items())
    found = _symbols.get(key)
    if found is None:
        number = next(_symbol_ids)
        symbol = _RankSymbol(f"rank_int{number}", integer=True, nonnegative=True)
        found = _symbols[key] = (number, symbol)
    return found


class LocalNode:
    """What ints, bools and floats per rank share. `_values` maps rank to value, in rank order."""

    pytype: ClassVar[type]
    shape_env: Any = None
    fx_node: Any = None
    _hint: Any = None
    any_made = False  # whether this process ever made a per-rank number

    def __init__(self, values: Mapping[int, Any], traced: bool = False) -> None:
        LocalNode.any_made = True
        self._values: dict[int, Any] = dict(sorted(values.items()))
        # Nodes of real tensors must say is_symbolic() == False, those of fake tensors True
        # (symbolic_shapes.py asks both).
        self._traced = traced

    # ---- kind and identity
    def is_int(self) -> bool:
        return False

    def is_bool(self) -> bool:
        return False

    def is_float(self) -> bool:
        return False

    def is_nested_int(self) -> bool:
        return False

    def is_constant(self) -> bool:
        return self._uniform() is not None

    def is_symbolic(self) -> bool:
        return self._traced and not self.is_constant()

    def has_hint(self) -> bool:
        # Without a hint, C++ asks the layout questions below about whole size lists; with one it
        # compares size by size, and ranks may disagree about each.
        return self.is_constant()

    @property
    def hint(self) -> Any:
        return None

    @property
    def constant(self) -> Any:
        return self._uniform()

    def clone(self) -> LocalNode:
        return self

    @property
    def _guard_key(self) -> tuple[Any, ...]:
        """What compiled code that took this number for a constant compares."""
        return (tuple(self._values), tuple(self._values.values()))

    def maybe_as_int(self) -> int | None:
        return None

    def maybe_as_float(self) -> float | None:
        return None

    def maybe_as_bool(self) -> bool | None:
        return None

    def _uniform(self) -> Any:
        """The plain value that all ranks share, or None."""
        it = iter(self._values.values())
        first = next(it)
        if isinstance(first, _SYM_TYPES):
            return None
        for v in it:
            if isinstance(v, _SYM_TYPES) or v != first:
                return None
        return first

    @property
    def expr(self) -> Any:
        uniform = self._uniform()
        return sympy.sympify(uniform) if uniform is not None else _symbol_of(self._values)[1]

    @property
    def _expr(self) -> Any:
        return self.expr

    def _str(self) -> Text:
        return "{" + ", ".join(f"{r}: {v}" for r, v in self._values.items()) + "}"

    str = _str

    def __str__(self) -> Text:
        return self._str()

    def __repr__(self) -> Text:
        return f"{type(self).__name__}({self._str()})"

    def _graph_repr(self) -> Text:
        return self._str()

    def __getstate__(self) -> dict[Text, Any]:
        return {"values": {r: _plain(v, self) for r, v in self._values.items()}}

    def __setstate__(self, state: dict[Text, Any]) -> None:
        self.__init__(state["values"])  # type: ignore[misc]

    def _value_eq(self, other: Any) -> bool:
        return isinstance(other, LocalNode) and self._values == other._values

    def _value_hash(self) -> int:
        # FakeTensorMode's cache asks for a hash only when an op gets a per-rank size and no
        # LocalTensor: nothing could run that op once per rank.
        raise RankDivergence(
            f"an op got the per-rank number {self} but no LocalTensor, so that it cannot run once "
            "per rank. Call it inside LocalTensorMode, or use x.new_*(...) or torch.*_like(...)."
        )

    # ---- arithmetic
    def wrap_int(self, number: int) -> Any:
        return LocalIntNode._make(dict.fromkeys(self._values, number), self._traced)

    def wrap_float(self, number: float) -> LocalFloatNode:
        return LocalFloatNode(dict.fromkeys(self._values, number), self._traced)

    def wrap_bool(self, flag: bool) -> LocalBoolNode:
        return LocalBoolNode(dict.fromkeys(self._values, flag), self._traced)

    def _map(self, make: Callable[..., Any], op: Callable[..., Any], *others: Any) -> Any:
        recorded = self._record(op, others)
        if recorded is not None:
            return recorded
        traced = self._traced or any(getattr(o, "_traced", False) for o in others)
        values = {r: op(v, *[value_on_rank(o, r) for o in others]) for r, v in self._values.items()}
        return make(values, traced)

    def _record(self, op: Callable[..., Any], others: Sequence[Any]) -> Any:
        """Record the arithmetic when make_fx traces LocalTensors as wholes (torch.export).

        There the per-rank SymInt itself has an FX proxy. Under AOTAutograd only the inner sizes
        have proxies, and plain per-rank arithmetic is right.
        """
        mode = proxy_mode() if self._traced else None
        if mode is None:
            return None
        from torch.fx.experimental.proxy_tensor import handle_sym_dispatch

        operands: list[Any] = [
            _as_sym(n) if not isinstance(n, (int, float)) else n for n in (self, *others)
        ]
        known = mode.tracer.symnode_tracker
        ranked = [o for o in operands if is_ranked(o)]
        if any(known.get(o) is None for o in ranked if not o.node.is_constant()):
            return None
        result = handle_sym_dispatch(op, tuple(operands), {})
        if isinstance(result, bool):
            return self.wrap_bool(result)
        if isinstance(result, int):
            return self.wrap_int(result)
        return result.node


def _plain(value: Any, node: LocalNode) -> Any:
    if isinstance(value, _SYM_TYPES):
        raise TypeError(f"cannot pickle the symbolic per-rank number {node}")
    return value


def _binary(make: str, op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: LocalNode, other: Any) -> Any:
        return self._map(_MAKERS[make], op, other)

    return method


def _unary(make: str, op: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def method(self: LocalNode) -> Any:
        return self._map(_MAKERS[make], op)

    return method


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
        raise RankDivergence(_one_value_text("float", values))

    add = _binary("float", operator.add)
    sub = _binary("float", operator.sub)
    mul = _binary("float", operator.mul)
    truediv = float_truediv = _binary("float", operator.truediv)
    pow = float_pow = _binary("float", operator.pow)
    floordiv = _binary("float", operator.floordiv)
    mod = _binary("float", operator.mod)
    sym_max = _binary("float", torch.sym_max)
    sym_min = _binary("float", torch.sym_min)
    neg = _unary("float", operator.neg)
    abs = _unary("float", operator.abs)
    sym_int = trunc = _unary("int", torch.sym_int)
    floor = _unary("int", lambda v: torch.sym_int(v // 1))
    ceil = _unary("int", lambda v: -torch.sym_int(-v // 1))
    eq = _binary("bool", operator.eq)
    ne = _binary("bool", operator.ne)
    lt = _binary("bool", operator.lt)
    le = _binary("bool", operator.le)
    gt = _binary("bool", operator.gt)
    ge = _binary("bool", operator.ge)

    def sym_float(self) -> LocalFloatNode:
        return self


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
        return _symbol_of(self._values)[0]

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
        raise RankDivergence(_one_value_text("int", values))

    def int_(self) -> int:
        return self.guard_int("", 0)

    def require_hint(self, fallback: Any = None) -> int:
        return self.guard_int("", 0)

    def bool_(self) -> bool:
        return bool(self.ne(self.wrap_int(0)).bool_())

    add = _binary("int", operator.add)
    sub = _binary("int", operator.sub)
    mul = _binary("int", operator.mul)
    floordiv = int_floordiv = _binary("int", operator.floordiv)
    mod = _binary("int", operator.mod)
    pow = pow_by_natural = _binary("int", operator.pow)
    lshift = _binary("int", operator.lshift)
    rshift = _binary("int", operator.rshift)
    bitwise_and = _binary("int", operator.and_)
    bitwise_or = _binary("int", operator.or_)
    bitwise_xor = _binary("int", operator.xor)
    sym_max = _binary("int", torch.sym_max)
    sym_min = _binary("int", torch.sym_min)
    neg = _unary("int", operator.neg)
    abs = _unary("int", operator.abs)
    truediv = int_truediv = float_truediv = _binary("float", operator.truediv)
    float_pow = _binary("float", operator.pow)
    sym_float = _unary("float", torch.sym_float)
    ge = _binary("bool", operator.ge)
    gt = _binary("bool", operator.gt)
    le = _binary("bool", operator.le)
    lt = _binary("bool", operator.lt)

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


class _RankShapeEnv:
    """The ShapeEnv entry points that guard_or_false/true and statically_known_true reach on a
    per-rank bool (symbolic_shapes.py). Ranks that disagree mean "cannot tell"."""

    def evaluate_sym_node(
        self,
        node: LocalBoolNode,
        size_oblivious: bool = False,
        fallback_value: Any = None,
        **_: Any,
    ) -> bool:
        flags = set(node._flags().values())
        if len(flags) == 1:
            return flags.pop()
        return node.bool_() if fallback_value is None else bool(fallback_value)

    def _maybe_evaluate_static(self, expr: Any, **_: Any) -> None:
        return None


class LocalBoolNode(LocalNode):
    """A bool per rank. `bool()` of it raises RankDivergence when the ranks disagree.

    `when_mixed` is what torch's own structural comparisons see when the ranks disagree: "are these
    sizes equal?" is no unless it is yes on every rank. It never answers user code.
    """

    pytype = bool
    shape_env = _RankShapeEnv()
    when_mixed: bool | None = None
    compared: tuple[Any, Any] | None = None  # the operands of == between ints

    def is_bool(self) -> bool:
        return True

    def maybe_as_bool(self) -> bool | None:
        return self._uniform()

    def constant_bool(self) -> bool | None:
        return self._uniform()

    def _flags(self) -> dict[int, bool]:
        return {r: bool(v) for r, v in self._values.items()}  # guards on each rank's symbol

    def guard_bool(self, file: str, line: int) -> bool:
        flags = self._flags()
        if len(set(flags.values())) == 1:
            return next(iter(flags.values()))
        if self.when_mixed is not None and (
            # C++ probes of layout and broadcasting: "not on all ranks" sends them down the general
            # path, or into a check that raises.
            (file and file.endswith((".cpp", ".h", ".c")))
            or (not self._traced and _asked_by_compiler())
        ):
            return self.when_mixed
        raise RankDivergence(
            f"ranks disagree about a condition: {per_rank_text(flags)}. Each rank would take its "
            "own branch, and one program cannot take both. Compute the choice with torch.where, "
            "or run the branch once per rank with rank_map, tensor_map or "
            "@maybe_run_for_local_tensor."
        )

    def bool_(self) -> bool:
        return self.guard_bool("", 0)

    def expect_true(self, file: str, line: int) -> bool:
        flags = self._flags()
        if all(flags.values()):
            return True
        if not any(flags.values()):
            return False
        failing = [r for r, ok in flags.items() if not ok]
        raise RankDivergence(
            f"a size check of torch fails on ranks {failing} only and holds on the others. On real "
            "processes these ranks would raise here and the others go on. Give every rank "
            "sizes that pass."
        )

    def guard_size_oblivious(self, file: str, line: int) -> bool:
        return all(self._flags().values())

    def guard_or_false(self, file: str, line: int) -> bool:
        flags = self._flags()
        if self.compared is None:
            return all(flags.values())
        left, right = self.compared
        values = {r: value_on_rank(right, r) for r in flags}
        return broadcast.answer_equal(file, left._values, values, flags)

    def guard_or_true(self, file: str, line: int) -> bool:
        return any(self._flags().values())

    def statically_known_true(self, file: str, line: int) -> bool:
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return all(statically_known_true(v) for v in self._values.values())

    sym_and = and_ = _binary("bool", operator.and_)
    sym_or = or_ = _binary("bool", operator.or_)
    sym_not = not_ = _unary("bool", torch.sym_not)
    eq = _binary("bool", operator.eq)
    ne = _binary("bool", operator.ne)

    def sym_ite(self, then: Any, otherwise: Any) -> Any:
        values = {
            r: value_on_rank(then if flag else otherwise, r) for r, flag in self._flags().items()
        }
        maker = LocalIntNode._make if then.is_int() else LocalFloatNode
        return maker(values, self._traced)


_MAKERS: dict[str, Callable[..., Any]] = {
    "int": LocalIntNode._make,
    "float": LocalFloatNode,
    "bool": LocalBoolNode,
}


def _one_value_text(kind: str, values: Mapping[int, Any]) -> str:
    return (
        f"one Python {kind} is needed, but the ranks have different values: "
        f"{per_rank_text(values)}. Pass the number on as it is (sizes, slices and arithmetic take "
        "it), or run the code once per rank with rank_map, tensor_map or "
        "@maybe_run_for_local_tensor."
    )


# The parts of torch that compare sizes structurally on real tensors, to build guards and keys.
_COMPILER_DIRS = tuple(
    os.path.join(os.path.dirname(torch.__file__), *part.split("/")) + os.sep
    for part in (
        "_dynamo", "_functorch", "_export", "_inductor", "_subclasses", "_library", "export", "fx",
    )
)  # fmt: skip
_SYMBOL_FILE = os.path.join(os.path.dirname(torch.__file__), "__init__.py")


def _asked_by_compiler() -> bool:
    """Whether the code that wants a bool is torch's compiler (looked at only on disagreement)."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in (__file__, _SYMBOL_FILE):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith(_COMPILER_DIRS)
