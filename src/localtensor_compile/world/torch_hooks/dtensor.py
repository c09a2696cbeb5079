"""DTensor over our LocalTensor.

DTensor asks torch's own simulator module which mode is active and lets it run rank-dependent
Python once per rank. While one of our modes is active, that module answers with ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import placement_types

from .. import drop_in, per_rank_code, state
from ..rank_numbers import is_plain

Replacement = tuple[Any, str, Any]


def replacements() -> Iterator[Replacement]:
    # The functions that DTensor imported by name look these globals up at call time. Reached
    # through one of them: sys.modules may hold our package under the name of torch's module.
    upstream = placement_types.maybe_run_for_local_tensor.__globals__
    yield upstream, "get_local_tensor_mode_list", state.get_local_tensor_mode_list
    yield upstream, "_for_each_rank_run_func", per_rank_code.for_each_rank
    # DTensor's tracker of CUDA generators does its own arithmetic, on the states of all ranks.
    name = "maybe_enable_local_tracker"
    if name in upstream:  # not in every supported version
        yield upstream, name, drop_in.maybe_enable_local_tracker
    name = "_make_replicate_tensor"
    original = placement_types.Replicate.__dict__.get(name)
    if original is not None:  # not in every supported version
        yield placement_types.Replicate, name, classmethod(_replicating(original.__func__))
    from . import dtensor_sharding

    yield from dtensor_sharding.replacements()


def _replicating(original: Callable[..., Any]) -> Callable[..., Any]:
    """The broadcast of distribute_tensor, of what each rank has: a plain tensor is copied first."""

    @functools.wraps(original)
    def make_replicate_tensor(cls: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        mode = state.enabled_local_tensor_mode()
        if (
            mode is not None
            and state.acting.rank is None
            and not torch.compiler.is_compiling()
            and is_plain(tensor)
            and tensor.layout is torch.strided
        ):
            tensor = mode._replicas.of(tensor)
        return original(cls, tensor, *args, **kwargs)

    return make_replicate_tensor


def forget_sharding() -> None:
    """Empty DTensor's caches of sharding propagation, whose results hold meshes.

    A mesh of a later world equals that of one that is gone, so the caches would hand out the old
    one, and AOTAutograd's tracing tells meshes apart by identity.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
