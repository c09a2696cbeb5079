"""A value of all ranks as plain parts, one per rank, and back.

An exported program of plain tensors takes and returns the parts; inside, while it is traced, the
model sees the LocalTensors, DTensors and per-rank numbers that they are parts of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from .._torch import AsyncCollectiveTensor, mesh_rank_grids
from ..errors import LocalTensorError, example_of
from ..values.int_node import make_int
from ..values.rank_node import is_ranked
from ..values.tensor import LocalTensor, _wrap


class ExportError(LocalTensorError, ValueError):
    """A model, or inputs, that cannot be exported to programs of single ranks."""


@dataclass(frozen=True)
class Leaf:
    """One value among the inputs, outputs or parameters.

    Attributes:
        ranks: whose parts there are; empty for a value that all ranks share.
        parts: one per rank, or the shared value itself.
        join: parts -> the value.
    """

    ranks: tuple[int, ...]
    parts: tuple[Any, ...]
    join: Callable[[Sequence[Any]], Any]

    @property
    def of_all(self) -> Any:
        """The parts as the program of all ranks has them: a tuple, or the shared value."""
        return self.parts if self.ranks else self.parts[0]

    def joined(self, of_all: Any) -> Any:
        """The value, of parts like `of_all`."""
        return self.join(of_all if self.ranks else (of_all,))

    def of_rank(self, rank: int) -> Any:
        """What one rank has."""
        return self.parts[self.ranks.index(rank)] if self.ranks else self.parts[0]


def take_apart(value: Any) -> Leaf:
    """The parts of a leaf value."""
    if isinstance(value, AsyncCollectiveTensor):
        value = value.wait()
    if isinstance(value, LocalTensor):
        ranks = tuple(value._local_tensors)
        grad = value.requires_grad

        def join_shards(parts: Sequence[Any]) -> Any:
            # A shard must not require grad: autograd works on the LocalTensor.
            return _wrap({r: p.detach() for r, p in zip(ranks, parts)}, grad)

        return Leaf(ranks, tuple(value._local_tensors.values()), join_shards)
    if isinstance(value, DTensor):
        inner, spec, grad = take_apart(value._local_tensor), value._spec, value.requires_grad

        def join_dtensor(parts: Sequence[Any]) -> Any:
            local = inner.join(parts)
            return DTensor(local, _spec_of(spec, local), requires_grad=grad)

        return Leaf(inner.ranks, inner.parts, join_dtensor)
    if is_ranked(value):
        numbers = value.node._values
        return Leaf(
            tuple(numbers),
            tuple(numbers.values()),
            lambda parts: make_int(dict(zip(numbers, parts))),
        )
    if isinstance(value, torch.Tensor):
        grad = value.requires_grad
        # As shards are: gradients that reach shared parameters alone would be misleading.
        return Leaf((), (value,), lambda parts: parts[0].detach().requires_grad_(grad))
    return Leaf((), (value,), lambda parts: parts[0])


def _spec_of(spec: Any, local: Any) -> Any:
    """`spec` with the global sizes that belong to `local`, whose sizes may be symbols by now."""
    if not isinstance(local, LocalTensor):
        return spec
    sizes = list(spec.tensor_meta.shape)
    for dim in range(len(sizes)):
        of_ranks = {r: t.shape[dim] for r, t in local._local_tensors.items()}
        # Symbols: sizes of a program that is traced, or that was, of which `spec` is the output.
        if any(isinstance(s, torch.SymInt) for s in (*of_ranks.values(), sizes[dim])):
            sizes[dim] = _global_size(spec, dim, of_ranks)
    if all(a is b for a, b in zip(sizes, spec.tensor_meta.shape)):
        return spec
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = spec.tensor_meta
    strides = _strides_like(meta.stride, sizes)
    return DTensorSpec(
        spec.mesh,
        spec.placements,
        tensor_meta=TensorMeta(torch.Size(sizes), strides, meta.dtype),
    )


def _global_size(spec: Any, dim: int, of_ranks: dict[int, Any]) -> Any:
    """The size of a dimension of all shards together, in each group that cuts it."""
    cutting = [i for i, p in enumerate(spec.placements) if p.is_shard(dim)]
    if not cutting:
        return next(iter(of_ranks.values()))
    shape, (grid, *_) = mesh_rank_grids(spec.mesh)
    of_group = [
        rank
        for rank, place in zip(grid, itertools.product(*map(range, shape)))
        if not any(c for d, c in enumerate(place) if d not in cutting)
    ]
    first = of_ranks[of_group[0]]
    # Asking whether symbols are equal makes them so, or different, for good.
    if len({example_of(of_ranks[r]) for r in of_group}) == 1 and all(
        of_ranks[r] is first or bool(of_ranks[r] == first) for r in of_group
    ):
        return first * len(of_group)
    return sum(of_ranks[r] for r in of_group)


def _strides_like(strides: Sequence[Any], sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Dense strides in the order of `strides`."""
    order = sorted(range(len(sizes)), key=lambda d: (strides[d], -d))
    result: list[Any] = [1] * len(sizes)
    step: Any = 1
    for d in order:
        result[d] = step
        step = step * sizes[d]
    return tuple(result)


def take_tree_apart(tree: Any) -> tuple[list[Leaf], pytree.TreeSpec]:
    """The leaves of a nested structure."""
    values, spec = pytree.tree_flatten(tree)
    return [take_apart(v) for v in values], spec


def common_ranks(leaves: Sequence[Leaf], what: str, default: Iterable[int] = ()) -> tuple[int, ...]:
    """The ranks of all leaves that are not shared, or `default` where all are.

    Raises:
        ExportError: they differ, or there are none.
    """
    found = {leaf.ranks: leaf for leaf in leaves if leaf.ranks}
    if not found and tuple(default):
        return tuple(sorted(default))
    if not found:
        raise ExportError(
            f"{what} hold nothing that ranks have a part of: no LocalTensor, no DTensor of "
            "LocalTensors. Build the model and its inputs inside LocalTensorMode, or use "
            "torch.export.export for plain tensors."
        )
    if len(found) > 1:
        listed = " and ".join(str(list(ranks)) for ranks in found)
        raise ExportError(
            f"{what} are of different ranks: {listed}. Every tensor needs a shard of every rank."
        )
    return next(iter(found))
