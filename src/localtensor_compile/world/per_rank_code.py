"""Running Python code once per rank: from LocalTensors to shards and back, differentiably.

`split_shards` and `join_shards` are what rank_map and tensor_map are made of. Dynamo puts each of
them into its graph as one call; AOTAutograd then sees only the shards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._torch import AsyncCollectiveTensor
from ..errors import RankDivergence, ShardError, fail
from ..stacked import sharding
from ..stacked.layout import can_join, join
from ..values.ranked import (
    combine,
    combined_values,
    numbers_on_ranks,
    pick,
    require_one_structure,
)
from ..values.stack import ShardsOfStack, made
from ..values.tensor import LocalTensor, _checked_shards, _wrap
from .state import enabled_local_tensor_mode

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: LocalTensor) -> tuple[Tensor, ...]:
        ctx.ranks = tuple(tensor._local_tensors)
        return tuple(t.view_as(t) for t in tensor._local_tensors.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> LocalTensor:
        return _wrap(dict(zip(ctx.ranks, grads)))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: tuple[int, ...], stacked: bool, *shards: Tensor) -> LocalTensor:
        ctx.ranks = ranks
        if stacked:
            result = _wrap(dict(zip(ranks, shards)))
            if can_join(result):
                return join(result, "rank_map")
        return _wrap({r: t.view_as(t) for r, t in zip(ranks, shards)})

    @staticmethod
    def backward(ctx: Any, grad: LocalTensor) -> tuple[Any, ...]:
        return None, None, *(grad._local_tensors[r] for r in ctx.ranks)


@torch._dynamo.allow_in_graph
def _split(tensor: LocalTensor) -> tuple[Tensor, ...]:
    if not tensor.requires_grad:
        return tuple(tensor._local_tensors.values())
    return _Split.apply(tensor)


@torch._dynamo.allow_in_graph
def _join(ranks: tuple[int, ...], stacked: bool, *shards: Tensor) -> LocalTensor:
    if not any(t.requires_grad for t in shards):
        result = _wrap(_checked_shards(dict(zip(ranks, shards))))
        return join(result, "rank_map") if stacked and can_join(result) else result
    _checked_shards({r: t.detach() for r, t in zip(ranks, shards)})
    return _Join.apply(ranks, stacked, *shards)


def split_shards(tensor: Any, ranks: Sequence[int]) -> dict[int, Tensor]:
    """{rank: shard} for the given ranks that `tensor` has shards of; a plain tensor has all."""
    if not isinstance(tensor, LocalTensor):
        return dict.fromkeys(ranks, tensor)
    held = tensor.__tensor_flatten__()[1] if not torch.compiler.is_compiling() else None
    shards = _split(tensor)
    if held is None:
        held = _ranks_of(tensor)
    return {r: t for r, t in zip(held, shards) if r in ranks}


@torch._dynamo.assume_constant_result
def _ranks_of(tensor: LocalTensor) -> tuple[int, ...]:
    return tuple(tensor._local_tensors)


def join_shards(
    ranks: tuple[int, ...], shards: Sequence[Tensor], stacked: bool = False
) -> LocalTensor:
    """The LocalTensor of one tensor per rank; `stacked`: copied into a stack where they are alike.

    Raises:
        ShardError: no ranks, or results that are no tensors or do not fit together.
    """
    if not ranks:
        fail(
            ShardError,
            "the callback returned a tensor on no rank. Return the shard of at least one rank.",
        )
    for r, t in zip(ranks, shards):
        if not isinstance(t, Tensor):
            fail(
                ShardError,
                f"the callback returned {type(t).__name__} on rank {r}, but the shard of a rank is "
                "a tensor. Wrap numbers with torch.tensor(...).",
            )
    return _join(ranks, stacked, *shards)


def for_each_rank(
    func: Callable[..., Any],
    ranks: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    alias: bool = True,
) -> Any:
    """Run a Python function once per rank on that rank's values and combine the results.

    The function must have no side effects. `alias=False` says that nobody relies on results that
    share memory with the arguments. Raises RankDivergence where results do not combine.
    """
    mode = enabled_local_tensor_mode()
    stacked = mode.stacked if mode is not None else made.any and _any_stacked(args)
    if stacked:
        result = sharding.at_once(func, ranks, args, kwargs)
        if result is not NotImplemented:
            return result
    flat, spec = pytree.tree_flatten((tuple(args), kwargs))
    results: dict[int, Any] = {}
    for r in sorted(ranks):
        rank_args, rank_kwargs = pytree.tree_unflatten([pick(a, r) for a in flat], spec)
        if mode is None:
            results[r] = func(*rank_args, **rank_kwargs)
        else:
            results[r] = mode._on_rank(r, func, *rank_args, **rank_kwargs)
    if not alias:
        results = _resolved_alike(results)
    result = combine(results, getattr(func, "__name__", str(func)) + "()")
    return pytree.tree_map(_off_the_stack, result) if stacked else result


def _any_stacked(args: Sequence[Any]) -> bool:
    return any(isinstance(a, LocalTensor) and type(a._local_tensors) is ShardsOfStack for a in args)


def _off_the_stack(value: Any) -> Any:
    """A LocalTensor of rows of a stack that are not alike, in memory of its own.

    Its ranks would have a storage offset each, which a compiled function cannot take.
    """
    if not isinstance(value, LocalTensor) or type(value._local_tensors) is ShardsOfStack:
        return value
    shards = value._local_tensors
    if len({t.storage_offset() for t in shards.values()}) == 1:
        return value
    return _wrap({r: t.clone() for r, t in shards.items()})


def _resolved_alike(results: dict[int, Any]) -> dict[int, Any]:
    """The results with the conjugation carried out where only some ranks have the lazy bit.

    Padding does so: a rank whose shard of a conjugate tensor is padded gets fresh memory, the
    others get the conjugate view back.
    """
    bits = {t.is_conj() if isinstance(t, Tensor) else None for t in results.values()}
    return {r: t.resolve_conj() for r, t in results.items()} if bits == {True, False} else results


def maybe_run_for_local_tensor(func: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: in a LocalTensorMode run the function once per rank, else call it as it is.

    For code that needs one Python value per rank (a branch, an int, a list length). The function
    must have no side effects. LocalTensors and per-rank numbers in its arguments are that rank's;
    its results are combined: tensors to LocalTensors, numbers to per-rank numbers, and everything
    else must be equal on all ranks.

    Raises:
        RankDivergence: results that cannot be one value.
    """

    @functools.wraps(func)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        mode = enabled_local_tensor_mode()
        if mode is None:
            return func(*args, **kwargs)
        return _run_on_ranks(mode, func, args, kwargs)

    return wrapper


