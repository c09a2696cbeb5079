"""Carrying out a collective that every rank of a group has called, and a send with its recv.

The ranks' tensors become shards of LocalTensors, on which the simulation's own c10d collectives
work in place: the values are those of `LocalTensorMode`, which are gloo's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._torch import AsyncCollectiveTensor
from ..collectives import c10d
from ..collectives.groups import Groups
from ..collectives.reduction import memory_order
from ..errors import CollectiveError
from ..values.int_node import make_int
from ..values.tensor import LocalTensor, _wrap
from ._torch_runner import no_modes
from .calls import Call

Calls = Sequence[Call]  # of all ranks of a group, in group-rank order


def carry_out(calls: Calls) -> None:
    """Compute a collective and write its results into the ranks' tensors.

    Raises:
        CollectiveError: what real ranks could not do.
    """
    first = calls[0]
    if first.kind in ("barrier", "monitored_barrier"):
        return
    ranks = first.ranks
    order = sorted(ranks)
    groups = Groups(tuple(order.index(r) for r in ranks), len(ranks), (ranks,), family=True)
    with _on_plain_data(calls):
        _KINDS[first.kind](calls, groups)


@contextlib.contextmanager
def _on_plain_data(calls: Calls) -> Iterator[None]:
    """Whoever comes last computes: nothing of its thread's modes may have a say."""
    inference = any(t.is_inference() for c in calls for t in c.tensors())
    with no_modes(), torch.inference_mode() if inference else torch.no_grad():
        yield


def _together(calls: Calls, tensors: Sequence[Any], flat: bool = False) -> LocalTensor:
    """One LocalTensor of a tensor per call; it writes into the ranks' own memory."""
    shards = {c.rank: _plain(t) for c, t in zip(calls, tensors)}
    if flat:
        shards = {r: memory_order(t) for r, t in shards.items()}
    return _wrap({r: shards[r] for r in sorted(shards)})


def _plain(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        raise CollectiveError(
            f"a collective of a {tensor.layout} tensor between ranks is not simulated. Use "
            "tensor.to_dense()."
        )
    if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, AsyncCollectiveTensor):
        raise CollectiveError(
            f"a collective between ranks got a {type(tensor).__name__}, which is no memory that "
            "can be sent. Use its local tensor, such as dtensor.to_local()."
        )
    # Not detach(): what a process group writes is not seen by autograd's version counters.
    return tensor.data if type(tensor) is Tensor else tensor.detach().as_subclass(Tensor)


def _columns(calls: Calls, lists: Sequence[Sequence[Any]], what: str) -> list[LocalTensor]:
    """Lists of tensors, one per call, as a list of LocalTensors."""
    counts = {c.rank: len(x) for c, x in zip(calls, lists)}
    if len(set(counts.values())) > 1:
        raise CollectiveError(
            f"{calls[0].kind} got lists of different lengths: {counts} {what} by rank. Give every "
            "rank the same number."
        )
    return [_together(calls, column) for column in zip(*lists)]


# ---------------------------------------------------------------- one function per kind
def _in_place(op: str) -> Callable[[Calls, Groups], None]:
    def run(calls: Calls, groups: Groups) -> None:
        first = calls[0]
        target = [_together(calls, [c.inputs[0] for c in calls], flat=True)]
        rest = [] if first.reduce_op is None else [first.reduce_op]
        if first.root is not None:
            rest.append(first.root)
        c10d._table[op](target, groups, *rest)

    return run


def _all_reduce_coalesced(calls: Calls, groups: Groups) -> None:
    columns = _columns(calls, [c.inputs for c in calls], "tensors")
    c10d._table["allreduce_coalesced_"](columns, groups, calls[0].reduce_op)


def _out_of_place(op: str) -> Callable[[Calls, Groups], None]:
    """One output and one input tensor."""

    def run(calls: Calls, groups: Groups) -> None:
        out = _together(calls, [c.outputs[0] for c in calls])
        given = _together(calls, [c.inputs[0] for c in calls])
        rest = [] if calls[0].reduce_op is None else [calls[0].reduce_op]
        c10d._table[op](out, given, groups, *rest)

    return run


def _coalesced(op: str) -> Callable[[Calls, Groups], None]:
    """A list of outputs and a list of inputs."""

    def run(calls: Calls, groups: Groups) -> None:
        out = _columns(calls, [c.outputs for c in calls], "outputs")
        given = _columns(calls, [c.inputs for c in calls], "inputs")
        rest = [] if calls[0].reduce_op is None else [calls[0].reduce_op]
        c10d._table[op](out, given, groups, *rest)

    return run


def _all_gather(calls: Calls, groups: Groups) -> None:
    for k in range(len(calls[0].inputs)):
        outputs = _columns(calls, [c.outputs[k] for c in calls], "output tensors")
        given = _together(calls, [c.inputs[k] for c in calls])
        c10d._table["allgather_"]([outputs], [given], groups)


