"""What a program returned, as plain tensors on the CPU: name -> rank -> tensor.

Only reads results. Everything that a rank can hold is accepted; what cannot be compared is an
error that names the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch import AsyncCollectiveTensor
from ..values.ranked import per_rank_values
from .program import ProgramError

# name -> rank -> that rank's value
Outputs = dict[str, dict[int, Tensor]]


def shards_of(result: Any, ranks: Iterable[int], whole: bool = False) -> dict[str, dict[int, Any]]:
    """Each rank's own value of every named result: tensors and numbers, not copied yet.

    Of a DTensor that is the local shard, or with `whole` the full tensor. A plain tensor or number
    is the same on all `ranks`.

    Raises:
        ProgramError: no dict, an empty dict, a key that is no str, or a value that is neither a
            tensor nor a number.
    """
    if not isinstance(result, Mapping):
        raise ProgramError(
            f"the program returned {_describe(result)}; return a dict of named tensors, as in "
            'return {"loss": loss}.'
        )
    if not result:
        raise ProgramError("the program returned an empty dict: there is nothing to compare.")
    ranks = tuple(ranks)
    return {
        _checked_name(name): _shards(name, value, ranks, whole) for name, value in result.items()
    }


def to_plain(values: Mapping[str, Mapping[int, Any]]) -> Outputs:
    """Detached copies on the CPU of what `shards_of` found. To be called outside any world."""
    return {
        name: {rank: _plain(value) for rank, value in shards.items()}
        for name, shards in values.items()
    }


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise ProgramError(
            f"the program returned a result named {name!r}: names are strings, found "
            f"{type(name).__name__}."
        )
    return name


def _shards(name: str, value: Any, ranks: tuple[int, ...], whole: bool) -> dict[int, Any]:
    with torch.no_grad():
        if isinstance(value, DTensor):
            value = value.full_tensor() if whole else value.to_local()
        if isinstance(value, AsyncCollectiveTensor):
            value = value.wait()
    if value is None:
        raise ProgramError(
            f"the program returned None as {name!r}: return a tensor or a number. Is it the "
            "gradient of a parameter that the loss does not depend on?"
        )
    shards = per_rank_values(value)
    if shards is not None:
        return dict(shards)
    if not isinstance(value, (Tensor, bool, int, float)):
        raise ProgramError(
            f"the program returned {_describe(value)} as {name!r}: return a tensor or a number "
            "under each name."
        )
    return dict.fromkeys(ranks, value)


def _plain(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    value = value.detach()
    return value.cpu() if value.device.type != "cpu" else value.clone()


def _describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
