"""What a drawing of captured graphs shows, whatever the format.

Ranks are lanes. A graph is a list of rows: what ranks compute on their own, and collectives, whose
bars span the lanes of their groups. Up to 8 ranks have a lane each; of more, ranks that have the
same lines share one, so that a drawing for 64 equal ranks has one lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..check.text import plural, ranks_text
from ..golden.fold import Family, Folded, Line
from ..golden.listing import COLLECTIVE, INPUT, OUTPUT
from ..golden.ranges import at_rank
from ..golden.text import Document

# As many ranks have lanes of their own.
LANES = 8
# Of a longer run of ops the first and last ones are shown.
LONGEST_RUN = 12
_ENDS = 4


@dataclass(frozen=True)
class Lane:
    """One or more ranks next to each other in a drawing."""

    ranks: tuple[int, ...]

    @property
    def label(self) -> str:
        return ("rank " if len(self.ranks) == 1 else "ranks ") + ranks_text(self.ranks)


@dataclass(frozen=True)
class Entry:
    """A line of text in a lane.

    Attributes:
        text: `mm: f32[3, 8]`.
        detail: all there is to say: the whole golden line and the user's code.
    """

    text: str
    detail: str


@dataclass(frozen=True)
class Local:
    """What ranks do on their own until the next collective: lane -> entries."""

    entries: Mapping[int, tuple[Entry, ...]]


@dataclass(frozen=True)
class Bar:
    """A collective of one group, or of several groups of the same lanes.

    Attributes:
        lanes: the lanes of its ranks.
        ranks: its ranks.
        group: name of the groups, for the colour.
    """

    lanes: tuple[int, ...]
    ranks: tuple[int, ...]
    group: str
    text: str
    detail: str


@dataclass(frozen=True)
class Joint:
    """One collective: a bar per group. Bars whose lanes overlap are in rows below each other."""

    rows: tuple[tuple[Bar, ...], ...]


@dataclass(frozen=True)
class Section:
    """One graph: forward, backward."""

    title: str
    rows: tuple[Local | Joint, ...]


@dataclass(frozen=True)
class Drawing:
    """All of a drawing.

    Attributes:
        groups: names of the process groups, in a fixed order.
    """

    lanes: tuple[Lane, ...]
    groups: tuple[str, ...]
    sections: tuple[Section, ...]


def drawing(document: Document, rank: int | None = None) -> Drawing:
    """What to draw of captured graphs.

    Args:
        rank: only this rank's lane.
    """
    ranks = range(document.size) if rank is None else (rank,)
    lanes = tuple(_lanes(document, ranks))
    groups = tuple(sorted(document.groups))
    sections = tuple(
        Section(title, tuple(_rows(folded, lanes, document.groups)))
        for title, folded in document.graphs.items()
    )
    return Drawing(lanes, groups, sections)


def _lanes(document: Document, ranks: Sequence[int]) -> Iterator[Lane]:
    if len(ranks) <= LANES:
        yield from (Lane((rank,)) for rank in ranks)
        return
    alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for rank in ranks:
        lines = tuple(
            (title, i)
            for title, folded in document.graphs.items()
            for i, line in enumerate(folded.lines)
            if rank in line.ranks
        )
        alike.setdefault(lines, []).append(rank)
    yield from (Lane(tuple(same)) for same in alike.values())


def _rows(
    folded: Folded, lanes: Sequence[Lane], groups: Mapping[str, Family]
) -> Iterator[Local | Joint]:
    waiting: list[Line] = []
    for line in folded.lines:
        if line.kind != COLLECTIVE:
            waiting.append(line)
            continue
        if waiting:
            yield _local(waiting, lanes)
        waiting = []
        bars = list(_bars(line, lanes, groups))
        if bars:
            yield Joint(tuple(_without_overlap(bars)))
    if waiting:
        yield _local(waiting, lanes)


# ---------------------------------------------------------------- ops
def _local(lines: Sequence[Line], lanes: Sequence[Lane]) -> Local:
    found = {}
    for number, lane in enumerate(lanes):
        own = [line for line in lines if set(line.ranks) & set(lane.ranks)]
        if own:
            found[number] = tuple(_entries(own, lane))
    return Local(found)


def _entries(lines: Sequence[Line], lane: Lane) -> Iterator[Entry]:
    inputs = [line for line in lines if line.kind == INPUT]
    ops = [line for line in lines if line.kind not in (INPUT, OUTPUT)]
    outputs = [line for line in lines if line.kind == OUTPUT]
    if inputs:
        yield _together(inputs, lane, "in")
    if len(ops) > LONGEST_RUN:
        yield from (_entry(line, lane) for line in ops[:_ENDS])
        yield _together(ops[_ENDS:-_ENDS], lane, "op")
        yield from (_entry(line, lane) for line in ops[-_ENDS:])
    else:
        yield from (_entry(line, lane) for line in ops)
    if outputs:
        yield _together(outputs, lane, "out")


def _together(lines: Sequence[Line], lane: Lane, what: str) -> Entry:
    words = {
        "in": [line.name for line in lines],
        "op": [line.op.removeprefix("aten.") for line in lines],
        "out": [line.op for line in lines],
    }[what]
    head = f"{plural(len(lines), 'op')}: " if what == "op" else f"{what}: "
    detail = "\n".join(_entry(line, lane).detail for line in lines)
    return Entry(head + ", ".join(words), detail)


def _entry(line: Line, lane: Lane) -> Entry:
    return Entry(_at(f"{line.name}: {line.type}", lane), _detail(line, lane))


def _detail(line: Line, lane: Lane) -> str:
    text = f"{line.name}: {line.type} = {line.op}({', '.join(line.arguments)})"
    return "\n".join(filter(None, [_at(text, lane), _size(line, lane), line.source]))


def _size(line: Line, lane: Lane) -> str:
    return f"{_at(line.bytes, lane)} bytes" if line.bytes else ""


def _at(text: str, lane: Lane) -> str:
    """What a text says for a lane, if it says the same for all of its ranks."""
    found = {at_rank(text, rank) for rank in lane.ranks}
    return found.pop() if len(found) == 1 else text


# ---------------------------------------------------------------- collectives
def _bars(line: Line, lanes: Sequence[Lane], groups: Mapping[str, Family]) -> Iterator[Bar]:
    names = [a for a in line.arguments if a in groups]
    name = names[-1] if names else ""
    families = sorted(g for g in groups.get(name, ()) if set(g) & set(line.ranks))
    at_lanes: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for group in families or [line.ranks]:
        of = tuple(i for i, lane in enumerate(lanes) if set(lane.ranks) & set(group))
        if of:
            at_lanes.setdefault(of, []).append(group)
    options = [a for a in line.arguments[1:] if a != name]
    for of, same in at_lanes.items():
        ranks = tuple(sorted(r for group in same for r in group))
        where = f"{name} {ranks_text(ranks)}" if name else ranks_text(ranks)
        if len(same) > 1:
            where += f", {len(same)} groups"
        lane = Lane(tuple(r for i in of for r in lanes[i].ranks))
        text = " ".join(filter(None, [line.op, *options, where, _size(line, lane)]))
        yield Bar(of, ranks, name, _at(text, lane), _detail(line, lane))


def _without_overlap(bars: Sequence[Bar]) -> list[tuple[Bar, ...]]:
    rows: list[list[Bar]] = []
    for bar in bars:
        for row in rows:
            if all(b.lanes[-1] < bar.lanes[0] or bar.lanes[-1] < b.lanes[0] for b in row):
                row.append(bar)
                break
        else:
            rows.append([bar])
    return [tuple(row) for row in rows]
