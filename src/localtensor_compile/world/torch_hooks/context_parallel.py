"""torch's context parallelism of flex attention (create_cp_block_mask) on simulated ranks.

A block mask moves the queries of a rank to their place in the whole sequence. Its function runs
under vmap, and flex_attention takes what it closes over as tensors: so the rank is a tensor.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ...values.rank_node import value_on_rank
from ..state import enabled_local_tensor_mode

Replacement = tuple[Any, str, Any]


class _RankTensors:
    """A DeviceMesh whose local ranks are tensors."""

    def __init__(self, mesh: Any, mode: Any) -> None:
        self._mesh, self._mode = mesh, mode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mesh, name)

    def get_local_rank(self, mesh_dim: Any = None) -> Any:
        ranks = self._mesh.get_local_rank(mesh_dim)
        device = self._mesh.device_type
        return self._mode.rank_map(lambda r: torch.tensor(value_on_rank(ranks, r), device=device))


def replacements() -> Iterator[Replacement]:
    try:
        import torch.distributed.tensor.experimental._context_parallel._attention as attention
    except ImportError:  # not in every supported version
        return
    name = "_create_cp_block_mask"
    original = getattr(attention, name, None)
    if original is None:
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create_cp_block_mask(*args: Any, **kwargs: Any) -> Any:
        mode = enabled_local_tensor_mode()
        if mode is None:
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.arguments["device_mesh"] = _RankTensors(bound.arguments["device_mesh"], mode)
        return original(*bound.args, **bound.kwargs)

    yield attention, name, create_cp_block_mask
