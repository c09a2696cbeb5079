"""Ops with out=: the op that returns its result, and a copy into the memory of the output."""

from __future__ import annotations

from typing import Any

import torch

from ..values.tensor import LocalTensor
from . import inplace
from .plans import Plan, Ranks


def into_out(plan: Plan, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An op with out=: the op that returns its result, and a copy into the output's memory."""
    functional = _functional_of(plan)
    if functional is None or any(type(kwargs.get(n)) is not LocalTensor for n in plan.outs):
        return NotImplemented
    inputs = {k: v for k, v in kwargs.items() if k not in plan.outs}
    made = functional(*args, **inputs)
    results = made if isinstance(made, (list, tuple)) else (made,)
    outs = [kwargs[name] for name in plan.outs]
    for out, result in zip(outs, results):
        if out.shape != result.shape:
            inplace.resize(out, ranks, result.shape)
        out.copy_(result)
    return outs[0] if len(outs) == 1 else tuple(outs)


def _functional_of(plan: Plan) -> Any:
    """The overload with the same arguments but for out=."""
    if plan.func not in _functionals:
        _functionals[plan.func] = _find_functional(plan)
    return _functionals[plan.func]


_functionals: dict[Any, Any] = {}


def _find_functional(plan: Plan) -> Any:
    def inputs(schema: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]

    namespace, _, name = plan.func._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name)
    wanted = inputs(plan.func._schema)
    for overload in packet.overloads():
        other = getattr(packet, overload)
        if other is not plan.func and inputs(other._schema) == wanted:
            if not any(a.is_write for a in other._schema.arguments):
                return other
    return None
