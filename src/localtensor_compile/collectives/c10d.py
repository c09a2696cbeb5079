"""The in-place c10d collectives (dist.all_reduce and friends) on LocalTensors.

torch.distributed's Python functions end in these ops, with the ProcessGroup, ReduceOp and Work
boxed as script objects. Ranks outside the group keep their tensors, as real ranks do, which
return from the call at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._torch import completed_work, reduce_op_of
from ..errors import CollectiveError, UnsupportedError, per_rank_text
from ..values.op_table import Handler, implements_namespace
from ..values.stack import stack_of
from ..values.tensor import LocalTensor, _wrap, _wrap_stacked
from . import apply, on_stacks
from .groups import Groups
from .ops import OPS
from .reduction import memory_order, memory_order_of_rows

_table: dict[str, Callable[..., Any]] = {}


def _handles(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _table[name] = fn
        return fn

    return register


@implements_namespace("c10d")
def _choose(func: Any) -> Handler:
    name = func._schema.name.partition("::")[2]
    if name not in _table:
        raise UnsupportedError(
            f"{func} is not simulated: point-to-point calls need a program per rank. Use "
            "collectives, or all_to_all_single with splits."
        )
    fn = _table[name]

    def handler(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)

    return handler


def _operand(tensor: Any, group: Any, what: str) -> tuple[LocalTensor, Groups]:
    tensor = apply.local(tensor, what)
    return tensor, apply.locate(tensor, group)


def _reduced(tensor: LocalTensor, reduce_op: Any) -> tuple[LocalTensor, str]:
    """The tensor and op name with PREMUL_SUM written out: each rank's data times the factor."""
    op, factor = reduce_op_of(reduce_op)
    if op == "premul_sum" and factor is None:
        raise CollectiveError(
            "ReduceOp.PREMUL_SUM arrives here without its factor, and gloo does not have it. "
            "Multiply the tensor by the factor and use ReduceOp.SUM."
        )
    if op != "premul_sum":
        return tensor, op
    stack = stack_of(tensor._local_tensors)
    if stack is not None:
        return _wrap_stacked((stack * factor).to(stack.dtype), on_stacks.ranks_of(tensor)), "sum"
    shards = {r: (t * factor).to(t.dtype) for r, t in tensor._local_tensors.items()}
    return _wrap(shards), "sum"


@_handles("allreduce_")
def _allreduce_(
    tensors: Any, process_group: Any, reduce_op: Any, sparse_indices: Any = None, *_: Any, **__: Any
) -> Any:
    for t in tensors:
        _allreduce_one(t, process_group, reduce_op)
    return tensors, completed_work(tensors)


def _allreduce_one(tensor: Any, process_group: Any, reduce_op: Any) -> None:
    tensor, groups = _operand(tensor, process_group, "all_reduce")
    tensor = _by_memory(tensor)
    source, op = _reduced(tensor, reduce_op)
    source, among = on_stacks.members_only(source, groups)
    result = apply.all_reduce(source, op, among, "all_reduce")
    apply.copy_into(tensor, result, groups.members, "all_reduce")


def _by_memory(tensor: LocalTensor) -> LocalTensor:
    """gloo reduces in place in the order of the memory, which decides how sums associate."""
    shards = tensor._local_tensors
    stack = stack_of(shards)
    if stack is not None:
        if tensor.is_contiguous():
            return tensor
        return _wrap_stacked(memory_order_of_rows(stack), on_stacks.ranks_of(tensor))
    if all(t.is_contiguous() for t in shards.values()):
        return tensor
    return _wrap({r: memory_order(t) for r, t in shards.items()})


@_handles("allreduce_coalesced_")
def _allreduce_coalesced_(
    tensors: Any, process_group: Any, reduce_op: Any, *_: Any, **__: Any
) -> Any:
    what = "all_reduce_coalesced"
    targets = [_by_memory(apply.local(t, what)) for t in tensors]
    if targets:
        groups = apply.locate(targets[0], process_group)
        sources = [_reduced(t, reduce_op) for t in targets]
        op = sources[0][1]
        given = [s for s, _ in sources]
        among = groups
        found = [on_stacks.members_only(s, groups) for s in given]
        if all(g == found[0][1] for _, g in found):  # else they are in both layouts
            given, among = [s for s, _ in found], found[0][1]
        results = apply.all_reduce_together(given, op, among, what)
        for target, result in zip(targets, results):
            apply.copy_into(target, result, groups.members, what)
    return completed_work(tensors)


