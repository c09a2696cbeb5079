"""{rank: value} -> one value, and back. The only place that knows how to pick and to combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.utils import _pytree as pytree

from .._torch import AsyncCollectiveTensor
from ..errors import RankDivergence, fail, per_rank_text
from .bool_node import make_bool
from .float_node import make_float
from .int_node import make_int
from .rank_node import is_ranked, value_on_rank
from .tensor import LocalTensor, _checked_shards, _wrap


def per_rank_values(value: Any) -> Mapping[int, Any] | None:
    """{rank: value} of a LocalTensor or per-rank number, or None for what all ranks share.

    `tensor op SymInt` arrives as a 0-dim tensor that carries the SymInt as `_wrapped_number`.
    """
    if isinstance(value, LocalTensor):
        return value._local_tensors
    if is_ranked(value):
        return value.node._values
    if type(value) is Tensor:
        number = getattr(value, "_wrapped_number", None)
        if number is not None and is_ranked(number):
            return number.node._values
    return None


def pick(value: Any, rank: int) -> Any:
    """What `rank` sees of a leaf value."""
    if isinstance(value, AsyncCollectiveTensor):
        value = value.wait()
    values = per_rank_values(value)
    if values is None:
        return value
    if rank not in values:
        raise RankDivergence(
            f"a value of ranks {sorted(values)} is used where rank {rank} takes part. Combine only "
            "values of one set of ranks."
        )
    return values[rank]


def pick_tree(tree: Any, rank: int) -> Any:
    """What `rank` sees of a nested structure."""
    return pytree.tree_map(lambda leaf: pick(leaf, rank), tree)


def ranks_of(tree: Any) -> tuple[int, ...] | None:
    """The ranks of the per-rank values in a nested structure, or None where it holds none."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, AsyncCollectiveTensor):
            leaf = leaf.wait()
        values = per_rank_values(leaf)
        if values is not None:
            return tuple(values)
    return None


def combine(results: Mapping[int, Any], what: str = "a call that ran once per rank") -> Any:
    """{rank: result} as one result: tensors become LocalTensors, numbers per-rank numbers.

    Args:
        results: rank -> result, in rank order.
        what: names the call in error messages.

    Raises:
        RankDivergence: results of different types, lists of different lengths, or values other
            than tensors and numbers that differ.
    """
    first = next(iter(results.values()))
    if isinstance(first, Tensor):
        require_one_structure(results, what)
        return _wrap(_checked_shards(results))
    if first is None:
        _require_same_type(results, type(None), what)
        return None
    if isinstance(first, (bool, SymBool)):
        _require_same_type(results, (bool, SymBool), what)
        if all(isinstance(v, bool) for v in results.values()):
            return _one_value(results, what)
        return make_bool(results)
    if isinstance(first, (int, SymInt)):
        _require_same_type(results, (int, SymInt), what)
        return make_int(results)
    if isinstance(first, (float, SymFloat)):
        _require_same_type(results, (float, SymFloat), what)
        return make_float(results)
    if isinstance(first, (list, tuple)):
        require_one_structure(results, what)
        items = [combine({r: v[i] for r, v in results.items()}, what) for i in range(len(first))]
        if hasattr(first, "_fields"):
            return type(first)(*items)
        return torch.Size(items) if isinstance(first, torch.Size) else type(first)(items)
    if isinstance(first, dict):
        require_one_structure(results, what)
        return {k: combine({r: v[k] for r, v in results.items()}, what) for k in first}
    return _one_value(results, what)


def numbers_on_ranks(value: Any, ranks: Sequence[int]) -> tuple[Any, ...] | None:
    """What each rank has of a per-rank number, or None for any other value."""
    if not is_ranked(value):
        return None
    return tuple(value_on_rank(value, r) for r in ranks)


def combined_values(ranks: Sequence[int], what: str, *values: Any) -> Any:
    """`combine` of numbers, strings and other plain values, one per rank."""
    return combine(dict(zip(ranks, values)), what)


_STRUCTURES = (Tensor, list, tuple, dict)


def require_one_structure(results: Mapping[int, Any], what: str) -> None:
    """Raise RankDivergence unless tensors, sequences or dicts are alike on every rank."""
    first = next(iter(results.values()))
    _require_same_type(results, next(k for k in _STRUCTURES if isinstance(first, k)), what)
    if isinstance(first, (list, tuple)):
        lengths = {r: len(v) for r, v in results.items()}
        if any(n != len(first) for n in lengths.values()):
            fail(
                RankDivergence,
                f"{what} returned sequences of different lengths: {per_rank_text(lengths)}. One "
                "program cannot hold a list of several lengths: do the part that needs them inside "
                "rank_map, tensor_map or @maybe_run_for_local_tensor.",
            )
    if isinstance(first, dict):
        keys = {r: tuple(v) for r, v in results.items()}
        if any(k != tuple(first) for k in keys.values()):
            fail(
                RankDivergence,
                f"{what} returned dicts with different keys: {per_rank_text(keys)}. Return the "
                "same keys on every rank.",
            )


def _require_same_type(results: Mapping[int, Any], expected: Any, what: str) -> None:
    if not all(isinstance(v, expected) for v in results.values()):
        names = {r: type(v).__name__ for r, v in results.items()}
        fail(
            RankDivergence,
            f"{what} returned values of different types: {per_rank_text(names)}. Return the same "
            "type on every rank.",
        )


def _one_value(results: Mapping[int, Any], what: str) -> Any:
    it = iter(results.values())
    first = next(it)
    if all(v == first for v in it):
        return first
    raise RankDivergence(
        f"{what} gave a {type(first).__name__} that the ranks disagree about: "
        f"{per_rank_text(results)}. One program cannot go on with several values here: compute "
        "with tensors (torch.where), or do the part that needs the value inside rank_map, "
        "tensor_map or @maybe_run_for_local_tensor."
    )
