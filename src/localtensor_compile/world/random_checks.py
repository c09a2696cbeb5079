"""Random functions that Dynamo records: which there are, and which a graph must not keep.

A plain random node in a graph would draw once for all ranks, from torch's default generator.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.random_factories import PLAIN_DRAWS, RANDOM_FACTORIES, draws_for_plain
from ..errors import PlainTensorError, UnsupportedError


def _path(func: Any) -> str:
    """Where torch has the function: "rand", "Tensor.normal_", "nn.functional.dropout"."""
    for prefix in ("", "Tensor.", "nn.functional."):
        path = prefix + func.__name__
        try:
            if attrgetter(path)(torch) is func:
                return path
        except AttributeError:
            continue
    raise UnsupportedError(f"this version of torch has no public name for {func}.")


RANDOM_NAMES: dict[Any, str] = {
    func: _path(func) for func in (*sorted(RANDOM_FACTORIES, key=_path), *PLAIN_DRAWS)
}
"""Every function of torch that draws random numbers -> its path below torch."""


# Dynamo does not look into these.
DRAWING_INSIDE = {
    F.fractional_max_pool2d: "nn.functional.fractional_max_pool2d",
    F.fractional_max_pool2d_with_indices: "nn.functional.fractional_max_pool2d_with_indices",
    F.fractional_max_pool3d: "nn.functional.fractional_max_pool3d",
    F.fractional_max_pool3d_with_indices: "nn.functional.fractional_max_pool3d_with_indices",
    torch.lobpcg: "lobpcg",
    torch.pca_lowrank: "pca_lowrank",
    torch.svd_lowrank: "svd_lowrank",
}


def check_graph(graph_module: Any) -> None:
    """Raise where a graph that Dynamo made would draw once for all ranks.

    Raises:
        PlainTensorError: a draw into a plain tensor. Names the function and the user's line.
        UnsupportedError: a function that draws where no graph shows it. Names the same.
    """
    for module in graph_module.modules():
        graph = getattr(module, "graph", None)
        if graph is None:
            continue
        for node in graph.nodes:
            func = _function(node)
            if func in DRAWING_INSIDE and node.kwargs.get("_random_samples") is None:
                raise UnsupportedError(
                    f"a compiled function would call torch.{DRAWING_INSIDE[func]}, which draws "
                    f"random numbers inside, once for all ranks{_line(node)}. Call it outside of "
                    "the compiled function, or wrap it in torch.compiler.disable."
                )
            if func not in RANDOM_NAMES:
                continue
            args = torch.fx.map_arg(node.args, _example)
            kwargs = torch.fx.map_arg(node.kwargs, _example)
            if draws_for_plain(func, tuple(args), dict(kwargs)):
                raise PlainTensorError(
                    f"a compiled function would call {func.__name__} once for all ranks, where "
                    f"each rank draws its own{_line(node)}. Make the tensor inside "
                    "LocalTensorMode, with rank_map or with replicate(), so that it has a shard "
                    "per rank."
                )


def _function(node: Any) -> Any:
    if node.op == "call_function":
        try:
            hash(node.target)
        except TypeError:
            return None
        return node.target
    if node.op == "call_method":
        return getattr(Tensor, node.target, None)
    return None


def _example(node: Any) -> Any:
    return node.meta.get("example_value", node)


def _line(node: Any) -> str:
    """` (File "train.py", line 7, in step: x = torch.rand(3))`, where torch recorded it."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    lines = [line for line in lines if line.strip("^~")]
    return f" ({': '.join(lines[-2:])})" if lines else ""
