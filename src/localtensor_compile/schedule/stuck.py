"""Ranks that wait for ever: for whom, and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from ..golden.source import Source
from .branches import branch_of
from .calls import GROUP, NEW_GROUP, RAISED, RECV, RETURNED, SEND, Call, Records, Wait
from .findings import (
    CORRUPT,
    DEADLOCK,
    ERROR,
    FAILS,
    FRAGILE,
    HANG,
    NO_RECV,
    NO_SEND,
    SOME_RANKS,
    TAGS,
    Finding,
    Place,
    places_of,
)
from .matching import Blocked, Matched, Meeting, like
from .wording import ranks_of


def stuck(records: Records, matched: Matched, explained: set[int]) -> list[Finding]:
    """A finding per reason for which ranks wait.

    Args:
        records: what ranks did.
        matched: which calls met.
        explained: ranks whose waiting, or whose end, is in another finding. It is added to.
    """
    return _Stuck(records, matched, explained).run()


class _Stuck:
    def __init__(self, records: Records, matched: Matched, explained: set[int]) -> None:
        self.records = records
        self.matched = matched
        self.blocked = matched.blocked
        self.explained = explained

    def run(self) -> list[Finding]:
        found: list[Finding] = []
        self._spread()
        found += self._for_failed()
        found += self._for_returned()
        while left := [r for r in sorted(self.blocked) if r not in self.explained]:
            found.append(self._cycle(left[0]))
            self._spread()
        found += self._never_waited_for()
        return found

    # ---- who waits for whom
    def _ended(self, rank: int, how: str) -> bool:
        return rank not in self.blocked and self.records[rank].end == how

    def _spread(self) -> None:
        """Who waits for a rank whose waiting is explained is explained too."""
        more = True
        while more:
            more = False
            for rank, blocked in self.blocked.items():
                missing = blocked.meeting.missing
                known = [r in self.explained for r in missing]
                enough = all(known) if blocked.meeting.any_of else any(known)
                if rank not in self.explained and missing and enough:
                    self.explained.add(rank)
                    more = True

    def _waiting_in(self, meeting: Meeting) -> dict[int, Source | None]:
        return {r: b.event.source for r, b in self.blocked.items() if b.meeting is meeting}

    def _explain(self, ranks: Sequence[int]) -> None:
        self.explained.update(ranks)
        self._spread()

    def _places(self, ranks: Sequence[int]) -> tuple[Place, ...]:
        """The calls in which ranks wait, and where they wait for them if that is elsewhere."""
        calls = [self.blocked[rank].meeting.calls[rank] for rank in ranks]
        return places_of(calls) + waiting_places(self.blocked, ranks)

    # ---- for a rank that raised
    def _for_failed(self) -> Iterator[Finding]:
        failed: dict[tuple[str, Source | None], list[int]] = {}
        for rank, record in self.records.items():
            if self._ended(rank, RAISED) and rank not in self.explained:
                failed.setdefault((record.error, record.source), []).append(rank)
        for (error, source), ranks in failed.items():
            waiting = [r for r, b in self.blocked.items() if {*ranks} & {*b.meeting.missing}]
            waiting = [r for r in waiting if r not in self.explained]
            self._explain([*ranks, *waiting])
            one = len(ranks) == 1
            raised = Place(tuple(ranks), f"raise{'s' if one else ''} {error}", source)
            yield Finding(
                FAILS,
                HANG if waiting else ERROR,
                f"{ranks_of(ranks)} {raised.text}",
                (raised, *self._places(waiting)),
                "those that wait for it hang until a time-out, or until the launcher ends them."
                if waiting
                else f"{'the rank ends' if one else 'the ranks end'} with this error.",
                "let the rank not raise, or let all ranks learn of it: all_reduce a flag before "
                "the next collective.",
                {r: self.blocked[r].event.source for r in waiting},
            )

    # ---- for a rank that returned
    def _for_returned(self) -> Iterator[Finding]:
        for meeting in self.matched.meetings:
            waiting = self._waiting_in(meeting)
            here = [r for r in waiting if r not in self.explained]
            gone = [r for r in meeting.missing if self._ended(r, RETURNED)]
            if not here or not gone or (meeting.any_of and len(gone) < len(meeting.missing)):
                continue
            self._explain(here)
            if meeting.is_message:
                yield self._one_sided(meeting, here)
            else:
                yield self._some_ranks(meeting, here, gone, HANG)

    def _some_ranks(
        self, meeting: Meeting, here: Sequence[int], gone: Sequence[int], outcome: str
    ) -> Finding:
        last = meeting.calls[here[0]]
        extra = self._extra(last, gone[0])
        beside = [c.source for c in like(self.records, gone[0], last) if c.source is not None]
        end = self.records[gone[0]].source
        hint = branch_of(extra.stack, [*beside, *([end] if end else [])])
        places = (
            list(self._places(here))
            if here and here[0] in self.blocked
            else list(places_of([last]))
        )
        if extra.source != last.source:
            places.insert(0, *places_of([extra]))
        places += ends(self.records, gone)
        name = "new_group" if last.kind == GROUP else extra.op
        mine, theirs = (len(like(self.records, r, last)) for r in (here[0], gone[0]))
        what = "new_group" if last.kind == GROUP else f"collectives on {last.group}"
        counts = f"{ranks_of(here[:1])} calls {what} {_times(mine)}, {ranks_of(gone[:1])} "
        counts += _times(theirs) if theirs else "never"
        wait = "goes on with what it had" if outcome == CORRUPT else "waits for ever"
        if len(here) > 1:
            wait = "go on with what they had" if outcome == CORRUPT else "wait for ever"
        return Finding(
            SOME_RANKS,
            outcome,
            f"{name} of {ranks_of(here)} is not called by {ranks_of(gone)}",
            tuple(places),
            f"{counts}: {ranks_of(here)} {wait}" + (f"; {hint}." if hint else "."),
            "call it on all ranks of the group, or on none: take it out of the branch or the "
            "loop, or decide the branch by a value that all ranks share.",
            self._waiting_in(meeting),
        )

    def _extra(self, last: Call, other: int) -> Call:
        """The call that the other rank does not make: the last one, or one before that others
        have met instead."""
        mine = like(self.records, last.rank, last)
        theirs = like(self.records, other, last)
        matcher = difflib.SequenceMatcher(None, _keys(mine), _keys(theirs), autojunk=False)
        extra = [
            mine[i]
            for tag, start, end, *_ in matcher.get_opcodes()
            if tag == "delete"
            for i in range(start, end)
        ]
        return extra[-1] if extra and len(mine) - len(theirs) == len(extra) else last

    # ---- messages
    def _one_sided(self, meeting: Meeting, here: Sequence[int]) -> Finding:
        call = meeting.first
        others = ranks_of(meeting.missing)
        began = self._places(here) if here else places_of([call])
        places = (*began, *ends(self.records, meeting.missing))
        if call.kind == SEND:
            return Finding(
                NO_RECV,
                HANG if here else FRAGILE,
                f"rank {call.rank} sends to {others}, which does not receive it",
                places,
                "the send waits for the receiver for ever (with NCCL small ones return, and what "
                "is received next is wrong)."
                if here
                else "nobody gets the data; the send may still run when its tensor is changed.",
                "let the receiver call recv once per send, with the same group and tag.",
                self._waiting_in(meeting),
            )
        return Finding(
            NO_SEND,
            HANG if here else CORRUPT,
            f"rank {call.rank} receives from {'any rank' if call.peer is None else others}, "
            "which does not send",
            places,
            "the receive waits for ever." if here else "the tensor is never written.",
            "let the sender call send once per receive, with the same group and tag.",
            self._waiting_in(meeting),
        )

    # ---- cycles
    def _cycle(self, start: int) -> Finding:
        path = [start]
        while True:
            blocked = self.blocked[path[-1]]
            following = next(
                r for r in blocked.meeting.missing if r in self.blocked and r not in self.explained
            )
            if following in path:
                path = path[path.index(following) :]
                break
            path.append(following)
        self.explained.update(path)
        waits = {r: self.blocked[r].event.source for r in path}
        calls = [self.blocked[r].meeting.calls[r] for r in path]
        if len(path) == 2 and _tags_alone_differ(*calls):
            return Finding(
                TAGS,
                HANG,
                f"rank {path[0]} uses tag {calls[0].tag}, rank {path[1]} tag {calls[1].tag}",
                self._places(path),
                "on gloo a message meets a receive of its own tag only: both wait for ever (NCCL "
                "ignores tags).",
                "give both sides the same tag.",
                waits,
            )
        around = " -> ".join(str(r) for r in [*path, path[0]])
        sends = all(c.kind == SEND for c in calls)
        return Finding(
            DEADLOCK,
            HANG,
            f"ranks wait for each other: {around}",
            self._places(path),
            "each waits for a call that the next one would make later: none goes on."
            + (" Small messages may pass with other backends." if sends else ""),
            _BREAK_MESSAGES
            if any(c.kind in (SEND, RECV) for c in calls)
            else "call the collectives of different groups in the same order on all ranks.",
            waits,
        )

    # ---- what nobody waits for
    def _never_waited_for(self) -> Iterator[Finding]:
        for meeting in self.matched.meetings:
            gone = meeting.missing
            if meeting.met or not gone or self._waiting_in(meeting):
                continue
            if not all(self._ended(r, RETURNED) for r in (*gone, *meeting.calls)):
                continue
            if meeting.is_message:
                yield self._one_sided(meeting, [])
            else:
                yield self._some_ranks(meeting, sorted(meeting.calls), gone, CORRUPT)


_BREAK_MESSAGES = (
    "let one side call the other way round (receive first on odd ranks), or start sends and "
    "receives together with batch_isend_irecv."
)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _keys(calls: Sequence[Call]) -> list[tuple[str, Source | None]]:
    return [(c.op, c.source) for c in calls]


def _tags_alone_differ(one: Call, other: Call) -> bool:
    return (
        {one.kind, other.kind} == {SEND, RECV}
        and one.tag != other.tag
        and one.peer == other.rank
        and other.peer == one.rank
        and one.group.key == other.group.key
    )


def skipped_groups(records: Records, matched: Matched) -> list[Finding]:
    """Groups that only their members have made: later ones get different names."""
    made = {rank: [c for c in r.calls if c.op == NEW_GROUP] for rank, r in records.items()}
    least = min(len(calls) for calls in made.values())
    extra = [calls[least] for calls in made.values() if len(calls) > least]
    behind = [r for r, calls in made.items() if len(calls) == least]
    if not extra or any(records[r].end != RETURNED or r in matched.blocked for r in records):
        return []
    return [
        Finding(
            SOME_RANKS,
            FRAGILE,
            f"new_group of {ranks_of(c.rank for c in extra)} is not called by {ranks_of(behind)}",
            (*places_of(extra), *ends(records, behind)),
            "this goes on: only the members wait for each other. But torch numbers groups, so that "
            "the next group of all these ranks has two names and hangs.",
            "call new_group on every rank, also for groups that the rank is not in, or pass "
            "use_local_synchronization=True.",
        )
    ]


def ends(records: Records, ranks: Sequence[int]) -> Iterator[Place]:
    """Where ranks return, or what they call last."""
    by_line: dict[tuple[str, Source | None], list[int]] = {}
    for rank in ranks:
        record = records[rank]
        if record.source is None and record.calls:
            place = ("no call after this one", record.calls[-1].source)
        else:
            place = ("returns", record.source)
        by_line.setdefault(place, []).append(rank)
    for (text, source), found in by_line.items():
        yield Place(
            tuple(found), "return" if len(found) > 1 and text == "returns" else text, source
        )


def waiting_places(blocked: Mapping[int, Blocked], ranks: Sequence[int]) -> tuple[Place, ...]:
    """Where ranks wait for calls that they have made elsewhere."""
    found: dict[tuple[str, Source | None], list[int]] = {}
    for rank in ranks:
        event, call = blocked[rank].event, blocked[rank].meeting.calls[rank]
        if isinstance(event, Wait) and event.source != call.source:
            text = f"waits for {call.op}"
            found.setdefault((text, event.source), []).append(rank)
    return tuple(Place(tuple(r), text, source) for (text, source), r in found.items())
