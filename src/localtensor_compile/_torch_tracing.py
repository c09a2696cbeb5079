"""The tensors that torch traces with, and the nodes that stand for them: private names in one place.

While AOTAutograd traces, a shard is a FunctionalTensor around a FakeTensor, which a proxy of the
graph stands for; in Dynamo and in AOTAutograd's first pass there is no graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental import proxy_tensor

_PROXY: Any = torch._C._TorchDispatchModeKey.PROXY  # type: ignore[attr-defined]
_FUNCTIONAL: Any = torch._C._TorchDispatchModeKey.FUNCTIONAL  # type: ignore[attr-defined]


def proxy_mode() -> Any:
    """The mode that records ops into a graph, or None."""
    return torch._C._get_dispatch_mode(_PROXY)


def fake_of(tensor: Tensor) -> FakeTensor | None:
    """The FakeTensor behind a traced tensor, or None where writes to it are still to be carried out
    or it is of another kind."""
    if type(tensor) is FunctionalTensor:
        element = tensor.elem
        if torch._functionalize_mutation_counter(element):  # type: ignore[attr-defined]
            return None
        tensor = torch._from_functional_tensor(element)
    return tensor if type(tensor) is FakeTensor else None


def node_of(fake: FakeTensor, mode: Any) -> fx.Node | None:
    """The node that stands for a tensor, or None for one that is a constant or no node's."""
    entry = mode.tracer.tensor_tracker.get(fake)
    if entry is None or entry.constant is not None:
        return None
    return entry.proxy.node


def another(fake: FakeTensor) -> FakeTensor:
    """A new fake tensor with the metadata of one that owns its memory."""
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_strided(
            fake.shape, fake.stride(), dtype=fake.dtype, device="meta", layout=fake.layout
        )
    return FakeTensor(fake.fake_mode, meta, fake.device)


def as_traced(fake: FakeTensor, like: Tensor) -> Tensor:
    """A fake tensor as `like`, which is fake or functional, is wrapped."""
    if type(like) is not FunctionalTensor:
        return fake
    functional = torch._C._get_dispatch_mode(_FUNCTIONAL)
    return FunctionalTensor(torch._to_functional_tensor(fake), functional)


def last_node(mode: Any) -> fx.Node:
    """The node recorded last."""
    return mode.tracer.graph._root.prev


def nodes_since(last: fx.Node, mode: Any) -> list[fx.Node]:
    """The nodes recorded after `last`, in order."""
    found = []
    node = mode.tracer.graph._root.prev
    while node is not last:
        found.append(node)
        node = node.prev
    return found[::-1]


def copy_node(node: fx.Node, nodes: dict[fx.Node, fx.Node], fake: FakeTensor, mode: Any) -> fx.Node:
    """Record `node` again, of the mapped operands, with `fake` as its value."""
    graph = mode.tracer.graph
    args = fx.map_arg(node.args, lambda n: nodes.get(n, n))
    kwargs = fx.map_arg(node.kwargs, lambda n: nodes.get(n, n))
    target: Any = node.target
    name = graph._target_to_str(target.overloadpacket.__name__)
    copy = graph.create_node(node.op, target, args, kwargs, name=name)
    copy.meta = dict(node.meta)
    copy.meta["val"] = proxy_tensor.snapshot_fake(fake)
    proxy = fx.Proxy(copy, mode.tracer)
    proxy_tensor.track_tensor(fake, proxy, constant=None, tracer=mode.tracer)
    return copy
