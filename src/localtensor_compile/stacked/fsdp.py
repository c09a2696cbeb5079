"""FSDP2's own ops on stacks: its copies into and out of the buffers of collectives.

They are known by name: torch defines them when FSDP is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Ranks = tuple[int, ...]


def _copy_in(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of the all-gather, beside its output and not a part of it: one copy."""
    if kwargs or len(args) < 2 or len({t.dtype for t in args[0]}) != 1:
        return NotImplemented
    inputs, output, *_ = args
    return torch.cat([t.reshape(-1) for t in inputs]).to(output.dtype), output


def _split_copy(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    source, sizes, *rest = args
    dim = rest[0] if rest else kwargs.get("dim", 0)
    parts, outs = source.split_with_sizes(sizes, dim), kwargs.get("out")
    if outs is None or any(o.shape != p.shape for o, p in zip(outs, parts)):
        return NotImplemented
    for out, part in zip(outs, parts):
        out.copy_(part)
    return None


def _chunk_cat(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each tensor cut into `count` rows, rows joined: out[i] holds chunk i of all tensors."""
    tensors, dim, count = args[:3]
    out = kwargs.get("out")
    if out is None or dim != 0 or any(t.dim() == 0 or t.shape[0] % count for t in tensors):
        return NotImplemented
    rows = torch.cat([t.reshape(count, -1) for t in tensors], 1)
    if out.shape != rows.shape:
        return NotImplemented
    out.copy_(rows)
    return None


BY_NAME: dict[str, Callable[[Any, Ranks, tuple[Any, ...], dict[str, Any]], Any]] = {
    "fsdp.all_gather_copy_in.default": _copy_in,
    "fsdp.chunk_cat.default": _chunk_cat,
    "fsdp.split_with_sizes_copy.default": _split_copy,
}
