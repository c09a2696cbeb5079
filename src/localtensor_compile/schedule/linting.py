"""All findings of what ranks did, in the order in which they would be met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .calls import STUCK, Records
from .comparing import compare
from .findings import DEADLOCK, GROUPS, HANG, Finding, Place
from .matching import Matched, Meeting, match
from .stuck import skipped_groups, stuck, waiting_places
from .wording import ranks_of


def findings(records: Records) -> list[Finding]:
    """What is wrong between the ranks; what only follows from another finding is left out.

    Args:
        records: rank -> what it did, of all ranks of a world.
    """
    matched = match(records)
    found: list[Finding] = []
    explained = set(matched.halted)
    for meeting in matched.meetings:
        finding = compare(meeting)
        if finding is None:
            continue
        # Once ranks have made other groups, whatever they do with them follows from that.
        if finding.kind == GROUPS and any(f.kind == GROUPS for f in found):
            continue
        found.append(_with_waits(finding, meeting, matched))
        if finding.kind == GROUPS:
            explained.update(matched.blocked)
        elif not meeting.met:
            explained.update(r for r, b in matched.blocked.items() if b.meeting is meeting)
    found += stuck(records, matched, explained)
    if not any(f.outcome == HANG for f in found):
        found += skipped_groups(records, matched)
    return _merged(found or _unexplained(records))


def _unexplained(records: Records) -> list[Finding]:
    """Ranks that the runner has stopped for what no call shows, as a wait for a store's key."""
    stopped = {r: record for r, record in records.items() if record.end == STUCK}
    if not stopped:
        return []
    return [
        Finding(
            DEADLOCK,
            HANG,
            f"{ranks_of(stopped)} cannot go on",
            tuple(Place((r,), record.error, record.source) for r, record in stopped.items()),
            "these ranks wait for ever, or fail.",
            "let every wait have its counterpart on another rank.",
        )
    ]


def _with_waits(finding: Finding, meeting: Meeting, matched: Matched) -> Finding:
    """With the lines in which ranks wait, which may be others than those of the calls."""
    waiting = [r for r, b in sorted(matched.blocked.items()) if b.meeting is meeting]
    if finding.outcome != HANG or not waiting:
        return finding
    return replace(
        finding,
        places=finding.places + waiting_places(matched.blocked, waiting),
        waits={r: matched.blocked[r].event.source for r in waiting},
    )


def _merged(found: Iterable[Finding]) -> list[Finding]:
    """The same mistake in the same lines, of other ranks or again in a loop, is one."""
    result: dict[object, Finding] = {}
    for finding in found:
        key = (finding.kind, finding.outcome, finding.lines)
        known = result.get(key)
        if known is None:
            result[key] = finding
            continue
        places: dict[tuple[object, ...], Place] = {(p.text, p.source): p for p in known.places}
        for place in finding.places:
            same = places.get((place.text, place.source))
            ranks = {*place.ranks, *(same.ranks if same else ())}
            places[place.text, place.source] = replace(place, ranks=tuple(sorted(ranks)))
        result[key] = replace(
            known,
            places=tuple(places.values()),
            waits={**finding.waits, **known.waits},
        )
    return list(result.values())
