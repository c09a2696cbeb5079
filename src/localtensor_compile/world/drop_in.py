"""Names of torch.distributed._local_tensor that have another shape here.

For code that was written against that module; new code has no use for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ..values.int_node import make_int
from ..values.ranked import combine, pick
from ..values.tensor import _PREFIX
from .per_rank_code import for_each_rank as _for_each_rank_run_func
from .state import enabled_local_tensor_mode

_LOCAL_TENSOR_ATTR_PREFIX = _PREFIX

_map_to_rank_local_val = pick


def _combine_rank_results(rank_results: Mapping[int, Any], default: Any = None) -> Any:
    return combine(rank_results)


def _is_local_tensor_attr(attr: str) -> bool:
    return attr.startswith(_PREFIX)


def _to_local_tensor_attr(rank: int) -> str:
    return f"{_PREFIX}{rank}"


def _from_local_tensor_attr(attr: str) -> int:
    if not _is_local_tensor_attr(attr):
        raise AssertionError(f"Invalid local tensor attr {attr}")
    return int(attr[len(_PREFIX) :])


def maybe_enable_local_tracker(
    device_type: str, distribute_region_enabled: bool, spec: Any, generator: Any
) -> contextlib.AbstractContextManager[None] | None:
    """None: DTensor's random ops use their own tracker, with the generators of the ranks."""
    return None


def get_generator_seed_for_device_type(device_type: str) -> Any:
    """The seed of the device's default generator, per rank inside a mode."""
    mode = enabled_local_tensor_mode()
    device = torch.get_device_module(device_type) if device_type != "cpu" else torch
    if mode is None:
        return device.initial_seed()
    seeds = {}
    for rank in mode._sorted_ranks:
        seeds[rank] = mode._on_rank(rank, device.initial_seed)
    return make_int(seeds)


__all__ = ["_for_each_rank_run_func"]