@_handles("reduce_")
def _reduce_(
    tensors: Any,
    process_group: Any,
    reduce_op: Any,
    root_rank: int,
    root_tensor: int = 0,
    *_: Any,
    **__: Any,
) -> Any:
    tensor, groups = _operand(tensors[0], process_group, "reduce")
    tensor = _by_memory(tensor)
    source, op = _reduced(tensor, reduce_op)
    apply.require_same_shape(source, groups, "reduce", slice(None))
    _check_root(root_rank, groups, "reduce")
    source, among = on_stacks.members_only(source, groups)
    result = apply.run(OPS.reduce.default, source, among, apply.checked_op(op), root_rank)
    apply.copy_into(tensor, result, groups.members, "reduce")
    return completed_work(tensors)


def _check_root(root: int, groups: Groups, what: str) -> None:
    if not 0 <= root < groups.size:
        raise CollectiveError(
            f"{what}: the root is group rank {root}, but the group {list(groups.ranks[0])} has "
            f"group ranks 0 to {groups.size - 1}."
        )


@_handles("broadcast_")
def _broadcast_(
    tensors: Any, process_group: Any, root_rank: int, root_tensor: int = 0, *_: Any, **__: Any
) -> Any:
    tensor, groups = _operand(tensors[root_tensor], process_group, "broadcast")
    source, among = on_stacks.members_only(tensor, groups)
    result = apply.broadcast(source, root_rank, among, "broadcast")
    apply.copy_into(tensor, result, groups.members, "broadcast")
    return tensors, completed_work(tensors)


# ---------------------------------------------------------------- gathering
@_handles("_allgather_base_")
def _allgather_base_(
    output_tensor: Any, input_tensor: Any, process_group: Any, *_: Any, **__: Any
) -> Any:
    _allgather_into(output_tensor, input_tensor, process_group)
    return output_tensor, completed_work([output_tensor])


def _allgather_into(output: Any, input: Any, process_group: Any) -> None:
    what = "all_gather_into_tensor"
    tensor, groups = _operand(input, process_group, what)
    if len(tensor._size) == 0:
        stack = stack_of(tensor._local_tensors)
        if stack is not None:
            tensor = _wrap_stacked(stack.unsqueeze(1), on_stacks.ranks_of(tensor))
        else:
            tensor = _wrap({r: t.reshape(1) for r, t in tensor._local_tensors.items()})
    source, among = on_stacks.members_only(tensor, groups)
    result = apply.all_gather(source, among, what)
    apply.copy_into(output, result, groups.members, what)


@_handles("allgather_into_tensor_coalesced_")
def _allgather_into_tensor_coalesced_(
    outputs: Any, inputs: Any, process_group: Any, *_: Any, **__: Any
) -> Any:
    for output, input in zip(outputs, inputs, strict=True):
        _allgather_into(output, input, process_group)
    return completed_work(outputs)


@_handles("allgather_")
def _allgather_(
    output_tensors: Any, input_tensors: Any, process_group: Any, *_: Any, **__: Any
) -> Any:
    for outputs, input in zip(output_tensors, input_tensors, strict=True):
        _allgather_list(outputs, input, process_group)
    return output_tensors, completed_work(output_tensors)


@_handles("allgather_coalesced_")
def _allgather_coalesced_(
    output_lists: Any, input_list: Any, process_group: Any, *_: Any, **__: Any
) -> Any:
    # output_lists[rank][tensor], unlike allgather_'s [tensor][rank].
    for k, input in enumerate(input_list):
        _allgather_list([row[k] for row in output_lists], input, process_group)
    return completed_work(output_lists)


def _allgather_list(outputs: Any, input: Any, process_group: Any) -> None:
    what = "all_gather"
    tensor, groups = _operand(input, process_group, what)
    _check_count(outputs, groups, what, "output tensors")
    if on_stacks.all_stacked((tensor, *outputs), on_stacks.ranks_of(tensor)):
        rows = _wrap_stacked(tensor._stack.unsqueeze(1), on_stacks.ranks_of(tensor))
        on_stacks.write_entries(outputs, on_stacks.on_entries("all_gather", rows, groups))
        return
    on_stacks.per_rank(what, (tensor, *outputs))
    shards = list(tensor._local_tensors.values())
    flat = iter(OPS.all_gather_list.default(shards, list(groups.positions), groups.size))
    _write_lists(outputs, flat, groups, what)


