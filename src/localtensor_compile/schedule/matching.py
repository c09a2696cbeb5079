"""Which calls of different ranks meet, if every call waits for its partners as on a cluster.

Ranks go through what they did in a run once more, here without any data: a collective ends when
all ranks of its group have called it, a send when the other side receives. What the run itself let
pass, as a send that was kept until somebody wanted it, waits here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .calls import GROUP, RECV, SEND, STUCK, Call, Group, Records, Wait


@dataclass(eq=False)
class Meeting:
    """Calls that belong together: a collective of a group, or the two sides of a message.

    Attributes:
        group: on which they meet.
        needed: the ranks that have to call; of a receive from any rank, all that might send.
        calls: rank -> its call.
        met: whether all are there, and do the same.
    """

    group: Group
    needed: tuple[int, ...]
    calls: dict[int, Call] = field(default_factory=dict)
    met: bool = False

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks that have not called."""
        return tuple(r for r in self.needed if r not in self.calls)

    @property
    def first(self) -> Call:
        return self.calls[min(self.calls)]

    @property
    def is_message(self) -> bool:
        return self.first.kind in (SEND, RECV)

    @property
    def any_of(self) -> bool:
        """Whether one of the missing ranks is enough."""
        return self.is_message and self.first.peer is None

    def by_op(self) -> dict[str, list[Call]]:
        """op -> calls, in the order of ranks."""
        found: dict[str, list[Call]] = {}
        for rank in sorted(self.calls):
            found.setdefault(self.calls[rank].op, []).append(self.calls[rank])
        return found


@dataclass
class Blocked:
    """A rank that waits for ever.

    Attributes:
        meeting: what it waits for.
        event: the call or the wait that does not return.
    """

    meeting: Meeting
    event: Call | Wait


@dataclass
class Matched:
    """What met and what did not.

    Attributes:
        meetings: all, in the order in which they began.
        blocked: rank -> where it waits for ever.
        halted: ranks whose run ended in a call that others had joined: the arguments did not fit.
    """

    meetings: list[Meeting] = field(default_factory=list)
    blocked: dict[int, Blocked] = field(default_factory=dict)
    halted: set[int] = field(default_factory=set)


def match(records: Records) -> Matched:
    """Let the calls of all ranks meet."""
    return _Matcher(records).run()


class _Matcher:
    def __init__(self, records: Records) -> None:
        self.records = records
        self.result = Matched()
        self.next = dict.fromkeys(sorted(records), 0)
        self.of_call: dict[tuple[int, int], Meeting] = {}
        self.collectives: dict[object, Meeting] = {}
        # (group, receiving rank, tag) -> messages with one side, in order.
        self.messages: dict[object, list[Meeting]] = {}

    def run(self) -> Matched:
        moved = True
        while moved:
            moved = False
            for rank in self.next:
                moved = self._advance(rank) or moved
        for rank, record in self.records.items():
            if rank not in self.result.blocked and record.end == STUCK:
                self.result.halted.add(rank)
        return self.result

    def _advance(self, rank: int) -> bool:
        """Let a rank go on until it waits; whether it moved."""
        events, start = self.records[rank].events, self.next[rank]
        waiting = self.result.blocked.get(rank)
        if waiting is not None:
            if not waiting.meeting.met:
                return False
            del self.result.blocked[rank]
        while self.next[rank] < len(events):
            event = events[self.next[rank]]
            self.next[rank] += 1
            if isinstance(event, Wait):
                meeting, waits = self.of_call[rank, event.number], True
            else:
                meeting, waits = self._join(event), event.waits
                self.of_call[rank, event.number] = meeting
            # Who is not in a new group does not wait for it.
            if waits and not meeting.met and rank in meeting.needed:
                self.result.blocked[rank] = Blocked(meeting, event)
                return True
        return self.next[rank] > start

    def _join(self, call: Call) -> Meeting:
        if call.kind in (SEND, RECV):
            return self._join_message(call)
        # torch numbers the groups that a rank makes: the n-th of one is the n-th of the others.
        group = None if call.kind == GROUP else call.group.key
        meeting = self.collectives.get((group, call.sequence))
        if meeting is None:
            meeting = self.collectives[group, call.sequence] = self._begin(call, ())
        meeting.needed = tuple(sorted({*meeting.needed, *call.group.ranks}))
        meeting.calls[call.rank] = call
        if not meeting.missing:
            meeting.met = _fit(meeting)
        return meeting

    def _join_message(self, call: Call) -> Meeting:
        receiver = call.rank if call.kind == RECV else call.peer
        open_ones = self.messages.setdefault((call.group.key, receiver, call.tag), [])
        for meeting in open_ones:
            if _are_sides(meeting.first, call):
                open_ones.remove(meeting)
                meeting.needed = tuple(sorted((meeting.first.rank, call.rank)))
                meeting.calls[call.rank] = call
                meeting.met = True
                self.of_call[call.rank, call.number] = meeting
                return meeting
        needed = call.group.ranks if call.peer is None else (call.rank, call.peer)
        meeting = self._begin(call, tuple(sorted(needed)))
        meeting.calls[call.rank] = call
        open_ones.append(meeting)
        return meeting

    def _begin(self, call: Call, needed: tuple[int, ...]) -> Meeting:
        meeting = Meeting(call.group, needed)
        self.result.meetings.append(meeting)
        return meeting


def _fit(meeting: Meeting) -> bool:
    """Whether calls of all ranks end: they are the same collective, or make the same group."""
    if meeting.first.kind == GROUP:
        return len({c.group.ranks for c in meeting.calls.values()}) == 1
    ops = {c.op for c in meeting.calls.values()}
    roots = {c.root for c in meeting.calls.values()}
    return one_on_the_wire(ops) and len(roots) == 1


# What gloo does the same for, so that ranks which mix them go on.
_ALIKE = ({"all_gather", "all_gather_into_tensor"}, {"all_reduce", "reduce_scatter_tensor"})


def one_on_the_wire(ops: Iterable[str]) -> bool:
    """Whether collectives of these names meet on gloo."""
    found = set(ops)
    return len(found) == 1 or any(found <= alike for alike in _ALIKE)


def _are_sides(one: Call, other: Call) -> bool:
    """Whether a call is the other side of a message that a call began."""
    if {one.kind, other.kind} != {SEND, RECV}:
        return False
    recv, send = (one, other) if one.kind == RECV else (other, one)
    return recv.peer in (None, send.rank)


def waits_for(blocked: Blocked) -> tuple[int, ...]:
    """The ranks that a blocked one waits for."""
    return blocked.meeting.missing


def like(records: Records, rank: int, call: Call) -> list[Call]:
    """What a rank calls of the kind of `call`: collectives on its group, or groups it makes."""
    same = None if call.kind == GROUP else call.group.key
    return [
        other
        for other in records[rank].calls
        if other.kind == call.kind and same in (None, other.group.key)
    ]
