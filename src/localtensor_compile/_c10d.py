"""The names of torch.distributed._local_tensor._c10d, for code that calls them directly.

Each takes the arguments of the c10d or functional op that it is named after and runs our
implementation. New code calls torch.distributed.
"""

from __future__ import annotations

from typing import Any

from ._torch import reduce_op_of
from .collectives import c10d, functional
from .collectives.groups import groups_of
from .collectives.ops import settings
from .collectives.reduction import reduce_shards
from .runner import spmd_p2p

_local_functional_all_gather_into_tensor = functional._all_gather
_local_functional_reduce_scatter_tensor = functional._reduce_scatter
_local_functional_shard_dim_alltoall = functional._shard_dim_alltoall
_local_functional_all_to_all_single = functional._all_to_all_single
_local_broadcast_ = c10d._broadcast_
_local_all_reduce_ = c10d._allreduce_
_local_allreduce_coalesced_ = c10d._allreduce_coalesced_
_local_reduce_scatter_tensor_coalesced_ = c10d._reduce_scatter_tensor_coalesced_
_local_allgather_base_ = c10d._allgather_base_
_local_reduce_scatter_base_ = c10d._reduce_scatter_base_
_local_all_gather_ = c10d._allgather_
_local_allgather_into_tensor_coalesced_ = c10d._allgather_into_tensor_coalesced_
_local_gather_ = c10d._gather_
_local_scatter_ = c10d._scatter_
_local_alltoall_ = c10d._alltoall_
_local_alltoall_base_ = c10d._alltoall_base_
_local_barrier = c10d._barrier
_local_monitored_barrier_ = c10d._monitored_barrier_


def _local_reduce(reduce_op: Any, tensors: list[Any]) -> Any:
    """The reduction of plain tensors, one per rank, in rank order of the list."""
    op, factor = reduce_op_of(reduce_op)
    if op == "premul_sum":
        return reduce_shards(tensors, op, order=settings.order, factor=factor)
    return reduce_shards(tensors, op, order=settings.order)


def _prepare_collective_groups(process_group: Any) -> tuple[list[int], list[int], int]:
    """(offsets of a group's ranks from its first, first rank of each group, first rank of ours).

    Every rank takes part when its first rank is added to the offsets.
    """
    import torch.distributed as dist

    groups = groups_of(process_group, tuple(range(dist.get_world_size()))).ranks
    first = groups[0]
    return [r - first[0] for r in first], [g[0] for g in groups], first[0]


def wait_all(work: Any) -> None:
    """Wait for a Work, every Work of a list, or nothing."""
    for one in work if isinstance(work, list) else [work]:
        if one is not None:
            one.wait()


_local_send = spmd_p2p.local_send
_local_recv_ = spmd_p2p.local_recv_
_local_recv_any_source_ = spmd_p2p.local_recv_any_source_
local_p2p_op = spmd_p2p.local_p2p_op
_attach_rank = spmd_p2p.attach_rank
