"""send and recv of LocalTensors: SPMD threads of a LocalRunnerMode that send each other shards.

A tensor that is to be sent says which of its ranks sends it (`_attach_rank`), since one thread
stands for several. Names and arguments are those of torch.distributed._local_tensor._c10d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from .._torch import completed_work, resolve_group
from ..collectives.c10d import _handles
from ..errors import CollectiveError, UnsupportedError
from ..values.ranked import per_rank_values
from ..values.tensor import LocalTensor
from ..world.torch_hooks.distributed import pretend_rank
from ._torch_runner import boxed_callback_work
from .mode import LocalRunnerMode

_RANK = "__src_rank__"


def attach_rank(tensor: Any, rank: int) -> Any:
    """The tensor, marked as what `rank` sends or receives next."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    setattr(tensor, _RANK, rank)
    return tensor


def _own(tensors: Any, what: str) -> tuple[LocalTensor, int]:
    tensor = tensors[0]
    rank: int | None = getattr(tensor, _RANK, None)
    if not isinstance(tensor, LocalTensor) or rank is None or rank not in tensor._ranks:
        raise CollectiveError(
            f"{what} of a LocalTensor must say which of its ranks {what}s. Use "
            "local_p2p_op(peers, tensor, dist.isend), where peers is a number per rank, or run a "
            "thread per rank."
        )
    return tensor, rank


def _runner(what: str) -> LocalRunnerMode:
    if not LocalRunnerMode.active():
        raise UnsupportedError(
            f"{what} of a LocalTensor: point-to-point calls need a program per rank, but one "
            "program runs for all. Run it in LocalRunnerMode(ranks, concurrency, fn), or use a "
            "collective, such as all_to_all_single with splits."
        )
    return LocalRunnerMode.current()


def _global(group: Any, rank: int) -> int:
    return dist.get_process_group_ranks(resolve_group(group))[rank]


@_handles("send")
def local_send(tensors: Any, process_group: Any, dst: int, tag: int = 0) -> Any:
    """Send the marked rank's shard as it is now. Done at once."""
    mode = _runner("send")
    tensor, src = _own(tensors, "send")
    mode._signal_send(src, _global(process_group, dst), tensor._local_tensors[src].clone())
    return completed_work([])


@_handles("recv_")
def local_recv_(tensors: Any, process_group: Any, src: int, tag: int = 0) -> Any:
    """Receive into the marked rank's shard when the Work is waited for."""
    return _recv(tensors, _global(process_group, src))


@_handles("recv_any_source_")
def local_recv_any_source_(tensors: Any, process_group: Any, tag: int = 0) -> Any:
    """`local_recv_` from whichever rank has sent."""
    return _recv(tensors, -1)


def _recv(tensors: Any, src: int) -> Any:
    mode = _runner("recv")
    tensor, dst = _own(tensors, "recv")

    def store(value: Any) -> None:
        shard = tensor._local_tensors[dst]
        if value.shape != shard.shape or value.dtype != shard.dtype:
            raise CollectiveError(
                f"rank {dst} receives {value.dtype} {tuple(value.shape)} from another rank into "
                f"{shard.dtype} {tuple(shard.shape)}. Use one dtype and shape on both sides."
            )
        shard.copy_(value)

    def wait(timeout: Any) -> bool:
        mode._wait_recv(src, dst, store)
        return True

    return boxed_callback_work(wait)


def local_p2p_op(peers: Any, tensor: Any, op: Callable[..., Any]) -> list[Any]:
    """`op(tensor, peer)` of dist.isend or dist.irecv for every rank of `peers`, a number per rank.

    Returns:
        The Work of each rank.

    Raises:
        CollectiveError: `peers` is no number per rank.
    """
    values = per_rank_values(peers)
    if values is None:
        raise CollectiveError(
            f"local_p2p_op got {peers!r} as peers. Give it a number per rank, such as "
            "torch.SymInt(LocalIntNode({0: 1, 1: 0})): the rank that each rank sends to."
        )
    works = []
    for rank, peer in values.items():
        with pretend_rank(rank):
            works.append(op(attach_rank(tensor, rank), int(peer)))
    return works
