"""Run one aten op on the shards of every rank.

What an op needs (which arguments it writes, whether it returns one of them, whether it makes a
view or changes metadata in place) is read from its schema once. No mode is pushed and no random
state is saved here: random ops and collectives have handlers of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from .._torch import AsyncCollectiveTensor, bind_unbacked
from ..errors import PlainTensorError, ShardError, UnsupportedError, per_rank_text
from ..values.broadcast import dims_to_sum
from ..values.float_node import LocalFloatNode
from ..values.op_table import Handler, add_rule, implements
from ..values.rank_node import LocalNode, is_ranked
from ..values.ranked import combine, per_rank_values
from ..values.tensor import LocalTensor, _wrap, _wrap_fresh

aten = torch.ops.aten
_SYM_TYPES = (SymInt, SymFloat, SymBool)


class OpPlan:
    """What the per-rank runner has to know about one OpOverload."""

    __slots__ = ("call", "func", "inplace", "name", "resizes", "single", "views", "writes")

    def __init__(self, func: Any) -> None:
        schema = func._schema
        arguments, returns = schema.arguments, schema.returns
        self.func = func
        self.call = func  # a random op calls another overload, with the rank's generator
        self.name = str(func)
        self.writes = tuple((i, a.name) for i, a in enumerate(arguments) if a.is_write)
        # An op that returns its first argument (add_, foreach in place returns nothing).
        self.inplace = bool(
            arguments and arguments[0].is_write and len(returns) == 1 and returns[0].is_write
        )
        self.views = bool(func.is_view) or any(
            r.alias_info is not None and not r.is_write for r in returns
        )
        self.resizes = torch.Tag.inplace_view in func.tags or schema.name in _RESIZING
        self.single = len(returns) == 1 and str(returns[0].type) == "Tensor"


_RESIZING = {
    "aten::resize_",
    "aten::resize_as_",
    "aten::set_",
    "aten::set_data",
    "aten::swapaxes_",
    "aten::swapdims_",
    "aten::as_strided_",
}


def run_per_rank(
    plan: OpPlan,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    extra: tuple[tuple[str, Mapping[int, Any]], ...] = (),
) -> Any:
    """Run `plan`'s op once per rank and combine the results.

    `extra` holds keyword arguments that only `plan.call` takes: (name, {rank: value}).
    """
    ranked: list[tuple[int, Mapping[int, Any]]] = []
    ranks: Any = None
    for i, arg in enumerate(args):
        kind = type(arg)
        if kind is LocalTensor:
            values: Mapping[int, Any] | None = arg._local_tensors
        elif kind is list or kind is tuple or kind is torch.Size:
            values = _list_values(arg)
        elif kind is int or kind is float or kind is bool or arg is None:
            continue
        else:
            values = _leaf_values(arg)
        if values is not None:
            if ranks is None:
                ranks = values.keys()
            elif values.keys() != ranks:
                raise _rank_sets_differ(plan, ranks, values.keys())
            ranked.append((i, values))
    ranked_kwargs: list[tuple[str, Mapping[int, Any]]] = []
    if kwargs:
        for name, arg in kwargs.items():
            values = _list_values(arg) if isinstance(arg, (list, tuple)) else _leaf_values(arg)
            if values is not None:
                if ranks is None:
                    ranks = values.keys()
                elif values.keys() != ranks:
                    raise _rank_sets_differ(plan, ranks, values.keys())
                ranked_kwargs.append((name, values))
    ranked_kwargs += extra
    if plan.writes:
        _check_writes(plan, args, kwargs)

    call = plan.call._op
    base = list(args)
    results: dict[int, Any] = {}
    if ranked_kwargs:
        base_kwargs = dict(kwargs)
        for r in ranks:
            for i, values in ranked:
                base[i] = values[r]
            for name, values in ranked_kwargs:
                base_kwargs[name] = values[r]
            results[r] = call(*base, **base_kwargs)
    elif len(ranked) == 1:
        i, values = ranked[0]
        for r, value in values.items():
            base[i] = value
            results[r] = call(*base, **kwargs)
    else:
        for r in ranks:
            for i, values in ranked:
                base[i] = values[r]
            results[r] = call(*base, **kwargs)

    if not plan.writes and not plan.views:
        if plan.single:
            return _wrap_fresh(results, frozenset(results))
        return combine(results, plan.name)
    if plan.resizes:
        args[0]._sync_meta()
        return args[0]
    if plan.inplace:
        return args[0] if plan.writes[0][0] < len(args) else kwargs[plan.writes[0][1]]
    # combine() on all-None results (foreach in place) gives None, which has nothing to alias.
    if plan.views and torch.is_inference_mode_enabled() and not _is_inference(args, kwargs):
        # A view of a normal tensor is a normal tensor: autograd gives it its base's version.
        with torch.inference_mode(False):
            result = combine(results, plan.name)
    else:
        result = combine(results, plan.name)
    if result is None:
        return None
    return return_and_correct_aliasing(plan.func, args, kwargs, result)


def _is_inference(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the tensor that a view is of was made in inference mode."""
    base = args[0] if args else next(iter(kwargs.values()))
    return isinstance(base, Tensor) and base.is_inference()


def _leaf_values(arg: Any) -> Mapping[int, Any] | None:
    if isinstance(arg, _SYM_TYPES):
        node = arg.node
        return node._values if isinstance(node, LocalNode) else None
    if isinstance(arg, Tensor):
        return per_rank_values(arg)
    return None


