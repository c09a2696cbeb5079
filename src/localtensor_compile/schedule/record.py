"""Writes down what each rank calls of torch.distributed while a program runs.

A call is seen where torch hands it to a ProcessGroup, so that every way that leads there is:
torch.distributed, functional collectives, DTensor, DDP, FSDP.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .._torch import process_group_named, reduce_op_of
from ..check.text import dtype_text
from ..golden.listing import TensorType
from ..golden.source import Source
from ..runner._torch_runner import watching_groups
from ..runner.calls import Call as RunnerCall
from ..runner.engine import Engine
from .calls import (
    COLLECTIVE,
    GROUP,
    LOCAL_NEW_GROUP,
    NEW_GROUP,
    RECV,
    RETURNED,
    SEND,
    STUCK,
    WORLD,
    Call,
    Event,
    Group,
    RankRecord,
    Wait,
)
from .lines import user_stack

_KINDS = {"send": SEND, "recv": RECV}


@dataclass
class _Rank:
    """What a rank has done so far.

    Attributes:
        numbers: of the calls of the runner that it may still wait for.
        from_any: number of a receive from any rank -> what the runner says about it once done.
    """

    events: list[Event] = field(default_factory=list)
    calls: int = 0
    sequences: dict[object, int] = field(default_factory=dict)
    numbers: dict[RunnerCall, int] = field(default_factory=dict)
    from_any: dict[int, dict[str, Any]] = field(default_factory=dict)


class Recorder:
    """Watches the ranks of an engine, which runs within `watching`."""

    def __init__(self, engine: Engine) -> None:
        self._world = engine.ranks
        self._ranks = {rank: _Rank() for rank in engine.ranks}
        engine.exchange.observers.append(self.called)
        engine.exchange.wait_observers.append(self.waits)

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: what ranks do is written down."""
        return watching_groups(self.made_group)

    # ---- what ranks do
    def called(self, given: RunnerCall) -> None:
        """A rank launches a collective, a send or a receive."""
        state = self._ranks[given.rank]
        state.numbers[given] = state.calls
        if given.kind == "recv" and given.peer is None:
            state.from_any[state.calls] = given.extra
        self._add(_read(given, self._group(given)))

    def made_group(self, rank: int, name: str, ranks: Sequence[int], description: str) -> None:
        """A rank makes a process group; the default one has no `ranks`."""
        if not ranks:
            return
        members = tuple(sorted(ranks))
        # torch numbers groups, but for those that only their members make.
        local = not name.isdecimal()
        group = Group(name, members, _label(name, members, description, self._world))
        op = LOCAL_NEW_GROUP if local else NEW_GROUP
        number = self._ranks[rank].calls
        self._add(
            Call(rank, 0, GROUP, op, group, waits=rank in members, stack=user_stack()),
            (members, number) if local and rank not in members else members if local else None,
        )

    def waits(self, given: RunnerCall) -> None:
        """A rank waits for a call of its own."""
        state = self._ranks[given.rank]
        state.events.append(Wait(state.numbers[given], user_stack()))

    def ended(
        self, rank: int, end: str = RETURNED, error: str = "", source: Source | None = None
    ) -> RankRecord:
        """The record of a rank that does no more."""
        state = self._ranks[rank]
        events = [self._finished(state, event) for event in state.events]
        if end == STUCK and events and isinstance(last := events[-1], Call):
            events.append(Wait(last.number, last.stack))  # it was on its way there
        return RankRecord(tuple(events), end, error, source)

    # ---- how it is kept
    def _finished(self, state: _Rank, event: Event) -> Event:
        if isinstance(event, Call) and event.any_source:
            return replace(event, peer=state.from_any[event.number].get("source"))
        return event

    def _add(self, call: Call, only: object = None) -> None:
        state = self._ranks[call.rank]
        sequence = None
        if call.kind in (COLLECTIVE, GROUP):
            key = call.group.key if call.kind == COLLECTIVE else only
            sequence = state.sequences.get(key, 0)
            state.sequences[key] = sequence + 1
        state.events.append(replace(call, number=state.calls, sequence=sequence))
        state.calls += 1

    def _group(self, given: RunnerCall) -> Group:
        known = process_group_named(given.group)
        description = "" if known is None else str(known.group_desc)
        label = _label(given.group, given.ranks, description, self._world)
        return Group(given.group, given.ranks, label)


def _label(name: str, ranks: Sequence[int], description: str, world: Sequence[int]) -> str:
    if description == "default_pg" and tuple(ranks) == tuple(world):
        return WORLD
    known = description.removeprefix("mesh_")
    return known if known not in ("undefined", "") else f"group{name}"


# ---------------------------------------------------------------- reading a call
def _read(given: RunnerCall, group: Group) -> Call:
    inputs, outputs = list(_tensors(given.inputs)), list(_tensors(given.outputs))
    op = given.kind
    if len(inputs) == 1:
        op = op.removesuffix("_coalesced")  # what functional collectives of one tensor are
    splits = None
    if given.splits is not None and any(given.splits):
        received, sent = given.splits
        splits = tuple(map(int, sent)), tuple(map(int, received))
    kind = _KINDS.get(given.kind, COLLECTIVE)
    root = given.root
    return Call(
        rank=given.rank,
        number=0,
        kind=kind,
        op=op,
        group=group,
        given=tuple(map(_type, inputs)),
        taken=tuple(map(_type, outputs)),
        bytes=sum(t.numel() * t.element_size() for t in (outputs if kind == RECV else inputs)),
        reduce_op=None if given.reduce_op is None else reduce_op_of(given.reduce_op)[0],
        root=group.ranks[root] if root is not None and 0 <= root < len(group.ranks) else None,
        peer=given.global_peer,
        any_source=kind == RECV and given.peer is None,
        tag=given.tag,
        splits=splits,
        waits=False,
        stack=user_stack(),
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors of lists, and of lists of lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _tensors(value)


def _type(tensor: Tensor) -> TensorType:
    return TensorType(dtype_text(tensor.dtype), tuple(int(n) for n in tensor.shape))