def _check_count(tensors: Any, groups: Groups, what: str, name: str) -> None:
    if len(tensors) != groups.size:
        raise CollectiveError(
            f"{what} got {len(tensors)} {name} for a group of {groups.size} ranks. Give one per "
            "rank of the group."
        )


def _write_lists(outputs: Any, flat: Any, groups: Groups, what: str) -> None:
    """`flat` holds, for each group member, one tensor per output."""
    for group in groups.ranks:
        for r in group:
            for output in outputs:
                _write_shard(output, r, next(flat), what)


def _write_shard(output: Any, rank: int, value: Any, what: str) -> None:
    target = apply.local(output, what)._local_tensors[rank]
    if target.shape != value.shape or target.dtype != value.dtype:
        raise CollectiveError(
            f"{what}: an output of rank {rank} is {target.dtype} of shape {tuple(target.shape)}, "
            f"but it receives {value.dtype} of shape {tuple(value.shape)}. Give it that "
            "dtype and shape."
        )
    target.copy_(value)


@_handles("gather_")
def _gather_(
    output_tensors: Any,
    input_tensors: Any,
    process_group: Any,
    root_rank: int,
    *_: Any,
    **__: Any,
) -> Any:
    what = "gather"
    tensor, groups = _operand(input_tensors[0], process_group, what)
    _check_root(root_rank, groups, what)
    outputs = output_tensors[0] if output_tensors else []
    _check_count(outputs, groups, what, "output tensors")
    if on_stacks.all_stacked((tensor, *outputs), on_stacks.ranks_of(tensor)):
        on_stacks.gather_into(outputs, tensor, root_rank, groups)
        return completed_work(output_tensors)
    on_stacks.per_rank(what, (tensor, *outputs))
    shards = list(tensor._local_tensors.values())
    flat = OPS.all_gather_list.default(shards, list(groups.positions), groups.size)
    for g, group in enumerate(groups.ranks):
        start = (g * groups.size + root_rank) * groups.size
        for k, output in enumerate(outputs):
            _write_shard(output, group[root_rank], flat[start + k], what)
    return completed_work(output_tensors)


# ---------------------------------------------------------------- scattering
@_handles("_reduce_scatter_base_")
def _reduce_scatter_base_(
    output_tensor: Any, input_tensor: Any, process_group: Any, reduce_op: Any, *_: Any, **__: Any
) -> Any:
    _reduce_scatter_into(output_tensor, input_tensor, process_group, reduce_op)
    return output_tensor, completed_work([output_tensor])


def _reduce_scatter_into(output: Any, input: Any, process_group: Any, reduce_op: Any) -> None:
    what = "reduce_scatter_tensor"
    tensor, groups = _operand(input, process_group, what)
    source, op = _reduced(tensor, reduce_op)
    source, among = on_stacks.members_only(source, groups)
    result = apply.reduce_scatter(source, op, among, what)
    apply.copy_into(output, result, groups.members, what)


@_handles("reduce_scatter_tensor_coalesced_")
def _reduce_scatter_tensor_coalesced_(
    outputs: Any, inputs: Any, process_group: Any, reduce_op: Any, *_: Any, **__: Any
) -> Any:
    for output, input in zip(outputs, inputs, strict=True):
        _reduce_scatter_into(output, input, process_group, reduce_op)
    return completed_work(outputs)


@_handles("reduce_scatter_")
def _reduce_scatter_(
    output_tensors: Any, input_tensors: Any, process_group: Any, reduce_op: Any, *_: Any, **__: Any
) -> Any:
    what = "reduce_scatter"
    for output, inputs in zip(output_tensors, input_tensors, strict=True):
        _, groups = _operand(output, process_group, what)
        _check_count(inputs, groups, what, "input tensors")
        sources = [_reduced(apply.local(t, what), reduce_op) for t in inputs]
        for k, (source, _op) in enumerate(sources):
            apply.require_same_shape(source, groups, f"{what} (input {k})", slice(None))
        op = apply.checked_op(sources[0][1])
        given = [s for s, _op in sources]
        if on_stacks.all_stacked((output, *given), on_stacks.ranks_of(output)):
            joined = on_stacks.entries(given)
            result = on_stacks.on_entries("reduce_scatter_list", joined, groups, op)
            apply.copy_into(output, result, groups.members, what)
            continue
        on_stacks.per_rank(what, (output, *given))
        shards = [s._local_tensors[r] for r in output._local_tensors for s in given]
        flat = iter(
            OPS.reduce_scatter_list.default(shards, op, list(groups.positions), groups.size)
        )
        _write_lists([output], flat, groups, what)
    return output_tensors, completed_work(output_tensors)


