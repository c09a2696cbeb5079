"""The memory of a bucket of gradients, and the part of it that is each parameter's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class GradBucket:
    """What a communication hook is given: the gradients of some parameters in one flat tensor."""

    def __init__(
        self, index: int, buffer: Tensor, views: list[Tensor], params: list[Tensor], last: bool
    ) -> None:
        self._index, self._buffer, self._views = index, buffer, views
        self._parameters, self._last = params, last

    def index(self) -> int:
        return self._index

    def buffer(self) -> Tensor:
        return self._buffer

    def set_buffer(self, tensor: Tensor) -> None:
        self._buffer = tensor

    def gradients(self) -> list[Tensor]:
        return self._views

    def parameters(self) -> list[Tensor]:
        return self._parameters

    def is_last(self) -> bool:
        return self._last


@dataclass
class Bucket:
    indices: list[int]
    contents: Tensor
    views: list[Tensor]
    pending: int = 0
    future: Any = None


def flat_views(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """One view of a bucket per parameter, laid out as the parameter where that is dense."""
    views, offset = [], 0
    for param in params:
        numel = param.numel()
        if _is_dense(param):
            views.append(torch.as_strided(flat, param.size(), param.stride(), offset))
        else:
            views.append(flat.narrow(0, offset, numel).view(param.size()))
        offset = offset + numel
    return views


def _is_dense(param: Any) -> bool:
    """Whether every shard's elements lie side by side in memory, in whatever order."""
    for shard in param._local_tensors.values():
        expected = 1
        for stride, size in sorted(zip(shard.stride(), shard.shape)):
            if size != 1 and stride != expected:
                return False
            expected *= size
    return True


def is_alias(one: Any, other: Any) -> bool:
    shards = other._local_tensors
    return all(torch._C._is_alias_of(t, shards[r]) for r, t in one._local_tensors.items())