def _list_values(items: Any) -> Mapping[int, Any] | None:
    """{rank: list} of a list with per-rank items, else None."""
    columns: list[tuple[int, Mapping[int, Any]]] = []
    for i, item in enumerate(items):
        kind = type(item)
        if kind is int or kind is float:
            continue
        if kind is LocalTensor:
            columns.append((i, item._local_tensors))
        else:
            values = _list_values(item) if isinstance(item, (list, tuple)) else _leaf_values(item)
            if values is not None:
                columns.append((i, values))
    if not columns:
        return None
    ranks = columns[0][1].keys()
    base = list(items)
    out: dict[int, Any] = {}
    for r in ranks:
        for i, values in columns:
            if r not in values:
                raise ShardError(
                    f"a list argument mixes values of ranks {sorted(ranks)} and of ranks "
                    f"{sorted(values)}. Combine only values of one set of ranks."
                )
            base[i] = values[r]
        out[r] = list(base)
    return out


def _rank_sets_differ(plan: OpPlan, one: Any, other: Any) -> ShardError:
    return ShardError(
        f"{plan.name} got values of ranks {sorted(one)} together with values of ranks "
        f"{sorted(other)}. Combine only values of one set of ranks."
    )


def _check_writes(plan: OpPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for i, name in plan.writes:
        target = args[i] if i < len(args) else kwargs.get(name)
        targets = target if isinstance(target, (list, tuple)) else (target,)
        for t in targets:
            if isinstance(t, Tensor) and not isinstance(t, (LocalTensor, AsyncCollectiveTensor)):
                raise PlainTensorError(
                    f"{plan.name} would write the values of several ranks into one plain tensor of "
                    f"shape {tuple(t.shape)}: only one rank's value could stay. Make the target a "
                    "LocalTensor: create it inside LocalTensorMode, or with rank_map, or with "
                    "LocalTensor({rank: tensor.clone() for rank in ranks})."
                )


def _plan_rule(func: Any) -> Handler | None:
    if not isinstance(func, torch._ops.OpOverload):
        return _run_other
    plan = OpPlan(func)
    if plan.single and not plan.writes and not plan.views:
        return _fresh_handler(plan)
    if plan.views and not plan.writes and func._can_decompose():
        # to(), reshape() and the like are a view or a copy, depending on the tensor: the ops that
        # they consist of know which. They get here in inference mode and in torch.func transforms.
        return _decomposed

    def handler(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return run_per_rank(plan, args, kwargs)

    return handler


def _decomposed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func.decompose(*args, **kwargs)


def _fresh_handler(plan: OpPlan) -> Handler:
    """The handler of an op that makes one new tensor: short ways for the most frequent calls."""
    call = plan.call._op

    def handler(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs and len(args) <= 2:
            first = args[0]
            if type(first) is LocalTensor:
                if len(args) == 1:
                    results = {r: call(x) for r, x in first._local_tensors.items()}
                    return _wrap_fresh(results, first._ranks)
                second = args[1]
                if type(second) is LocalTensor and second._ranks == first._ranks:
                    others = second._local_tensors
                    results = {r: call(x, others[r]) for r, x in first._local_tensors.items()}
                    return _wrap_fresh(results, first._ranks)
                if type(second) in _NUMBERS:
                    results = {r: call(x, second) for r, x in first._local_tensors.items()}
                    return _wrap_fresh(results, first._ranks)
        return run_per_rank(plan, args, kwargs)

    return handler


_NUMBERS = (int, float, bool)


def _run_other(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Higher order operators and Python callables: once per rank."""
    from ..values.ranked import pick_tree, ranks_of

    ranks = ranks_of((args, kwargs)) or ()
    results = {}
    for r in ranks:
        rank_args, rank_kwargs = pick_tree((args, kwargs), r)
        results[r] = func(*rank_args, **rank_kwargs)
    return combine(results, str(func))


add_rule(_plan_rule)


# ---- metadata: answered by the wrapper, without running anything on the shards
@implements(aten.sym_size.default)
def _size(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]._size


@implements(aten.sym_stride.default)
def _stride(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]._stride


@implements(aten.size.default, aten.stride.default)
def _plain_ints(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's C++ wants plain ints."""
    tensor = args[0]
    values = tensor._size if func is aten.size.default else tensor._stride
    if not any(is_ranked(v) for v in values):
        return list(values)
    found = {r: (tuple(t.shape), t.stride()) for r, t in tensor._local_tensors.items()}
    raise UnsupportedError(
        "the function that you called asks for the one size or stride of a tensor whose shards "
        f"have different ones (size, stride): {per_rank_text(found)}. Run it once per rank: "
        "tensor_map(x, lambda rank, shard: ...), or @maybe_run_for_local_tensor."
    )


@implements(aten.dim.default)
def _dim(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return len(args[0]._size)


@implements(aten._local_scalar_dense.default)
def _item(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Integers may stay a number per rank, and floats that are traced; an eager float or bool must
    be one Python value."""
    result = combine({r: func(t) for r, t in args[0]._local_tensors.items()}, "item()")
    if not is_ranked(result):
        return result
    values = result.node._values.values()
    bind_unbacked(values)
    if isinstance(result.node, LocalFloatNode) and all(type(v) is float for v in values):
        return result.node.guard_float("", 0)
    return result


# ---- the gradient of a broadcast
_sum_plan = OpPlan(aten.sum.dim_IntList)


@implements(aten.sum.dim_IntList)
def _sum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Over other dimensions on each rank, where autograd sums what was broadcast on some ranks."""
    if len(args) != 3 or kwargs or not args[2]:
        return run_per_rank(_sum_plan, args, kwargs)
    sizes = [s.node._values if is_ranked(s) else s for s in args[0]._size]
    dims = dims_to_sum(sizes, args[1] or ())
    if dims is None:
        return run_per_rank(_sum_plan, args, kwargs)
    shards = args[0]._local_tensors
    return _wrap({r: func(t, dims[r], True) if dims[r] else t.clone() for r, t in shards.items()})
