"""The calls of torch.distributed that a rank makes: what matters to the ranks that it meets there.

Nothing here knows how a program is run; record.py writes calls down, captured.py reads them from
graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..golden.listing import TensorType
from ..golden.source import Source

COLLECTIVE, SEND, RECV, GROUP = "collective", "send", "recv", "group"

WORLD = "world"
NEW_GROUP, LOCAL_NEW_GROUP = "new_group", "new_group(use_local_synchronization)"


@dataclass(frozen=True)
class Group:
    """A process group as its members know it.

    Attributes:
        name: torch's name for it, the same on every member; of captured graphs, its ranks.
        ranks: its members, as global ranks, in the group's order.
        label: what a reader calls it: `world`, a mesh dimension, `group1`.
    """

    name: str
    ranks: tuple[int, ...]
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.name

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What tells groups apart."""
        return self.name, self.ranks


@dataclass(frozen=True)
class Call:
    """One call of one rank.

    Attributes:
        rank: who calls.
        number: its place among the calls of this rank, from 0.
        kind: COLLECTIVE, SEND, RECV, or GROUP for what makes a process group.
        op: as torch.distributed spells it, `all_reduce`.
        group: the process group; of GROUP, the one that it makes.
        sequence: its place among this rank's collectives on the group, or among the groups that
            it makes, from 0; None of SEND and RECV.
        given: dtype and shape of each tensor that the rank gives.
        taken: the same of each tensor that it gets, where that is not what it gave.
        bytes: of the tensors that it gives; of RECV, of what it gets. None where symbolic.
        reduce_op: `sum`, `max`, ...; None of calls that do not reduce.
        root: global rank of the source or destination of a rooted collective.
        peer: global rank of the other side of SEND or RECV; None of a RECV from any rank, until
            one has sent.
        any_source: whether a RECV takes from any rank.
        tag: of SEND and RECV.
        splits: rows that all_to_all_single sends to each rank and expects from each, where given.
        waits: whether the call returns only when it is done.
        stack: the user's lines that lead to it, the innermost first.
    """

    rank: int
    number: int
    kind: str
    op: str
    group: Group
    sequence: int | None = None
    given: tuple[TensorType, ...] = ()
    taken: tuple[TensorType, ...] = ()
    bytes: int | None = 0
    reduce_op: str | None = None
    root: int | None = None
    peer: int | None = None
    any_source: bool = False
    tag: int = 0
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    waits: bool = True
    stack: tuple[Source, ...] = ()

    @property
    def source(self) -> Source | None:
        """The user's line."""
        return self.stack[0] if self.stack else None

    @property
    def where(self) -> str:
        """`train.py:12`."""
        return "an unknown line" if self.source is None else str(self.source)


@dataclass(frozen=True)
class Wait:
    """A rank waits for an earlier call of its own.

    Attributes:
        number: that call's number.
        stack: the user's lines that lead to it, the innermost first.
    """

    number: int
    stack: tuple[Source, ...] = ()

    @property
    def source(self) -> Source | None:
        """The user's line."""
        return self.stack[0] if self.stack else None


Event = Call | Wait

RETURNED, RAISED, STUCK = "returned", "raised", "stuck"


@dataclass(frozen=True)
class RankRecord:
    """What one rank did.

    Attributes:
        events: its calls and waits, in order.
        end: RETURNED; RAISED an exception of its own; STUCK in its last call or wait.
        error: `ValueError: text` of what it raised; of a rank that is STUCK, what the runner says.
        source: the user's line that raised, or from which the program returned if that is known.
    """

    events: tuple[Event, ...]
    end: str = RETURNED
    error: str = ""
    source: Source | None = None

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(e for e in self.events if isinstance(e, Call))


Records = Mapping[int, RankRecord]
