"""What may be a shard, and what the shards of one LocalTensor must have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from .._torch import AsyncCollectiveTensor, FakeTensor, FunctionalTensor
from ..errors import ShardError, per_rank_text

# Tensor types that may be a shard.
SHARD_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor, FunctionalTensor)
NO_KEYS = DispatchKeySet.from_raw_repr(0)


def checked(local_tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Rank -> shard in rank order, after every check that ops on good shards need not repeat."""
    if not local_tensors:
        raise ShardError(
            "LocalTensor needs the shard of at least one rank, but got none. "
            "Give it a dict {rank: tensor}."
        )
    bad_ranks = [r for r in local_tensors if not isinstance(r, int) or isinstance(r, bool) or r < 0]
    if bad_ranks:
        raise ShardError(f"ranks are ints from 0 up, but LocalTensor got {bad_ranks!r}.")
    shards: dict[int, Tensor] = {}
    for rank in sorted(local_tensors):
        shard = local_tensors[rank]
        if isinstance(shard, AsyncCollectiveTensor):
            shard = shard.wait()
        if hasattr(shard, "_local_tensors"):
            raise ShardError(
                f"the shard of rank {rank} is a LocalTensor itself (of ranks "
                f"{list(shard._local_tensors)}). A LocalTensor holds plain tensors: inside "
                "LocalTensorMode factories make LocalTensors, so build shards with "
                "rank_map(lambda rank: ...) or under mode.disable()."
            )
        if not isinstance(shard, Tensor):
            raise ShardError(
                f"the shard of rank {rank} is no tensor but {type(shard).__name__}. "
                "Wrap numbers with torch.tensor(...)."
            )
        if type(shard) not in SHARD_TYPES:
            raise ShardError(
                f"the shard of rank {rank} is of the tensor subclass {type(shard).__name__}, which "
                "LocalTensor does not know how to run per rank. Put the LocalTensor inside "
                f"{type(shard).__name__} instead, or convert the shard to a plain tensor."
            )
        if shard.requires_grad:
            raise ShardError(
                f"the shard of rank {rank} requires grad. Autograd works on the LocalTensor, not "
                "on its shards: detach the shards and pass LocalTensor(..., requires_grad=True)."
            )
        shards[rank] = shard
    return shards


def extra_keys(t: Tensor) -> DispatchKeySet:
    keys = NO_KEYS
    if t.is_neg():
        keys = keys.add(DispatchKey.Negative)
    if t.is_conj():
        keys = keys.add(DispatchKey.Conjugate)
    return keys


def disagreement(shards: Mapping[int, Tensor]) -> ShardError:
    for what, read in _MUST_AGREE:
        values = {r: read(t) for r, t in shards.items()}
        if len(set(values.values())) > 1:
            return ShardError(
                f"the shards of one LocalTensor must have the same {what}, but they have "
                f"{per_rank_text(values)}. Sizes may differ between ranks, the {what} may not."
            )
    return ShardError("the shards of one LocalTensor disagree.")  # only reached on a race


_MUST_AGREE: tuple[tuple[str, Any], ...] = (
    ("dtype", lambda t: t.dtype),
    ("device", lambda t: t.device),
    ("layout", lambda t: t.layout),
    ("number of dimensions", lambda t: t.dim()),
    ("conjugate bit", lambda t: t.is_conj()),
    ("negative bit", lambda t: t.is_neg()),
)
