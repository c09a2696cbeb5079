"""LocalTensors as Python objects in a frame that Dynamo traces: shards and ranks.

Dynamo knows tensors, not what a subclass keeps beside them. The names that people read
(`_local_tensors`, `_local_tensor_{rank}`, `_ranks`) become nodes of its graph, which AOTAutograd
sees through. The constructor and `reconcile()` are such nodes by torch's own rules.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..values.tensor import _PREFIX, LocalTensor


# ---------------------------------------------------------------- nodes of the Dynamo graph
@torch._dynamo.allow_in_graph
def shard(tensor: LocalTensor, rank: int) -> Tensor:
    """The shard of one rank, which autograd does not know, as the attribute gives it."""
    return tensor._local_tensors[rank]


NODES = (shard, LocalTensor)


# ---------------------------------------------------------------- traced in place of the methods
def _by_rank(ranks: tuple[int, ...], *shards: Tensor) -> Mapping[int, Tensor]:
    # Not to be written: nobody would see it.
    return MappingProxyType(dict(zip(ranks, shards)))


def _build(tx: Any, value: Any) -> Any:
    from torch._dynamo.variables.base import VariableTracker

    return VariableTracker.build(tx, value)


def _node(tx: Any, function: Any, *args: Any) -> Any:
    from torch._dynamo.variables.builder import wrap_fx_proxy

    return wrap_fx_proxy(tx, tx.output.create_proxy("call_function", function, args, {}))


def _attribute(tx: Any, variable: Any, tensor: LocalTensor, name: str) -> Any:
    """The Dynamo variable of an attribute of ours, or None."""
    ranks = tuple(tensor._local_tensors)
    if name == "_ranks":
        return _build(tx, tensor._ranks)
    if name == "_local_tensors":
        shards = [_node(tx, shard, variable.as_proxy(), r) for r in ranks]
        return _build(tx, _by_rank).call_function(tx, [_build(tx, ranks), *shards], {})
    rank = name[len(_PREFIX) :]
    if name.startswith(_PREFIX) and rank.isdecimal() and int(rank) in ranks:
        return _node(tx, shard, variable.as_proxy(), int(rank))
    return None


def replacements() -> list[tuple[Any, Any, Any]]:
    """(owner, name, replacement) in torch's Dynamo."""
    from torch._dynamo.variables.builder import SourcelessBuilder
    from torch._dynamo.variables.tensor import TensorVariable
    from torch._dynamo.variables.torch_function import (
        can_dispatch_torch_function,
        dispatch_torch_function,
    )

    # Its name since torch 2.14, and before.
    names = ("tp_getattro_impl", "var_getattr")
    getattr_name = next(name for name in names if name in TensorVariable.__dict__)
    var_getattr = getattr(TensorVariable, getattr_name)

    def example(variable: Any) -> Any:
        return variable.as_proxy().node.meta.get("example_value")

    @functools.wraps(var_getattr)
    def attribute(self: Any, tx: Any, name: str) -> Any:
        if self.class_type is LocalTensor and name.startswith("_"):
            found = _attribute(tx, self, example(self), name)
            if found is not None:
                return found
        return var_getattr(self, tx, name)

    found = []
    set_item = TensorVariable.__dict__.get("mp_ass_subscript_impl")
    if set_item is not None:  # torch 2.14, which shows `x[i] = v` to no torch function mode

        @functools.wraps(set_item)
        def write(self: Any, tx: Any, key: Any, value: Any) -> Any:
            args = (self, key, value)
            if value is None or not can_dispatch_torch_function(tx, args, {}):
                return set_item(self, tx, key, value)
            function = SourcelessBuilder.create(tx, Tensor.__setitem__)
            return dispatch_torch_function(tx, function, args, {})

        found.append((TensorVariable, "mp_ass_subscript_impl", write))

    return [*found, (TensorVariable, getattr_name, attribute)]
