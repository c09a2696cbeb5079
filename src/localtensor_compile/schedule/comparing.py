"""Calls that meet, but do not fit: another collective, shape, dtype, reduce op, root or split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..golden.listing import TensorType
from .branches import branch_of
from .calls import GROUP, RECV, SEND, Call
from .findings import (
    CORRUPT,
    DIFFERENT,
    DTYPES,
    ERROR,
    FRAGILE,
    GROUPS,
    HANG,
    REDUCE_OPS,
    ROOTS,
    SHAPES,
    SPLITS,
    Finding,
    places_of,
    ranks_in_words,
)
from .matching import Meeting, one_on_the_wire
from .wording import tensors_text

_REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
_EXCHANGES = ("all_to_all", "all_to_all_single")


def compare(meeting: Meeting) -> Finding | None:
    """The first thing in which the calls of a meeting differ and should not."""
    calls = [meeting.calls[rank] for rank in sorted(meeting.calls)]
    if len(calls) < 2:
        return None
    if calls[0].kind == GROUP:
        return _groups(calls)
    if calls[0].kind in (SEND, RECV):
        return _message(*sorted(calls, key=lambda c: c.kind != SEND))
    return _ops(meeting, calls) or _roots(calls) or _reduce_ops(calls) or _tensors(calls)


def _by(calls: Iterable[Call], key: Callable[[Call], Any]) -> dict[Any, list[int]]:
    """Value -> the ranks that have it."""
    found: dict[Any, list[int]] = {}
    for call in calls:
        found.setdefault(key(call), []).append(call.rank)
    return found


def _waiting(calls: Iterable[Call]) -> dict[int, Any]:
    return {c.rank: c.source for c in calls}


# ---------------------------------------------------------------- which call
def _ops(meeting: Meeting, calls: Sequence[Call]) -> Finding | None:
    ops = _by(calls, lambda c: c.op)
    if len(ops) == 1:
        return None
    hints = [
        branch_of(c.stack, [o.source for o in calls if o.op != c.op and o.source])
        for c in (meeting.calls[ranks[0]] for ranks in ops.values())
    ]
    hint = next((f"; {h}" for h in hints if h), "")
    number = calls[0].sequence or 0
    alike = one_on_the_wire(ops)
    return Finding(
        DIFFERENT,
        FRAGILE if alike else HANG,
        f"collective {number + 1} on {calls[0].group} is {ranks_in_words(ops)}",
        places_of(calls),
        f"gloo does the same for both and goes on; other backends may hang{hint}."
        if alike
        else f"each waits for the others to call the same, for ever{hint}.",
        "let all ranks of a group call the same collectives in the same order.",
        {} if alike else _waiting(calls),
    )


def _groups(calls: Sequence[Call]) -> Finding | None:
    members = _by(calls, lambda c: list_text(c.group.ranks))
    if len(members) == 1:
        return None
    number = calls[0].sequence or 0
    return Finding(
        GROUPS,
        HANG,
        f"the new group number {number + 1} has ranks {ranks_in_words(members)}",
        places_of(calls),
        "torch numbers groups by the order in which a rank makes them: these have one name and "
        "different ranks. Making them, or their first collective, waits for ever or fails.",
        "call new_group on every rank, for all groups, in the same order with the same ranks, "
        "also for groups that the rank is not in.",
    )


def _roots(calls: Sequence[Call]) -> Finding | None:
    roots = _by(calls, lambda c: c.root)
    if len(roots) == 1:
        return None
    return Finding(
        ROOTS,
        HANG,
        f"{calls[0].op} on {calls[0].group} has root {ranks_in_words(roots)}",
        places_of(calls),
        "each rank waits for the one that it takes for the root, or for those that it thinks it "
        "is the root of.",
        "give src or dst the same global rank everywhere (group_src and group_dst are ranks of "
        "the group).",
        _waiting(calls),
    )


def _reduce_ops(calls: Sequence[Call]) -> Finding | None:
    ops = _by(calls, lambda c: c.reduce_op)
    if len(ops) == 1:
        return None
    return Finding(
        REDUCE_OPS,
        CORRUPT,
        f"{calls[0].op} on {calls[0].group} computes {ranks_in_words(ops)}",
        places_of(calls),
        "each rank reduces its part of the tensor by its own op: the result is a mixture.",
        "give op the same value on all ranks.",
    )


# ---------------------------------------------------------------- tensors
def _tensors(calls: Sequence[Call]) -> Finding | None:
    first = calls[0]
    if not all(_is_known((*c.given, *c.taken)) for c in calls):
        return None
    if first.op in _EXCHANGES:
        return _exchange(calls)
    if first.op in ("gather", "scatter"):
        return _rooted(calls)
    given = _by(calls, lambda c: tensors_text(c.given))
    if len(given) == 1:
        return None
    kind, outcome = _difference(first.op, [c.given for c in calls])
    if kind is None:
        return None
    one_way = first.op == "broadcast"
    if one_way and outcome == ERROR:
        sent = next((_bytes(c.given) for c in calls if c.rank == first.root), 0)
        outcome = ERROR if any(_bytes(c.given) < sent for c in calls) else CORRUPT
    return _unequal(kind, outcome, calls, f"is given {ranks_in_words(given)}")


def _unequal(kind: str, outcome: str, calls: Sequence[Call], what: str) -> Finding:
    happens = {
        ERROR: "a rank gets more bytes than it has room for: gloo ends its process and the others "
        "lose the connection; NCCL hangs or writes beyond the tensor.",
        CORRUPT: "nobody compares: bytes are combined in the order of memory, values are wrong.",
    }[outcome]
    change = {
        DTYPES: "give tensors of the same dtype on all ranks, as with .to(dtype).",
        SHAPES: "give tensors of the same shape on all ranks: pad them, or exchange sizes first.",
        SPLITS: "let what a rank sends to another be what that one expects: exchange the splits "
        "first, with an all_to_all_single of the counts.",
    }[kind]
    first = calls[0]
    return Finding(
        kind, outcome, f"{first.op} on {first.group} {what}", places_of(calls), happens, change
    )


def _difference(op: str, tensors: Sequence[Sequence[TensorType]]) -> tuple[str | None, str]:
    """In what lists of tensors differ that should be equal, and what comes of it."""
    one = tensors[0]
    for other in tensors[1:]:
        bytes_differ = _bytes(one) != _bytes(other)
        if [t.dtype for t in one] != [t.dtype for t in other] and len(one) == len(other):
            return DTYPES, ERROR if bytes_differ else CORRUPT
        if bytes_differ:
            return SHAPES, ERROR
        # As many elements in another shape: whoever only copies may mean it.
        if list(one) != list(other) and op in _REDUCING:
            return SHAPES, CORRUPT
    return None, ""


def _rooted(calls: Sequence[Call]) -> Finding | None:
    """gather and scatter: the root's list against what each rank has."""
    root = next((c for c in calls if c.rank == c.root), None)
    if root is None:
        return None
    listed = root.taken if root.op == "gather" else root.given
    for call in calls:
        position = root.group.ranks.index(call.rank)
        if position >= len(listed):
            continue
        own = call.given if call.op == "gather" else call.taken
        sent, room = (own, listed[position : position + 1])
        if call.op == "scatter":
            sent, room = room, sent
        kind, outcome = _one_way(sent, room)
        if kind is not None:
            return _unequal(
                kind,
                outcome,
                calls,
                f"has {tensors_text(listed[position : position + 1])} for rank {call.rank} on root "
                f"{root.rank}, and {tensors_text(own)} there",
            )
    return None


