"""Run one aten op on the stacks of all ranks at once.

How is decided per op and remembered: elementwise ops run on the stacks themselves, others through
a batching rule of vmap or through the ops that they consist of. What is left, and what needs a
value per rank in Python, runs once per rank on views of the stack, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from .. import _torch_vmap
from .._torch import tracing_active
from ..dispatch.per_rank import OpPlan
from ..errors import LocalTensorError
from ..values.broadcast import sum_is_asked_for
from ..values.op_table import Handler, on_stacks
from ..values.rank_node import LocalNode, is_ranked
from ..values.ranked import per_rank_values
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap_stacked
from . import counts, fsdp
from .layout import can_join, expanded, join, wrap

aten = torch.ops.aten
_SYM_TYPES = (torch.SymInt, torch.SymFloat, torch.SymBool)

Ranks = tuple[int, ...]
Rule = Callable[[Any, Ranks, tuple[Any, ...], dict[str, Any]], Any]
"""rule(func, ranks, args, kwargs): the result, or NotImplemented where it does not know this call.
The LocalTensors among the arguments are stacked, but for those that the op writes."""

RULES: dict[Any, Rule] = {}

# Their handlers look at the wrapper only, or know stacks themselves.
_AS_THEY_ARE = {
    aten.sym_size.default,
    aten.sym_stride.default,
    aten.sym_storage_offset.default,
    aten.sym_numel.default,
    aten.size.default,
    aten.stride.default,
    aten.dim.default,
}
_NAMESPACES_OF_THEIR_OWN = (
    "_c10d_functional",
    "_c10d_functional_autograd",
    "_dtensor",
    "c10d",
    "cplib",
    "localtensor",
    "localtensor_random",
)
# Tagged as elementwise, but not on operands that are broadcast together.
_NOT_ELEMENTWISE = {"aten::bucketize", "aten::searchsorted", "aten::batch_norm_elemt"}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Decorator: the function runs these overloads on stacks."""

    def register(fn: Rule) -> Rule:
        for op in ops:
            RULES[op] = fn
        return fn

    return register


class _Plan(OpPlan):
    """What the stacked runner has to know about one OpOverload."""

    __slots__ = ("batches", "decomposition", "direct", "explicit", "fresh", "leave", "outs", "why")

    def __init__(self, func: Any) -> None:
        self.leave = (
            not isinstance(func, torch._ops.OpOverload)
            or func in _AS_THEY_ARE
            or func.namespace in _NAMESPACES_OF_THEIR_OWN
        )
        if self.leave:
            return
        super().__init__(func)
        if self.views and not self.writes and func._can_decompose():
            # to(), reshape(): a view or a copy, as the ops that they consist of find out.
            self.leave = True
            return
        if func.namespace == "fsdp" and str(func) in fsdp.BY_NAME:
            RULES[func] = fsdp.BY_NAME[str(func)]
        tags, schema = func.tags, func._schema
        self.outs = tuple(a.name for a in schema.arguments if a.is_out)
        elementwise = torch.Tag.pointwise in tags and schema.name not in _NOT_ELEMENTWISE
        self.direct = elementwise and not self.views and not self.outs
        self.why = ""
        if torch.Tag.nondeterministic_seeded in tags:
            self.why = "it draws random numbers"
        elif (
            torch.Tag.data_dependent_output in tags
            or torch.Tag.dynamic_output_shape in tags
            or func is aten._local_scalar_dense.default
        ):
            self.why = "what it returns depends on the data"
        self.batches = not self.why and _torch_vmap.has_rule(func) and not self.outs
        self.decomposition = None if self.why or self.writes else _decomposition(func)
        self.explicit = (
            not self.why
            and not self.batches
            and torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeExplicitAutograd"
            )
            and func.namespace == "aten"
            and schema.name.startswith("aten::_foreach_")
        )
        self.fresh = self.single and not self.writes and not self.views


def _decomposition(func: Any) -> Any:
    from torch._decomp import decomposition_table

    return decomposition_table.get(func)


_plans: dict[Any, _Plan] = {}


def plan_of(func: Any) -> Any:
    """The plan of an op, made once."""
    plan = _plans.get(func)
    if plan is None:
        plan = _plans[func] = _Plan(func)
    return plan


