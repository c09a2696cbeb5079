"""A rank's program as a torch.export.ExportedProgram, node by node as it was captured."""

from __future__ import annotations

from typing import Any

import torch.fx as fx
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from .._torch import exported_program, value_ranges
from ..compile.fx_graphs import leaves, output_node, placeholders, spell_out_keywords
from .portable import PortableProgram


def exported(program: PortableProgram) -> ExportedProgram:
    """`program` as torch.export.save takes it: its inputs are positional, its output a tuple.

    It is not traced again: what was captured is what is saved.
    """
    root = nn.Module()
    for name, module in program.modules.items():
        root.add_module(name, module)
    graph = program.graph
    holder = fx.GraphModule(root, graph)
    spell_out_keywords(holder)
    inputs = [
        InputSpec(
            InputKind.CONSTANT_TENSOR if n.name in program.constants else InputKind.USER_INPUT,
            _argument(n),
            n.name if n.name in program.constants else None,
        )
        for n in placeholders(holder)
    ]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, _argument(value), None)
        for value in leaves(output_node(holder).args[0])
    ]
    given = tuple(0 for spec in inputs if spec.kind is InputKind.USER_INPUT)
    return exported_program(
        holder,
        ExportGraphSignature(inputs, outputs),
        in_spec=pytree.tree_structure((given, {})),
        out_spec=pytree.tree_structure(tuple(0 for _ in outputs)),
        range_constraints=value_ranges([n.meta.get("val") for n in graph.nodes]),
        constants=program.constants,
    )


def _argument(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return ConstantArgument(name="", value=value)
    found = value.meta.get("val")
    kinds = {
        "SymInt": SymIntArgument,
        "SymFloat": SymFloatArgument,
        "SymBool": SymBoolArgument,
    }
    if isinstance(found, Tensor):
        return TensorArgument(name=value.name)
    kind = kinds.get(type(found).__name__)
    return kind(name=value.name) if kind else ConstantArgument(name=value.name, value=found)
