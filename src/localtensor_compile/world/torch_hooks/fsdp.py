"""FSDP2 (`fully_shard`) and `replicate` on simulated ranks.

FSDP's collectives, views and foreach copies are ops and need nothing here. Its bookkeeping is
Python of one rank: it frees the memory of one storage, takes the chunk of its own rank, and asks
whether that chunk is empty.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from ...stacked import sharding
from ...stacked.layout import is_stacked
from ...values.rank_node import is_ranked, value_on_rank
from ...values.stack import ShardsOfStack
from ...values.tensor import LocalTensor, _wrap
from ..state import enabled_local_tensor_mode

Replacement = tuple[Any, str, Any]


def replacements() -> Iterator[Replacement]:
    import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
    import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group

    for name in ("alloc_storage", "free_storage"):
        for owner in (fsdp_param, param_group):
            if hasattr(owner, name):
                yield owner, name, _on_shards(getattr(owner, name))
    yield fsdp_param, "_chunk_with_empty", _chunk_with_empty(fsdp_param._chunk_with_empty)
    fsdp_class = fsdp_param.FSDPParam
    yield fsdp_class, "reset_sharded_param", _reset(fsdp_class.reset_sharded_param)


def _on_shards(original: Any) -> Any:
    """Memory is freed and allocated on every rank, so that stale reads fail as on real ranks."""

    @functools.wraps(original)
    def resize(tensor: Any) -> None:
        if not isinstance(tensor, LocalTensor):
            return original(tensor)
        held = tensor._local_tensors
        for memory in [held.stack] if type(held) is ShardsOfStack else held.values():
            original(memory)

    return resize


class _Chunks(list[Any]):
    """The chunks of a parameter; `chunks[own rank]` is each rank's own."""

    def __init__(self, chunks: list[Any], dim: int, whole: Any) -> None:
        super().__init__(chunks)
        self.dim = dim
        self.whole = whole

    def __getitem__(self, index: Any) -> Any:
        if not is_ranked(index):
            return super().__getitem__(index)
        if is_stacked(self.whole):
            own = sharding.own_even_chunk(self.whole, self.dim, len(self), index)
            if own is not NotImplemented:
                return own
        whole = super().__getitem__(0)
        ranks = tuple(index.node._values)
        shards = {}
        for rank in ranks:
            chunk = super().__getitem__(value_on_rank(index, rank))
            shards[rank] = chunk._local_tensors[rank] if isinstance(chunk, LocalTensor) else chunk
            if shards[rank].dim() != whole.dim():  # FSDP's empty chunk has one dimension
                shards[rank] = shards[rank].new_empty(_emptied(whole.shape, self.dim))
        result = _wrap(shards)
        # FSDP asks for it only to leave out copies of nothing, which do no harm on the ranks whose
        # chunk is empty.
        numel = max(t.numel() for t in shards.values())
        result.numel = lambda: numel
        return result


def _emptied(shape: Any, dim: int) -> list[Any]:
    sizes = list(shape)
    sizes[dim] = 0
    return sizes


def _chunk_with_empty(original: Any) -> Any:
    @functools.wraps(original)
    def chunk_with_empty(tensor: Any, num_chunks: int, dim: int) -> Any:
        chunks = original(tensor, num_chunks, dim)
        return chunks if enabled_local_tensor_mode() is None else _Chunks(chunks, dim, tensor)

    return chunk_with_empty


def _reset(original: Any) -> Any:
    """Pad the local tensor that a user or `Module.to` has put into a sharded parameter.

    The original compares sizes and memory of one rank.
    """

    @functools.wraps(original)
    def reset_sharded_param(self: Any) -> None:
        module_info = self._module_info
        parameter = getattr(module_info.module, module_info.param_name)
        local = getattr(parameter, "_local_tensor", None)
        if not isinstance(local, LocalTensor) or local.is_meta:
            return original(self)
        if not is_ranked_size(local):
            return original(self)
        if not _same_memory(self._sharded_param_data, local):
            padded_size = self.padded_sharded_param_size
            dim = self.fsdp_placement.dim
            padded = {r: _padded(t, padded_size, dim) for r, t in local._local_tensors.items()}
            self._sharded_param_data = _wrap({r: t.view(-1) for r, t in padded.items()})
            parameter._local_tensor = _wrap(
                {r: t.narrow(dim, 0, local._local_tensors[r].size(dim)) for r, t in padded.items()}
            )
        self.sharded_param = parameter
        self._sharding_spec = parameter._spec

    return reset_sharded_param


def is_ranked_size(tensor: LocalTensor) -> bool:
    return any(is_ranked(s) for s in tensor._size)


def _same_memory(one: Any, other: LocalTensor) -> bool:
    if not isinstance(one, LocalTensor):
        return False
    return all(
        one._local_tensors[r].untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
        for r, t in other._local_tensors.items()
    )


def _padded(shard: torch.Tensor, size: Any, dim: int) -> torch.Tensor:
    with torch.no_grad(), torch._C.DisableTorchFunction():
        padded = shard.new_zeros(size)
        padded.narrow(dim, 0, shard.size(dim)).copy_(shard)
    return padded
