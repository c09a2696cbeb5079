"""A call as one line of text: `all_reduce(f32[4], sum)`, `recv(f32[4], from rank 0)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..golden.listing import TensorType
from ..golden.ranges import rank_set
from .calls import GROUP, RECV, SEND, Call


def tensor_text(tensor: TensorType) -> str:
    """`f32[4, 2]`."""
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"


def tensors_text(tensors: Iterable[TensorType]) -> str:
    """`f32[4]`; of several, `2 x f32[4]` or all of them."""
    texts = [tensor_text(t) for t in tensors]
    if len(texts) > 1 and len(set(texts)) == 1:
        return f"{len(texts)} x {texts[0]}"
    shown = texts if len(texts) <= 4 else [*texts[:3], f"... {len(texts)} tensors"]
    return shown[0] if len(shown) == 1 else f"[{', '.join(shown)}]" if shown else ""


def arguments(call: Call) -> Iterator[tuple[str, str]]:
    """What stands between the parentheses, but for the group: (words, value) in order."""
    if call.kind == GROUP:
        yield "", f"[{', '.join(map(str, call.group.ranks))}]"
        return
    tensors = call.taken if call.kind == RECV else call.given or call.taken
    if tensors:
        yield "", tensors_text(tensors)
    if call.kind == SEND:
        yield "to rank ", str(call.peer)
    if call.kind == RECV:
        yield "from ", "any rank" if call.any_source else f"rank {call.peer}"
    if call.kind in (SEND, RECV) and call.tag:
        yield "tag ", str(call.tag)
    if call.reduce_op is not None:
        yield "", call.reduce_op
    if call.root is not None:
        yield "root ", str(call.root)
    if call.splits is not None:
        sent, expected = (list(s) for s in call.splits)
        yield "sends ", str(sent or "even splits")
        yield "expects ", str(expected or "even splits")


def call_text(call: Call) -> str:
    """`all_reduce(f32[4], sum) on world`."""
    where = "" if call.kind == GROUP or str(call.group) == "world" else f" on {call.group}"
    return f"{call.op}({', '.join(map(''.join, arguments(call)))}){where}"


def ranks_of(ranks: Iterable[int]) -> str:
    """`rank 0`, `ranks 1-3`."""
    found = sorted(ranks)
    return f"rank{'s' if len(found) > 1 else ''} {rank_set(found)}"
