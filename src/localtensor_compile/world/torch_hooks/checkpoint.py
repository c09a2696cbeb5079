"""torch.distributed.checkpoint: every rank plans, writes and reads its own part, as real ranks do.

Planner, writer and reader keep state of their rank and wait for one another, so each rank runs them
in a thread of its own, with copies of them and with its shards of the state dict.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from ...errors import UnsupportedError
from ...values.ranked import combine, pick
from ...values.tensor import LocalTensor
from ..rank_threads import run_in_threads
from ..state import enabled_local_tensor_mode

Replacement = tuple[Any, str, Any]


def replacements() -> Iterator[Replacement]:
    import torch.distributed.checkpoint as checkpoint

    for module, name in (
        (state_dict_saver, "_save_state_dict"),
        (state_dict_loader, "_load_state_dict"),
    ):
        yield module, name, _per_rank(getattr(module, name))
    refused = _refused(state_dict_saver.async_save)
    yield state_dict_saver, "async_save", refused
    yield checkpoint, "async_save", refused


def _per_rank(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        mode = enabled_local_tensor_mode()
        if mode is None:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        if given.arguments.get("process_group") is not None:
            raise UnsupportedError(
                "a checkpoint of a part of the ranks (process_group=) is not simulated. Leave it "
                "out, or save and load inside LocalTensorMode of those ranks."
            )
        state_dict = given.arguments.pop("state_dict")
        of_rank = {r: _on_rank(state_dict, r) for r in mode._sorted_ranks}
        # Before any thread starts: copying is not their business.
        rest = {r: copy.deepcopy(given.arguments) for r in mode._sorted_ranks}
        found = run_in_threads(
            mode._sorted_ranks, lambda r: original(state_dict=of_rank[r], **rest[r])
        )
        if original.__name__ == "_load_state_dict":
            _take_back(state_dict, of_rank)
        return next(iter(found.values()))

    return function


def _on_rank(state_dict: Any, rank: int) -> Any:
    def leaf(value: Any) -> Any:
        if isinstance(value, DTensor) and isinstance(value._local_tensor, LocalTensor):
            shard = value._local_tensor._local_tensors[rank]
            return DTensor(shard, value._spec, requires_grad=False)
        if isinstance(value, Tensor) and not isinstance(value, LocalTensor):
            return value.detach()
        return pick(value, rank)

    return pytree.tree_map(leaf, state_dict)


def _take_back(state_dict: dict[str, Any], of_rank: dict[int, dict[str, Any]]) -> None:
    """Tensors were loaded in place; everything else is read from the ranks' state dicts."""
    for key, value in state_dict.items():
        leaves, spec = pytree.tree_flatten(value)
        loaded = {r: pytree.tree_leaves(s[key]) for r, s in of_rank.items()}
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                leaves[i] = combine({r: v[i] for r, v in loaded.items()}, f"loading {key!r}")
        state_dict[key] = pytree.tree_unflatten(leaves, spec)


def _refused(original: Any) -> Any:
    @functools.wraps(original)
    def async_save(*args: Any, **kwargs: Any) -> Any:
        if enabled_local_tensor_mode() is None:
            return original(*args, **kwargs)
        raise UnsupportedError(
            "torch.distributed.checkpoint.async_save hands the state dict to a thread that knows "
            "no simulated ranks. Use torch.distributed.checkpoint.save."
        )

    return async_save
