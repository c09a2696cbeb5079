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


def details(call: Call) -> Iterator[str]:
    """What a call is given beside its tensors and its group."""
    if call.kind == SEND:
        yield f"to rank {call.peer}"
    if call.kind == RECV:
        yield "from any rank" if call.any_source else f"from rank {call.peer}"
    if call.kind in (SEND, RECV) and call.tag:
        yield f"tag {call.tag}"
    if call.reduce_op is not None:
        yield call.reduce_op
    if call.root is not None:
        yield f"root {call.root}"
    if call.splits is not None:
        sent, expected = (list(s) for s in call.splits)
        yield f"sends {sent or 'even splits'}"
        yield f"expects {expected or 'even splits'}"


def arguments_text(call: Call) -> str:
    """What stands between the parentheses."""
    if call.kind == GROUP:
        return f"[{', '.join(map(str, call.group.ranks))}]"
    shown = call.taken if call.kind == RECV else call.given or call.taken
    return ", ".join(filter(None, [tensors_text(shown), *details(call)]))


def call_text(call: Call) -> str:
    """`all_reduce(f32[4], sum) on world`."""
    where = "" if call.kind == GROUP or str(call.group) == "world" else f" on {call.group}"
    return f"{call.op}({arguments_text(call)}){where}"


def ranks_of(ranks: Iterable[int]) -> str:
    """`rank 0`, `ranks 1-3`."""
    found = sorted(ranks)
    return f"rank{'s' if len(found) > 1 else ''} {rank_set(found)}"
