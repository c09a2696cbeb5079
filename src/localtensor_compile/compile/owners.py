"""Whose value each node of a graph of all ranks is."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..collectives.ops import NAMESPACE
from ..dispatch import random_nodes
from .functional_nodes import LISTS, PER_RANK, ExtractError, message
from .fx_graphs import placeholders

Owner = frozenset[int]
SHARED: Owner = frozenset()


def owners(
    module: fx.GraphModule, inputs: Sequence[int | None], *, ranks: Sequence[int]
) -> dict[fx.Node, Owner]:
    """Whose value each node of a graph of all ranks is: one rank, or nobody's in particular.

    Args:
        module: the graph.
        inputs: for each placeholder the rank whose shard it is; None for what all ranks have.
        ranks: all ranks.

    Returns:
        node -> the ranks on whose shards it depends; empty for what all ranks have. A node for
        several ranks is a collective, a draw, or an expression of sizes.

    Raises:
        ExtractError: the graph has ops on stacks of all ranks.
    """
    found: dict[fx.Node, Owner] = {}
    known = iter(inputs)
    holders = symbol_holders(module, inputs)
    for node in module.graph.nodes:
        if is_for_all(node) and "stacked" in op_name(node):
            why = f"it is one op on the stack of all ranks (layout='stacked'). {PER_RANK}"
            raise ExtractError(message(node, why))
        if node.op == "placeholder":
            rank = next(known)
            found[node] = SHARED if rank is None else frozenset({rank})
        elif node.target is operator.getitem and is_for_all(node.args[0]):
            rank = rank_of_result(node.args[0], node.args[1], found, ranks)
            found[node] = frozenset({rank})
        else:
            inputs_of = node.all_input_nodes
            # Ranks share symbols: the size of one rank's tensor may be written for another's.
            others = [n for n in inputs_of if expression_of(n.meta.get("val")) is None]
            expression = expression_of(node.meta.get("val"))
            if expression is not None and _held_by_several(expression, holders):
                found[node] = SHARED
            else:
                found[node] = frozenset().union(*(found[n] for n in others or inputs_of))
    return found


def symbol_holders(
    module: fx.GraphModule, inputs: Sequence[int | None]
) -> dict[Any, frozenset[int | None]]:
    """Symbol -> the ranks with an input of that size; None among them for what all ranks have."""
    found: dict[Any, set[int | None]] = {}
    for node, rank in zip(placeholders(module), inputs):
        value = node.meta.get("val")
        numbers = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
        for number in numbers:
            for symbol in getattr(expression_of(number), "free_symbols", ()):
                found.setdefault(symbol, set()).add(rank)
    return {symbol: frozenset(ranks) for symbol, ranks in found.items()}


def _held_by_several(expression: Any, holders: Mapping[Any, frozenset[int | None]]) -> bool:
    """Whether more than one rank can compute an expression of sizes."""
    of = [holders.get(symbol, frozenset()) for symbol in expression.free_symbols]
    own = [ranks for ranks in of if None not in ranks]
    if not own:
        return bool(of)
    return len(frozenset.intersection(*own)) > 1


def is_for_all(node: Any) -> bool:
    """Whether a node takes the shards of all ranks: a collective, or a draw."""
    namespace = getattr(getattr(node, "target", None), "namespace", "")
    return namespace in (NAMESPACE, random_nodes.NAMESPACE)


def op_name(node: fx.Node) -> str:
    return str(node.target._schema.name).partition("::")[2]


def is_draw(node: fx.Node) -> bool:
    return getattr(node.target, "namespace", "") == random_nodes.NAMESPACE


def shard_ranks(node: fx.Node, found: Mapping[fx.Node, Owner], ranks: Sequence[int]) -> list[int]:
    """The rank of each position of a collective: not all ranks need have a shard."""
    shards: Any = node.args[0]
    each = node.args[-1] if op_name(node) in LISTS else 1
    if op_name(node) == "reconcile":
        return list(node.args[1])
    count = len(shards) // each
    if count == len(ranks):
        return list(ranks)
    known: list[int] = []
    for i in range(count):
        owner = found[shards[i * each]]
        if len(owner) != 1:
            raise ExtractError(message(node, "the ranks of its operands are not known"))
        known += owner
    return known


def rank_of_result(
    node: fx.Node, index: int, found: Mapping[fx.Node, Owner], ranks: Sequence[int]
) -> int:
    if is_draw(node):
        of = list(node.args[0])
        return int(of[index // results_per_rank(node)])
    of = shard_ranks(node, found, ranks)
    if op_name(node) not in LISTS:
        return of[index]
    groups, size = node.args[-2], int(node.args[-1])
    each = 1 if op_name(node) == "reduce_scatter_list" else size
    return of[groups[index // each]]


def results_per_rank(node: fx.Node) -> int:
    value: Any = node.meta.get("val") or ()
    return max(len(value) // len(node.args[0]), 1)


def expression_of(value: Any) -> Any:
    """Of a symbolic number, else None."""
    symbolic = isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
    return value.node.expr if symbolic else None
