"""The program of one rank as a list of steps, with everything about fx and this process left out.

A Step has what the golden text shows: an op, its arguments (references to earlier steps, numbers,
groups), the type of its result and the user's source line. fold.py puts the lists of all ranks
on top of each other.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from .._torch import FakeTensor
from ..check.text import dtype_text
from ..compile.fx_graphs import leaves
from .source import Source, source_of

INPUT, COLLECTIVE, OP, OUTPUT = "input", "collective", "op", "return"
WAIT = "_c10d_functional::wait_tensor"


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step, or one item of it."""

    step: int
    item: int | None = None


@dataclass(frozen=True)
class GroupRef:
    """A process group among the arguments of a collective.

    Attributes:
        ranks: the ranks of the group that this rank is in.
    """

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class TensorType:
    """dtype and sizes of a tensor; symbolic sizes are numbered `s0, s1, ...` in order."""

    dtype: str
    shape: tuple[int | str, ...]


Type = TensorType | str | None | tuple["TensorType | str | None", ...]


@dataclass(frozen=True)
class Step:
    """One line of a rank's program.

    Attributes:
        kind: INPUT, OP, COLLECTIVE or OUTPUT.
        op: `aten.mm`, `all_reduce`, or what an input is (`parameter`, `input`, `saved`).
        arguments: by position.
        keywords: (name, value) pairs, sorted.
        type: of the result; a tuple for an op with several.
        name: that the step has in the traced graph of all ranks.
        label: an input's name in the user's code; an output's, as `gradient x`.
        source: the user's line that it comes from.
        sent: bytes that a collective takes from this rank.
        parts: names that items of its result have in the traced graph; None for all of it.
    """

    kind: str
    op: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    type: Type
    name: str
    label: str = ""
    source: Source | None = None
    sent: int | None = None
    parts: tuple[tuple[str, int | None], ...] = ()


Groups = Callable[[str], tuple[int, ...]]


def listing(graph: fx.Graph, groups: Groups) -> list[Step]:
    """The steps of one rank's graph, whose collectives are torch's own functional ones.

    Args:
        graph: as compile/extract.py makes it.
        groups: name of a process group -> its ranks.
    """
    return _Listing(groups).run(graph)


