"""localtensor_random ops on stacks: one node and one tensor for the draws of all ranks.

The same as random_nodes.py but for what goes in and out: a stack [ranks, *local] in place of a
tensor per rank. When the node runs, each rank draws from its own generator into its row, whose
strides are those of the rank's tensor of its own, so that the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..values.rank_node import is_ranked
from ..values.stack import ShardsOfStack, stack_of
from ..values.tensor import LocalTensor
from .random_nodes import _ATTENTION, _TYPES, NODES, RANDPERM, VERSION, Node, _of_rank


class StackedNode(Node):
    """One localtensor_random op for a stack."""

    kinds = {**_TYPES, "Tensor": "Tensor", "Optional[Tensor]": "Tensor?"}
    suffix = f"stacked_{VERSION}"

    # ---- recording
    def _columns(self, ranks: Sequence[int], values: Sequence[Any]) -> list[Any]:
        stacks = [_stack(v) if isinstance(v, LocalTensor) else v for v in values]
        return super()._columns(ranks, stacks)

    def _outputs(self, ranks: Sequence[int], flat: Sequence[Tensor]) -> list[Any]:
        return [ShardsOfStack(t, tuple(ranks)) for t in flat]

    def takes(self, ranks: Sequence[int], values: Sequence[Any]) -> bool:
        """Whether every tensor among the values is a stack of these ranks."""
        return all(_is_stack_of(ranks, v) for v in values if isinstance(v, Tensor))

    # ---- running
    def _kernel(self, ranks: Sequence[int], call: int, after: Any, *rest: Any) -> list[Tensor]:
        with torch._C.DisableTorchFunction():
            memory, of_ranks = self._rows(len(ranks), rest)
            device = next(v for v in of_ranks[0] if isinstance(v, Tensor)).device
            rows: list[list[Tensor]] = []
            with self.draw.turns(ranks, device) as turns:
                for r, (args, kwargs) in zip(ranks, map(self._named, of_ranks)):
                    result = self.draw.call(*args, **kwargs, **{self.draw.keyword: turns[r]})
                    if memory is None:
                        rows.append(self._tensors(result))
            return [memory] if memory is not None else [_stacked(list(c)) for c in zip(*rows)]

    def _fake(self, ranks: Sequence[int], call: int, after: Any, *rest: Any) -> list[Tensor]:
        memory, of_ranks = self._rows(len(ranks), rest)
        if memory is not None:
            return [memory]
        args, kwargs = self._named(of_ranks[0])
        return [_stacked([t] * len(ranks)) for t in self._tensors(self.func(*args, **kwargs))]

    def _rows(self, count: int, rest: Sequence[Any]) -> tuple[Tensor | None, list[list[Any]]]:
        """The memory that is filled, if any, and the arguments of `func` for each rank."""
        memory = None
        if self.fills:
            sizes, strides, dtype, device, *rest = rest
            if strides:
                extent = 1 + sum((n - 1) * s for n, s in zip(sizes, strides))
                memory = torch.empty_strided(
                    (count, *sizes), (extent, *strides), dtype=dtype, device=device
                )
            else:
                memory = torch.empty((count, *sizes), dtype=dtype, device=device)
        rows = []
        for i in range(count):
            row = [] if memory is None else [memory[i]]
            for kind, column in zip(self.types, rest):
                own = column[i] if isinstance(column, Tensor) else _of_rank(kind, column, i)
                row.append(own)
            rows.append(row)
        return memory, rows

    def plain_calls(
        self, index: int, world_size: int, rest: Sequence[Any]
    ) -> list[tuple[Any, list[Any], dict[str, Any]]]:
        """Raises NotImplementedError: the program of one rank is taken from per-rank graphs."""
        raise NotImplementedError(
            "the draws of all ranks are one node in the stacked layout. Use "
            'LocalTensorMode(layout="per_rank")'
        )


def _stack(value: LocalTensor) -> Any:
    return stack_of(value._local_tensors)


def _is_stack_of(ranks: Sequence[int], value: Any) -> bool:
    held = value._local_tensors if type(value) is LocalTensor else None
    return type(held) is ShardsOfStack and tuple(held.ranks) == tuple(ranks)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """A stack of tensors alike whose rows have their strides, if those are dense."""
    first = tensors[0]
    if first.is_contiguous():
        return torch.stack(tensors)
    order = sorted(range(first.dim()), key=lambda d: -first.stride(d))
    back = [0] * len(order)
    for position, d in enumerate(order):
        back[d] = position + 1
    return torch.stack([t.permute(order) for t in tensors]).permute(0, *back)


STACKED_NODES: dict[Node, StackedNode] = {
    **{node: StackedNode.of(f) for f, node in NODES.items() if f not in _ATTENTION},
    RANDPERM: StackedNode("randperm", RANDPERM.func, (), fills=True),
}


def stacked_fill(node: Node, like: LocalTensor, values: Sequence[Any]) -> ShardsOfStack | None:
    """The node's draws into fresh memory of `like`'s kind, or None where it is per rank."""
    stack = _stack(like)
    if stack is None:
        return None
    ranks = tuple(like._local_tensors)
    sizes, strides = stack.shape[1:], stack.stride()[1:]
    return _fill(node, ranks, sizes, strides, like.dtype, like.device, values)


def stacked_factory(
    node: Node,
    ranks: Sequence[int],
    size: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
    values: Sequence[Any],
) -> ShardsOfStack | None:
    """A fresh contiguous stack for torch.rand and others, or None where sizes differ by rank."""
    return _fill(node, ranks, size, None, dtype, device, values)


def _fill(
    node: Node, ranks: Sequence[int], sizes: Any, strides: Any, dtype: Any, device: Any, values: Any
) -> ShardsOfStack | None:
    stacked = STACKED_NODES[node]
    if not stacked.takes(ranks, values) or any(is_ranked(n) for n in sizes):
        return None
    memory = [list(sizes), [] if strides is None else list(strides), dtype, device]
    return stacked._call(ranks, memory + stacked._columns(ranks, values))[0]


def stacked_draws(node: Node, ranks: Sequence[int], values: Sequence[Any]) -> list[Any] | None:
    """The node's outputs for stacks, or None where a tensor among the values is none."""
    stacked = STACKED_NODES.get(node)
    if stacked is None or not stacked.takes(ranks, values):
        return None
    return stacked._call(ranks, stacked._columns(ranks, values))
