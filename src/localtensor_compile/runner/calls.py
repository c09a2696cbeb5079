"""One call of one rank, as the exchange, the reports and the observers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .stacks import NOWHERE, Line

P2P = ("send", "recv")


@dataclass(eq=False)
class Call:
    """A collective or point-to-point call.

    Attributes:
        rank: the global rank that calls.
        kind: all_reduce, all_reduce_coalesced, broadcast, reduce, all_gather,
            all_gather_into_tensor, all_gather_coalesced, all_gather_into_tensor_coalesced,
            gather, scatter, reduce_scatter, reduce_scatter_tensor,
            reduce_scatter_tensor_coalesced, all_to_all, all_to_all_single, barrier,
            monitored_barrier, send, recv.
        group: name of the process group.
        ranks: the group's global ranks, in group-rank order.
        inputs, outputs: tensors. Nested lists where c10d has them, e.g. outputs of all_gather are
            [[tensor of group rank 0, ...]].
        reduce_op: c10d's ReduceOp, or None.
        root: group rank, or None.
        splits: (output splits, input splits) of all_to_all_single, or None.
        peer: of send and recv: group rank of the other side, None for a receive from any source.
        tag: of send and recv.
        line: the user's line.
        number: how many collectives the rank called on this group before.
        extra: "source": of a recv that is done, the global rank that sent.
    """

    rank: int
    kind: str
    group: str
    ranks: tuple[int, ...]
    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    reduce_op: Any = None
    root: int | None = None
    splits: tuple[list[int], list[int]] | None = None
    peer: int | None = None
    tag: int = 0
    line: Line = NOWHERE
    number: int = -1
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def global_peer(self) -> int | None:
        """The other side's global rank."""
        return None if self.peer is None else self.ranks[self.peer]

    def tensors(self) -> list[Tensor]:
        """All tensors, inputs first."""
        found: list[Tensor] = []
        for value in (*self.inputs, *self.outputs):
            found += value if isinstance(value, (list, tuple)) else [value]
        return found

    def __str__(self) -> str:
        """'all_reduce(SUM) of float32 (4,) at a.py:3'."""
        details = []
        if self.reduce_op is not None:
            details.append(str(reduce_name(self.reduce_op)))
        if self.root is not None and 0 <= self.root < len(self.ranks):
            details.append(f"root {self.ranks[self.root]}")
        if self.kind in P2P:
            other = "any source" if self.peer is None else f"rank {self.global_peer}"
            text = f"send to {other}" if self.kind == "send" else f"recv from {other}"
            if self.tag:
                details.append(f"tag {self.tag}")
        else:
            text = self.kind
        if details:
            text += f"({', '.join(details)})"
        tensors = self.tensors()
        if tensors:
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            text += f" of {dtype} {tuple(tensors[0].shape)}"
        return f"{text} at {self.line}"


def reduce_name(reduce_op: Any) -> str:
    """'SUM'."""
    from .._torch import reduce_op_of

    return reduce_op_of(reduce_op)[0].upper()