def run(handler: Handler, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func`; its per-rank `handler` does what cannot be done on stacks."""
    plan = plan_of(func)
    if plan.leave:
        return handler(func, args, kwargs)
    if plan.direct:
        result = _short(plan, args, kwargs)
        if result is not NotImplemented:
            return result
    found = _scan(args, kwargs)
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
    if not why:
        result = _on_stacks(plan, ranks, found.numbers, args, kwargs)
        if result is not NotImplemented:
            counts.counts.stacked += 1
            return result
        why = "vmap has no rule for it, or not for these arguments"
    return per_rank(plan, handler, why, args, kwargs)


def per_rank(
    plan: Any, handler: Handler, why: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the op once per rank on views of the stacks, and join what it made."""
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


# ---------------------------------------------------------------- operands
class _Scan:
    __slots__ = ("mismatch", "numbers", "others", "ranks")

    def __init__(self) -> None:
        self.ranks: Ranks | None = None
        self.others: list[LocalTensor] = []
        self.numbers = False
        self.mismatch = False

    def leaf(self, value: Any) -> None:
        kind = type(value)
        if kind is LocalTensor:
            shards = value._local_tensors
            if type(shards) is ShardsOfStack:
                if self.ranks is None:
                    self.ranks = shards.ranks
                elif self.ranks is not shards.ranks and self.ranks != shards.ranks:
                    self.mismatch = True
            else:
                self.others.append(value)
        elif kind is list or kind is tuple or kind is torch.Size:
            for item in value:
                self.leaf(item)
        elif LocalNode.any_made and not self.numbers:
            if kind in _SYM_TYPES:
                self.numbers = is_ranked(value)
            elif kind is Tensor and per_rank_values(value) is not None:
                self.numbers = True


def _scan(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Scan:
    found = _Scan()
    for a in args:
        found.leaf(a)
    if kwargs:
        for a in kwargs.values():
            found.leaf(a)
    if found.ranks is not None and any(
        tuple(o._local_tensors) != found.ranks for o in found.others
    ):
        found.mismatch = True
    return found


def _joined(
    plan: _Plan, found: _Scan, args: tuple[Any, ...], kwargs: dict[str, Any]
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


def mapped(
    fn: Callable[[LocalTensor], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with `fn` of every LocalTensor in them."""

    def leaf(value: Any) -> Any:
        kind = type(value)
        if kind is LocalTensor:
            return fn(value)
        if kind is list or kind is tuple:
            return kind(leaf(v) for v in value)
        return value

    return tuple(leaf(a) for a in args), {k: leaf(v) for k, v in kwargs.items()}


# ---------------------------------------------------------------- ways to run
def _short(plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
    plan: _Plan, ranks: Ranks, numbers: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
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
        return _into_out(plan, ranks, args, kwargs)
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


def _elementwise(plan: _Plan, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


def batched(plan: _Plan, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op through vmap over the rank dimension, or NotImplemented."""
    views = plan.views
    count = len(ranks)
    shift = shift_of(args) if views else 0

    def finish(stack: Tensor, own: bool) -> LocalTensor:
        if views:
            return _wrap_stacked(stack, ranks, shift=shift)
        return wrap(stack if own else expanded(stack.select(0, 0), count), ranks)

    try:
        out = call_batched(plan.func, count, args, kwargs, None if plan.inplace else finish)
    except LocalTensorError:
        raise
    except (RuntimeError, ValueError, IndexError, NotImplementedError) as error:
        if _torch_vmap.FALLBACK_REFUSED in str(error):
            plan.batches = False
        return NotImplemented  # per rank the op works, or says in its own words what is wrong
    if plan.inplace:
        return args[0] if plan.writes[0][0] < len(args) else kwargs[plan.writes[0][1]]
    return aliased(plan, args, kwargs, out) if views else out


def call_batched(
    func: Any,
    count: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    finish: Callable[[Tensor, bool], Any] | None,
) -> Any:
    """Call `func` under vmap, its LocalTensors as batched tensors.

    Args:
        finish: makes the result of a stack, and of whether its rows are memory of their own each;
            without it nothing is returned.
    """
    with _torch_vmap.one_level(count) as level:

        def enter(tensor: LocalTensor) -> Tensor:
            return _torch_vmap.batch(tensor._local_tensors.stack, level)  # type: ignore[attr-defined]

        batched_args, batched_kwargs = mapped(enter, args, kwargs)
        out = func(*batched_args, **batched_kwargs)
        if finish is None:
            return None
        left = _each(Tensor, lambda t: _Left(*_torch_vmap.unbatch(t, level, count)), out)
    return _each(_Left, lambda item: finish(*item), left)


class _Left(NamedTuple):
    stack: Tensor
    own: bool


def _each(kind: Any, fn: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(kind, fn, v) for v in value)
    return value


def shift_of(args: tuple[Any, ...]) -> int:
    """The shift of the stack that an op makes a view of (see ShardsOfStack)."""
    shards = args[0]._local_tensors if args and type(args[0]) is LocalTensor else None
    return shards.shift if type(shards) is ShardsOfStack else 0


def aliased(plan: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """`result`, which is a view, with the storage of what it is a view of."""
    if torch.is_inference_mode_enabled() and not args[0].is_inference():
        # A view of a normal tensor is a normal tensor: autograd gives it its base's version.
        with torch.inference_mode(False):
            result = _again(result)
    return return_and_correct_aliasing(plan.func, args, kwargs, result)


def _again(result: Any) -> Any:
    if type(result) is LocalTensor:
        shards = result._local_tensors
        return _wrap_stacked(shards.stack, shards.ranks, shift=shards.shift)
    if isinstance(result, (list, tuple)):
        return type(result)(_again(r) for r in result)
    return result


def _into_out(plan: _Plan, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


def _functional_of(plan: _Plan) -> Any:
    """The overload with the same arguments but for out=."""
    if plan.func not in _functionals:
        _functionals[plan.func] = _find_functional(plan)
    return _functionals[plan.func]


_functionals: dict[Any, Any] = {}


def _find_functional(plan: _Plan) -> Any:
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


on_stacks.run = run

from . import direct as direct  # noqa: E402 - they register rules
from . import inplace as inplace  # noqa: E402
