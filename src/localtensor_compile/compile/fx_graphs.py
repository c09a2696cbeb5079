"""Small questions about FX graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.fx as fx


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    """The inputs, in order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def output_node(module: fx.GraphModule) -> fx.Node:
    """The node that returns."""
    return next(iter(reversed(module.graph.nodes)))


def leaves(value: Any) -> Iterator[Any]:
    """What nested lists, tuples and dicts among a node's arguments hold."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value
