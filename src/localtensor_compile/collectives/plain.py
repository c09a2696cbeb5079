"""Collectives on plain tensors in a simulated world: replicated on all ranks, or refused.

A plain tensor has one value, so it counts as that value on every rank. A collective whose result
is one value again is computed; one whose result differs per rank is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._torch import finished_work, reduce_op_of, resolve_group
from ..errors import PlainTensorError
from ..values.tensor import LocalTensor
from .apply import checked_op
from .ops import settings
from .reduction import reduce_shards

# Method names of ProcessGroup, old and new spellings. torch's fake group does the rest itself: it
# copies what it is given into every place of an all_gather.
METHODS = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce",
    "allgather_coalesced", "allgather_into_tensor_coalesced", "all_gather_single_coalesced",
    "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced",
    "gather", "scatter", "alltoall", "alltoall_base", "all_to_all_single",
    "send", "recv", "recv_anysource",
)  # fmt: skip


def has_local_tensor(args: Any, kwargs: Any) -> bool:
    """Whether LocalTensors take part."""
    return any(isinstance(x, LocalTensor) for x in pytree.tree_leaves((args, kwargs)))


def collective(name: str, group: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run ProcessGroup method `name` on plain tensors.

    Raises:
        PlainTensorError: the result would differ per rank.
    """
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if name in ("allreduce", "allreduce_coalesced"):
        op, factor = _reduce_op(args, kwargs)
        for t in tensors:
            source = t if factor is None else (t * factor).to(t.dtype)
            copies = [source] * group.size()
            t.copy_(
                reduce_shards(copies, "sum" if factor is not None else op, order=settings.order)
            )
        return finished_work(tensors)
    if name == "broadcast":
        return finished_work(tensors)
    raise _refused(f"ProcessGroup.{name}", tensors)


_functional = torch.ops._c10d_functional
FUNCTIONAL = frozenset(
    getattr(_functional, name)
    for name in (
        "all_reduce", "all_reduce_", "all_gather_into_tensor", "broadcast", "broadcast_",
        "reduce_scatter_tensor", "all_to_all_single", "all_reduce_coalesced",
        "all_gather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced",
    )
)  # fmt: skip
"""The functional collectives, which reach the process group below any Python."""


def functional(func: Any, args: Sequence[Any]) -> Any:
    """Run a functional collective on plain tensors.

    Raises:
        PlainTensorError: the result would differ per rank.
    """
    name = str(func).rpartition(".")[2]
    tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    if name.startswith("broadcast"):
        return args[0] if name.endswith("_") else args[0].clone()
    if name.startswith("all_reduce"):
        size = resolve_group(args[2]).size()
        op = checked_op(args[1])
        results = [reduce_shards([t] * size, op, order=settings.order) for t in tensors]
        if name.endswith("_"):
            return args[0].copy_(results[0])
    elif name.startswith("all_gather"):
        results = [torch.cat([t] * args[1]) for t in tensors]
    else:
        raise _refused(f"_c10d_functional.{name}", tensors)
    return results if isinstance(args[0], (list, tuple)) else results[0]


def _refused(name: str, tensors: Sequence[Tensor]) -> PlainTensorError:
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    return PlainTensorError(
        f"{name} on plain tensors of shapes {shapes} would have another result on every rank, "
        "which a plain tensor cannot hold. Make the operands LocalTensors: create them inside "
        "LocalTensorMode, or with rank_map or replicate(tensor)."
    )


def _reduce_op(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str, Any]:
    for value in (*args[1:], *kwargs.values()):
        if hasattr(value, "reduceOp"):
            return reduce_op_of(value.reduceOp)
        if hasattr(value, "op"):
            return reduce_op_of(value)
    return "sum", None
