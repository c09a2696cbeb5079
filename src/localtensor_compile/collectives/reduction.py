"""The value of a reduction over a group, in gloo's own association order or in rank order.

Pure functions on the plain shards of one group, in group-rank order. Groups, worlds and custom ops
are not known here. Which collective of torch uses which function is written at each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CollectiveError, per_rank_text

ORDERS = ("gloo", "rank_order")

Combine = Callable[[Tensor, Tensor], Tensor]

# What a rank makes of its own data and of the fold it received. min and max are C++ std::min and
# std::max, which keep the first operand where a comparison with NaN is false.
COMBINE: dict[str, Combine] = {
    "sum": torch.add,
    "product": torch.mul,
    "min": lambda own, got: torch.where(got < own, got, own),
    "max": lambda own, got: torch.where(own < got, got, own),
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
_BITWISE = ("band", "bor", "bxor")
SUMS = {"avg": "sum", "premul_sum": "sum"}
OPS = (*COMBINE, *SUMS)

_FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool})
_COMPLEX = frozenset({torch.complex64, torch.complex128})

# gloo's maxSegmentSize (gloo/allreduce.h, gloo/reduce.h).
_MAX_SEGMENT = 1024 * 1024
# Up to this many bytes in all shards the number of ops costs more than a copy of the data.
SMALL = 1024 * 1024


def legal(op: str, dtype: torch.dtype) -> str | None:
    """Why real gloo processes cannot reduce `dtype` with `op`, or None if they can.

    Measured on torch 2.13; it is the same for every reducing collective.
    """
    if op not in OPS:
        return f"there is no reduce op {op!r}; the reduce ops are {', '.join(OPS)}"
    name = f"ReduceOp.{op.upper()}"
    if dtype not in _FLOATS | _INTEGERS | _COMPLEX:
        return f"gloo cannot reduce {dtype}"
    if op == "premul_sum":
        return f"gloo has no {name}; it exists on NCCL only"
    if op in _BITWISE and dtype not in _INTEGERS:
        return f"{name} needs integers or bool, not {dtype}"
    if op == "avg" and dtype in _INTEGERS:
        return f"{name} gives fractions, which {dtype} cannot hold"
    if dtype in _COMPLEX and op not in ("sum", "avg"):
        return f"{name} is not defined on {dtype}"
    return None


def reduce_shards(
    shards: Sequence[Tensor],
    op: str,
    *,
    order: str = "gloo",
    factor: Any = None,
    complex_parts: bool = True,
) -> Tensor:
    """What every member of the group gets from all_reduce.

    The same holds, for its part of the data, for each way to reduce_scatter: gloo runs all_reduce
    on the whole input of reduce_scatter_single and keeps a chunk of dimension 0, and runs one
    all_reduce for each entry of reduce_scatter's list. all_reduce_coalesced is one all_reduce on
    all its tensors, flattened and joined; reduce_scatter_single_coalesced is one per tensor.

    Args:
        shards: one per member, in group-rank order; one shape and dtype, of static sizes.
        op: a name of OPS.
        order: "gloo" adds up in the order of gloo's ring all-reduce, bit for bit: rank c of W
            ranks gets the c-th of W chunks, added up from rank c-1 downwards to c+1 and last c,
            modulo W. "rank_order" is the left fold from rank 0 upwards.
        factor: of premul_sum: a number or tensor of one element, or a sequence with one per member.
        complex_parts: how avg divides complex numbers: the real and imaginary parts, as all_reduce
            and functional reduce_scatter_tensor do, or the number, as reduce, reduce_scatter and
            the functional coalesced collectives do. They round differently.

    Returns:
        New contiguous tensor of the shards' shape and dtype.

    Raises:
        CollectiveError: shards that do not fit together, or an op that the dtype does not have.
    """
    data, combine = prepared(shards, op, order, factor)
    total = _fold(data, combine, order, op)
    return finished(total, shards[0].dtype, len(shards), op, complex_parts)


def reduce_to_root(
    shards: Sequence[Tensor],
    op: str,
    root: int,
    *,
    order: str = "gloo",
    factor: Any = None,
) -> list[Tensor]:
    """What each member has in its tensor after `dist.reduce` to group rank `root`.

    The result is on the root only, but gloo reduces in place: on the other ranks it leaves the
    partial sums that they passed on. With order="rank_order" their data stays as it was.

    Args and errors as for `reduce_shards`.
    """
    data, combine = prepared(shards, op, order, factor)
    dtype, size = shards[0].dtype, len(shards)
    if order == "gloo" and size > 1:
        buffers = _ring_reduce(data, combine, root)
        return [finished(t, dtype, size, op, complex_parts=False) for t in buffers]
    result = [_contiguous_copy(t) for t in shards]
    total = _fold(data, combine, order, op)
    result[root] = finished(total, dtype, size, op, complex_parts=False)
    return result


def memory_order(t: Tensor) -> Tensor:
    """One-dimensional view of `t` in the order of its memory.

    gloo's in-place all_reduce and reduce take the elements in this order, and so does
    reduce_scatter_single on `input.clone()`. It decides which element belongs to which chunk.

    Raises:
        CollectiveError: `t` has gaps or overlaps. gloo would then read and write memory that does
            not belong to it.
    """
    return memory_order_of_rows(t.unsqueeze(0)).squeeze(0)


def memory_order_of_rows(stack: Tensor) -> Tensor:
    """`memory_order` of each row of a stack [ranks, *local]: a view [ranks, elements]."""
    stride, shape = stack.stride()[1:], stack.shape[1:]
    dims = sorted(range(len(shape)), key=lambda d: (-stride[d], shape[d] == 1))
    ordered = stack.permute(0, *[1 + d for d in dims])
    if not ordered[0].is_contiguous():
        raise CollectiveError(
            f"a tensor of shape {tuple(shape)} and strides {tuple(stride)} has gaps or "
            "overlaps in memory, which an in-place collective of gloo would write into. "
            "Use tensor.contiguous()."
        )
    return ordered.flatten(1) if len(dims) else ordered.unsqueeze(1)


# ---------------------------------------------------------------- before and after
def prepared(
    shards: Sequence[Tensor], op: str, order: str, factor: Any
) -> tuple[list[Tensor], Combine]:
    """The shards as real numbers or integers, and how two of them combine.

    Raises:
        CollectiveError: as reduce_shards.
    """
    if order not in ORDERS:
        raise CollectiveError(f"unknown reduction order {order!r}. Use {' or '.join(ORDERS)}.")
    if not shards:
        raise CollectiveError("a reduction needs the shard of at least one rank.")
    dtype, shape = shards[0].dtype, shards[0].shape
    if any(t.dtype != dtype or t.shape != shape for t in shards):
        texts = {i: f"{t.dtype} {tuple(t.shape)}" for i, t in enumerate(shards)}
        raise CollectiveError(
            "a reduction needs one shape and dtype on all ranks of the group, but by group rank "
            f"they are {per_rank_text(texts)}."
        )
    reason = legal(op, dtype)
    if op == "premul_sum":
        shards = [t * f for t, f in zip(shards, factors_of(shards, factor))]
    elif reason is not None:
        raise CollectiveError(f"{reason}. Convert the tensor, or use another op.")
    elif factor is not None:
        raise CollectiveError(f"a factor belongs to premul_sum, not to {op}.")
    combine = COMBINE[SUMS.get(op, op)]
    if dtype in _COMPLEX:
        return [torch.view_as_real(t.resolve_conj()) for t in shards], combine
    if dtype is torch.bool:  # gloo takes bool as uint8
        return [t.to(torch.uint8) for t in shards], combine
    return list(shards), combine


def factors_of(shards: Sequence[Tensor], factor: Any) -> list[Tensor]:
    """The factor of premul_sum of each shard, as a tensor of no dimensions.

    Raises:
        CollectiveError: no floating point numbers, or another number of factors than of shards.
    """
    dtype = shards[0].dtype
    if dtype not in _FLOATS | _COMPLEX:
        raise CollectiveError(f"ReduceOp.PREMUL_SUM needs floating point numbers, not {dtype}.")
    factors = list(factor) if isinstance(factor, Sequence) else [factor] * len(shards)
    if len(factors) != len(shards) or any(f is None for f in factors):
        raise CollectiveError(
            f"premul_sum over {len(shards)} ranks needs one factor, or one per rank, but got "
            f"{factor!r}."
        )
    return [
        f.to(t).reshape(()) if isinstance(f, Tensor) else t.new_full((), f)
        for t, f in zip(shards, factors)
    ]


def finished(total: Tensor, dtype: torch.dtype, size: int, op: str, complex_parts: bool) -> Tensor:
    """The result of an op over `size` shards of `dtype`, from their total."""
    if dtype is torch.bool:
        return total.ne(0)
    if dtype not in _COMPLEX:
        return total / size if op == "avg" else total
    if op != "avg":
        return torch.view_as_complex(total)
    if complex_parts:
        return torch.view_as_complex(total / size)
    return torch.view_as_complex(total) / size


def _contiguous_copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- association orders
def _fold(shards: Sequence[Tensor], combine: Combine, order: str, op: str) -> Tensor:
    size, count = len(shards), shards[0].numel()
    if size == 1 or count == 0:
        return _contiguous_copy(shards[0])
    exact = not shards[0].dtype.is_floating_point
    commutes = size == 2 and op not in ("min", "max")  # these two are not, for NaN and -0.0
    if order == "rank_order" or exact or commutes:
        total = shards[0]
        for t in shards[1:]:
            total = combine(t, total)
        return total.contiguous()
    element_size, shape = shards[0].element_size(), shards[0].shape
    flat = [t.reshape(-1) for t in shards]
    chunk = all_reduce_chunk(count, element_size, size)
    if size * count * element_size <= SMALL:
        return _ring_few_ops(flat, combine, chunk).view(shape)
    return torch.cat([partial[-1] for partial in _ring(flat, combine, chunk)]).view(shape)


def _ring(flat: Sequence[Tensor], combine: Combine, chunk: int) -> Iterable[list[Tensor]]:
    """For each chunk c, its folds of 1, 2, ... W ranks; the k-th is made by rank c-k."""
    size, count = len(flat), flat[0].numel()
    for c, start in enumerate(range(0, count, chunk)):
        own = [t.narrow(0, start, min(chunk, count - start)) for t in flat]
        folds = [own[c - 1]]
        for k in range(2, size + 1):
            folds.append(combine(own[(c - k) % size], folds[-1]))
        yield folds


def _ring_few_ops(flat: Sequence[Tensor], combine: Combine, chunk: int) -> Tensor:
    """The last folds of `_ring`, joined, in 2 W ops instead of W * W.

    Of all shards in one row, twice, chunk c of rank c-k is a diagonal: one strided view for all c.
    """
    size, count = len(flat), flat[0].numel()
    rows = torch.cat([*flat, *flat])
    # Where the last chunk is short, its row runs on into other data, which is cut off at the end.
    diagonal = (-(-count // chunk), chunk), (count + chunk, 1)
    total = rows.as_strided(*diagonal, (size - 1) * count)
    for k in range(2, size + 1):
        total = combine(rows.as_strided(*diagonal, (size - k) * count), total)
    return total.view(-1)[:count]


def all_reduce_chunk(count: int, element_size: int, size: int) -> int:
    """Elements of a chunk: `ring` of gloo/allreduce.cc."""
    total = count * element_size
    limit = _MAX_SEGMENT // element_size * element_size
    segments = _round_up(max(-(-total // limit), 2 * size), size)
    segment = _round_up(-(-total // segments), element_size)
    return segments // size * segment // element_size


def _ring_reduce(shards: Sequence[Tensor], combine: Combine, root: int) -> list[Tensor]:
    """The ring of gloo/reduce.cc: that of all_reduce, cut into other chunks if there is much data.

    Where a chunk has more than two segments, gloo sends all but two of them once too often: a
    rank adds the finished chunk of its neighbour to its own data. The root does not keep it.
    """
    size, count, shape = len(shards), shards[0].numel(), shards[0].shape
    if count == 0:
        return [_contiguous_copy(t) for t in shards]
    chunk, surplus = reduce_chunk(count, shards[0].element_size(), size)
    pieces: list[list[Tensor]] = [[] for _ in shards]
    for c, folds in enumerate(_ring([t.reshape(-1) for t in shards], combine, chunk)):
        first, last = folds[0], folds[-1]
        if surplus:
            again = combine(first[:surplus], last[:surplus])
            folds[0] = torch.cat([again, first[surplus:]])
        for k, fold in enumerate(folds, 1):
            rank = (c - k) % size
            pieces[rank].append(last if rank == root else fold)
    return [torch.cat(p).view(shape) for p in pieces]


def reduce_chunk(count: int, element_size: int, size: int) -> tuple[int, int]:
    """Elements of a chunk of gloo/reduce.cc, and how many of them it sends once too often."""
    total = count * element_size
    limit = _MAX_SEGMENT // element_size * element_size
    segment = _round_up(min(-(-total // (2 * size)), limit), element_size)
    segments = _round_up(max(-(-total // segment), 2 * size), size) // size
    return segments * segment // element_size, (segments - 2) * segment // element_size


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
