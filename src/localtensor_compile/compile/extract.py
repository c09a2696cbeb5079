"""The program of one rank, out of the graph of all ranks.

In the graph of all ranks every input is the shard of one rank, an op works on the shards of one
rank, and only collectives and draws are nodes for all. A rank's program is what its outputs need,
and every collective that the rank takes part in: a rank must join it even where its own result is
not used. Collectives become torch's functional ones (`_c10d_functional`), on process groups named
by their ranks; draws become the plain random ops.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..collectives.ops import chunks
from ..dispatch import random_nodes
from .functional_nodes import COLLECTIVES, LISTS, ExtractError, NodeMaker, message
from .fx_graphs import leaves, output_node
from .owners import (
    SHARED,
    expression_of,
    is_draw,
    is_for_all,
    op_name,
    owners,
    rank_of_result,
    results_per_rank,
    shard_ranks,
)

_GROUP = "ranks:"
_FUNCTIONAL = torch.ops._c10d_functional
aten = torch.ops.aten


_SIZES = {aten.sym_size.int: Tensor.size, aten.sym_stride.int: Tensor.stride}


def group_name(ranks: Sequence[int]) -> str:
    """What extracted programs call the process group of these ranks: `ranks:0,1`."""
    return _GROUP + ",".join(map(str, ranks))


def is_group_name(value: Any) -> bool:
    """Whether an argument of a node is a `group_name`."""
    return isinstance(value, str) and value.startswith(_GROUP)


def group_ranks(name: str) -> tuple[int, ...]:
    """The ranks of a `group_name`.

    Raises:
        ValueError: any other name.
    """
    if not is_group_name(name):
        raise ValueError(f"{name!r} does not name a group by its ranks.")
    return tuple(int(r) for r in name.removeprefix(_GROUP).split(","))


def extract_rank(
    module: fx.GraphModule,
    rank: int,
    *,
    ranks: Sequence[int],
    inputs: Sequence[int | None],
    outputs: Sequence[int | None],
) -> fx.GraphModule:
    """The program that `rank` would run.

    Args:
        module: a graph of all ranks, as AOTAutograd makes it.
        rank: whose program.
        ranks: all ranks.
        inputs: for each placeholder the rank whose shard it is; None for what all ranks have.
        outputs: the same for each output, nested lists counted item by item.

    Returns:
        A graph with the rank's inputs (its own, and what it uses of those that all ranks have) and
        its outputs, both in order. Nodes keep their `meta`.

    Raises:
        ExtractError: an op that no single rank can run, with the op and the user's line.
    """
    return _Extraction(module, rank, ranks, inputs, outputs).run()


class _Extraction:
    def __init__(
        self,
        module: fx.GraphModule,
        rank: int,
        ranks: Sequence[int],
        inputs: Sequence[int | None],
        outputs: Sequence[int | None],
    ) -> None:
        self.module, self.rank, self.ranks = module, rank, list(ranks)
        self.owners = owners(module, inputs, ranks=ranks)
        self.outputs = [
            value
            for value, of in zip(leaves(output_node(module).args[0]), outputs)
            if of in (rank, None)
        ]
        self.graph = fx.Graph()
        self.make = NodeMaker(self.graph)
        self.copies: dict[fx.Node, Any] = {}
        self.results: dict[fx.Node, list[Any]] = {}
        self.sizes: dict[fx.Node, tuple[fx.Node, int]] = {}

    def run(self) -> fx.GraphModule:
        needed = self._needed()
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                if node in needed or self.rank in self.owners[node]:
                    self.copies[node] = self.graph.node_copy(node)
            elif node.op == "output":
                self._finish(node)
            elif node not in needed:
                continue
            elif node in self.sizes:
                tensor, dim = self.sizes[node]
                size = self.make.call(node.target, self.copies[tensor], dim)
                size.meta.update(node.meta)
                self.copies[node] = size
            elif is_for_all(node):
                self.results[node] = self._taken_apart(node)
            elif node.target is operator.getitem and node.args[0] in self.results:
                self.copies[node] = self._result(node)
            else:
                self._require_one_rank(node)
                self.copies[node] = self.graph.node_copy(node, lambda n: self.copies[n])
        self.graph.lint()
        return fx.GraphModule(self.module, self.graph)

    def _finish(self, node: fx.Node) -> None:
        values = [self.copies.get(v) if isinstance(v, fx.Node) else v for v in self.outputs]
        meta = {k: v for k, v in node.meta.items() if k != "desc"}
        output = self.graph.output(tuple(values))
        output.meta.update(meta)

    # ---- what the rank needs
    def _needed(self) -> set[fx.Node]:
        start = [v for v in self.outputs if isinstance(v, fx.Node) and not _is_object(v)]
        assertions = []
        for node in self.module.graph.nodes:
            if is_for_all(node):
                start += [node] if self._takes_part(node) else []
            elif node.op == "call_function" and node.is_impure():
                assertions += [node] if self.owners[node] in ({self.rank}, SHARED) else []
        found = self._behind(start, set())
        for node in assertions:
            try:
                found |= self._behind([node], found)
            except ExtractError:
                continue  # about sizes that only other ranks have: they assert it
        return found

    def _behind(self, start: list[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
        """What the rank has to run for some nodes, without what is `known`."""
        found: set[fx.Node] = set()
        left = list(start)
        while left:
            node = left.pop()
            if node in found or node in known:
                continue
            found.add(node)
            if self._is_size_of_another(node):
                self.sizes[node] = self._same_size(node)
                left.append(self.sizes[node][0])
            else:
                left += self._operands(node) if is_for_all(node) else node.all_input_nodes
        return found

    def _is_size_of_another(self, node: fx.Node) -> bool:
        """Whether a node is a size of another rank's tensor, which equals one of this rank's."""
        if node.target not in _SIZES:
            return False
        owner = self.owners[node.args[0]]
        return bool(owner) and self.rank not in owner

    def _same_size(self, node: fx.Node) -> tuple[fx.Node, int]:
        """(tensor, dimension) of this rank with the same symbolic size or stride."""
        wanted = expression_of(node.meta.get("val"))
        read = _SIZES[node.target]
        for other in self.module.graph.nodes:
            if other is node:
                break
            value = other.meta.get("val")
            if isinstance(value, Tensor) and self.owners[other] == {self.rank}:
                for dim, size in enumerate(read(value)):
                    if wanted is not None and expression_of(size) == wanted:
                        return other, dim
        raise ExtractError(message(node, "it is a size that only another rank has"))

    def _takes_part(self, node: fx.Node) -> bool:
        if is_draw(node):
            return self.rank in node.args[0]
        of = shard_ranks(node, self.owners, self.ranks)
        if op_name(node) == "reconcile":
            return self.rank in of
        return self.rank in {of[i] for i in node.args[-2]}

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """What the rank gives to a collective or draw."""
        if is_draw(node):
            values: Any = [call[1:] for call in _draws(node, self.rank)]
        else:
            position = shard_ranks(node, self.owners, self.ranks).index(self.rank)
            values = self._given(node, position)
        return [v for v in leaves(values) if isinstance(v, fx.Node)]

    def _given(self, node: fx.Node, position: int) -> list[Any]:
        """(what it sends, ...) of the rank at a position."""
        shards: Any = node.args[0]
        if op_name(node) in ("reduce_scatter_list", "all_to_all_list"):
            size = int(node.args[-1])
            return list(shards[position * size : (position + 1) * size])
        if op_name(node) == "all_to_all_single":
            size = int(node.args[-1])
            part = slice(position * size, (position + 1) * size)
            return [shards[position], list(node.args[1][part]), list(node.args[2][part])]
        return [shards[position]]

    def _require_one_rank(self, node: fx.Node) -> None:
        others = self.owners[node] - {self.rank}
        if others and expression_of(node.meta.get("val")) is None:
            raise ExtractError(
                message(
                    node, f"it combines values of rank {self.rank} with those of rank {min(others)}"
                )
            )

    # ---- collectives and draws
    def _result(self, node: fx.Node) -> Any:
        """The rank's own item of a node for all ranks."""
        source: fx.Node = node.args[0]
        index = int(node.args[1])
        if rank_of_result(source, index, self.owners, self.ranks) != self.rank:
            raise ExtractError(message(source, "a rank reads what another rank received"))
        results = self.results[source]
        if is_draw(source):
            own = index % results_per_rank(source)
        elif op_name(source) in LISTS:
            own = index % (1 if op_name(source) == "reduce_scatter_list" else source.args[-1])
        else:
            own = 0
        made = results[own]
        made.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        made.meta["val"] = node.meta.get("val")
        return made

    def _taken_apart(self, node: fx.Node) -> list[Any]:
        """The rank's results of a collective or draw."""
        first = len(self.graph.nodes)
        made = self._draw(node) if is_draw(node) else self._collective(node)
        for new in list(self.graph.nodes)[first:]:
            for key, value in node.meta.items():
                new.meta.setdefault(key, value)
        return made

    def _draw(self, node: fx.Node) -> list[Any]:
        drawn: Any = None
        for op, args, kwargs in _draws(node, self.rank):
            given = _mapped(args, self.copies), _mapped(kwargs, self.copies)
            first = [] if drawn is None else [drawn]
            drawn = self.make.call(op, *first, *given[0], **given[1])
        count = results_per_rank(node)
        values: Any = node.meta["val"]
        start = list(node.args[0]).index(self.rank) * count
        own = list(values[start : start + count])
        memory = drawn.all_input_nodes[:1] if len(drawn.all_input_nodes) == 1 else []
        for made in memory:
            if made.target in (aten.empty.memory_format, aten.empty_strided.default):
                made.meta["val"] = own[0]
        returns = len(drawn.target._schema.returns)
        if returns == 1:
            return [self.make.with_value(drawn, own[0])]
        node_of = random_nodes.node_of(node.target)
        drawn.meta["val"] = tuple(own)
        items = node_of.outputs or range(returns)
        return [
            self.make.with_value(self.make.call(operator.getitem, drawn, i), v)
            for i, v in zip(items, own)
        ]

    def _collective(self, node: fx.Node) -> list[Any]:
        name = op_name(node)
        of = shard_ranks(node, self.owners, self.ranks)
        if name == "reconcile":
            return [
                self.make.call(aten.clone.default, self.copies[node.args[0][of.index(self.rank)]])
            ]
        make = COLLECTIVES.get(name)
        if make is None:
            raise ExtractError(message(node, "torch has no functional collective for it"))
        position = of.index(self.rank)
        groups = chunks(node.args[-2], node.args[-1])
        group = next((g for g in groups if position in g), None)
        if group is None:  # the rank is in none of the groups, and keeps what it has
            return [self.make.call(aten.clone.default, self.copies[self._given(node, position)[0]])]
        given = _mapped(self._given(node, position), self.copies)
        values: Any = node.meta["val"]
        mine = [
            v
            for i, v in enumerate(values)
            if rank_of_result(node, i, self.owners, self.ranks) == self.rank
        ]
        name = group_name([of[i] for i in group])
        return make(self.make, node, given, name, len(group), mine)


# ---------------------------------------------------------------- draws
def _draws(node: fx.Node, rank: int) -> list[tuple[Any, list[Any], dict[str, Any]]]:
    """The plain ops that draw for one rank, as `Node.plain_calls`."""
    ranks, _, _, *rest = node.args
    found = random_nodes.node_of(node.target)
    index = list(ranks).index(rank)
    try:
        return found.plain_calls(index, len(ranks), rest)
    except NotImplementedError as error:
        raise ExtractError(message(node, str(error))) from error


# ---------------------------------------------------------------- graphs
def _mapped(value: Any, copies: Mapping[fx.Node, Any]) -> Any:
    return fx.map_arg(value, lambda n: copies[n])


def _is_object(node: fx.Node) -> bool:
    """An input that is no tensor or number: the mesh of a DTensor, which AOTAutograd hands back."""
    value = node.meta.get("val")
    known = (Tensor, int, float, torch.SymInt, torch.SymFloat, torch.SymBool, list, tuple)
    return node.op == "placeholder" and value is not None and not isinstance(value, known)
