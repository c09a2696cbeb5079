"""DistributedDataParallel on simulated ranks.

The module itself is Python and stays as it is; what it calls in C++ is answered for LocalTensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from ..bucket_parameters import assign_buckets, verify_across_ranks
from ..gradient_buckets import Logger, Reducer
from ..state import enabled_local_tensor_mode

Replacement = tuple[Any, str, Any]


def replacements() -> Iterator[Replacement]:
    yield dist, "Reducer", _instead(dist.Reducer, Reducer)
    yield dist, "Logger", _instead(dist.Logger, Logger)
    buckets = dist._compute_bucket_assignment_by_size
    yield dist, "_compute_bucket_assignment_by_size", _instead(buckets, assign_buckets)
    verify = dist._verify_params_across_processes

    def verify_params(group: Any, params: Any, logger: Any = None) -> None:
        verify_across_ranks(group, params)

    yield dist, "_verify_params_across_processes", _instead(verify, verify_params)
    coalesced = dist._broadcast_coalesced
    yield dist, "_broadcast_coalesced", _instead(coalesced, _broadcast_one_by_one)
    yield dist, "_register_comm_hook", _instead(dist._register_comm_hook, _register_hook)
    builtin = dist._register_builtin_comm_hook
    yield dist, "_register_builtin_comm_hook", _instead(builtin, _register_builtin_hook)


def _instead(original: Any, ours: Any) -> Any:
    """`ours` while the thread's mode is enabled, else `original`."""

    @functools.wraps(original, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        return (original if enabled_local_tensor_mode() is None else ours)(*args, **kwargs)

    return call


def _broadcast_one_by_one(group: Any, tensors: Any, buffer_size: int, src: int = 0) -> None:
    """Without torch's flat buffers, whose C++ asks for the one size of a tensor."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), group=group, group_src=src)


def _register_hook(reducer: Reducer, state: Any, hook: Any) -> None:
    reducer.register_hook(functools.partial(hook, state))


def _register_builtin_hook(reducer: Reducer, kind: Any) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hooks = {
        dist.BuiltinCommHookType.ALLREDUCE: default_hooks.allreduce_hook,
        dist.BuiltinCommHookType.FP16_COMPRESS: default_hooks.fp16_compress_hook,
    }
    reducer.register_hook(functools.partial(hooks[kind], reducer._group))
