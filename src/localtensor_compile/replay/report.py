"""What a replay found, for people and for exit codes."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle.load import Bundle
from ..check.text import plural, ranks_text, table
from .results import Outcome


def lines(bundle: Bundle, outcomes: Sequence[Outcome], engine: str) -> list[str]:
    """A table with a line per graph and program, and what differs."""
    found = {(o.title, o.rank): o for o in outcomes}
    rows = [["graph", "program", "ranks", "values", "result"]]
    wrong = []
    for graph in bundle.manifest.graphs:
        for part in graph.parts:
            of_ranks = [found[graph.title, r] for r in part.ranks]
            different = [o for o in of_ranks if o.different]
            result = "bit-equal"
            if different:
                result = f"different on ranks {ranks_text(o.rank for o in different)}"
            count = sum(o.values for o in of_ranks)
            name = part.program.rpartition("/")[2]
            rows.append([graph.title, name, ranks_text(part.ranks), str(count), result])
            wrong += [f"{graph.title}, rank {o.rank}: {t}" for o in different for t in o.different]
    made = f"captured with torch {bundle.manifest.torch}"
    head = f"{bundle.directory}: {plural(bundle.world_size, 'rank')}, {made}; run by {engine}"
    values = sum(o.values for o in outcomes)
    end = f"PASS: {plural(values, 'value')} as captured, bit for bit"
    if wrong:
        end = f"FAIL: {len(wrong)} of {plural(values, 'value')} differ from the capture"
    return [head, "", *table(rows), "", *wrong, end]


def verdict(outcomes: Sequence[Outcome]) -> int:
    """The exit code: 0 all as captured, 1 something differs."""
    return int(any(o.different for o in outcomes))
