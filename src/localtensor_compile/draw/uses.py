"""Which lines of a folded graph take the results of which, on each rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..golden.fold import Folded
from ..golden.listing import Ref, Step

Uses = Mapping[tuple[int, int], tuple[int, ...]]


def uses(folded: Folded, steps: Mapping[int, Sequence[Step]]) -> Uses:
    """(line, rank) -> the lines whose results that line takes on that rank.

    Args:
        steps: rank -> its steps, of which the lines were made.
    """
    line_of = {
        (rank, index): number
        for number, line in enumerate(folded.lines)
        for rank, index in line.steps.items()
    }
    found = {}
    for (rank, index), number in line_of.items():
        step = steps[rank][index]
        taken = {line_of[rank, ref.step] for ref in _refs((step.arguments, step.keywords))}
        found[number, rank] = tuple(sorted(taken))
    return found


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _refs(item)
