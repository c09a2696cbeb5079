"""Run one aten op on the stacks of all ranks at once.

How is decided per op and remembered: elementwise ops run on the stacks themselves, others through
a batching rule of vmap or through the ops that they consist of. What is left, and what needs a
value per rank in Python, runs once per rank on views of the stack, and is counted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import tracing_active
from ..values.broadcast import sum_is_asked_for
from ..values.op_table import Handler, on_stacks
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap_stacked
from . import attention as attention  # they register rules
from . import counts
from . import direct as direct
from . import inplace as inplace
from .batched import batched
from .layout import can_join, join, wrap
from .operands import Operands, mapped, operands
from .outs import into_out, per_rank_into_out
from .plans import RULES, Plan, Ranks, plan_of

aten = torch.ops.aten


def run(handler: Handler, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func`; its per-rank `handler` does what cannot be done on stacks."""
    plan = plan_of(func)
    if plan.leave:
        return handler(func, args, kwargs)
    if plan.direct:
        result = _short(plan, args, kwargs)
        if result is not NotImplemented:
            return result
    found = operands(args, kwargs)
    ranks = found.ranks
    if ranks is None:
        return handler(func, args, kwargs)
    why = plan.why
    if func is aten.sum.dim_IntList and sum_is_asked_for():
        why = "it may sum what was broadcast on some ranks only"
    if found.others or found.mismatch:
        if found.mismatch:
            why = "its operands are of different ranks"
        else:
            joined = _joined(plan, found, args, kwargs)
            if joined is None:
                why = "the ranks' shards differ in size, or are written in the per-rank layout"
            else:
                args, kwargs = joined
    if not why or (why is plan.why and func in RULES):
        result = _on_stacks(plan, ranks, found.numbers, args, kwargs)
        if result is not NotImplemented:
            counts.counts.stacked += 1
            return result
        why = why or "vmap has no rule for it, or not for these arguments"
    return per_rank(plan, handler, why, args, kwargs)


def per_rank(
    plan: Any, handler: Handler, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the op once per rank on views of the stacks, and join what it made."""
    if plan.outs and not tracing_active():
        counts.went_per_rank(plan.name, why)
        return per_rank_into_out(plan, handler, args, kwargs)
    result = handler(plan.func, args, kwargs)
    if plan.why and tracing_active() and is_whole(result):
        return result  # a random op with one node for the draws of all ranks
    counts.went_per_rank(plan.name, why)
    if plan.writes or plan.views:
        return result
    return _restacked(result, plan.name)


def is_whole(result: Any) -> bool:
    """Whether every tensor of a result is stacked, and there is one."""
    items = result if isinstance(result, (list, tuple)) else (result,)
    tensors = [t for t in items if isinstance(t, Tensor)]
    return bool(tensors) and all(
        type(t) is LocalTensor and type(t._local_tensors) is ShardsOfStack for t in tensors
    )


def _restacked(result: Any, name: str) -> Any:
    if type(result) is LocalTensor:
        if type(result._local_tensors) is ShardsOfStack:
            return result
        if can_join(result):
            return join(result, name)
        counts.left(name)
        return result
    if isinstance(result, (list, tuple)) and not hasattr(result, "_fields"):
        return type(result)(_restacked(r, name) for r in result)
    return result


def _joined(
    plan: Plan, found: Operands, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with per-rank LocalTensors stacked, or None where memory must stay theirs."""
    if not all(map(can_join, found.others)):
        return None
    kept = {id(t) for t in found.others}
    if plan.views and args and id(args[0]) in kept:
        return None
    for i, name in plan.writes:
        target = args[i] if i < len(args) else kwargs.get(name)
        targets = target if isinstance(target, (list, tuple)) else (target,)
        if any(id(t) in kept for t in targets):
            return None
    return mapped(lambda t: join(t, plan.name), args, kwargs)


# ---------------------------------------------------------------- ways to run
def _short(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An elementwise op on stacks of one shape and numbers: most calls."""
    if kwargs or not args:
        return NotImplemented
    first = args[0]
    if type(first) is not LocalTensor:
        return NotImplemented
    shards = first._local_tensors
    if type(shards) is not ShardsOfStack:
        return NotImplemented
    ranks = shards.ranks
    if len(args) == 1:
        out = plan.func(shards.stack)
    elif len(args) == 2:
        second = args[1]
        kind = type(second)
        if kind is LocalTensor:
            other = second._local_tensors
            if (
                type(other) is not ShardsOfStack
                or other.ranks != ranks
                or second.dtype is not first.dtype
                or len(second._size) != len(first._size)
            ):
                return NotImplemented
            out = plan.func(shards.stack, other.stack)
        elif kind is int or kind is float or kind is bool:
            out = plan.func(shards.stack, second)
        else:
            return NotImplemented
    else:
        return NotImplemented
    counts.counts.stacked += 1
    if plan.writes:
        return first
    return _wrap_stacked(out, ranks) if out.is_contiguous() else wrap(out, ranks)


def _on_stacks(
    plan: Plan, ranks: Ranks, numbers: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    known = RULES.get(plan.func)
    if known is not None:
        result = known(plan.func, ranks, args, kwargs)
        if result is not NotImplemented:
            return result
    if numbers:
        from .numbers import with_numbers

        done = with_numbers(plan.func, ranks, args, kwargs)
        return NotImplemented if done is None else done.result
    if plan.outs:
        return into_out(plan, ranks, args, kwargs)
    if plan.direct:
        result = _elementwise(plan, ranks, args, kwargs)
        if result is not NotImplemented:
            return result
    if plan.batches and not plan.resizes:
        result = batched(plan, ranks, args, kwargs)
        if result is not NotImplemented:
            return result
    if plan.decomposition is not None and not plan.views:
        result = plan.decomposition(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if plan.explicit:
        # A loop in C++ over the lists: each op in it comes back here.
        return plan.func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    return NotImplemented


def _elementwise(plan: Plan, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if any(isinstance(a, (list, tuple)) for a in args) or kwargs.get("memory_format") not in (
        None,
        torch.preserve_format,
        torch.contiguous_format,
    ):
        return NotImplemented
    dims = max(t.dim() for t in tensors)
    first = tensors[0].dtype
    # A tensor of no dimensions counts less for the result's dtype, and its stack has one.
    if any(t.dim() == 0 and type(t) is LocalTensor for t in tensors) and any(
        t.dtype is not first for t in tensors
    ):
        return NotImplemented
    if plan.writes and (type(args[0]) is not LocalTensor or args[0].dim() != dims):
        return NotImplemented

    def aligned(tensor: LocalTensor) -> Tensor:
        stack = tensor._local_tensors.stack  # type: ignore[attr-defined]
        missing = dims + 1 - stack.dim()
        if missing:
            stack = stack.view(stack.shape[0], *([1] * missing), *stack.shape[1:])
        return stack

    try:
        stacks, options = mapped(aligned, args, kwargs)
    except RuntimeError:  # a stride that view cannot keep
        return NotImplemented
    out = plan.func(*stacks, **options)
    if plan.writes:
        return args[0]
    if not isinstance(out, Tensor):
        return type(out)(wrap(o, ranks) for o in out)
    return wrap(out, ranks)


on_stacks.run = run
