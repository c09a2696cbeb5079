"""What a drawing of the graphs of all ranks shows, whatever its format.

A drawing has a section per graph and a lane per rank, or per set of ranks with one program. A
section is rows in the order of the program. A row has a box in each lane whose ranks have the op,
or the bars of one collective: a bar per process group, over the lanes of its ranks. More than
`LONGEST` lines without a collective are one row, whose boxes count them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..golden.fold import Family, Folded, Line
from ..golden.listing import COLLECTIVE, INPUT, OUTPUT, Step
from ..golden.ranges import at_rank, rank_set, varying_text
from ..golden.text import Document, line_text
from .lanes import Lane, lanes_of
from .uses import Uses, uses

LONGEST = 12

SEVERAL = "several"  # the kind of a box for more than one line


@dataclass(frozen=True)
class Box:
    """One op, or several, of the ranks of a lane.

    Attributes:
        lane: index of the lane.
        kind: INPUT, OP, OUTPUT or SEVERAL.
        name: `mm`, `up.weight`, `17 ops`.
        type: of the result; for SEVERAL what they are: `mm, gelu x2`.
        details: the lines in full, with the user's code that they come from.
    """

    lane: int
    kind: str
    name: str
    type: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Bar:
    """A collective of one process group; of several where these have the same lanes.

    Attributes:
        lanes: indices of the lanes whose ranks run it.
        groups: of ranks.
        group: their name.
        op: `all_reduce sum`.
        bytes: `96 bytes`, what it takes from each rank.
        absent: ranks of the groups that do not have this line.
        source: `function: code` of the user's line.
        details: the line in full.
    """

    lanes: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    group: str
    op: str
    bytes: str
    absent: tuple[int, ...]
    source: str
    details: tuple[str, ...]

    @property
    def label(self) -> str:
        """`all_reduce sum, tp 0-1, 96 bytes`."""
        if len(self.groups) == 1:
            ranks = rank_set(self.groups[0])
        else:
            ranks = f"{len(self.groups)} groups"
        parts = [self.op, f"{self.group} {ranks}".lstrip(), self.bytes]
        if self.absent:
            parts.append(f"without {rank_set(self.absent)}")
        return ", ".join(filter(None, parts))


Mark = Box | Bar
Place = tuple[int, int]  # row, index in the row


@dataclass(frozen=True)
class Edge:
    """In one lane, `target` takes a result of `source`."""

    source: Place
    target: Place
    lane: int


@dataclass(frozen=True)
class Section:
    """One graph."""

    title: str
    rows: tuple[tuple[Mark, ...], ...]
    edges: tuple[Edge, ...]

    def of_lane(self, lane: int) -> list[Place]:
        """The marks of a lane, from top to bottom."""
        return [
            (i, j)
            for i, row in enumerate(self.rows)
            for j, mark in enumerate(row)
            if lane in lanes_of_mark(mark)
        ]


@dataclass(frozen=True)
class Drawing:
    """All that is drawn.

    Attributes:
        title: `world of 4 ranks`.
        groups: names of process groups -> the groups of ranks.
    """

    title: str
    lanes: tuple[Lane, ...]
    groups: Mapping[str, Family]
    sections: tuple[Section, ...]


def lanes_of_mark(mark: Mark) -> tuple[int, ...]:
    """Indices of the lanes that a box or bar is in."""
    return mark.lanes if isinstance(mark, Bar) else (mark.lane,)


def drawing(
    document: Document,
    steps: Mapping[str, Mapping[int, Sequence[Step]]],
    rank: int | None = None,
) -> Drawing:
    """What to draw of the folded graphs.

    Args:
        steps: graph's title -> rank -> its steps, of which the document's lines were made.
        rank: only this one.
    """
    ranks = tuple(range(document.size)) if rank is None else (rank,)
    lanes = lanes_of(document.graphs, ranks)
    sections = [
        _Section(lanes, document.groups, folded).section(title, uses(folded, steps.get(title, {})))
        for title, folded in document.graphs.items()
    ]
    return Drawing(f"world of {document.size} ranks", lanes, dict(document.groups), tuple(sections))


class _Section:
    def __init__(self, lanes: Sequence[Lane], groups: Mapping[str, Family], folded: Folded):
        self.lanes = lanes
        self.groups = groups
        self.folded = folded
        self.shown = {rank: i for i, lane in enumerate(lanes) for rank in lane}
        self.rows: list[tuple[Mark, ...]] = []
        self.places: dict[tuple[int, int], Place] = {}  # (line, rank) -> its mark

    def section(self, title: str, used: Uses) -> Section:
        numbered = [
            (i, line)
            for i, line in enumerate(self.folded.lines)
            if not self.shown.keys().isdisjoint(line.ranks)
        ]
        for kind, run in itertools.groupby(numbered, lambda item: item[1].kind):
            lines = list(run)
            if kind == COLLECTIVE:
                for one in lines:
                    self._add_bars(*one)
            elif len(lines) > LONGEST:
                self._add_boxes(lines)
            else:
                for one in lines:
                    self._add_boxes([one])
        return Section(title, tuple(self.rows), self._edges(used))

    # ---- boxes
    def _add_boxes(self, lines: Sequence[tuple[int, Line]]) -> None:
        row: list[Mark] = []
        for i, lane in enumerate(self.lanes):
            own = [(n, line) for n, line in lines if not set(lane).isdisjoint(line.ranks)]
            if not own:
                continue
            for n, line in own:
                self._set_place(n, line, lane, (len(self.rows), len(row)))
            row.append(_box(i, lane, [line for _, line in own]))
        self.rows.append(tuple(row))

    def _set_place(self, number: int, line: Line, ranks: Sequence[int], place: Place) -> None:
        for rank in ranks:
            if rank in line.ranks:
                self.places[number, rank] = place

    # ---- bars
    def _add_bars(self, number: int, line: Line) -> None:
        families: dict[tuple[str, tuple[int, ...]], dict[tuple[int, ...], None]] = {}
        for name, group in dict.fromkeys(self._group(line, r) for r in line.ranks):
            lanes = {self.shown[r] for r in group if r in self.shown and r in line.ranks}
            if lanes:
                families.setdefault((name, tuple(sorted(lanes))), {})[group] = None
        row: list[Mark] = []
        for (name, lanes_held), groups in families.items():
            members = [r for group in groups for r in group if r in self.shown]
            self._set_place(number, line, members, (len(self.rows), len(row)))
            row.append(self._bar(line, name, lanes_held, tuple(groups)))
        self.rows.append(tuple(row))

    def _group(self, line: Line, rank: int) -> tuple[str, tuple[int, ...]]:
        """Name and ranks of the group in which a rank runs a collective."""
        for argument in reversed(line.arguments):
            name = at_rank(argument, rank)
            for group in sorted(self.groups.get(name, ())):
                if rank in group:
                    return name, group
        return "", (rank,)

    def _bar(
        self, line: Line, name: str, lanes: tuple[int, ...], groups: tuple[tuple[int, ...], ...]
    ) -> Bar:
        ranks = [r for group in groups for r in group]
        there = [r for r in ranks if r in line.ranks and r in self.shown]
        sent = varying_text({r: at_rank(line.bytes, r) for r in there})
        words = [_at(a, there) for a in line.arguments[1:] if at_rank(a, there[0]) != name]
        return Bar(
            lanes=lanes,
            groups=groups,
            group=name,
            op=" ".join([line.op, *(w for w in words if w.isidentifier() or w.isdecimal())]),
            bytes=f"{sent} bytes" if sent else "",
            absent=tuple(r for r in ranks if r not in line.ranks),
            source=line.source,
            details=_details(there, [line]),
        )

    # ---- edges
    def _edges(self, used: Uses) -> tuple[Edge, ...]:
        edges: dict[Edge, None] = {}
        for (number, rank), target in self.places.items():
            for taken in used.get((number, rank), ()):
                source = self.places[taken, rank]
                if source != target:
                    edges[Edge(source, target, self.shown[rank])] = None
        return tuple(edges)


# ---------------------------------------------------------------- text
def _box(i: int, lane: Lane, lines: Sequence[Line]) -> Box:
    details = _details(lane, lines)
    if len(lines) > 1:
        what = {INPUT: "inputs", OUTPUT: "outputs"}.get(lines[0].kind, "ops")
        return Box(i, SEVERAL, f"{len(lines)} {what}", _summary(lines), details)
    line = lines[0]
    held = [r for r in lane if r in line.ranks]
    where = "" if len(held) == len(lane) else f" @ {rank_set(held)}"
    if line.kind == INPUT:
        name = line.name
    elif line.kind == OUTPUT:
        name = line.op
    else:
        name = _short(line.op)
    kind = _at(", ".join(line.arguments) if line.kind == OUTPUT else line.type, held)
    return Box(i, line.kind, name, kind + where, details)


def _short(op: str) -> str:
    """`aten.mm` -> `mm`, `aten.add.Tensor` -> `add`."""
    name = op.removeprefix("aten.")
    return name if name == op else name.partition(".")[0]


# Of which a reader learns the least: they are named last.
_VIEWS = frozenset(
    "_unsafe_view alias clone detach expand permute reshape select slice split squeeze t "
    "transpose unsqueeze view".split()
)


def _summary(lines: Sequence[Line]) -> str:
    if lines[0].kind == INPUT:
        found = [line.op for line in lines]
    elif lines[0].kind == OUTPUT:
        found = [line.op.partition("[")[0] for line in lines]
    else:
        found = sorted((_short(line.op) for line in lines), key=_VIEWS.__contains__)
    counts: dict[str, int] = {}
    for op in found:
        counts[op] = counts.get(op, 0) + 1
    return ", ".join(op if n == 1 else f"{op} x{n}" for op, n in counts.items())


def _at(text: str, ranks: Sequence[int]) -> str:
    """What a folded text says for these ranks."""
    return varying_text({rank: at_rank(text, rank) for rank in ranks})


def _details(ranks: Sequence[int], lines: Iterable[Line]) -> tuple[str, ...]:
    """Each line, with what these ranks have, under the user's code that it comes from."""
    found, source = [], ""
    for line in lines:
        if line.source and line.source != source:
            source = line.source
            found.append(f"# {source}")
        held = [r for r in ranks if r in line.ranks]
        text = line_text(line, line.ranks)
        found.append(at_rank(text, held[0]) if len(held) == 1 else text)
    return tuple(found)
