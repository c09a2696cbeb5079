"""Per-rank numbers that leave a compiled frame: returned, or alive across a graph break.

AOTAutograd and Inductor know graph outputs that are tensors or numbers, not numbers per rank. So
before a Dynamo graph goes to its backend, a number that is constant on every rank leaves the
graph, and any other becomes one output per rank; both are put together again after each call.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..values.float_node import make_float
from ..values.rank_node import is_ranked
from .traced_numbers import MAKERS, rank_value


class FloatOutput:
    """A per-rank float where Dynamo's code expects a tensor and calls item()."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def item(self) -> Any:
        return self.value


@dataclass(frozen=True)
class _Output:
    """How one output of the original graph comes from those of the changed one.

    `ranks` is empty for an output that is passed on, else the number is made of the outputs from
    `start` on, or is `constant`.
    """

    start: int = 0
    make: Any = None
    ranks: tuple[int, ...] = ()
    constant: Any = None

    def rebuild(self, outputs: Any) -> Any:
        if self.make is None:
            return outputs[self.start]
        if self.constant is not None:
            value = self.constant
        else:
            found = outputs[self.start : self.start + len(self.ranks)]
            value = self.make(dict(zip(self.ranks, found)))
        return FloatOutput(value) if self.make is make_float else value


def without_rank_numbers(gm: fx.GraphModule) -> list[_Output] | None:
    """Change the graph's outputs to plain ones, in place; None where they are plain already."""
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    old = output.args[0]
    if not any(_ranked_value(node) is not None for node in old):
        return None
    plan: list[_Output] = []
    new: list[Any] = []
    with gm.graph.inserting_before(output):
        for node in old:
            number = _ranked_value(node)
            if number is None:
                plan.append(_Output(start=len(new)))
                new.append(node)
                continue
            values, make = number.node._values, MAKERS[type(number)]
            if all(type(v) in (int, float, bool) for v in values.values()):
                plan.append(_Output(make=make, constant=make(values)))
                continue
            plan.append(_Output(start=len(new), make=make, ranks=tuple(values)))
            for rank, value in values.items():
                if type(value) in (int, float, bool):
                    new.append(value)
                    continue
                part = gm.graph.call_function(rank_value, (node, rank))
                part.meta.update(node.meta)
                part.meta["example_value"] = value
                new.append(part)
    output.args = (tuple(new),)
    _erase_unused(gm.graph, old)
    gm.recompile()
    return plan


def _ranked_value(node: Any) -> Any:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if is_ranked(value) else None


def _erase_unused(graph: fx.Graph, nodes: Any) -> None:
    """Numbers that nobody needs any more are not to be traced again."""
    for node in nodes:
        if isinstance(node, fx.Node) and not node.users and _ranked_value(node) is not None:
            if node.op == "placeholder" or node not in node.graph.nodes:
                continue
            parents = node.all_input_nodes
            graph.erase_node(node)
            _erase_unused(graph, parents)


def with_rank_numbers(compiled: Any, plan: list[_Output]) -> Any:
    """`compiled` with the outputs that the original graph had."""

    def call(*args: Any) -> Any:
        outputs = compiled(*args)
        return tuple(entry.rebuild(outputs) for entry in plan)

    return call


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) in torch's Dynamo."""
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.variables.tensor import SymNodeVariable

    call_user_compiler = OutputGraph.call_user_compiler
    as_tensor = SymNodeVariable.as_tensor

    @functools.wraps(call_user_compiler)
    def split_numbers(self: Any, gm: Any, example_inputs: Any) -> Any:
        plan = None if self.export else without_rank_numbers(gm)
        compiled = call_user_compiler(self, gm, example_inputs)
        return compiled if plan is None else with_rank_numbers(compiled, plan)

    @functools.wraps(as_tensor)
    def keep_rank_float(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self if is_ranked(self.sym_num) else as_tensor(self, *args, **kwargs)

    return [
        (OutputGraph, "call_user_compiler", split_numbers),
        (SymNodeVariable, "as_tensor", keep_rank_float),
    ]