class _Listing:
    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.steps: list[Step] = []
        self.refs: dict[fx.Node, Any] = {}
        self.symbols: dict[str, str] = {}
        self.parts: dict[int, list[tuple[str, int | None]]] = {}

    def run(self, graph: fx.Graph) -> list[Step]:
        for node in graph.nodes:
            self._add(node)
        return [
            replace(step, parts=tuple(self.parts.get(i, ()))) for i, step in enumerate(self.steps)
        ]

    def _is_part(self, node: fx.Node, ref: Any) -> None:
        """`node` is an item of an earlier step, or its result after a wait."""
        self.refs[node] = ref
        if isinstance(ref, Ref):
            name = node.meta.get("flat_name", node.name)
            self.parts.setdefault(ref.step, []).append((name, ref.item))

    def _add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if not _is_value(node):
                self.refs[node] = None  # a mesh, of which nothing is left in this graph
                return
            self._append(node, INPUT, node.meta.get("input_kind", "input"))
        elif node.op == "output":
            self._add_outputs(list(leaves(node.args[0])), node.meta.get("user_names"))
        elif node.op == "get_attr":
            self._append_constant(node)
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            base = self.refs[node.args[0]]
            if isinstance(base, Ref) and base.item is None:
                self._is_part(node, Ref(base.step, int(node.args[1])))
            else:
                self._append(node, OP, "getitem")
        elif schema_name(node.target) == WAIT:
            # A collective and the wait for it are one line.
            self._is_part(node, self._value(node.args[0]))
        elif is_collective(node.target):
            self._append(node, COLLECTIVE, _op_name(node.target))
        else:
            self._append(node, OP, _op_name(node.target))

    def _add_outputs(self, values: list[Any], names: Sequence[str] | None) -> None:
        """A line per named output; those of one name, as what is saved for backward, share it."""
        by_name: dict[str, list[Any]] = {}
        for name, value in zip(names or ["return"] * len(values), values):
            shown = self._value(value)
            if shown is not None:
                by_name.setdefault(name, []).append(shown)
        for name, found in by_name.items():
            self.steps.append(Step(OUTPUT, name, tuple(found), (), None, name, name))

    def _append(self, node: fx.Node, kind: str, op: str) -> None:
        arguments, keywords = ((), ()) if kind is INPUT else self._arguments(node)
        self.refs[node] = Ref(len(self.steps))
        self.steps.append(
            Step(
                kind,
                op,
                arguments,
                keywords,
                self._type(node.meta.get("val")),
                node.meta.get("flat_name", node.name),
                label=node.meta.get("user_name", node.name) if kind is INPUT else "",
                source=None if kind is INPUT else source_of(node),
                sent=_bytes(node.args[0]) if kind is COLLECTIVE else None,
            )
        )

    def _append_constant(self, node: fx.Node) -> None:
        """A tensor or subgraph that belongs to the graph, with the tensor's values."""
        held: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            held = getattr(held, part, None)
        name = node.meta.get("flat_name", node.name)
        self.refs[node] = Ref(len(self.steps))
        if isinstance(held, fx.GraphModule):
            self.steps.append(Step(OP, "subgraph", (), (), None, name))
            return
        value = node.meta.get("val", held)
        shown = (Word(values_text(held)),) if isinstance(held, Tensor) else ()
        self.steps.append(Step(OP, "constant", shown, (), self._type(value), name))

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
        given = [self._value(a) for a in node.args]
        if is_collective(node.target):
            names = [a.name for a in node.target._schema.arguments]
            given = [
                GroupRef(self.groups(value)) if name == "group_name" else value
                for name, value in zip(names, given)
                if name != "group_size"  # the group says it
            ]
        return tuple(given), tuple((k, self._value(v)) for k, v in sorted(node.kwargs.items()))

    def _value(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.refs[value]
        if isinstance(value, (list, tuple)):
            return tuple(self._value(v) for v in value)
        if isinstance(value, dict):
            return tuple((str(k), self._value(v)) for k, v in sorted(value.items()))
        if isinstance(value, slice):
            return ("slice", *(self._value(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbolic(value)
        if isinstance(value, (bool, int, float, str)) or value is None:
            return value
        if isinstance(value, torch.dtype):
            return Word(dtype_text(value))
        if isinstance(value, fx.GraphModule):
            return Word("graph")
        return Word(str(value).removeprefix("torch."))

    def _type(self, value: Any) -> Type:
        if isinstance(value, (list, tuple)):
            return tuple(_flat_type(self._type(v)) for v in value)
        if isinstance(value, Tensor):
            return TensorType(dtype_text(value.dtype), tuple(map(self._size, value.shape)))
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            return "int"
        return None if value is None else type(value).__name__

    def _size(self, size: Any) -> int | str:
        return self._symbolic(size) if isinstance(size, torch.SymInt) else int(size)

    def _symbolic(self, value: Any) -> Any:
        """The expression, with symbols numbered as they appear in this rank's program."""
        expression = value.node.expr
        if expression.is_number:
            return int(expression) if expression.is_integer else float(expression)
        found = sorted(expression.free_symbols, key=lambda s: (_number(s.name), s.name))
        for symbol in found:
            kind = symbol.name.rstrip("0123456789") or "s"
            count = sum(n.startswith(kind) for n in self.symbols.values())
            self.symbols.setdefault(symbol.name, f"{kind}{count}")
        names = {s: type(s)(self.symbols[s.name], **s.assumptions0) for s in found}
        return str(expression.xreplace(names))


@dataclass(frozen=True)
class Word:
    """A dtype, layout and the like: printed without quotes."""

    text: str


def _flat_type(kind: Type) -> TensorType | str | None:
    return "list" if isinstance(kind, tuple) else kind


def values_text(tensor: Tensor) -> str:
    """Few values as they are, many by a hash."""
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return "..."
    if tensor.numel() <= 8:
        return str(tensor.tolist())
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def _is_value(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return value is None or isinstance(value, (Tensor, int, float, torch.SymInt, torch.SymFloat))


def _number(name: str) -> int:
    digits = "".join(c for c in name if c.isdigit())
    return int(digits or 0)


def schema_name(target: Any) -> str:
    """`namespace::name` of an op, empty of any other target."""
    schema = getattr(target, "_schema", None)
    return schema.name if schema is not None else ""


def is_collective(target: Any) -> bool:
    """Whether a node's target is one of torch's functional collectives."""
    namespace = schema_name(target).partition("::")[0]
    return namespace in ("_c10d_functional", "_c10d_functional_autograd", "_dtensor")


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        if is_collective(target):
            return name
        overload = target._schema.overload_name
        return ".".join(filter(None, (namespace, name, overload)))
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name()) if callable(target.name) else str(target)
    if isinstance(target, str):
        return f".{target}"
    module = (getattr(target, "__module__", "") or "").removeprefix("_")
    name = getattr(target, "__qualname__", getattr(target, "__name__", str(target)))
    return name if module in ("", "builtins", "operator") else f"{module}.{name}"


def _bytes(operand: Any) -> int | None:
    """Bytes of the tensors that a collective takes."""
    total = 0
    for leaf in leaves(operand):
        value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
        if not isinstance(value, Tensor):
            continue
        count = value.numel()
        if not isinstance(count, int):
            return None
        total += count * value.element_size()
    return total
