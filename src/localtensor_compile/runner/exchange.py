"""Which calls of the ranks belong together: collectives by their number per group, sends and
receives by (source, destination, tag) in order.

A collective is carried out by the last rank to call it, for all of them; a send and its recv by
the second of the two. Until then the rank goes on where the call is asynchronous, and waits in
`Pending.wait()` where it is not. Like gloo's, a send is done when its recv took the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import CollectiveError
from .calls import Call, reduce_name
from .carry_out import carry_out, deliver
from .scheduler import Scheduler

Observer = Callable[[Call], None]


class Pending:
    """A call that was launched; done when all who take part have called."""

    def __init__(self, exchange: Exchange, call: Call) -> None:
        self.exchange, self.call = exchange, call
        self.done = False
        self.error: BaseException | None = None
        self.source: int | None = None
        """Of a recv that is done: the group rank that sent."""
        self.on_done: list[Callable[[], None]] = []
        self.slot: Slot | None = None

    def ready(self) -> bool:
        return self.done

    def text(self) -> str:
        call = self.call
        if self.slot is not None:
            missing = [r for r in call.ranks if r not in self.slot.calls]
            names = ", ".join(map(str, missing))
            return f"{call} (group {list(call.ranks)}), for rank{'s'[: len(missing) > 1]} {names}"
        other = "any rank" if call.peer is None else f"rank {call.global_peer}"
        return f"{call}, for a {'recv' if call.kind == 'send' else 'send'} of {other}"

    def wait(self) -> None:
        """Let other ranks run until the call is done. Raises what went wrong in it."""
        for observer in self.exchange.wait_observers:
            observer(self.call)
        self.exchange.scheduler.wait(self)
        if self.error is not None:
            raise self.error

    def finish(self, error: BaseException | None = None) -> None:
        self.error, self.done = error, True
        for callback in self.on_done:
            callback()


class Slot:
    """One collective of one group: who has called."""

    def __init__(self) -> None:
        self.calls: dict[int, Pending] = {}


class Exchange:
    """Where the ranks' calls meet.

    Args:
        observers: each is given every call as it is launched.

    Attributes:
        wait_observers: each is given every call that a rank waits for, as it begins to wait.
    """

    def __init__(self, scheduler: Scheduler, observers: Sequence[Observer] = ()) -> None:
        self.scheduler = scheduler
        self.observers = list(observers)
        self.wait_observers: list[Observer] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._slots: dict[tuple[str, tuple[int, ...], int], Slot] = {}
        self._sends: list[Pending] = []
        self._recvs: list[Pending] = []

    def launch(self, call: Call) -> Pending:
        """Take part in a collective, or offer a send or recv. Does not wait.

        Raises:
            CollectiveError: calls that belong together do not fit; every rank of them raises it.
        """
        if call.kind not in ("send", "recv"):
            place = (call.group, call.rank)
            call.number = self._numbers.get(place, 0)
            self._numbers[place] = call.number + 1
        for observer in self.observers:
            observer(call)
        self.scheduler.pause()
        pending = Pending(self, call)
        if call.kind in ("send", "recv"):
            self._match(pending)
        else:
            self._join(pending)
        return pending

    # ---- collectives
    def _join(self, pending: Pending) -> None:
        call = pending.call
        key = (call.group, call.ranks, call.number)
        slot = self._slots.setdefault(key, Slot())
        pending.slot = slot
        first = next(iter(slot.calls.values()), None)
        slot.calls[call.rank] = pending
        error: BaseException | None = None
        if first is not None:
            error = _mismatch(first.call, call)
        if error is None and len(slot.calls) < len(call.ranks):
            return
        del self._slots[key]
        members = [slot.calls[r] for r in call.ranks if r in slot.calls]
        if error is None:
            try:
                carry_out([p.call for p in members])
            except CollectiveError as found:
                error = CollectiveError(f"{found}\nThe calls were:\n{_listed(members)}")
        for member in members:
            member.finish(error)

    # ---- point to point
    def _match(self, pending: Pending) -> None:
        mine, others = self._sends, self._recvs
        if pending.call.kind == "recv":
            mine, others = others, mine
        for other in others:
            if _fit(pending.call, other.call):
                others.remove(other)
                send, recv = (pending, other) if mine is self._sends else (other, pending)
                self._deliver(send, recv)
                return
        mine.append(pending)

    def _deliver(self, send: Pending, recv: Pending) -> None:
        error: BaseException | None = None
        try:
            deliver(send.call, recv.call)
        except CollectiveError as found:
            error = found
        recv.source = send.call.ranks.index(send.call.rank)
        recv.call.extra["source"] = send.call.rank
        send.finish(error)
        recv.finish(error)

    def unfinished(self) -> list[Call]:
        """Calls that nobody answered."""
        waiting = [p for slot in self._slots.values() for p in slot.calls.values()]
        return [p.call for p in (*waiting, *self._sends, *self._recvs)]


def _fit(a: Call, b: Call) -> bool:
    send, recv = (a, b) if a.kind == "send" else (b, a)
    return (
        send.group == recv.group
        and send.tag == recv.tag
        and send.global_peer == recv.rank
        and recv.global_peer in (None, send.rank)
    )


def _listed(members: Sequence[Pending]) -> str:
    return "\n".join(f"  rank {p.call.rank}: {p.call}" for p in members)


# What every rank of a group must say alike. Shapes are checked by those who carry it out.
def _mismatch(a: Call, b: Call) -> CollectiveError | None:
    differs = None
    if a.kind != b.kind:
        differs = "different collectives"
    elif _op(a) != _op(b):
        differs = "different reduce ops"
    elif a.root != b.root:
        differs = "different roots"
    elif {t.dtype for t in a.tensors()} != {t.dtype for t in b.tensors()}:
        differs = "different dtypes"
    elif {t.device for t in a.tensors()} != {t.device for t in b.tensors()}:
        differs = "different devices"
    if differs is None:
        return None
    return CollectiveError(
        f"ranks {a.rank} and {b.rank} meet in {differs}, as call {a.number} on the group of ranks "
        f"{list(a.ranks)}:\n  rank {a.rank}: {a}\n  rank {b.rank}: {b}\n"
        "On real processes this hangs or corrupts data. Make all ranks of the group call the "
        "same collectives in the same order."
    )


def _op(call: Call) -> str | None:
    return None if call.reduce_op is None else reduce_name(call.reduce_op)
