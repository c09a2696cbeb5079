"""What `lt.capture` returns: the graphs of a program, of all ranks and of each."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from ..compile.extract import group_ranks
from ..draw.dot import dot
from ..draw.model import Drawing, drawing
from ..draw.svg import svg
from ..errors import LocalTensorError
from ..golden.fold import Family, Folded, GroupNames, Line, fold
from ..golden.listing import COLLECTIVE, Step, listing
from ..golden.ranges import at_rank
from ..golden.text import Document, write
from .programs import FlatGraph, flat_graph, rank_programs
from .record import BACKWARD, DYNAMO, FORWARD, JOINT, POST_GRAD, Recorded


class CaptureError(LocalTensorError, RuntimeError):
    """A program whose graphs cannot be captured, or a stage or rank that there is not."""


@dataclass(frozen=True)
class Collective:
    """One collective of one graph.

    Attributes:
        graph: the graph's title.
        op: `all_reduce`, ...
        group: the name of its groups.
        groups: the groups of ranks that run it.
        ranks: the ranks that run it.
        bytes: rank -> bytes of what it takes from that rank; None where that is symbolic.
        source: `function: code` of the user's line.
    """

    graph: str
    op: str
    group: str
    groups: Family
    ranks: tuple[int, ...]
    bytes: Mapping[int, int | None]
    source: str


class CapturedGraphs:
    """The graphs of a program on all ranks of a simulated world.

    `print(graphs)` shows them folded: a line per step, whatever the number of ranks.

    Attributes:
        world_size: number of ranks.
        stages: those that were asked for.
        graph_breaks: why Dynamo broke graphs, and how often: code between graphs is in none.
        device: where the program's tensors were.
    """

    def __init__(
        self,
        world_size: int,
        stages: Sequence[str],
        frames: Sequence[Recorded],
        groups: Mapping[str, Family],
        graph_breaks: Mapping[str, int],
        device: str,
    ) -> None:
        self.graph_breaks = dict(graph_breaks)
        self.device = device
        self.world_size = world_size
        self.stages = tuple(stages)
        self._frames = list(frames)
        self._groups = dict(groups)

    def _suffix(self, frame: int) -> str:
        """What titles of a frame's graphs end in."""
        return f" {frame}" if len(self._frames) > 1 else ""

    # ---- graphs
    @functools.cached_property
    def _flat(self) -> list[FlatGraph]:
        ranks = range(self.world_size)
        return [
            flat_graph(f.graphs[JOINT if JOINT in f.graphs else FORWARD], f.names, ranks)
            for f in self._frames
        ]

    @functools.cached_property
    def _programs(self) -> dict[str, dict[int, fx.GraphModule]]:
        """Title -> rank -> program."""
        found: dict[str, dict[int, fx.GraphModule]] = {}
        for number, (frame, flat) in enumerate(zip(self._frames, self._flat)):
            suffix = self._suffix(number)
            for rank in range(self.world_size):
                for stage, module in rank_programs(frame, flat, rank).items():
                    found.setdefault(f"{stage}{suffix}", {})[rank] = module
        return found

    @functools.cached_property
    def _steps(self) -> dict[str, dict[int, list[Step]]]:
        return {
            title: {r: listing(m.graph, group_ranks) for r, m in programs.items()}
            for title, programs in self._programs.items()
        }

    def steps(self, title: str) -> Mapping[int, Sequence[Step]]:
        """Rank -> the steps of its program in the graph of that title.

        Raises:
            CaptureError: no such graph.
        """
        if title not in self._steps:
            known = ", ".join(self._steps)
            raise CaptureError(f"there is no graph {title!r}; captured were {known}.")
        return self._steps[title]

    @property
    def titles(self) -> tuple[str, ...]:
        """`joint`, `forward`, `backward`; with numbers where Dynamo captured several frames."""
        return tuple(self._programs)

    def rank(self, rank: int) -> Mapping[str, fx.GraphModule]:
        """Title -> the program of one rank: what it would run under torchrun.

        Its inputs and outputs are plain tensors of that rank, its collectives torch's functional
        ones on groups named by their ranks (`ranks:0,1`).

        Raises:
            CaptureError: no such rank.
            ExtractError: an op that cannot be taken apart.
        """
        self._check_rank(rank)
        return {title: programs[rank] for title, programs in self._programs.items()}

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise CaptureError(f"there is no rank {rank} in a world of {self.world_size} ranks.")

    def all_ranks(self, frame: int = 0) -> fx.GraphModule:
        """The graph of all ranks, joint if there are gradients; a collective is one node."""
        return self._flat[frame].module

    def dynamo(self, frame: int = 0) -> fx.GraphModule:
        """Dynamo's graph of a frame, whose values are LocalTensors."""
        return self._frames[frame].graphs[DYNAMO]

    def post_grad(self, backward: bool = False, frame: int = 0) -> fx.GraphModule:
        """What Inductor compiles, after its passes; with stage="post_grad" only.

        Raises:
            CaptureError: it was not captured.
        """
        title = f"{POST_GRAD} {BACKWARD if backward else FORWARD}"
        found = self._frames[frame].graphs.get(title)
        if found is None:
            raise CaptureError(
                f"there is no {title} graph: capture it with stage='post_grad', and run a "
                "backward in the program for that of the backward."
            )
        return found

    @property
    def lowered(self) -> dict[str, fx.GraphModule]:
        """Title -> what Inductor compiles; empty without stage="post_grad"."""
        found = {}
        for number, frame in enumerate(self._frames):
            suffix = self._suffix(number)
            for title, module in frame.graphs.items():
                if title.startswith(POST_GRAD):
                    found[f"{title}{suffix}"] = module
        return found

    # ---- lines
    @functools.cached_property
    def document(self) -> Document:
        """The folded graphs of the stages that were asked for."""
        groups = GroupNames(self.world_size, self._groups)
        graphs: dict[str, Folded] = {}
        saved: Mapping[tuple[int, str], str] | None = None
        for title, steps in self._steps.items():
            stage = title.partition(" ")[0]
            folded = fold(steps, groups, saved if stage == BACKWARD else None)
            if stage == FORWARD:
                saved = folded.names
            if stage in self.stages:
                graphs[title] = folded
        return Document(self.world_size, groups.used, graphs)

    def __str__(self) -> str:
        return write(self.document)

    # ---- drawings
    def to_svg(self, *, rank: int | None = None) -> str:
        """A drawing as SVG: ranks side by side, collectives across them, time downwards.

        Of more than 8 ranks those with equal programs share a lane.

        Args:
            rank: only what this rank runs.

        Raises:
            CaptureError: no such rank, or only stages that are not drawn.
        """
        return svg(self._drawing(rank))

    def to_dot(self, *, rank: int | None = None) -> str:
        """A drawing as GraphViz source text: ranks as clusters, collectives between them.

        Args:
            rank: only what this rank runs.

        Raises:
            CaptureError: no such rank, or only stages that are not drawn.
        """
        return dot(self._drawing(rank))

    def _drawing(self, rank: int | None) -> Drawing:
        if rank is not None:
            self._check_rank(rank)
        if not self.document.graphs:
            raise CaptureError(
                f"there is no graph to draw: of stage={', '.join(self.stages)} nothing is of each "
                f"rank. Capture {JOINT!r}, {FORWARD!r} or {BACKWARD!r} too."
            )
        return drawing(self.document, self._steps, rank)

    @property
    def collectives(self) -> list[Collective]:
        """Every collective of the captured stages, in order."""
        found = []
        for title, folded in self.document.graphs.items():
            steps = self._steps[title]
            for line in folded.lines:
                if line.kind == COLLECTIVE:
                    found.append(self._collective(title, line, steps))
        return found

    def _collective(self, title: str, line: Line, steps: Mapping[int, list[Step]]) -> Collective:
        known = self.document.groups
        group = next((a for a in reversed(line.arguments) if a in known), "")
        sent = {rank: steps[rank][index].sent for rank, index in line.steps.items()}
        groups = frozenset(g for g in known.get(group, ()) if set(g) & set(line.ranks))
        return Collective(title, line.op, group, groups, line.ranks, sent, line.source)

    def lines(self, source: str = "", *, rank: int | None = None) -> list[str]:
        """The folded lines that come from user's code.

        Args:
            source: part of `function: code`, as `forward` or `self.up(`.
            rank: only what this rank has, with its own sizes.
        """
        found = []
        for folded in self.document.graphs.values():
            for line in folded.lines:
                if source not in line.source or (rank is not None and rank not in line.ranks):
                    continue
                text = f"{line.name}: {line.type} = {line.op}({', '.join(line.arguments)})"
                found.append(text if rank is None else at_rank(text, rank))
        return found

    @property
    def parameters(self) -> dict[str, dict[int, Any]]:
        """Name -> {rank: fake tensor of that rank's shard}."""
        found: dict[str, dict[int, Any]] = {}
        for flat in self._flat:
            nodes = (n for n in flat.module.graph.nodes if n.op == "placeholder")
            for node, known in zip(nodes, flat.inputs):
                if known.kind == "parameter" and known.rank is not None:
                    found.setdefault(known.label, {})[known.rank] = node.meta["val"]
        return found
