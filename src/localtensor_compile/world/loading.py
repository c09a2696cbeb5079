"""torch.load inside a world: every rank gets a copy of what the file holds.

On real processes each rank reads the file into memory of its own. So does each shard here; tensors
that share memory in the file share it within a rank.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..values.tensor import LocalTensor, _checked_shards, _wrap
from .rank_numbers import is_plain
from .state import enabled_local_tensor_mode


def load_per_rank(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load` (torch.load), with its tensors on every rank while a LocalTensorMode is enabled."""

    @functools.wraps(load)
    def load_on_ranks(*args: Any, **kwargs: Any) -> Any:
        mode = enabled_local_tensor_mode()
        if mode is None:
            return load(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return on_all_ranks(load(*args, **kwargs), sorted(mode.ranks))

    return load_on_ranks


def on_all_ranks(value: Any, ranks: list[int]) -> Any:
    """`value` with each plain tensor in it replaced by a LocalTensor of copies.

    Looks into containers and into nn.Modules, which are changed in place. LocalTensors stay as
    they are; tensors inside other objects stay plain.
    """
    leaves = pytree.tree_leaves(value)
    for module in [leaf for leaf in leaves if isinstance(leaf, torch.nn.Module)]:
        leaves += [t for m in module.modules() for t in _own_tensors(m)]
    found = {id(t): t for t in leaves if isinstance(t, Tensor) and is_plain(t)}
    made = _on_ranks(list(found.values()), ranks)
    replaced = dict(zip(found, made))

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, torch.nn.Module):
            for module in leaf.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in list(tensors.items()):
                        tensors[name] = replaced.get(id(tensor), tensor)
        return replaced.get(id(leaf), leaf)

    return pytree.tree_map(replace, value)


def _own_tensors(module: torch.nn.Module) -> list[Tensor]:
    own = (*module._parameters.values(), *module._buffers.values())
    return [t for t in own if t is not None]


def _on_ranks(tensors: list[Tensor], ranks: list[int]) -> list[LocalTensor]:
    # deepcopy of the list keeps which tensors share memory.
    plain = [t.detach() for t in tensors]
    copies = {r: copy.deepcopy(plain) for r in ranks}
    made = []
    for i, tensor in enumerate(tensors):
        result: Any = _wrap(_checked_shards({r: copies[r][i] for r in ranks}))
        if isinstance(tensor, torch.nn.Parameter):
            result = torch.nn.Parameter(result, requires_grad=tensor.requires_grad)
        elif tensor.requires_grad:
            result.requires_grad_()
        made.append(result)
    return made
