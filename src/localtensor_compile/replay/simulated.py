"""`replay`: a bundle's programs of all ranks in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch.export import ExportedProgram

from ..bundle.load import Bundle
from ..bundle.manifest import Graph
from ..capture.values import snapshot
from .lockstep import run_in_lockstep
from .results import Outcome, outcome


@dataclass(frozen=True)
class Replayed:
    """A graph that was replayed.

    Attributes:
        outcomes: of each rank.
        collectives: how many there were.
    """

    graph: Graph
    outcomes: tuple[Outcome, ...]
    collectives: int


def replay(bundle: Bundle) -> list[Replayed]:
    """Run every graph of a bundle, all ranks in lock-step, and compare with the capture.

    Raises:
        CollectiveError: the ranks' programs would hang on real processes.
    """
    ranks = range(bundle.world_size)
    results: dict[str, dict[int, list[Any]]] = {}
    found = []
    for graph in bundle.manifest.graphs:
        inputs, groups, generators = {}, {}, {}
        programs: dict[int, fx.GraphModule] = {}
        arguments: dict[int, list[Any]] = {}
        for part in graph.parts:
            program = bundle.program(graph.title, part.ranks[0])  # the same for all of them
            constants = constants_of(program)
            for rank in part.ranks:
                values = bundle.values(rank)[graph.title]
                before = results.get(graph.forward or "", {}).get(rank, [])
                inputs[rank] = given(graph, rank, values["given"], before)
                arguments[rank] = [*constants, *inputs[rank]]
                programs[rank], groups[rank] = program.graph_module, part.groups[rank]
                generators[rank] = values["generator"]
        made, count = run_in_lockstep(programs, arguments, groups, generators)
        results[graph.title] = made
        outcomes = tuple(
            outcome(graph.title, r, bundle.values(r)[graph.title], inputs[r], made[r])
            for r in ranks
        )
        found.append(Replayed(graph, outcomes, count))
    return found


def given(graph: Graph, rank: int, values: Sequence[Any], forward: Sequence[Any]) -> list[Any]:
    """The inputs of a rank's program.

    Args:
        values: what is saved for it.
        forward: what its forward has returned, for a backward.
    """
    return [
        snapshot(values[g.index]) if g.kind == "value" else forward[g.index]
        for g in graph.part(rank).inputs
    ]


def constants_of(program: ExportedProgram) -> list[Any]:
    """The values of the placeholders that come before the inputs."""
    return [
        program.constants[spec.target]
        for spec in program.graph_signature.input_specs
        if spec.kind.name == "CONSTANT_TENSOR"
    ]
