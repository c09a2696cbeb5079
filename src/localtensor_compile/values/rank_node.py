"""LocalNode: what per-rank ints, floats and bools behind `torch.Sym*` share.

The node speaks the SymNode protocol that Dynamo, FakeTensor, ShapeEnv and FX ask for; each rank's
value is a Python number, or a Sym* of its own while a dynamic shape is traced. Arithmetic is per
rank. Guards are installed per rank on the inner symbols. Where one Python value is needed and the
ranks disagree, RankDivergence is raised: nothing here ever picks the value of one rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import sympy
from torch import SymBool, SymFloat, SymInt

from .._torch import proxy_mode, sym_math
from ..errors import RankDivergence, per_rank_text

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
    if is_ranked(getattr(node, "_hint", None)):
        # torch makes symbols for the sizes of a view that it replays, one for all ranks.
        return value_on_rank(node._hint, rank)
    if node.is_constant():
        return node.maybe_as_int() if node.is_int() else as_sym(node)
    return as_sym(node)


def as_sym(node: Any) -> Any:
    if node.is_int():
        return SymInt(node)
    return SymFloat(node) if node.is_float() else SymBool(node)


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


def symbol_of(values: Mapping[int, Any]) -> tuple[int, _RankSymbol]:
    """An id and a sympy symbol, interned on the per-rank values: equal values, equal exprs."""
    key = tuple((r, v.node.expr if isinstance(v, _SYM_TYPES) else v) for r, v in values.items())
    found = _symbols.get(key)
    if found is None:
        number = next(_symbol_ids)
        symbol = _RankSymbol(f"rank_int{number}", integer=True, nonnegative=True)
        found = _symbols[key] = (number, symbol)
    return found


MAKERS: dict[str, Callable[..., Any]] = {}
""""int", "float", "bool" -> makes the node of {rank: value}; each kind's module adds its own."""


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
        return sympy.sympify(uniform) if uniform is not None else symbol_of(self._values)[1]

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
        return MAKERS["int"](dict.fromkeys(self._values, number), self._traced)

    def wrap_float(self, number: float) -> Any:
        return MAKERS["float"](dict.fromkeys(self._values, number), self._traced)

    def wrap_bool(self, flag: bool) -> Any:
        return MAKERS["bool"](dict.fromkeys(self._values, flag), self._traced)

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
            as_sym(n) if not isinstance(n, (int, float)) else n for n in (self, *others)
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


def binary(make: str, op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: LocalNode, other: Any) -> Any:
        return self._map(MAKERS[make], op, other)

    return method


def unary(make: str, op: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def method(self: LocalNode) -> Any:
        return self._map(MAKERS[make], op)

    return method


def one_value_text(kind: str, values: Mapping[int, Any]) -> str:
    return (
        f"one Python {kind} is needed, but the ranks have different values: "
        f"{per_rank_text(values)}. Pass the number on as it is (sizes, slices and arithmetic take "
        "it), or run the code once per rank with rank_map, tensor_map or "
        "@maybe_run_for_local_tensor."
    )


def add_math(cls: type) -> None:
    """Give a class of nodes what Dynamo makes of math.sqrt and its siblings."""
    for name in (
        "acos",
        "asin",
        "atan",
        "cos",
        "cosh",
        "log2",
        "sin",
        "sinh",
        "sqrt",
        "tan",
        "tanh",
    ):
        setattr(cls, f"sym_{name}", unary("float", sym_math(name)))
