"""Small questions about FX graphs."""

from __future__ import annotations

from collections.abc import Iterator
from keyword import iskeyword
from typing import Any

import torch.fx as fx
from torch.export.graph_signature import ConstantArgument


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    """The inputs, in order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def output_node(module: fx.GraphModule) -> fx.Node:
    """The node that returns."""
    return next(iter(reversed(module.graph.nodes)))


def leaves(value: Any) -> Iterator[Any]:
    """What nested lists, tuples and dicts among a node's arguments hold."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def spell_out_keywords(module: fx.GraphModule) -> None:
    """Write down what calls leave out that is named like a Python keyword, as `from` of uniform.

    torch.export.load looks such arguments up among those that were given (torch 2.13,
    torch/_export/serde/serialize.py, deserialize_inputs).
    """
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            schema = getattr(node.target, "_schema", None)
            arguments = [] if schema is None else [a for a in schema.arguments if not a.kwarg_only]
            last = max((i for i, a in enumerate(arguments) if iskeyword(a.name)), default=-1)
            if len(node.args) <= last:
                left_out = arguments[len(node.args) : last + 1]
                node.args = (*node.args, *(a.default_value for a in left_out))


def write_numbers_down(program: Any) -> None:
    """Put the numbers and strings that an ExportedProgram was exported with in place of the inputs.

    torch.export.save fails where a node uses such an input, as it does in what was exported below
    autograd (torch 2.13).
    """
    for node, spec in zip(placeholders(program.graph_module), program.graph_signature.input_specs):
        if isinstance(spec.arg, ConstantArgument):
            number = spec.arg.value
            for user in tuple(node.users):
                replaced = fx.map_arg(
                    (user.args, user.kwargs), lambda n, node=node, v=number: v if n is node else n
                )
                user.args, user.kwargs = replaced
