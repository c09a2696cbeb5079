"""The shards of all ranks in one tensor: the stacked layout of a LocalTensor.

`stack` has the shape [ranks, *local]. Its rows are the shards, and ShardsOfStack gives them out as
views, so that code that asks a LocalTensor for its shards works on both layouts: it reads and
writes the memory of the stack.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor


class StackedRanks(tuple):
    """The ranks of a stacked LocalTensor: the metadata that it is flattened with.

    Never equal to the plain tuple of ranks that stands for the per-rank layout: compiled code of
    one layout must not be taken for that of the other. `shift` is that of ShardsOfStack.
    """

    shift: int

    def __new__(cls, ranks: Iterable[int], shift: int = 0) -> StackedRanks:
        self = super().__new__(cls, ranks)
        self.shift = shift
        return self

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is StackedRanks and tuple.__eq__(self, other) and self.shift == other.shift
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(("stacked", tuple(self), self.shift))

    def __repr__(self) -> str:
        return f"StackedRanks({tuple(self)!r}, shift={self.shift})"

    def __reduce__(self) -> Any:
        return StackedRanks, (tuple(self), self.shift)


class _Made:
    """Whether this process ever made a stack: programs without any never look for one."""

    any = False


made = _Made()


@functools.lru_cache(maxsize=256)
def _positions(ranks: tuple[int, ...]) -> dict[int, int]:
    return {r: i for i, r in enumerate(ranks)}


@functools.lru_cache(maxsize=256)
def rank_set(ranks: tuple[int, ...]) -> frozenset[int]:
    return frozenset(ranks)


class ShardsOfStack(Mapping[int, Tensor]):
    """{rank: shard} over a stack: each shard is a view of it, made when it is asked for.

    In a view of a part that starts elsewhere on each rank, a row begins `shift` elements further
    into its rank's memory than the row before: the ranks' storage offsets differ.
    """

    __slots__ = ("ranks", "shift", "stack")

    def __init__(self, stack: Tensor, ranks: tuple[int, ...], shift: int = 0) -> None:
        self.stack = stack
        self.ranks = ranks
        self.shift = shift
        made.any = True

    def __getitem__(self, rank: int) -> Tensor:
        return self.stack.select(0, _positions(self.ranks)[rank])

    def __iter__(self) -> Iterator[int]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)

    def __contains__(self, rank: object) -> bool:
        return rank in _positions(self.ranks)

    def __repr__(self) -> str:
        return f"ShardsOfStack({self.stack!r}, {self.ranks!r})"


def stack_of(shards: Any) -> Tensor | None:
    """The stack behind a LocalTensor's shards, or None in the per-rank layout."""
    return shards.stack if type(shards) is ShardsOfStack else None
