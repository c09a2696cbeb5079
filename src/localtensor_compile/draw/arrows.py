"""Data edges that help in a drawing: into every collective, and out of it to what is next.

Between neighbours of a lane an arrow is straight. One from further up goes down beside the lane,
in a gutter with a few slots; the longest of those for which there is no slot are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .model import Bar, Edge, Place, Section

SLOTS, SLOT = 4, 6.0


@dataclass(frozen=True)
class Span:
    """From where to where something is, downwards."""

    top: float
    bottom: float


@dataclass(frozen=True)
class Arrow:
    """A line through points, with a head at the last."""

    points: tuple[tuple[float, float], ...]


def gutter_width(section: Section, spans: Mapping[Place, Span]) -> float:
    """Room that the arrows of a section need beside each lane."""
    slots = _slots(section, spans).values()
    return (max(slots) + 2) * SLOT if slots else 0.0


def arrows(
    section: Section, spans: Mapping[Place, Span], lanes: Sequence[tuple[float, float]]
) -> list[Arrow]:
    """The arrows of a section.

    Args:
        lanes: x and width of each.
    """
    found = []
    for edge in _straight(section):
        x, width = lanes[edge.lane]
        middle = x + width / 2
        found.append(Arrow(((middle, spans[edge.source].bottom), (middle, spans[edge.target].top))))
    for edge, slot in _slots(section, spans).items():
        x, width = lanes[edge.lane]
        right = x + width
        aside = right + (slot + 1) * SLOT
        start, end = _middle(spans[edge.source]), _middle(spans[edge.target])
        points: list[tuple[float, float]] = []
        if _covers(section, edge.source, edge.lane):
            points.append((aside, spans[edge.source].bottom))
        else:
            points += [(right, start), (aside, start)]
        if _covers(section, edge.target, edge.lane):
            points.append((aside, spans[edge.target].top))
        else:
            points += [(aside, end), (right, end)]
        found.append(Arrow(tuple(points)))
    return found


def _straight(section: Section) -> list[Edge]:
    next_ones = _next(section)
    return [
        e
        for e in section.edges
        if next_ones.get((e.source, e.lane)) == e.target
        and (_is_bar(section, e.source) or _is_bar(section, e.target))
    ]


def _slots(section: Section, spans: Mapping[Place, Span]) -> dict[Edge, int]:
    """The slot of each arrow beside a lane."""
    next_ones = _next(section)
    aside = [
        e
        for e in section.edges
        if _is_bar(section, e.target) and next_ones.get((e.source, e.lane)) != e.target
    ]
    # The arrows from one mark share their way down.
    ends: dict[tuple[int, Place], float] = {}
    for e in aside:
        key = e.lane, e.source
        ends[key] = max(ends.get(key, 0.0), spans[e.target].bottom)
    lengths = {key: end - spans[key[1]].top for key, end in ends.items()}
    taken: dict[tuple[int, int], list[Span]] = {}
    slots: dict[tuple[int, Place], int] = {}
    for lane, source in sorted(lengths, key=lambda key: (lengths[key], key)):
        needed = Span(spans[source].top, ends[lane, source])
        for slot in range(SLOTS):
            others = taken.setdefault((lane, slot), [])
            if all(needed.bottom < o.top or o.bottom < needed.top for o in others):
                others.append(needed)
                slots[lane, source] = slot
                break
    return {e: slots[e.lane, e.source] for e in aside if (e.lane, e.source) in slots}


def _next(section: Section) -> dict[tuple[Place, int], Place]:
    """(mark, lane) -> the mark below it."""
    found = {}
    for lane in {edge.lane for edge in section.edges}:
        found.update({(a, lane): b for a, b in itertools.pairwise(section.of_lane(lane))})
    return found


def _covers(section: Section, place: Place, lane: int) -> bool:
    """Whether a bar also covers what is beside the lane."""
    mark = section.rows[place[0]][place[1]]
    return isinstance(mark, Bar) and lane + 1 in mark.lanes


def _is_bar(section: Section, place: Place) -> bool:
    return isinstance(section.rows[place[0]][place[1]], Bar)


def _middle(span: Span) -> float:
    return (span.top + span.bottom) / 2
