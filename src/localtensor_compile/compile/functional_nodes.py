"""The collectives of one rank's program, as FX nodes: torch's functional ones, with the wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..errors import LocalTensorError

_FUNCTIONAL = torch.ops._c10d_functional
aten = torch.ops.aten


class ExtractError(LocalTensorError, NotImplementedError):
    """A graph of all ranks that cannot be taken apart into programs of single ranks."""


def message(node: fx.Node, why: str) -> str:
    """That `node` cannot be extracted, and the user's line it comes from."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    line = next((t.strip() for t in reversed(trace) if t.strip().startswith("File ")), "")
    where = f" It comes from {line}." if line else ""
    return f"{node.target} cannot be part of a single rank's program: {why}.{where}"


PER_RANK = 'Build the model and trace it under LocalTensorMode(..., layout="per_rank")'
"""What to do about stacked tensors in a graph that is to be taken apart into ranks."""


class NodeMaker:
    """Adds nodes to a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(op, args, kwargs)

    def with_value(self, node: fx.Node, value: Any) -> fx.Node:
        node.meta["val"] = value
        return node

    def waited(self, op: Any, value: Any, *args: Any) -> fx.Node:
        started = self.with_value(self.call(op, *args), value)
        return self.with_value(self.call(_FUNCTIONAL.wait_tensor.default, started), value)


LISTS = ("reduce_scatter_list", "all_gather_list", "all_to_all_list")
Make = Callable[[NodeMaker, fx.Node, list[Any], str, int, list[Any]], list[Any]]


def _all_reduce(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    return [x.waited(_FUNCTIONAL.all_reduce.default, mine[0], given[0], node.args[1], group)]


def _reduce_scatter(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    op = _FUNCTIONAL.reduce_scatter_tensor.default
    return [x.waited(op, mine[0], given[0], node.args[1], size, group)]


def _all_gather(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    op = _FUNCTIONAL.all_gather_into_tensor.default
    return [x.waited(op, mine[0], given[0], size, group)]


def _broadcast(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    return [x.waited(_FUNCTIONAL.broadcast.default, mine[0], given[0], node.args[1], group)]


def _all_to_all_single(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    tensor, sent, received = given
    op = _FUNCTIONAL.all_to_all_single.default
    return [x.waited(op, mine[0], tensor, received, sent, group)]


def _shard_dim_alltoall(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    op = torch.ops._dtensor.shard_dim_alltoall.default
    made = x.call(op, given[0], node.args[1], node.args[2], group)
    return [x.with_value(made, mine[0])]


def _all_gather_list(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    """One tensor with a new first dimension is gathered, and cut again."""
    _require_equal_shapes(node, mine)
    row = x.with_value(x.call(aten.unsqueeze.default, given[0], 0), mine[0].unsqueeze(0))
    whole = torch.cat([mine[0].unsqueeze(0)] * size)
    gathered = x.waited(_FUNCTIONAL.all_gather_into_tensor.default, whole, row, size, group)
    return _rows(x, gathered, mine)


def _all_to_all_list(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    values = [n.meta["val"] for n in given]
    _require_equal_shapes(node, [*values, *mine])
    stacked = x.with_value(x.call(aten.stack.default, given), torch.stack(values))
    ones = [1] * size
    op = _FUNCTIONAL.all_to_all_single.default
    received = x.waited(op, torch.stack(mine), stacked, ones, ones, group)
    return _rows(x, received, mine)


def _reduce_scatter_list(
    x: NodeMaker, node: fx.Node, given: list[Any], group: str, size: int, mine: list[Any]
) -> list[Any]:
    values = [n.meta["val"] for n in given]
    _require_equal_shapes(node, values)
    stacked = x.with_value(x.call(aten.stack.default, given), torch.stack(values))
    op = _FUNCTIONAL.reduce_scatter_tensor.default
    row = x.waited(op, mine[0].unsqueeze(0), stacked, node.args[1], size, group)
    return _rows(x, row, mine)


def _rows(x: NodeMaker, stacked: fx.Node, values: Sequence[Any]) -> list[Any]:
    return [
        x.with_value(x.call(aten.select.int, stacked, 0, i), value)
        for i, value in enumerate(values)
    ]


def _require_equal_shapes(node: fx.Node, values: Sequence[Tensor]) -> None:
    if any(v.shape != values[0].shape for v in values):
        shapes = ", ".join(str(tuple(v.shape)) for v in values)
        raise ExtractError(
            message(
                node, f"torch has no functional collective for lists of other shapes ({shapes})"
            )
        )


COLLECTIVES: dict[str, Make] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
    "all_to_all_single": _all_to_all_single,
    "shard_dim_alltoall": _shard_dim_alltoall,
    "all_gather_list": _all_gather_list,
    "all_to_all_list": _all_to_all_list,
    "reduce_scatter_list": _reduce_scatter_list,
}
