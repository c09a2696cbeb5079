"""Scaled dot product attention of CPUs on stacks: the ranks are more entries of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..values.stack import stack_of
from ..values.tensor import LocalTensor
from .layout import wrap
from .plans import Ranks, rule

aten = torch.ops.aten
_forward = aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _stack(value: Any) -> Tensor | None:
    return stack_of(value._local_tensors) if type(value) is LocalTensor else None


@rule(_forward, _backward)
def _attention(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    count = 3 if func is _forward else 6
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args)), **kwargs}
    stacks = [_stack(given[name]) for name in names[:count]]
    if any(s is None for s in stacks) or given.get("dropout_p", 0.0):
        return NotImplemented
    batch = stacks[0].shape[:2]  # type: ignore[union-attr]
    merged = [s.flatten(0, 1) for s in stacks]  # type: ignore[union-attr]
    options = {n: given[n] for n in names[count:] if n in given and n != "attn_mask"}
    mask = given.get("attn_mask")
    if mask is not None:
        mask = _mask(mask, batch)
        if mask is None:
            return NotImplemented
        options["attn_mask"] = mask
    positional = [options.pop(n) for n in ("dropout_p", "is_causal") if n in options]
    if "is_causal" in given and "dropout_p" not in given:
        positional = [0.0, *positional]
    out = func(*merged, *positional, **options)
    return tuple(wrap(o.unflatten(0, batch), ranks) for o in out)


def _mask(mask: Tensor, batch: torch.Size) -> Tensor | None:
    """The mask for [ranks * batch, heads, ...], or None for one of other dimensions."""
    stack = _stack(mask)
    dims = mask.dim()
    if dims not in (2, 4):
        return None
    if stack is None:
        if dims == 2:
            return mask
        stack = mask.unsqueeze(0)
    if dims == 2:
        stack = stack.unsqueeze(1).unsqueeze(1)
    return stack.expand(*batch, *stack.shape[2:]).flatten(0, 1)
