"""Rank-dependent parts of DTensor that torch does not run once per rank by itself.

A real rank guesses a DTensor's global size and stride from its own shard; where shards differ, so
do the guesses. It cuts its own shard into chunks; where shards differ, so does the number of chunks
that `torch.chunk` returns.

A DTensor on a submesh may have a *global* shape that differs between simulated ranks: each copy of
the submesh holds its own tensor. DTensor works out an op's output shape by running the op on fake
tensors of the global shape, which needs one shape: that is done per rank here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.distributed.tensor._api as tensor_api
import torch.distributed.tensor._sharding_prop as sharding_prop
import torch.distributed.tensor._utils as tensor_utils
from torch.distributed.tensor import placement_types
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema
from torch.utils import _pytree as pytree

from ..._torch import tracing_active
from ...stacked import sharding
from ...values.rank_node import is_ranked, value_on_rank
from .. import per_rank_code
from ..mesh import coordinates, per_rank_int
from ..state import acting, enabled_local_tensor_mode

Replacement = tuple[Any, str, Any]


def replacements() -> Iterator[Replacement]:
    yield from _once_per_rank()
    yield from _distribution()
    yield from _propagation()


def _once_per_rank() -> Iterator[Replacement]:
    name = "compute_global_tensor_info"
    guess = _per_rank(_plain(getattr(tensor_utils, name)))
    for module in (tensor_utils, tensor_api):
        yield module, name, guess
    chunk = getattr(placement_types.Shard, "_custom_chunk", None)
    if chunk is not None:  # not in every supported version
        per_rank_chunk = _per_rank(chunk)
        yield placement_types.Shard, "_custom_chunk", staticmethod(per_rank_chunk)
    name = "_chunk_or_narrow_cat"  # of all_gather and reduce_scatter along another dimension
    if hasattr(torch._utils, name):
        chunk_cat = _chunks_per_rank(getattr(torch._utils, name))
        for module in (torch._utils, funcol):
            yield module, name, chunk_cat


def _per_rank(func: Any) -> Any:
    """`func` once per rank, or once for all ranks of stacked tensors."""
    per_rank = per_rank_code.maybe_run_for_local_tensor(func)

    @functools.wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = enabled_local_tensor_mode()
        if mode is not None and mode.stacked:
            result = sharding.at_once(func, mode.ranks, args, kwargs)
            if result is not NotImplemented:
                return result
        return per_rank(*args, **kwargs)

    return run


def _distribution() -> Iterator[Replacement]:
    """distribute_tensor cuts a tensor into a list of chunks, one for each rank, and scatters it."""
    for kind in (placement_types.Shard, getattr(placement_types, "_StridedShard", None)):
        original = getattr(kind, "__dict__", {}).get("_shard_tensor")
        if original is not None:  # not in every supported version
            yield kind, "_shard_tensor", _scattering(original)


def _scattering(original: Any) -> Any:
    @functools.wraps(original)
    def shard_tensor(
        self: Any, tensor: Any, mesh: Any, mesh_dim: int, *rest: Any, **kw: Any
    ) -> Any:
        source = rest[0] if rest else kw.get("src_data_rank", 0)
        mode = enabled_local_tensor_mode()
        if mode is not None and mode.stacked and acting.rank is None and not tracing_active():
            places = coordinates(mesh, mode._sorted_ranks)
            if places is not None:
                result = sharding.scattered(
                    self, tensor, mode._sorted_ranks, places, mesh_dim, mesh.size(mesh_dim), source
                )
                if result is not NotImplemented:
                    return result
        return original(self, tensor, mesh, mesh_dim, *rest, **kw)

    return shard_tensor


def _chunks_per_rank(original: Any) -> Any:
    per_rank = per_rank_code.maybe_run_for_local_tensor(original)

    @functools.wraps(original)
    def chunk_cat(tensor: Any, num_chunks: int, narrow_dim: int, cat_dim: int = 0) -> Any:
        mode = enabled_local_tensor_mode()
        if mode is not None and mode.stacked:
            joined = sharding.chunked_cat(tensor, num_chunks, narrow_dim, cat_dim)
            if joined is not NotImplemented:
                return joined
        if torch.compiler.is_dynamo_compiling():  # which skips the original unless found by name
            return torch.cat(torch.chunk(tensor, num_chunks, dim=narrow_dim), dim=cat_dim)
        return per_rank(tensor, num_chunks, narrow_dim, cat_dim)

    return chunk_cat


def _plain(builtin: Any) -> Any:
    """A Python function that calls `builtin`: it has no name that functools.wraps could copy."""

    def compute_global_tensor_info(*args: Any) -> Any:
        return builtin(*args)

    compute_global_tensor_info.__module__ = tensor_utils.__name__
    compute_global_tensor_info.__qualname__ = "compute_global_tensor_info"
    return compute_global_tensor_info


def _propagation() -> Iterator[Replacement]:
    propagator = sharding_prop.ShardingPropagator
    name = "_propagate_tensor_meta_non_cached"
    original = propagator.__dict__.get(name)
    if original is None:  # not in every supported version
        return

    @functools.wraps(original)
    def propagate(self: Any, op_schema: Any) -> Any:
        mode = enabled_local_tensor_mode()
        if mode is None:
            return original(self, op_schema)
        flat, tree = pytree.tree_flatten(
            (op_schema.args_schema, op_schema.kwargs_schema),
            is_leaf=lambda x: isinstance(x, DTensorSpec),
        )
        if not any(_is_per_rank(x) for x in flat):
            return original(self, op_schema)
        metas = {}
        for rank in mode._sorted_ranks:
            args, kwargs = pytree.tree_unflatten([_on_rank(x, rank) for x in flat], tree)
            schema = OpSchema(op_schema.op, args, kwargs, op_schema.schema_info)
            metas[rank] = original(self, schema)
        return _combine(metas)

    yield propagator, name, propagate


def _sizes(meta: Any) -> tuple[Any, ...]:
    return (*meta.shape, *meta.stride)


def _is_per_rank(x: Any) -> bool:
    if isinstance(x, DTensorSpec):
        return x.tensor_meta is not None and any(map(is_ranked, _sizes(x.tensor_meta)))
    return is_ranked(x)


def _on_rank(x: Any, rank: int) -> Any:
    if isinstance(x, DTensorSpec) and _is_per_rank(x):
        meta = x.tensor_meta
        shape = torch.Size([value_on_rank(s, rank) for s in meta.shape])
        stride = tuple(value_on_rank(s, rank) for s in meta.stride)
        return DTensorSpec(x.mesh, x.placements, tensor_meta=TensorMeta(shape, stride, meta.dtype))
    return value_on_rank(x, rank) if is_ranked(x) else x


def _combine(metas: dict[int, Any]) -> Any:
    first = next(iter(metas.values()))
    if first is None:
        return None
    if not isinstance(first, TensorMeta):
        return type(first)(_combine({r: m[i] for r, m in metas.items()}) for i in range(len(first)))

    def per_dim(read: Any) -> tuple[Any, ...]:
        count = len(read(first))
        return tuple(per_rank_int({r: read(m)[i] for r, m in metas.items()}) for i in range(count))

    shape = torch.Size(per_dim(lambda m: m.shape))
    return TensorMeta(shape, per_dim(lambda m: m.stride), first.dtype)