def _one_way(sent: Sequence[TensorType], room: Sequence[TensorType]) -> tuple[str | None, str]:
    """What is sent against the room for it."""
    kind, outcome = _difference("", [sent, room])
    if outcome == ERROR and _bytes(sent) < _bytes(room):
        outcome = CORRUPT  # the rest of the room stays as it was
    return kind, outcome


def _message(send: Call, recv: Call) -> Finding | None:
    kind, outcome = _one_way(send.given, recv.taken)
    if kind is None:
        return None
    what = (
        f"sends {tensors_text(send.given)}, and rank {recv.rank} expects {tensors_text(recv.taken)}"
    )
    found = _unequal(kind, outcome, [send, recv], "")
    return Finding(
        found.kind,
        found.outcome,
        f"rank {send.rank} {what}",
        found.places,
        found.happens,
        found.change,
    )


# ---------------------------------------------------------------- all_to_all
def _exchange(calls: Sequence[Call]) -> Finding | None:
    """Whether what a rank sends to another is what that one expects."""
    worst: Finding | None = None
    for sender in calls:
        for receiver in calls:
            sent, expected = _part(sender, receiver.rank, 0), _part(receiver, sender.rank, 1)
            if sent is None or expected is None or sent == expected:
                continue
            kind = SPLITS if sent[0] == expected[0] else DTYPES
            lost = sent[1] <= expected[1]
            found = _unequal(
                kind,
                CORRUPT if lost else ERROR,
                calls,
                f"sends {sent[1]} bytes of {sent[0]} from rank {sender.rank} to rank "
                f"{receiver.rank}, which expects {expected[1]} bytes of {expected[0]}",
            )
            if worst is None or found.outcome == ERROR:
                worst = found
    return worst


def _part(call: Call, other: int, side: int) -> tuple[str, int] | None:
    """dtype and bytes of what a rank sends to another (side 0), or expects from it (side 1)."""
    tensors = call.taken if side else call.given
    if other not in call.group.ranks:
        return None
    position, size = call.group.ranks.index(other), len(call.group.ranks)
    if call.op == "all_to_all":
        return (
            (tensors[position].dtype, _bytes(tensors[position : position + 1]))
            if position < len(tensors)
            else None
        )
    if len(tensors) != 1:
        return None
    total = _bytes(tensors)
    splits = call.splits[side] if call.splits is not None else ()
    if not splits:
        return tensors[0].dtype, total // size
    rows = sum(splits)
    return tensors[0].dtype, splits[position] * (total // rows) if rows else 0


# ---------------------------------------------------------------- sizes
def _is_known(tensors: Iterable[TensorType]) -> bool:
    """Whether all sizes are numbers; those of captured dynamic graphs are not."""
    return all(isinstance(size, int) for t in tensors for size in t.shape)


def _bytes(tensors: Iterable[TensorType]) -> int:
    return sum(
        _itemsize(t.dtype) * math.prod(s for s in t.shape if isinstance(s, int)) for t in tensors
    )


def _itemsize(dtype: str) -> int:
    """Of `f32`, `i64`, `bool`."""
    return _SIZES.get(dtype, 1)


def _sizes() -> Iterator[tuple[str, int]]:
    from ..check.text import dtype_text

    for value in vars(torch).values():
        if isinstance(value, torch.dtype):
            yield dtype_text(value), value.itemsize


_SIZES = dict(_sizes())


def list_text(ranks: Iterable[int]) -> str:
    """`[0, 1]`."""
    return f"[{', '.join(map(str, ranks))}]"