def _run_on_ranks(mode: Any, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`for_each_rank`, differentiable, in Python that Dynamo can trace."""
    ranks = mode._sorted_ranks
    flat, spec = pytree.tree_flatten((args, kwargs))
    columns = [on_ranks(leaf, ranks) for leaf in flat]
    results = []
    for i, r in enumerate(ranks):
        rank_args, rank_kwargs = pytree.tree_unflatten([c[i] for c in columns], spec)
        results.append(mode._on_rank(r, func, *rank_args, **rank_kwargs))
    return join_results(ranks, results, f"{func.__name__}()")


def on_ranks(value: Any, ranks: tuple[int, ...]) -> Sequence[Any]:
    """What each rank sees of a leaf value."""
    if isinstance(value, AsyncCollectiveTensor):
        value = value.wait()
    if isinstance(value, LocalTensor):
        shards = split_shards(value, ranks)
        return [shards[r] for r in ranks]
    numbers = numbers_on_ranks(value, ranks)
    return [value] * len(ranks) if numbers is None else numbers


def join_results(ranks: tuple[int, ...], results: Sequence[Any], what: str) -> Any:
    """The results of all ranks as one: `combine`, but tensors stay part of the autograd graph."""
    first = results[0]
    if not isinstance(first, (Tensor, list, tuple, dict)):
        return combined_values(ranks, what, *results)
    require_one_structure(dict(zip(ranks, results)), what)
    if isinstance(first, Tensor):
        return join_shards(ranks, results)
    if isinstance(first, dict):
        return {k: join_results(ranks, [v[k] for v in results], what) for k in first}
    items = [join_results(ranks, [v[i] for v in results], what) for i in range(len(first))]
    return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)


def reconcile_args(args: Any, kwargs: dict[str, Any] | None = None) -> Any:
    """`(args, kwargs)` with every LocalTensor replaced by the one tensor that its ranks share.

    Raises:
        RankDivergence: a LocalTensor whose shards differ.
    """
    flat, spec = pytree.tree_flatten((args, {} if kwargs is None else kwargs))
    plain = [a.reconcile() if isinstance(a, LocalTensor) else a for a in flat]
    return pytree.tree_unflatten(plain, spec)


__all__ = [
    "RankDivergence",
    "for_each_rank",
    "join_shards",
    "maybe_run_for_local_tensor",
    "reconcile_args",
    "split_shards",
]
