"""localtensor::stacked_* custom ops: the collectives on the stack of all ranks, one node each.

What the ops of ops.py are for a list of shards, these are for a stack [ranks, *local], with the
groups given alike. An op that changes the shape of the shards needs every rank in some group; in
the others rows outside every group are copied. Results never alias operands.

Data movement is the same few ops in a kernel and before Inductor. Reductions are not: a kernel
adds up in the mode's order, bit for bit as the per-rank ops do, Inductor gets one reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CollectiveError
from .ops import NAMESPACE, library, settings
from .reduction import legal
from .row_groups import RowGroups, is_whole, joined_rows, row_groups, split_rows
from .row_reduction import reduce_rows, reduce_rows_to_root

OPS = torch.ops.localtensor
_GROUPS = "int[] groups, int group_size"

DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {}
"""For Inductor's table; it must be complete before anything compiles."""


def _op(
    schema: str, fake: Callable[..., Tensor], math: Callable[..., Tensor] | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Define localtensor::<schema>: the kernel, also its own decomposition if there is no other."""
    name = schema.partition("(")[0]

    def register(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        library.define(f"{schema} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        DECOMPOSITIONS[getattr(OPS, name).default] = math or kernel
        return kernel

    return register


def _fake_same(stack: Tensor, *rest: Any) -> Tensor:
    return stack.new_empty(stack.shape)


def _plan(stack: Tensor, groups: Sequence[int], size: int) -> RowGroups:
    return row_groups(groups, size, stack.shape[0])


def _whole_plan(what: str, stack: Tensor, groups: Sequence[int], size: int) -> RowGroups:
    """Raises CollectiveError where a rank is in no group: its shard would keep another shape."""
    if not is_whole(groups, stack.shape[0]):
        raise CollectiveError(
            f"localtensor::stacked_{what} on a stack of {stack.shape[0]} rows got groups of "
            f"{len(groups)} rows: the others would keep another shape. Select the groups' rows "
            "first."
        )
    return _plan(stack, groups, size)


# ---------------------------------------------------------------- reductions
def _bitwise(rows: Tensor, op: str) -> Tensor:
    """Over dimension 1, halving it: [outer, 1, inner, *local]."""
    combine = getattr(torch, {"band": "bitwise_and", "bor": "bitwise_or"}.get(op, "bitwise_xor"))
    while (size := rows.shape[1]) > 1:
        half = size // 2
        both = combine(rows.narrow(1, 0, half), rows.narrow(1, half, half))
        rows = torch.cat([both, rows.narrow(1, 2 * half, 1)], 1) if size % 2 else both
    return rows


def total_as_math(rows: Tensor, op: str) -> Tensor:
    """[outer, 1, inner, *local]: the reduction over dimension 1 in an order of Inductor's choice.

    Raises:
        CollectiveError: an op that the dtype does not have.
    """
    reason = legal(op, rows.dtype)
    if reason is not None:
        raise CollectiveError(f"{reason}. Convert the tensor, or use another op.")
    if rows.dtype is torch.bool:  # gloo takes bool as uint8
        return total_as_math(rows.to(torch.uint8), op).ne(0)
    if op in ("sum", "avg"):
        total = torch.sum(rows, 1, keepdim=True, dtype=rows.dtype)
        return total / rows.shape[1] if op == "avg" else total
    if op == "product":
        return torch.prod(rows, 1, keepdim=True, dtype=rows.dtype)
    if op in ("min", "max"):
        return (torch.amin if op == "min" else torch.amax)(rows, 1, keepdim=True)
    return _bitwise(rows, op)


def _all_reduce_math(stack: Tensor, op: str, groups: Sequence[int], group_size: int) -> Tensor:
    plan = _plan(stack, groups, group_size)
    rows = split_rows(stack, plan)
    return joined_rows(total_as_math(rows, op).expand(rows.shape), plan, stack)


@_op(f"stacked_all_reduce(Tensor stack, str op, {_GROUPS})", _fake_same, _all_reduce_math)
def all_reduce(stack: Tensor, op: str, groups: Sequence[int], group_size: int) -> Tensor:
    plan = _plan(stack, groups, group_size)
    rows = split_rows(stack, plan)
    total = reduce_rows(rows, op, order=settings.order)
    return joined_rows(total.unsqueeze(1).expand(rows.shape), plan, stack)


def _reduce_math(
    stack: Tensor, op: str, root: int, groups: Sequence[int], group_size: int
) -> Tensor:
    plan = _plan(stack, groups, group_size)
    rows = split_rows(stack, plan)
    is_root = torch.arange(group_size, device=stack.device) == root
    is_root = is_root.view(group_size, *[1] * (rows.dim() - 2))
    return joined_rows(torch.where(is_root, total_as_math(rows, op), rows), plan, stack)


@_op(f"stacked_reduce(Tensor stack, str op, int root, {_GROUPS})", _fake_same, _reduce_math)
def reduce(stack: Tensor, op: str, root: int, groups: Sequence[int], group_size: int) -> Tensor:
    """What each rank's tensor holds afterwards; only that of `root`, a group rank, is defined."""
    plan = _plan(stack, groups, group_size)
    left = reduce_rows_to_root(split_rows(stack, plan), op, root, order=settings.order)
    return joined_rows(left, plan, stack)


def _fake_reduce_scatter(stack: Tensor, op: str, groups: Sequence[int], group_size: int) -> Tensor:
    return stack.new_empty((stack.shape[0], stack.shape[1] // group_size, *stack.shape[2:]))


def _reduce_scatter_math(stack: Tensor, op: str, groups: Sequence[int], group_size: int) -> Tensor:
    plan = _whole_plan("reduce_scatter", stack, groups, group_size)
    rows = split_rows(stack, plan).unflatten(3, (group_size, stack.shape[1] // group_size))
    # From [outer, 1, inner, member, rows, ...].
    return joined_rows(total_as_math(rows, op).squeeze(1).transpose(1, 2), plan, stack)


@_op(
    f"stacked_reduce_scatter(Tensor stack, str op, {_GROUPS})",
    _fake_reduce_scatter,
    _reduce_scatter_math,
)
def reduce_scatter(stack: Tensor, op: str, groups: Sequence[int], group_size: int) -> Tensor:
    """Equal chunks along the first dimension of the shards of the group's reduction."""
    plan = _whole_plan("reduce_scatter", stack, groups, group_size)
    total = reduce_rows(split_rows(stack, plan), op, order=settings.order)
    parts = total.unflatten(2, (group_size, stack.shape[1] // group_size))
    return joined_rows(parts.transpose(1, 2), plan, stack)


def _fake_entry(stack: Tensor, *rest: Any) -> Tensor:
    return stack.new_empty((stack.shape[0], *stack.shape[2:]))


def _reduce_scatter_list_math(
    stack: Tensor, op: str, groups: Sequence[int], group_size: int
) -> Tensor:
    plan = _whole_plan("reduce_scatter_list", stack, groups, group_size)
    total = total_as_math(split_rows(stack, plan), op)
    return joined_rows(total.squeeze(1).transpose(1, 2), plan, stack)


@_op(
    f"stacked_reduce_scatter_list(Tensor stack, str op, {_GROUPS})",
    _fake_entry,
    _reduce_scatter_list_math,
)
def reduce_scatter_list(stack: Tensor, op: str, groups: Sequence[int], group_size: int) -> Tensor:
    """`stack[p, k]` is what position p sends to member k of its group; each is reduced alone."""
    plan = _whole_plan("reduce_scatter_list", stack, groups, group_size)
    rows = split_rows(stack, plan)
    flat = rows.reshape(plan.outer, plan.size, plan.inner * group_size, *rows.shape[4:])
    total = reduce_rows(flat, op, order=settings.order)
    parts = total.unflatten(1, (plan.inner, group_size))
    return joined_rows(parts.transpose(1, 2), plan, stack)


# ---------------------------------------------------------------- data movement
def _fake_all_gather(stack: Tensor, groups: Sequence[int], group_size: int) -> Tensor:
    return stack.new_empty((stack.shape[0], stack.shape[1] * group_size, *stack.shape[2:]))


@_op(f"stacked_all_gather(Tensor stack, {_GROUPS})", _fake_all_gather)
def all_gather(stack: Tensor, groups: Sequence[int], group_size: int) -> Tensor:
    """The group's shards joined along their first dimension."""
    plan = _whole_plan("all_gather", stack, groups, group_size)
    # [outer, 1, inner, member, rows, ...], and that for every member.
    rows = split_rows(stack, plan).transpose(1, 2).unsqueeze(1)
    out = joined_rows(rows.expand(-1, group_size, *[-1] * (rows.dim() - 2)), plan, stack)
    return out.reshape(stack.shape[0], group_size * stack.shape[1], *stack.shape[2:])


@_op(f"stacked_broadcast(Tensor stack, int root, {_GROUPS})", _fake_same)
def broadcast(stack: Tensor, root: int, groups: Sequence[int], group_size: int) -> Tensor:
    """`root` is a group rank."""
    plan = _plan(stack, groups, group_size)
    rows = split_rows(stack, plan)
    return joined_rows(rows.narrow(1, root, 1).expand(rows.shape), plan, stack)


@_op(f"stacked_all_to_all_single(Tensor stack, {_GROUPS})", _fake_same)
def all_to_all_single(stack: Tensor, groups: Sequence[int], group_size: int) -> Tensor:
    """Equal chunks along the first dimension of the shards, the k-th to member k."""
    plan = _whole_plan("all_to_all_single", stack, groups, group_size)
    rows = split_rows(stack, plan).unflatten(3, (group_size, stack.shape[1] // group_size))
    return joined_rows(rows.transpose(1, 3), plan, stack).reshape(stack.shape)


def _fake_shard_dim_alltoall(
    stack: Tensor, gather_dim: int, shard_dim: int, groups: Sequence[int], group_size: int
) -> Tensor:
    size = list(stack.shape[1:])
    size[shard_dim] //= group_size
    size[gather_dim] *= group_size
    return stack.new_empty([stack.shape[0], *size])


@_op(
    f"stacked_shard_dim_alltoall(Tensor stack, int gather_dim, int shard_dim, {_GROUPS})",
    _fake_shard_dim_alltoall,
)
def shard_dim_alltoall(
    stack: Tensor, gather_dim: int, shard_dim: int, groups: Sequence[int], group_size: int
) -> Tensor:
    """DTensor's Shard(gather_dim) -> Shard(shard_dim); the dimensions are those of a shard."""
    plan = _whole_plan("shard_dim_alltoall", stack, groups, group_size)
    dims = stack.dim() - 1
    gather_dim, shard_dim = gather_dim % dims, shard_dim % dims
    part = stack.shape[1 + shard_dim] // group_size
    rows = split_rows(stack, plan).unflatten(3 + shard_dim, (group_size, part))
    # The sender before the dimension that it fills, the receiver in its place.
    rows = rows.movedim(3 + shard_dim, 0).movedim(2, 3 + gather_dim).movedim(0, 1)
    size = list(stack.shape[1:])
    size[shard_dim] = part
    size[gather_dim] *= group_size
    return joined_rows(rows, plan, stack).reshape(stack.shape[0], *size)


@_op(f"stacked_scatter(Tensor stack, int root, {_GROUPS})", _fake_entry)
def scatter(stack: Tensor, root: int, groups: Sequence[int], group_size: int) -> Tensor:
    """`stack[p, k]` of the group rank `root` goes to member k."""
    plan = _whole_plan("scatter", stack, groups, group_size)
    rows = split_rows(stack, plan).select(1, root)
    return joined_rows(rows.transpose(1, 2), plan, stack)


def _fake_gather(stack: Tensor, groups: Sequence[int], group_size: int) -> Tensor:
    return stack.new_empty((len(groups) // group_size, group_size, *stack.shape[1:]))


@_op(f"stacked_gather(Tensor stack, {_GROUPS})", _fake_gather)
def gather(stack: Tensor, groups: Sequence[int], group_size: int) -> Tensor:
    """[groups, members, *local]: what the root of each group gets."""
    rows = stack.index_select(0, torch.tensor(groups, device=stack.device))
    return rows.unflatten(0, (len(groups) // group_size, group_size))


# ---------------------------------------------------------------- autograd
# As in ops.py: met only where a graph with these nodes is traced again, above autograd.
def _keep_options(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.options = inputs[1:]


def _autograd(name: str, backward: Callable[..., Any]) -> None:
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=_keep_options, lib=library
    )


def _all_reduce_backward(ctx: Any, grad: Tensor) -> Any:
    op, groups, size = ctx.options
    if op not in ("sum", "avg"):
        raise NotImplementedError(f"the backward of localtensor::stacked_all_reduce with {op!r}")
    return OPS.stacked_all_reduce(grad, op, groups, size), None, None, None


def _all_gather_backward(ctx: Any, grad: Tensor) -> Any:
    groups, size = ctx.options
    return OPS.stacked_reduce_scatter(grad, "sum", groups, size), None, None


def _reduce_scatter_backward(ctx: Any, grad: Tensor) -> Any:
    op, groups, size = ctx.options
    if op not in ("sum", "avg"):
        raise NotImplementedError(
            f"the backward of localtensor::stacked_reduce_scatter with {op!r}"
        )
    out = OPS.stacked_all_gather(grad, groups, size)
    return out / size if op == "avg" else out, None, None, None


def _all_to_all_backward(ctx: Any, grad: Tensor) -> Any:
    groups, size = ctx.options
    return OPS.stacked_all_to_all_single(grad, groups, size), None, None


def _shard_dim_alltoall_backward(ctx: Any, grad: Tensor) -> Any:
    gather_dim, shard_dim, groups, size = ctx.options
    out = OPS.stacked_shard_dim_alltoall(grad, shard_dim, gather_dim, groups, size)
    return out, None, None, None, None


_autograd("stacked_all_reduce", _all_reduce_backward)
_autograd("stacked_all_gather", _all_gather_backward)
_autograd("stacked_reduce_scatter", _reduce_scatter_backward)
_autograd("stacked_all_to_all_single", _all_to_all_backward)
_autograd("stacked_shard_dim_alltoall", _shard_dim_alltoall_backward)
