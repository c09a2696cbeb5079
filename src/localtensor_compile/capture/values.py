"""What captured graphs were given and returned in their first call, per rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..compile.fx_graphs import leaves, placeholders
from ..dispatch.generators import CPU, current
from ..values.equal import same_values


@dataclass
class Call:
    """The first call of a graph of all ranks.

    Attributes:
        given: name of a placeholder -> its value before the call.
        changed: those that the call wrote to -> the value after it.
        returned: what the graph returned, nested lists item by item.
        generators: rank -> state of its CPU generator before the call.
    """

    given: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    returned: list[Any] = field(default_factory=list)
    generators: Mapping[int, Tensor] = field(default_factory=dict)


def kept(graph: fx.GraphModule, call: Call) -> Callable[[list[Any]], Any]:
    """`graph` as AOTAutograd calls it, with one list of arguments; its first call is kept."""
    nodes = [node.name for node in placeholders(graph)]

    def run(arguments: list[Any]) -> Any:
        values = list(arguments)
        arguments.clear()
        if call.given:
            return graph(*values)
        call.given = {name: snapshot(v) for name, v in zip(nodes, values)}
        call.generators = _generators()
        result = graph(*values)
        call.returned = [snapshot(v) for v in leaves(result)]
        call.changed = {
            name: snapshot(after)
            for name, after in zip(nodes, values)
            if isinstance(after, Tensor) and not same_values(call.given[name], after)
        }
        return result

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def snapshot(value: Any) -> Any:
    """A tensor with the same values, sizes and strides in memory of its own; else `value`."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    copy = value.clone()
    if copy.stride() == value.stride():
        return copy
    memory = value.untyped_storage().clone()
    place = value.storage_offset(), value.size(), value.stride()
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(memory, *place)


def _generators() -> dict[int, Tensor]:
    world = current()
    return {} if world is None else {r: g.get_state() for r, g in world.on(CPU).items()}
