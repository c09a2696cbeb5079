"""Writes down what each rank calls of torch.distributed while a program runs.

A call is seen where torch hands it to a ProcessGroup, so that every way that leads there is:
torch.distributed, functional collectives, DTensor, DDP, FSDP. What a ProcessGroup's methods are
given is read here; how ranks run and data moves is not known here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .._torch import reduce_op_of
from ..check.text import dtype_text
from ..golden.listing import TensorType
from ..golden.source import Source
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

# Method of a ProcessGroup -> (name in torch.distributed, its argument of tensors that are given,
# that of tensors that are written; the same number where it works in place).
METHODS: dict[str, tuple[str, int | None, int | None]] = {
    "allreduce": ("all_reduce", 0, 0),
    "allreduce_coalesced": ("all_reduce_coalesced", 0, 0),
    "broadcast": ("broadcast", 0, 0),
    "reduce": ("reduce", 0, 0),
    "allgather": ("all_gather", 1, 0),
    "_allgather_base": ("all_gather_into_tensor", 1, 0),
    "all_gather_single": ("all_gather_into_tensor", 1, 0),
    "allgather_coalesced": ("all_gather_coalesced", 1, 0),
    "allgather_into_tensor_coalesced": ("all_gather_into_tensor_coalesced", 1, 0),
    "gather": ("gather", 1, 0),
    "scatter": ("scatter", 1, 0),
    "reduce_scatter": ("reduce_scatter", 1, 0),
    "_reduce_scatter_base": ("reduce_scatter_tensor", 1, 0),
    "reduce_scatter_single": ("reduce_scatter_tensor", 1, 0),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor_coalesced", 1, 0),
    "alltoall": ("all_to_all", 1, 0),
    "alltoall_base": ("all_to_all_single", 1, 0),
    "all_to_all_single": ("all_to_all_single", 1, 0),
    "barrier": ("barrier", None, None),
    "monitored_barrier": ("monitored_barrier", None, None),
    "send": ("send", 0, None),
    "recv": ("recv", None, 0),
    "recv_anysource": ("recv", None, 0),
}
_SPLITS = ("alltoall_base", "all_to_all_single")
_KINDS = {"send": SEND, "recv": RECV, "recv_anysource": RECV}


@dataclass
class _Rank:
    events: list[Event] = field(default_factory=list)
    calls: int = 0
    on_group: dict[object, int] = field(default_factory=dict)
    waited: set[int] = field(default_factory=set)


class Recorder:
    """What the ranks of a world do, as they do it. Only the rank that runs may call it."""

    def __init__(self, world_size: int) -> None:
        self._ranks = {rank: _Rank() for rank in range(world_size)}

    # ---- what ranks do
    def called(self, rank: int, group: dist.ProcessGroup, method: str, args: Sequence[Any]) -> int:
        """A rank calls a method of a ProcessGroup, one of METHODS.

        Args:
            args: by position, options and all.

        Returns:
            The call's number, for `waits` and `received_from`.
        """
        call = _read(method, args, self._group(group), rank)
        return self._add(replace(call, stack=user_stack()))

    def made_group(
        self, rank: int, ranks: Iterable[int], name: str, description: str, local: bool
    ) -> int:
        """A rank makes a process group.

        Args:
            name: torch's name for the group.
            description: the group_desc, if there is one.
            local: whether only its members make it (use_local_synchronization).
        """
        members = tuple(sorted(ranks))
        group = Group(name, members, self._label(name, members, description))
        op = LOCAL_NEW_GROUP if local else NEW_GROUP
        return self._add(
            Call(rank, 0, GROUP, op, group, waits=True, stack=user_stack()),
            members if local else None,
        )

    def waits(self, rank: int, number: int) -> None:
        """A rank waits for a call of its own."""
        self._ranks[rank].events.append(Wait(number, user_stack()))
        self._ranks[rank].waited.add(number)

    def received_from(self, rank: int, number: int, source: int) -> None:
        """A receive from any rank got its message from global rank `source`."""
        events = self._ranks[rank].events
        for i, event in enumerate(events):
            if isinstance(event, Call) and event.number == number:
                events[i] = replace(event, peer=source)

    def ended(
        self, rank: int, end: str = RETURNED, error: str = "", source: Source | None = None
    ) -> RankRecord:
        """The record of a rank that does no more."""
        events = list(self._ranks[rank].events)
        if end == STUCK and events and isinstance(last := events[-1], Call):
            events.append(Wait(last.number, last.stack))  # it was on its way there
        return RankRecord(tuple(events), end, error, source)

    # ---- how it is kept
    def _add(self, call: Call, only: tuple[int, ...] | None = None) -> int:
        state = self._ranks[call.rank]
        sequence = None
        if call.kind in (COLLECTIVE, GROUP):
            key = call.group.key if call.kind == COLLECTIVE else only
            sequence = state.on_group.get(key, 0)
            state.on_group[key] = sequence + 1
        state.events.append(replace(call, number=state.calls, sequence=sequence))
        state.calls += 1
        return state.calls - 1

    def _group(self, group: dist.ProcessGroup) -> Group:
        ranks = tuple(dist.get_process_group_ranks(group))
        name = str(group.group_name)
        return Group(name, ranks, self._label(name, ranks, str(group.group_desc)))

    def _label(self, name: str, ranks: tuple[int, ...], description: str) -> str:
        if description == "default_pg" and len(ranks) == len(self._ranks):
            return WORLD
        known = description.removeprefix("mesh_")
        return known if known not in ("undefined", "") else f"group{name}"


# ---------------------------------------------------------------- reading arguments
def _read(method: str, args: Sequence[Any], group: Group, rank: int) -> Call:
    op, given_at, taken_at = METHODS[method]
    given = _tensors(args[given_at]) if given_at is not None else []
    taken = _tensors(args[taken_at]) if taken_at is not None and taken_at != given_at else []
    options = next((a for a in args if type(a).__name__.endswith("Options")), None)
    kind = _KINDS.get(method, COLLECTIVE)
    peer = group.ranks[args[1]] if method in ("send", "recv") else None
    splits = None
    if method in _SPLITS:
        received, sent = (tuple(int(n) for n in args[i]) for i in (2, 3))
        splits = (sent, received) if sent or received else None
    if len(given) == 1:
        op = op.removesuffix("_coalesced")  # what functional collectives of one tensor are
    reduce_op = getattr(options, "reduceOp", None) if "reduce" in op else None
    root = getattr(options, "rootRank", None)
    return Call(
        rank=rank,
        number=0,
        kind=kind,
        op=op,
        group=group,
        given=tuple(map(_type, given)),
        taken=tuple(map(_type, taken)),
        bytes=sum(t.numel() * t.element_size() for t in (taken if kind == RECV else given)),
        reduce_op=None if reduce_op is None else str(reduce_op_of(reduce_op)[0]),
        root=group.ranks[root] if isinstance(root, int) and 0 <= root < len(group.ranks) else None,
        peer=peer,
        any_source=method == "recv_anysource",
        tag=int(args[{"send": 2, "recv": 2, "recv_anysource": 1}[method]])
        if kind != COLLECTIVE
        else 0,
        splits=splits,
        waits=False,
    )


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of a tensor, a list, or a list of lists."""
    if isinstance(value, Tensor):
        return [value]
    return list(itertools.chain.from_iterable(map(_tensors, value)))


def _type(tensor: Tensor) -> TensorType:
    return TensorType(dtype_text(tensor.dtype), tuple(int(n) for n in tensor.shape))
