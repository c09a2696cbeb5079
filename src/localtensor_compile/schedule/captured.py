"""The schedule of captured graphs: the functional collectives of each rank's program."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch.fx as fx

from ..capture.graphs import CapturedGraphs
from ..capture.record import BACKWARD, FORWARD, JOINT
from ..compile.extract import group_ranks
from ..golden.listing import COLLECTIVE as COLLECTIVE_STEP
from ..golden.listing import WAIT, Step, TensorType, is_collective, schema_name
from .calls import COLLECTIVE, WORLD, Call, Event, Group, RankRecord, Wait
from .schedule import Schedule


def captured_schedule(graphs: CapturedGraphs) -> Schedule:
    """What each rank's captured programs call, forward before backward.

    Raises:
        ExtractError: an op that cannot be taken apart.
    """
    labels = {ranks: name for name, family in graphs.document.groups.items() for ranks in family}
    labels[tuple(range(graphs.world_size))] = WORLD
    titles = [t for t in graphs.titles if t.partition(" ")[0] in (FORWARD, BACKWARD)]
    titles = titles or [t for t in graphs.titles if t.partition(" ")[0] == JOINT]
    records = {}
    for rank in range(graphs.world_size):
        reader = _Reader(rank, labels)
        for title in titles:
            steps = graphs.steps(title)[rank]
            reader.read(graphs.rank(rank)[title], [s for s in steps if s.kind == COLLECTIVE_STEP])
        records[rank] = RankRecord(tuple(reader.events))
    return Schedule(graphs.world_size, records)


class _Reader:
    def __init__(self, rank: int, labels: dict[tuple[int, ...], str]) -> None:
        self.rank = rank
        self.labels = labels
        self.events: list[Event] = []
        self.calls = 0
        self.on_group: dict[str, int] = {}

    def read(self, module: fx.GraphModule, steps: list[Step]) -> None:
        """Add the collectives of one graph; `steps` are theirs, in the same order."""
        left = iter(steps)
        number_of: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            if schema_name(node.target) == WAIT:
                started = _origin(node.args[0])
                if started in number_of:
                    self.events.append(Wait(number_of[started]))
            elif node.op == "call_function" and is_collective(node.target):
                number_of[node] = self.calls
                self.events.append(self._call(node, next(left)))
                self.calls += 1

    def _call(self, node: fx.Node, step: Step) -> Call:
        schema: Any = getattr(node.target, "_schema")  # noqa: B009
        given = dict(zip((a.name for a in schema.arguments), node.args)) | dict(node.kwargs)
        group = self._group(given["group_name"])
        sequence = self.on_group.get(group.name, 0)
        self.on_group[group.name] = sequence + 1
        source = given.get("src")
        splits = None
        if "output_split_sizes" in given:
            sizes = [tuple(given[f"{side}_split_sizes"]) for side in ("input", "output")]
            if all(isinstance(n, int) for s in sizes for n in s):
                splits = sizes[0], sizes[1]
        return Call(
            rank=self.rank,
            number=self.calls,
            kind=COLLECTIVE,
            op=step.op,
            group=group,
            sequence=sequence,
            given=tuple(_types(node.args[0])),
            taken=tuple(t for t in _listed(step.type) if isinstance(t, TensorType)),
            bytes=step.sent,
            reduce_op=given.get("reduce_op"),
            root=None if source is None else group.ranks[source],
            splits=splits,
            waits=False,
            stack=() if step.source is None else (step.source,),
        )

    def _group(self, name: str) -> Group:
        ranks = group_ranks(name)
        return Group(name, ranks, self.labels.get(ranks, name))


def _origin(value: Any) -> Any:
    """The collective that a value is a result of."""
    while isinstance(value, fx.Node) and value.target is operator.getitem:
        value = value.args[0]
    return value


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _types(value: Any) -> Iterator[TensorType]:
    """dtype and shape of each tensor that a collective takes."""
    from ..check.text import dtype_text

    for item in value if isinstance(value, (list, tuple)) else [value]:
        held = item.meta["val"]
        shape = tuple(n if isinstance(n, int) else str(n) for n in held.shape)
        yield TensorType(dtype_text(held.dtype), shape)
