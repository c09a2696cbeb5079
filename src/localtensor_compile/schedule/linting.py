"""All findings of what ranks did, in the order in which they would be met."""

from __future__ import annotations

from .calls import Records
from .comparing import compare
from .findings import GROUPS, HANG, Finding
from .matching import match
from .stuck import skipped_groups, stuck


def findings(records: Records) -> list[Finding]:
    """What is wrong between the ranks; what only follows from another finding is left out.

    Args:
        records: rank -> what it did, of all ranks of a world.
    """
    matched = match(records)
    found = []
    explained = set(matched.halted)
    seen = set()
    for meeting in matched.meetings:
        finding = compare(meeting)
        if finding is None:
            continue
        if not meeting.met or finding.kind == GROUPS:
            explained.update(r for r, b in matched.blocked.items() if b.meeting is meeting)
        # The same lines again, in a loop, are one mistake.
        key = (finding.kind, finding.lines, finding.ranks)
        if key not in seen:
            seen.add(key)
            found.append(finding)
    found += stuck(records, matched, explained)
    if not any(f.kind == GROUPS or f.outcome == HANG for f in found):
        found += skipped_groups(records, matched)
    return found
