"""Apply a localtensor::* op to LocalTensors: what functional and in-place collectives share.

Checks that the ranks agree where a real collective would otherwise fail, hang or corrupt data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CollectiveError, per_rank_text
from ..values.rank_node import is_ranked
from ..values.ranked import per_rank_values
from ..values.stack import ShardsOfStack, stack_of
from ..values.tensor import LocalTensor, _wrap
from . import on_stacks
from .groups import Groups, groups_of
from .ops import OPS, require_agreement

REDUCE_OPS = ("sum", "avg", "product", "min", "max", "band", "bor", "bxor")


def checked_op(op: str) -> str:
    """`op` in lower case. Raises CollectiveError for an unknown reduce op."""
    name = op.lower()
    if name not in REDUCE_OPS:
        raise CollectiveError(
            f"unknown reduce op {op!r}. The reduce ops are {', '.join(REDUCE_OPS)}."
        )
    return name


def local(tensor: Any, what: str) -> LocalTensor:
    """`tensor` as a LocalTensor, or CollectiveError."""
    if isinstance(tensor, LocalTensor):
        return tensor
    raise CollectiveError(
        f"{what} got LocalTensors together with a plain tensor of shape {tuple(tensor.shape)}. "
        "Every operand of one collective needs a shard per rank: create it inside "
        "LocalTensorMode, or with rank_map."
    )


def require_resolved(tensor: LocalTensor, what: str) -> None:
    """Refuse a conjugate view, as real process groups do: its memory holds other values.

    torch resolves it before a collective, but not inside a DTensor's redistribution in backward.
    """
    shards = tensor._local_tensors
    stack = stack_of(shards)
    held = shards.values() if stack is None else (stack,)
    if any(type(t) is Tensor and t.is_conj() for t in held):
        raise CollectiveError(
            f"{what} of a complex tensor of shape {tuple(tensor.shape)} whose conjugation is not "
            "resolved: real ranks fail here too, in view_as_real. Call resolve_conj() on it, or on "
            "the output whose gradient it is, first."
        )


def locate(tensor: LocalTensor, group: Any) -> Groups:
    return groups_of(group, tuple(tensor._local_tensors))


def require_members(groups: Groups, tensor: LocalTensor, what: str) -> None:
    """A functional collective must be called by members only: other real ranks raise."""
    if groups.family:
        return
    outside = [r for r in tensor._local_tensors if r not in groups.members]
    if outside:
        raise CollectiveError(
            f"{what} on the group of ranks {list(groups.ranks[0])} got shards of ranks {outside}, "
            "which are not in the group: on real processes these ranks raise here. Call it on "
            "the members only, or create the groups of all ranks together with "
            "dist.new_subgroups or a DeviceMesh."
        )


def require_same_shape(tensor: LocalTensor, groups: Groups, what: str, dims: slice) -> None:
    """Raise CollectiveError unless the members of each group agree in shape[dims]."""
    if not any(isinstance(s, torch.SymInt) for s in tensor._size[dims]):
        return
    if type(tensor._local_tensors) is ShardsOfStack:
        return
    shards = tensor._local_tensors
    for group in groups.ranks:
        shapes = {r: tuple(shards[r].shape) for r in group}
        first = shapes[group[0]][dims]
        if any(not _equal_sizes(s[dims], first) for s in shapes.values()):
            raise CollectiveError(
                f"{what} needs the same shape on every rank of the group {list(group)}, but the "
                f"shapes are {per_rank_text(shapes)}. On real processes this fails, hangs or "
                "corrupts data: pad the shards to one shape, or use a collective with splits."
            )


def _equal_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(x is y or bool(x == y) for x, y in zip(a, b))


def run(op: Any, tensor: LocalTensor, groups: Groups, *options: Any) -> LocalTensor:
    """Run localtensor::`op` on `tensor`; `options` stand before the groups."""
    at_once = on_stacks.run(op, tensor, groups, options)
    if at_once is not NotImplemented:
        return at_once
    shards = tensor._local_tensors
    out = op(list(shards.values()), *options, list(groups.positions), groups.size)
    result = _wrap(dict(zip(shards, out)))
    return on_stacks.back(op, result) if type(shards) is ShardsOfStack else result


def all_reduce(tensor: LocalTensor, op: str, groups: Groups, what: str) -> LocalTensor:
    require_same_shape(tensor, groups, what, slice(None))
    return run(OPS.all_reduce.default, tensor, groups, checked_op(op))


def all_reduce_together(
    tensors: Sequence[LocalTensor], op: str, groups: Groups, what: str
) -> list[LocalTensor]:
    """all_reduce of several tensors in one: gloo joins them, which decides how sums associate."""
    for t in tensors:
        require_same_shape(t, groups, what, slice(None))
    if len({t.dtype for t in tensors}) > 1:
        raise CollectiveError(
            f"{what} got tensors of dtypes {sorted({str(t.dtype) for t in tensors})}. "
            "Use one dtype, or one call per dtype."
        )
    row = on_stacks.cat_flat(tensors)
    if row is not None:
        return on_stacks.split_flat(all_reduce(row, op, groups, what), tensors)
    ranks = list(tensors[0]._local_tensors)
    joined = {r: torch.cat([t._local_tensors[r].reshape(-1) for t in tensors]) for r in ranks}
    reduced = all_reduce(_wrap(joined), op, groups, what)._local_tensors
    parts = {}
    for r in ranks:
        shards = [t._local_tensors[r] for t in tensors]
        split = torch.split(reduced[r], [s.numel() for s in shards])
        parts[r] = [p.reshape(s.shape).clone() for p, s in zip(split, shards)]
    return [_wrap({r: parts[r][k] for r in ranks}) for k in range(len(tensors))]


def all_gather(tensor: LocalTensor, groups: Groups, what: str) -> LocalTensor:
    require_rows(tensor, what)
    require_same_shape(tensor, groups, what, slice(None))
    return run(OPS.all_gather.default, tensor, groups)


def reduce_scatter(tensor: LocalTensor, op: str, groups: Groups, what: str) -> LocalTensor:
    require_rows(tensor, what)
    require_same_shape(tensor, groups, what, slice(None))
    first = tensor._local_tensors[groups.ranks[0][0]]
    if first.shape[0] % groups.size != 0:
        raise CollectiveError(
            f"{what} splits dimension 0 into {groups.size} equal parts, one per rank of the group, "
            f"but its size is {first.shape[0]}. Pad it to a multiple of {groups.size}."
        )
    return run(OPS.reduce_scatter.default, tensor, groups, checked_op(op))


def require_rows(tensor: LocalTensor, what: str) -> None:
    if len(tensor._size) == 0:
        raise CollectiveError(
            f"{what} works along dimension 0, but the tensor has none. Use tensor.view(1)."
        )


def broadcast(tensor: LocalTensor, root: int, groups: Groups, what: str) -> LocalTensor:
    if not 0 <= root < groups.size:
        raise CollectiveError(
            f"{what}: the root is group rank {root}, but the group {list(groups.ranks[0])} has "
            f"group ranks 0 to {groups.size - 1}."
        )
    require_same_shape(tensor, groups, what, slice(None))
    return run(OPS.broadcast.default, tensor, groups, root)


def all_to_all_single(
    tensor: LocalTensor, output_splits: Any, input_splits: Any, groups: Groups, what: str
) -> LocalTensor:
    """Splits are lists of ints or per-rank ints, or empty for equal parts.

    Raises:
        CollectiveError: splits of the wrong length, that do not sum to the rows, or of which the
            sender's and the receiver's differ.
    """
    require_rows(tensor, what)
    require_same_shape(tensor, groups, what, slice(1, None))
    at_once = on_stacks.equal_all_to_all(tensor, (input_splits, output_splits), groups)
    if at_once is not NotImplemented:
        return at_once
    size = groups.size
    sent = {
        r: _splits(input_splits, t.shape[0], size, r, what)
        for r, t in tensor._local_tensors.items()
        if r in groups.members
    }
    received = None
    if output_splits:
        received = {r: _splits(output_splits, None, size, r, what) for r in sent}
    for group in groups.ranks:
        for r in group:
            rows, total = tensor._local_tensors[r].shape[0], sum(sent[r])
            if not _same(total, rows):
                raise CollectiveError(
                    f"{what}: the input splits of rank {r} are {sent[r]}, which sum to {total}, "
                    f"but its tensor has {rows} rows. Splits must sum to the rows."
                )
        if received is None:
            continue
        for k, dst in enumerate(group):
            for j, src in enumerate(group):
                given, expected = sent[src][k], received[dst][j]
                if isinstance(given, int) and isinstance(expected, int):  # else when it runs
                    require_agreement(given, expected, what, f"rank {src}", f"rank {dst}")
    shards = tensor._local_tensors
    nothing = [0] * size
    given = [s for r in shards for s in sent.get(r, nothing)]
    if received is None:
        received = {
            dst: [sent[src][k] for src in group]
            for group in groups.ranks
            for k, dst in enumerate(group)
        }
    expected = [s for r in shards for s in received.get(r, nothing)]
    positions = list(groups.positions)
    op = OPS.all_to_all_single.default
    out = op(list(shards.values()), given, expected, positions, size)
    result = _wrap(dict(zip(shards, out)))
    return on_stacks.back(op, result) if type(shards) is ShardsOfStack else result


def _same(a: Any, b: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return bool(guard_or_true(a == b))


def _splits(splits: Any, rows: Any, size: int, rank: int, what: str) -> list[Any]:
    if not splits:
        if isinstance(rows, int) and rows % size:
            raise CollectiveError(
                f"{what} without splits sends equal parts, but the {rows} rows of rank {rank} do "
                f"not divide by the {size} ranks of the group. Pass splits."
            )
        return [rows // size] * size
    if len(splits) != size:
        raise CollectiveError(
            f"{what} got {len(splits)} splits for a group of {size} ranks. Give one split per rank."
        )
    return [_on_rank(s, rank) for s in splits]


def _on_rank(value: Any, rank: int) -> Any:
    if is_ranked(value):
        value = value.node._values[rank]
    else:
        values = per_rank_values(value)
        value = value if values is None else values[rank]
    return int(value) if isinstance(value, torch.Tensor) else value


def copy_into(target: Any, result: LocalTensor, ranks: Any, what: str) -> None:
    """Write `result` into `target` on the given ranks, as an in-place collective does.

    Raises:
        CollectiveError: a rank's output has another number of elements than its result.
    """
    out = local(target, what)
    if on_stacks.copy_into(out, result, ranks):
        return
    for r in ranks:
        have, got = out._local_tensors[r], result._local_tensors[r]
        if have.dtype != got.dtype:
            raise CollectiveError(
                f"{what}: the output of rank {r} has dtype {have.dtype}, but the data has "
                f"{got.dtype}. Use one dtype."
            )
        if have.shape != got.shape:
            if have.numel() != got.numel():
                raise CollectiveError(
                    f"{what}: the output of rank {r} has shape {tuple(have.shape)}, but it "
                    f"receives {tuple(got.shape)}. Give it that shape."
                )
            got = got.reshape(have.shape)
        have.copy_(got)