def _all_gather_coalesced(calls: Calls, groups: Groups) -> None:
    rows = range(len(calls[0].outputs))
    outputs = [_columns(calls, [c.outputs[k] for c in calls], "outputs") for k in rows]
    given = _columns(calls, [c.inputs for c in calls], "inputs")
    c10d._table["allgather_coalesced_"](outputs, given, groups)


def _reduce_scatter(calls: Calls, groups: Groups) -> None:
    out = _together(calls, [c.outputs[0] for c in calls])
    lists = _columns(calls, [c.inputs[0] for c in calls], "input tensors")
    c10d._table["reduce_scatter_"]([out], [lists], groups, calls[0].reduce_op)


def _gather(calls: Calls, groups: Groups) -> None:
    root = calls[calls[0].root or 0]
    outputs = [_wrap({root.rank: _plain(t)}) for t in root.outputs[0]]
    given = _together(calls, [c.inputs[0] for c in calls])
    c10d._table["gather_"]([outputs], [given], groups, calls[0].root)


def _scatter(calls: Calls, groups: Groups) -> None:
    root = calls[calls[0].root or 0]
    out = _together(calls, [c.outputs[0] for c in calls])
    lists = [_together(calls, [t] * len(calls)) for t in root.inputs[0]]
    c10d._table["scatter_"]([out], [lists], groups, calls[0].root)


def _all_to_all(calls: Calls, groups: Groups) -> None:
    outputs = _columns(calls, [c.outputs for c in calls], "output tensors")
    given = _columns(calls, [c.inputs for c in calls], "input tensors")
    c10d._table["alltoall_"](outputs, given, groups)


def _all_to_all_single(calls: Calls, groups: Groups) -> None:
    out = _together(calls, [c.outputs[0] for c in calls])
    given = _together(calls, [c.inputs[0] for c in calls])
    received = [_splits(c, c.outputs[0], (c.splits or ([], []))[0], groups.size) for c in calls]
    sent = [_splits(c, c.inputs[0], (c.splits or ([], []))[1], groups.size) for c in calls]
    per_rank = []
    for lists in (received, sent):
        columns = zip(*lists)
        per_rank.append([make_int({c.rank: n for c, n in zip(calls, k)}) for k in columns])
    c10d._table["alltoall_base_"](out, given, groups, *per_rank)


def _splits(call: Call, tensor: Tensor, splits: Sequence[int], size: int) -> list[int]:
    if splits:
        if len(splits) != size:
            raise CollectiveError(
                f"all_to_all_single got {len(splits)} splits on rank {call.rank} for a group of "
                f"{size} ranks. Give one split per rank."
            )
        return list(splits)
    rows = tensor.shape[0]
    if rows % size:
        raise CollectiveError(
            f"all_to_all_single without splits sends equal parts, but the {rows} rows of rank "
            f"{call.rank} do not divide by the {size} ranks of the group. Pass splits."
        )
    return [rows // size] * size


_KINDS: dict[str, Callable[[Calls, Groups], None]] = {
    "all_reduce": _in_place("allreduce_"),
    "all_reduce_coalesced": _all_reduce_coalesced,
    "broadcast": _in_place("broadcast_"),
    "reduce": _in_place("reduce_"),
    "all_gather": _all_gather,
    "all_gather_coalesced": _all_gather_coalesced,
    "all_gather_into_tensor": _out_of_place("_allgather_base_"),
    "all_gather_into_tensor_coalesced": _coalesced("allgather_into_tensor_coalesced_"),
    "gather": _gather,
    "scatter": _scatter,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _out_of_place("_reduce_scatter_base_"),
    "reduce_scatter_tensor_coalesced": _coalesced("reduce_scatter_tensor_coalesced_"),
    "all_to_all": _all_to_all,
    "all_to_all_single": _all_to_all_single,
}


# ---------------------------------------------------------------- point to point
def deliver(send: Call, recv: Call) -> None:
    """Copy what was sent into the receiver's tensor. As with gloo, a larger one keeps its end.

    Raises:
        CollectiveError: another dtype, or more elements than the receiver's tensor has.
    """
    with _on_plain_data([send, recv]):
        source, target = _plain(send.inputs[0]), _plain(recv.outputs[0])
        if source.dtype != target.dtype or source.numel() > target.numel():
            raise CollectiveError(
                f"rank {send.rank} sends {_described(source)} at {send.line}, but rank "
                f"{recv.rank} receives it into {_described(target)} at {recv.line}. On real "
                "processes this fails or corrupts data: use one dtype and shape on both sides."
            )
        memory_order(target)[: source.numel()].copy_(memory_order(source))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