@_handles("scatter_")
def _scatter_(
    output_tensors: Any,
    input_tensors: Any,
    process_group: Any,
    root_rank: int,
    *_: Any,
    **__: Any,
) -> Any:
    what = "scatter"
    output, groups = _operand(output_tensors[0], process_group, what)
    _check_root(root_rank, groups, what)
    if not input_tensors:
        raise CollectiveError(
            f"{what} got no scatter_list. In a simulated world the root is one of the ranks, so "
            "pass the list on every rank (the other ranks' lists are not read)."
        )
    inputs = [apply.local(t, what) for t in input_tensors[0]]
    _check_count(inputs, groups, what, "input tensors")
    if on_stacks.all_stacked((output, *inputs), on_stacks.ranks_of(output)):
        joined = on_stacks.entries(inputs)
        result = on_stacks.on_entries("scatter", joined, groups, root_rank)
        apply.copy_into(output, result, groups.members, what)
        return output_tensors, completed_work(output_tensors)
    on_stacks.per_rank(what, (output, *inputs))
    position = {r: i for i, r in enumerate(output._local_tensors)}
    shards = [t._local_tensors[r] for r in position for t in inputs]
    flat = iter(OPS.all_to_all_list.default(shards, list(groups.positions), groups.size))
    for group in groups.ranks:
        for r in group:
            received = [next(flat) for _ in group]
            _write_shard(output, r, received[root_rank], what)
    return output_tensors, completed_work(output_tensors)


# ---------------------------------------------------------------- all to all
@_handles("alltoall_")
def _alltoall_(
    output_tensors: Any, input_tensors: Any, process_group: Any, *_: Any, **__: Any
) -> Any:
    what = "all_to_all"
    first, groups = _operand(input_tensors[0], process_group, what)
    inputs = [apply.local(t, what) for t in input_tensors]
    _check_count(inputs, groups, what, "input tensors")
    _check_count(output_tensors, groups, what, "output tensors")
    outputs = [apply.local(t, what) for t in output_tensors]
    if on_stacks.all_stacked((*outputs, *inputs), on_stacks.ranks_of(first)):
        joined = on_stacks.entries(inputs)
        result = on_stacks.on_entries("all_to_all_single", joined, groups)
        on_stacks.write_entries(outputs, result)
        return output_tensors, completed_work(output_tensors)
    on_stacks.per_rank(what, (*outputs, *inputs))
    shards = [t._local_tensors[r] for r in first._local_tensors for t in inputs]
    flat = iter(OPS.all_to_all_list.default(shards, list(groups.positions), groups.size))
    _write_lists(output_tensors, flat, groups, what)
    return output_tensors, completed_work(output_tensors)


@_handles("alltoall_base_")
def _alltoall_base_(
    output: Any,
    input: Any,
    process_group: Any,
    output_split_sizes: Any,
    input_split_sizes: Any,
    *_: Any,
    **__: Any,
) -> Any:
    what = "all_to_all_single"
    tensor, groups = _operand(input, process_group, what)
    source, among = on_stacks.members_only(tensor, groups)
    result = apply.all_to_all_single(source, output_split_sizes, input_split_sizes, among, what)
    apply.copy_into(output, result, groups.members, what)
    return completed_work([output])


# ---------------------------------------------------------------- barriers
@_handles("barrier")
def _barrier(tensor: Any, process_group: Any, *_: Any, **__: Any) -> Any:
    return completed_work([])


@_handles("monitored_barrier_")
def _monitored_barrier_(tensor: Any, process_group: Any, *_: Any, **__: Any) -> None:
    return None


@_handles("check_for_nan")
def _check_for_nan(tensor: Any) -> None:
    shards = tensor._local_tensors
    stack = stack_of(shards)
    if stack is not None:
        bad = dict(zip(shards, stack.isnan().flatten(1).any(1).tolist()))
    else:
        bad = {r: bool(t.isnan().any()) for r, t in shards.items()}
    if any(bad.values()):
        raise CollectiveError(f"check_for_nan found NaN: {per_rank_text(bad)}.")
