"""The value of a reduction over a group, in gloo's own association order or in rank order.

Pure functions on the plain shards of one group, in group-rank order. Groups, worlds and custom ops
are not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CollectiveError

ORDERS = ("gloo", "rank_order")

# gloo sends a chunk in segments of at most this many bytes (gloo/allreduce.h, maxSegmentSize).
_MAX_SEGMENT_BYTES = 1024 * 1024


# Each takes what the next rank holds and what it received from the fold so far. min and max are
# C++ std::min and std::max, which keep the first operand where a comparison with NaN is false.
_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "product": torch.mul,
    "min": lambda held, got: torch.where(got < held, got, held),
    "max": lambda held, got: torch.where(held < got, got, held),
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}
OPS = (*_COMBINE, "avg", "premul_sum")


def reduce_shards(
    shards: Sequence[Tensor], op: str, *, order: str = "gloo", factor: Any = None
) -> Tensor:
    if order not in ORDERS:
        raise CollectiveError(f"unknown reduction order {order!r}. Use {' or '.join(ORDERS)}.")
    size = len(shards)
    if op == "avg":
        return reduce_shards(shards, "sum", order=order) / size
    if op == "premul_sum":
        shards, op = [t * factor for t in shards], "sum"
    combine = _COMBINE[op]
    dtype = shards[0].dtype
    if dtype.is_complex:
        parts = reduce_shards([torch.view_as_real(t) for t in shards], op, order=order)
        return torch.view_as_complex(parts)
    if dtype is torch.bool:
        return reduce_shards([t.view(torch.uint8) for t in shards], op, order=order).view(dtype)
    if size == 1:
        return shards[0].clone(memory_format=torch.contiguous_format)
    if order == "rank_order" or not dtype.is_floating_point:
        total = shards[0]
        for t in shards[1:]:
            total = combine(t, total)
        return total.contiguous()
    return _ring(shards, combine)


def _ring(shards: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    size, shape = len(shards), shards[0].shape
    flat = [t.reshape(-1) for t in shards]
    count = flat[0].numel()
    if count == 0:
        return shards[0].clone(memory_format=torch.contiguous_format)
    chunk = _chunk(count, shards[0].element_size(), size)
    parts = []
    for rank in range(size):
        start = rank * chunk
        length = min(chunk, count - start)
        if length <= 0:
            break
        held = [t.narrow(0, start, length) for t in flat]
        total = held[rank - 1]
        for step in range(2, size + 1):
            total = combine(held[(rank - step) % size], total)
        parts.append(total)
    return torch.cat(parts).view(shape)


def _chunk(count: int, element_size: int, size: int) -> int:
    """Elements of one of the `size` chunks of gloo's ring all-reduce (gloo/allreduce.cc)."""
    segment_limit = element_size * max(1, _MAX_SEGMENT_BYTES // element_size)
    segments = max(-(-count * element_size // segment_limit), 2 * size)
    segments = -(-segments // size) * size
    segment = -(-count * element_size // segments)
    return segments // size * (-(-segment // element_size))
