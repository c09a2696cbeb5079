"""What is wrong between the calls of ranks: where, and what a cluster would make of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..check.text import shortened
from ..golden.ranges import rank_set
from ..golden.source import Source
from .calls import Call
from .wording import call_text, ranks_of

HANG, CORRUPT, ERROR, FRAGILE = "hang", "corrupt", "error", "fragile"

DIFFERENT = "different collectives"
SOME_RANKS = "only some ranks"
FAILS = "a rank fails"
DEADLOCK = "deadlock"
SHAPES, DTYPES, REDUCE_OPS, ROOTS, SPLITS = "shapes", "dtypes", "reduce ops", "roots", "splits"
NO_RECV, NO_SEND, TAGS = "send without recv", "recv without send", "tags"
GROUPS = "groups"

_WIDTH = 98


@dataclass(frozen=True)
class Place:
    """What some ranks do, and where.

    Attributes:
        ranks: those that do it.
        text: `all_reduce(f32[4], sum)`, `returns`.
        source: the user's line, if it is known.
    """

    ranks: tuple[int, ...]
    text: str
    source: Source | None


@dataclass(frozen=True)
class Finding:
    """One mistake.

    Attributes:
        kind: `different collectives`, `shapes`, ...
        outcome: what a cluster does: HANG, CORRUPT (goes on with wrong values), ERROR, or FRAGILE
            (goes on, but against the rules of torch.distributed).
        title: the mistake in one line.
        places: which ranks do what where.
        happens: what happens on a cluster.
        change: what to do.
        waits: rank -> the line in which it would wait for ever.
    """

    kind: str
    outcome: str
    title: str
    places: tuple[Place, ...]
    happens: str
    change: str
    waits: Mapping[int, Source | None] = field(default_factory=dict)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that take part in it."""
        return tuple(sorted({r for place in self.places for r in place.ranks}))

    @property
    def lines(self) -> tuple[Source, ...]:
        """The user's lines that it names."""
        return tuple(dict.fromkeys(p.source for p in self.places if p.source is not None))

    def __str__(self) -> str:
        out = [_filled(f"{self.kind} ({self.outcome}): {self.title}", 0)]
        width = max((len(ranks_of(p.ranks)) for p in self.places), default=0)
        for place in self.places:
            who, room = f"{ranks_of(place.ranks):<{width}}", " " * width
            if place.source is None:
                out.append(f"    {who}  {place.text}")
                continue
            code = shortened(place.source.code, _WIDTH - width - len(str(place.source)) - 8)
            out += [f"    {who}  {place.source}: {code}", f"    {room}  {place.text}"]
        out.append(_filled(f"On a cluster: {self.happens}", 4))
        out.append(_filled(f"Change: {self.change}", 4))
        return "\n".join(out)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind,
            "outcome": self.outcome,
            "title": self.title,
            "ranks": list(self.ranks),
            "places": [
                {"ranks": list(p.ranks), "does": p.text, **_where(p.source)} for p in self.places
            ],
            "happens": self.happens,
            "change": self.change,
            "waits": {str(r): _where(s) for r, s in sorted(self.waits.items())},
        }


def _filled(text: str, indent: int) -> str:
    """Wrapped; further lines step to the right."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 4),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _where(source: Source | None) -> dict[str, Any]:
    if source is None:
        return {"file": None, "line": None, "code": None}
    return {"file": source.file, "line": source.line, "code": source.code}


def places_of(calls: Iterable[Call]) -> tuple[Place, ...]:
    """The calls, those of equal text and line as one."""
    found: dict[tuple[str, Source | None], list[int]] = {}
    for call in calls:
        found.setdefault((call_text(call), call.source), []).append(call.rank)
    return tuple(Place(tuple(r), text, source) for (text, source), r in found.items())


def ranks_in_words(values: Mapping[Any, Iterable[int]]) -> str:
    """`sum on ranks 0-2, max on rank 3` of {value: ranks}."""
    return ", ".join(f"{value} on {ranks_of(ranks)}" for value, ranks in values.items())


def short_ranks(ranks: Iterable[int]) -> str:
    """`0-2,5`."""
    return rank_set(ranks)
