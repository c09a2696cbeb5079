"""Whether inputs fit an exported program of all ranks, rank by rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..check.text import ranks_text
from ..compile.fx_graphs import placeholders
from ..errors import per_rank_text
from .flat import FlatModel
from .leaves import ExportError, Leaf
from .rank_model import inputs_of


def require_fitting(
    program: Any, flat: FlatModel, leaves: Sequence[Leaf], spec: pytree.TreeSpec
) -> None:
    """Raise ExportError unless the inputs are of the exported ranks and sizes.

    Args:
        program: the export of `flat`.
        leaves: the inputs.
        spec: their structure.
    """
    if spec != flat.in_spec:
        raise ExportError(
            f"the inputs have the structure {_line(spec)}, but {_line(flat.in_spec)} was exported. "
            "Call the module as the model was called when it was exported."
        )
    wanted = _expected(program, flat)
    sizes: dict[Any, int] = {}
    for i, (name, leaf) in enumerate(zip(flat.in_names, leaves)):
        exported = flat.leaves[i]
        if leaf.ranks != exported.ranks:
            raise ExportError(
                f"input {name} is {_of_ranks(leaf.ranks)}, but {_of_ranks(exported.ranks)} was "
                "exported. Every exported rank needs its shard, and no other rank has a program."
            )
        for rank, part in zip(leaf.ranks or (None,), leaf.parts):
            if not _fits(part, wanted[i, rank], sizes, program):
                raise _misfit(name, leaf, i, wanted, program)


def _line(spec: pytree.TreeSpec) -> str:
    return " ".join(str(spec).split())


def _of_ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return "a value that all ranks share"
    return f"one of rank{'s' if len(ranks) > 1 else ''} {ranks_text(ranks)}"


def _expected(program: Any, flat: FlatModel) -> dict[tuple[int, int | None], Any]:
    """(number of an input, rank) -> fake tensor with its exported sizes, or what was given."""
    nodes = placeholders(program.graph_module)
    return {
        (known.where, known.rank): node.meta.get("val")
        for node, known in zip(nodes, inputs_of(program, flat))
        if known.kind == "user"
    }


def _fits(part: Any, wanted: Any, sizes: dict[Any, int], program: Any) -> bool:
    if not isinstance(wanted, Tensor):
        same_type = isinstance(wanted, torch.SymInt) or type(part) is type(wanted)
        return same_type and _size_fits(part, wanted, sizes, program)
    if not isinstance(part, Tensor):
        return False
    if part.dtype != wanted.dtype or part.ndim != wanted.ndim:
        return False
    return all(_size_fits(a, b, sizes, program) for a, b in zip(part.shape, wanted.shape))


def _size_fits(found: Any, wanted: Any, sizes: dict[Any, int], program: Any) -> bool:
    if not isinstance(wanted, torch.SymInt):
        return bool(found == wanted)
    expression = wanted.node.expr
    if expression.is_Symbol:
        limits = program.range_constraints.get(expression)
        inside = limits is None or limits.lower <= found <= limits.upper
        return inside and sizes.setdefault(expression, found) == found
    known = {s: sizes[s] for s in expression.free_symbols if s in sizes}
    value = expression.subs(known)
    return bool(value == found) or not value.is_Integer


def _misfit(
    name: str, leaf: Leaf, number: int, wanted: Mapping[tuple[int, int | None], Any], program: Any
) -> ExportError:
    ranks: Sequence[Any] = leaf.ranks or (None,)
    found = {rank: _type(part) for rank, part in zip(ranks, leaf.parts)}
    exported = {rank: _type(wanted[number, rank]) for rank in ranks}
    symbols = {
        symbol
        for rank in ranks
        for size in _sizes(wanted[number, rank])
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    limits = [
        f"{limit.lower} <= {symbol}" + (f" <= {limit.upper}" if limit.upper.is_Integer else "")
        for symbol, limit in program.range_constraints.items()
        if symbol in symbols
    ]
    where = f" with {', '.join(limits)}" if limits else ""
    if leaf.ranks:
        texts = per_rank_text(found), per_rank_text(exported)
    else:
        texts = found[None], exported[None]
    return ExportError(
        f"input {name} does not fit: it is {texts[0]}, but {texts[1]}{where} was exported. Give "
        "every rank the sizes that were exported, the same number wherever a name is the same, or "
        "export again with dynamic_shapes."
    )


def _sizes(value: Any) -> Sequence[Any]:
    return value.shape if isinstance(value, Tensor) else (value,)


def _type(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value) if isinstance(value, torch.SymInt) else repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
