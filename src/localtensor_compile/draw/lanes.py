"""Which ranks share a lane of a drawing.

Up to `MOST` ranks have a lane each. More are drawn as one lane per kind of program, first with
ranks of other sizes apart, then without; where there are still too many kinds, as one lane.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from ..golden.fold import Folded, Line
from ..golden.ranges import at_rank, rank_set

MOST = 8

Lane = tuple[int, ...]  # its ranks


def lane_title(lane: Lane) -> str:
    """`rank 3`, `ranks 0-31`."""
    return f"rank{'s' if len(lane) > 1 else ''} {rank_set(lane)}"


def lanes_of(graphs: Mapping[str, Folded], ranks: Sequence[int]) -> tuple[Lane, ...]:
    """The lanes of a drawing, by their first rank.

    Args:
        ranks: those that are drawn.
    """
    if len(ranks) <= MOST:
        return tuple((rank,) for rank in ranks)
    lines = [line for folded in graphs.values() for line in folded.lines]
    for what in (_sizes, _presence):
        lanes = _kinds(lines, ranks, what)
        if len(lanes) <= MOST:
            return lanes
    return (tuple(ranks),)


def _kinds(
    lines: Sequence[Line], ranks: Sequence[int], what: Callable[[Line, int], Hashable]
) -> tuple[Lane, ...]:
    kinds: dict[tuple[Hashable, ...], list[int]] = {}
    for rank in ranks:
        key = tuple(what(line, rank) if rank in line.ranks else None for line in lines)
        kinds.setdefault(key, []).append(rank)
    return tuple(map(tuple, kinds.values()))


def _sizes(line: Line, rank: int) -> Hashable:
    return at_rank(line.type, rank)


def _presence(line: Line, rank: int) -> Hashable:
    return True
