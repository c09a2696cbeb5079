"""The functional collectives (_c10d_functional, its autograd twin, _dtensor) on LocalTensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._torch import OPDEFS
from ..errors import UnsupportedError
from ..values.op_table import Handler, implements_namespace
from ..values.tensor import LocalTensor, _wrap
from . import apply
from .ops import OPS

_table: dict[str, Callable[..., Any]] = {}


def _handles(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _table[name] = fn
        return fn

    return register


@implements_namespace("_c10d_functional", "_c10d_functional_autograd", "_dtensor")
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


@implements_namespace("cplib")
def _choose_composed(func: Any) -> Handler:
    """Of torch's context parallelism: ops whose Python code is made of functional collectives."""
    implementation = OPDEFS[func._schema.name]._init_fn

    def handler(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return implementation(*args, **kwargs)

    return handler


def _member_groups(tensor: Any, group_name: Any, what: str) -> tuple[LocalTensor, Any]:
    tensor = apply.local(tensor, what)
    groups = apply.locate(tensor, group_name)
    apply.require_members(groups, tensor, what)
    apply.require_resolved(tensor, what)
    return tensor, groups


@_handles("all_reduce")
def _all_reduce(input: Any, reduce_op: str, group_name: Any) -> LocalTensor:
    tensor, groups = _member_groups(input, group_name, "all_reduce")
    return apply.all_reduce(tensor, reduce_op, groups, "all_reduce")


@_handles("all_reduce_")
def _all_reduce_(input: Any, reduce_op: str, group_name: Any) -> LocalTensor:
    result = _all_reduce(input, reduce_op, group_name)
    apply.copy_into(input, result, result._local_tensors, "all_reduce_")
    return input


@_handles("all_reduce_coalesced")
def _all_reduce_coalesced(inputs: Any, reduce_op: str, group_name: Any) -> list[LocalTensor]:
    what = "all_reduce_coalesced"
    located = [_member_groups(t, group_name, what) for t in inputs]
    tensors = [t for t, _ in located]
    return apply.all_reduce_together(tensors, reduce_op, located[0][1], what) if tensors else []


@_handles("all_reduce_coalesced_")
def _all_reduce_coalesced_(inputs: Any, reduce_op: str, group_name: Any) -> Any:
    results = _all_reduce_coalesced(inputs, reduce_op, group_name)
    for t, result in zip(inputs, results):
        apply.copy_into(t, result, result._local_tensors, "all_reduce_coalesced_")
    return inputs


@_handles("all_gather_into_tensor")
def _all_gather(input: Any, group_size: int, group_name: Any) -> LocalTensor:
    tensor, groups = _member_groups(input, group_name, "all_gather_into_tensor")
    return apply.all_gather(tensor, groups, "all_gather_into_tensor")


@_handles("all_gather_into_tensor_out")
def _all_gather_out(input: Any, group_size: int, group_name: Any, *, out: Any) -> Any:
    result = _all_gather(input, group_size, group_name)
    apply.copy_into(out, result, result._local_tensors, "all_gather_into_tensor_out")
    return out


@_handles("all_gather_into_tensor_coalesced")
def _all_gather_coalesced(inputs: Any, group_size: int, group_name: Any) -> list[LocalTensor]:
    return [_all_gather(t, group_size, group_name) for t in inputs]


@_handles("reduce_scatter_tensor")
def _reduce_scatter(input: Any, reduce_op: str, group_size: int, group_name: Any) -> LocalTensor:
    tensor, groups = _member_groups(input, group_name, "reduce_scatter_tensor")
    return apply.reduce_scatter(tensor, reduce_op, groups, "reduce_scatter_tensor")


@_handles("reduce_scatter_tensor_out")
def _reduce_scatter_out(
    input: Any, reduce_op: str, group_size: int, group_name: Any, *, out: Any
) -> Any:
    result = _reduce_scatter(input, reduce_op, group_size, group_name)
    apply.copy_into(out, result, result._local_tensors, "reduce_scatter_tensor_out")
    return out


@_handles("reduce_scatter_tensor_coalesced")
def _reduce_scatter_coalesced(
    inputs: Any, reduce_op: str, group_size: int, group_name: Any
) -> list[LocalTensor]:
    return [_reduce_scatter(t, reduce_op, group_size, group_name) for t in inputs]


@_handles("all_to_all_single")
def _all_to_all_single(
    input: Any, output_split_sizes: Any, input_split_sizes: Any, group_name: Any
) -> LocalTensor:
    tensor, groups = _member_groups(input, group_name, "all_to_all_single")
    return apply.all_to_all_single(
        tensor, output_split_sizes, input_split_sizes, groups, "all_to_all_single"
    )


@_handles("broadcast")
def _broadcast(input: Any, src: int, group_name: Any) -> LocalTensor:
    tensor, groups = _member_groups(input, group_name, "broadcast")
    return apply.broadcast(tensor, src, groups, "broadcast")


@_handles("broadcast_")
def _broadcast_(input: Any, src: int, group_name: Any) -> LocalTensor:
    result = _broadcast(input, src, group_name)
    apply.copy_into(input, result, result._local_tensors, "broadcast_")
    return input


@_handles("shard_dim_alltoall")
def _shard_dim_alltoall(
    input: Any, gather_dim: int, shard_dim: int, group_name: Any
) -> LocalTensor:
    tensor, groups = _member_groups(input, group_name, "shard_dim_alltoall")
    apply.require_same_shape(tensor, groups, "shard_dim_alltoall", slice(None))
    return apply.run(OPS.shard_dim_alltoall.default, tensor, groups, gather_dim, shard_dim)


@_handles("wait_tensor", "_wrap_tensor_autograd")
def _wait_tensor(tensor: LocalTensor) -> LocalTensor:
    # A simulated collective has finished when it returns: a new wrapper of the same shards, so
    # that the graph gets no node and no output aliases its operand's wrapper.
    return _wrap(tensor._local_tensors)
