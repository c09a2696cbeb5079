"""torch.cond and its relatives on LocalTensors: every rank runs the operator on its own shards.

Ranks may take different branches or loop a different number of times, as real processes may. What
the branches compute must be a rank's own business: a collective, or code that runs once per rank,
would see one rank at a time here, and is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .._torch import VERSION
from ..errors import UnsupportedError
from ..values.ranked import ranks_of
from ..values.tensor import LocalTensor
from ..world.per_rank_code import join_results, on_ranks

_OPERATORS = ("cond", "while_loop", "scan", "associative_scan", "map_impl", "flex_attention")
_COMMUNICATING = (
    "_c10d_functional",
    "_c10d_functional_autograd",
    "_dtensor",
    "c10d",
    "localtensor",
)


def _require_own_business(operator: str, branches: list[fx.GraphModule]) -> None:
    """Raise UnsupportedError where a branch needs to know other ranks."""
    for branch in branches:
        for node in branch.graph.nodes:
            owner = (
                getattr(node.target, "namespace", None)
                or getattr(node.target, "_qualified_op_name", "").partition("::")[0]
            )
            module = str(getattr(node.target, "__module__", ""))
            if owner in _COMMUNICATING or module.startswith(
                ("localtensor_compile", "torch.distributed")
            ):
                raise UnsupportedError(
                    f"torch.{operator} on LocalTensors runs its branches once per rank, but a "
                    f"branch has {node.name}, which concerns several ranks. Do that part outside "
                    f"of torch.{operator}, and pass its result in."
                )


def _numbers_inside(predicate: Any, if_true: Any, if_false: Any, operands: Any) -> Any:
    """Sizes that the branches close over are plain numbers on one rank: as constants of the
    branches, for Inductor knows tensors and symbols as operands."""
    numbers = {i: v for i, v in enumerate(operands) if type(v) in (int, float, bool)}

    def bound(branch: Any) -> Any:
        def run(*tensors: Any) -> Any:
            rest = iter(tensors)
            given = (numbers[i] if i in numbers else next(rest) for i in range(len(operands)))
            return branch(*given)

        return run

    if not numbers:
        return predicate, if_true, if_false, operands
    tensors = tuple(v for i, v in enumerate(operands) if i not in numbers)
    return predicate, bound(if_true), bound(if_false), tensors


def _per_rank(operator: Any, args: Any, kwargs: Any) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    _require_own_business(operator.name(), [v for v in leaves if isinstance(v, fx.GraphModule)])
    ranks = ranks_of(leaves) or ()
    columns = [on_ranks(v, ranks) for v in leaves]
    results = []
    for i in range(len(ranks)):
        rank_args, rank_kwargs = pytree.tree_unflatten([c[i] for c in columns], spec)
        if operator.name() == "cond":
            rank_args = _numbers_inside(*rank_args)
        results.append(operator(*rank_args, **rank_kwargs))
    return join_results(ranks, results, operator.name())


def _storages(original: Any) -> Any:
    """Dynamo's question whether what a branch is given or returns shares memory."""

    @functools.wraps(original)
    def get_tensor_storages(tensor: Any) -> Any:
        if isinstance(tensor, LocalTensor):
            return set().union(*map(original, tensor._local_tensors.values()))
        return original(tensor)

    return get_tensor_storages


def replacements() -> list[tuple[Any, Any, Any]]:
    """(owner, name, replacement): the operators' classes, above autograd and every mode."""
    import torch._dynamo.variables.higher_order_ops as higher_order_ops

    found: list[tuple[Any, Any, Any]] = []
    storages = getattr(higher_order_ops, "get_tensor_storages", None)
    if storages is not None and VERSION < (2, 14):  # later it is not asked
        found.append((higher_order_ops, "get_tensor_storages", _storages(storages)))
    for name in _OPERATORS:
        operator = getattr(torch.ops.higher_order, name, None)
        call = type(operator).__dict__.get("__call__") if operator is not None else None
        if call is None:  # not in every supported version
            continue

        def per_rank(self: Any, *args: Any, _call: Any = call, **kwargs: Any) -> Any:
            leaves = pytree.tree_leaves((args, kwargs))
            if any(isinstance(v, LocalTensor) for v in leaves):
                return _per_rank(self, args, kwargs)
            return _call(self, *args, **kwargs)

        found.append((type(operator), "__call__", functools.wraps(call)(per_rank)))
    return found
