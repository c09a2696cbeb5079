"""Ops with out=: the op that returns its result, and a copy into the memory of the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..values.op_table import Handler
from ..values.tensor import LocalTensor, _wrap
from . import inplace
from .counts import left
from .layout import can_join, is_stacked
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


def per_rank_into_out(
    plan: Plan, handler: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """An op with out= once per rank: the op resizes tensors of its own, as it cannot resize rows.

    Raises:
        UnsupportedError: the outputs do not fit into the memory of their rows.
    """
    stacked = {n: kwargs[n] for n in plan.outs if is_stacked(kwargs.get(n))}
    if not stacked:
        return handler(plan.func, args, kwargs)
    made = {n: apart(out) for n, out in stacked.items()}
    result = handler(plan.func, args, {**kwargs, **made})
    for name, out in stacked.items():
        put(plan.name, made[name], out)
    given = {id(made[n]): out for n, out in stacked.items()}
    if result is None:  # as of FSDP's chunk_cat
        return None
    if isinstance(result, Tensor):
        return given.get(id(result), result)
    return type(result)(given.get(id(r), r) for r in result)


def apart(out: LocalTensor) -> LocalTensor:
    """A tensor per rank, for an op to resize and to write instead of the stacked `out`."""
    return _wrap({r: t.clone() for r, t in out._local_tensors.items()})


def put(name: str, made: LocalTensor, out: LocalTensor) -> None:
    """Give the stacked `out` the size and the values of `made`, which the op `name` wrote.

    Raises:
        UnsupportedError: they do not fit into the memory of the rows.
    """
    made._sync_meta()
    if can_join(made):
        if out.shape != made.shape:
            inplace.resize(out, tuple(out._local_tensors), made.shape)
        out.copy_(made)
        return
    if out.numel():
        raise UnsupportedError(
            f"{name} writes shards of different sizes into a tensor of shape {tuple(out.shape)}, "
            "whose shards are one tensor in the stacked layout. Give it an empty tensor, or use "
            'LocalTensorMode(..., layout="per_rank").'
        )
    out._local_tensors = made._local_tensors
    out._sync_meta()
    left(name)


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
