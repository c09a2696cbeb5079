"""From shards to a stack, and the memory layout that a stack must have.

The rows of a stack have the strides that the shards would have on their own, and lie one after the
other: the rank dimension is the outermost in memory. Views of a stack keep its rank stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..values.rank_node import is_ranked
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap_stacked
from .counts import joined


def is_stacked(value: Any) -> bool:
    """Whether `value` is a LocalTensor in the stacked layout."""
    return type(value) is LocalTensor and type(value._local_tensors) is ShardsOfStack


def wrap(stack: Tensor, ranks: tuple[int, ...]) -> LocalTensor:
    """The LocalTensor of a fresh stack that an op made, in whatever memory order it came."""
    return _wrap_stacked(settled(stack), ranks)


def settled(stack: Tensor) -> Tensor:
    """`stack`, copied if need be so that each row is memory of its own."""
    if type(stack) is Tensor and stack.is_contiguous():
        return stack
    stride, size = stack.stride(), stack.shape
    outer = stride[0]
    if not isinstance(outer, int):
        return stack
    span = 1
    for s, n in zip(stride[1:], size[1:]):
        if not isinstance(s, int) or not isinstance(n, int):
            return stack.contiguous()
        span += s * (n - 1)
    if size[0] == 1 or outer >= span:
        return stack
    order = memory_order(stride[1:], size[1:])
    inner = [1 + d for d in order]
    ordered = stack.permute(0, *inner).contiguous()
    back = [0] * len(inner)
    for position, d in enumerate(order):
        back[d] = position + 1
    return ordered.permute(0, *back)


def memory_order(stride: Sequence[int], size: Sequence[int]) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    return sorted(range(len(stride)), key=lambda d: -stride[d] if size[d] != 1 else 0)


def expanded(shard: Tensor, count: int) -> Tensor:
    """A stack with a copy of one tensor in each row, in memory of its own each."""
    if shard.is_contiguous():
        wide = shard.unsqueeze(0).expand(count, *shard.shape)
        return wide.clone(memory_format=torch.contiguous_format)
    size, stride = shard.shape, shard.stride()
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride)) if shard.numel() else 0
    result = shard.new_empty_strided((count, *size), (extent, *stride))
    return result.copy_(shard)


def can_join(tensor: LocalTensor) -> bool:
    """Whether all shards have one size and stride, so that they fit into a stack."""
    return not any(is_ranked(s) for s in (*tensor._size, *tensor._stride))


def join(tensor: LocalTensor, what: str) -> LocalTensor:
    """The stacked copy of a LocalTensor whose shards are alike; strides stay."""
    shards = tensor._local_tensors
    if type(shards) is ShardsOfStack:
        return tensor
    joined(what)
    ranks = tuple(shards)
    return _wrap_stacked(_stack(list(shards.values())), ranks, False)


def _stack(shards: list[Tensor]) -> Tensor:
    first = shards[0]
    stride, size = first.stride(), first.shape
    if first.is_contiguous() or not all(isinstance(s, int) for s in (*stride, *size)):
        return torch.stack(shards)
    order = memory_order(stride, size)
    back = [0] * len(order)
    for position, d in enumerate(order):
        back[d] = position + 1
    return torch.stack([t.permute(order) for t in shards]).permute(0, *back)
