"""A rank's program in a form that depends on nothing of this process, so that equal ones are found.

Nodes are named after their ops, inputs after what the user calls them. Groups are numbered in the
order in which the program uses them: two ranks of a mesh have the same program, on other groups.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..compile.extract import group_ranks, is_group_name
from ..compile.functional_nodes import message
from ..compile.fx_graphs import leaves, output_node, placeholders
from ..golden.listing import values_text
from .errors import BundleError

_SYMBOL = re.compile(r"\b[suz]\d+\b")
_GROUP = "group"
COLLECTIVE_NAMESPACES = ("_c10d_functional", "_dtensor")


@dataclass
class PortableProgram:
    """One rank's program.

    Attributes:
        graph: tensors and numbers in, tensors and numbers out.
        constants: name of a placeholder -> tensor; these placeholders come first.
        modules: nested graphs, of torch.cond.
        groups: ranks of `group0`, `group1`, ...
        inputs: the others of its placeholders, by position among those of the rank's graph.
        outputs: what it returns, by position among what the rank's graph returns.
        fingerprint: equal for equal programs.
    """

    graph: fx.Graph
    constants: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, fx.GraphModule] = field(default_factory=dict)
    groups: list[tuple[int, ...]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    fingerprint: str = ""


def portable(module: fx.GraphModule) -> PortableProgram:
    """The program of a graph that `CapturedGraphs.rank` gives.

    Raises:
        BundleError: a collective in a nested graph, which a rank may or may not reach.
    """
    return _Copy(module).run()


def is_collective(node: fx.Node) -> bool:
    """Whether a node hands something to other ranks."""
    namespace = getattr(node.target, "namespace", "")
    return namespace in COLLECTIVE_NAMESPACES and "wait_tensor" not in str(node.target)


class _Copy:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.made = PortableProgram(fx.Graph())
        self.copies: dict[fx.Node, fx.Node] = {}
        self.lines: list[str] = []
        self.symbols: dict[str, str] = {}

    def run(self) -> PortableProgram:
        nodes = list(self.module.graph.nodes)
        for node in nodes:
            if node.op == "get_attr":
                self._attribute(node)
        for position, node in enumerate(placeholders(self.module)):
            if is_value(node.meta.get("val")):
                self.made.inputs.append(position)
                self._add(node, "placeholder", _identifier(node.meta.get("user_name", "input")))
        for node in nodes:
            if node.op == "call_function":
                self._add(node, "call_function", _op_name(node.target))
            elif node.op in ("call_method", "call_module"):
                raise BundleError(message(node, "only torch ops can be saved"))
        self._finish(output_node(self.module))
        self.made.fingerprint = hashlib.sha256("\n".join(self.lines).encode()).hexdigest()
        return self.made

    def _attribute(self, node: fx.Node) -> None:
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, fx.GraphModule):
            _require_local(value)
            name = f"graph{len(self.made.modules)}"
            self.made.modules[name] = value
            copy = self.made.graph.get_attr(name)
            self.lines.append(f"{name} {self._renumbered(value.print_readable(False))}")
            self.copies[node] = copy
        elif isinstance(value, Tensor):
            copy = self._add(node, "placeholder", "constant")
            copy.meta.setdefault("val", value)
            self.made.constants[copy.name] = value
            self.lines.append(values_text(value))
        else:
            raise BundleError(message(node, f"a {type(value).__name__} cannot be saved"))

    def _add(self, node: fx.Node, op: str, name: str) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.copies[n])
        target: Any = node.target
        if op == "placeholder":
            args, kwargs, target = (), {}, name
        elif is_collective(node):
            args = tuple(self._numbered(a) for a in args)
        copy = self.made.graph.create_node(op, target, args, kwargs, name)
        if op == "placeholder":
            copy.target = copy.name
        for key in ("val", "stack_trace"):
            if key in node.meta:
                copy.meta[key] = node.meta[key]
        self.copies[node] = copy
        self.lines.append(
            self._renumbered(f"{copy.name} {copy.target} {args} {kwargs} {_described(copy)}")
        )
        return copy

    def _numbered(self, argument: Any) -> Any:
        """The name of a group in this program, for one that names its ranks."""
        if not is_group_name(argument):
            return argument
        ranks = group_ranks(argument)
        if ranks not in self.made.groups:
            self.made.groups.append(ranks)
        return f"{_GROUP}{self.made.groups.index(ranks)}"

    def _finish(self, node: fx.Node) -> None:
        values: list[Any] = []
        for position, value in enumerate(leaves(node.args[0])):
            copy = self.copies.get(value) if isinstance(value, fx.Node) else value
            if copy is not None:
                self.made.outputs.append(position)
                values.append(copy)
        self.made.graph.output(tuple(values))
        self.lines.append(f"return {values} {self.made.outputs}")

    def _renumbered(self, text: str) -> str:
        """Symbols by their first appearance: ranks have others for the same size."""
        return _SYMBOL.sub(lambda m: self.symbols.setdefault(m[0], f"n{len(self.symbols)}"), text)


def is_value(value: Any) -> bool:
    """What a program can be given: a mesh, as DTensors hand one through, cannot be saved."""
    known = (Tensor, int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, known)


def _require_local(module: fx.GraphModule) -> None:
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if is_collective(node):
                raise BundleError(
                    message(node, "it stands in a branch, so that not all ranks need reach it")
                )


def _op_name(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    name = schema.name.partition("::")[2] if schema is not None else target.__name__
    return _identifier(name)


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_") or "value"


def _described(node: fx.Node) -> str:
    parts = []
    for value in leaves(node.meta.get("val")):
        if isinstance(value, Tensor):
            parts.append(f"{value.dtype}{list(value.shape)}{list(value.stride())}{value.device}")
        else:
            parts.append(str(value))
    return " ".join(parts)


def group_names() -> Iterator[str]:
    """`group0`, `group1`, ..."""
    return (f"{_GROUP}{i}" for i in itertools.count())
