"""How many nodes the forward and backward graphs have, over the number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from .models import SMALL_BLOCK, SMALL_MLP, fsdp_mlp, tp_mlp
from .plot import Plot
from .report import Bound, Section, progress
from .timing import Timed
from .worlds import OWN, PER_RANK, STACKED, compiled, module, ours, own, process_group

RANKS = (1, 2, 8, 32, 64, 256, 1024)
GROWING = (1, 2, 8, 32)  # for what grows with the number of ranks


def nodes(contestant: Callable[..., Timed], ranks: int) -> int:
    """Nodes of all forward and backward graphs that AOTAutograd makes of one step."""
    counted: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counted.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    context, step = contestant(ranks, make=compiled(aot_autograd(fw_compiler=count)))
    with context:
        step()
    return sum(counted)


def contestants(tokens: int = 4) -> dict[str, tuple[Callable[..., Timed], bool]]:
    """name -> (contestant, whether it is expected not to grow)."""
    found: dict[str, tuple[Callable[..., Timed], bool]] = {}
    for layout in (STACKED, PER_RANK):
        flat = layout == STACKED
        for model in (SMALL_MLP, SMALL_BLOCK):
            found[f"{model.name}, {layout}"] = (partial(ours, model, layout=layout), flat)
        for name, build, same in (("TP MLP", tp_mlp, True), ("FSDP MLP", fsdp_mlp, False)):

            def contestant(
                ranks: int, make: Any, build: Any = build, same: bool = same, layout: str = layout
            ) -> Timed:
                # Rows and columns that every number of ranks divides.
                size = max(64, ranks)
                return module(build, ranks, tokens, size, size, layout, make, same)

            found[f"{name}, {layout}"] = (contestant, flat)
    found[f"MLP, {OWN}"] = (lambda ranks, make: own(SMALL_MLP, ranks, make, inside=False), False)
    return found


def run(quick: bool) -> Section:
    everywhere, growing = ((1, 2, 4), (1, 2)) if quick else (RANKS, GROWING)
    curves: dict[str, dict[int, float]] = {}
    for name, (contestant, flat) in contestants().items():
        curves[name] = {}
        for ranks in everywhere if flat else growing:
            with process_group(ranks):
                curves[name][ranks] = nodes(contestant, ranks)
        progress("graph_nodes", [name, *(f"W = {r}: {n}" for r, n in curves[name].items())])
    rows = [
        [name, *(f"{curve[r]:.0f}" if r in curve else "" for r in everywhere)]
        for name, curve in curves.items()
    ]
    most = everywhere[-2] if len(everywhere) > 3 else everywhere[-1]
    bounds = [
        Bound(
            f"{name}: nodes at W = {most} as at W = 2",
            curves[name][most] / curves[name][2],
            at_most=1,
        )
        for name in curves
        if name.endswith(STACKED)
    ]
    return Section(
        "graph_nodes",
        "Graph nodes",
        "Nodes of the forward and backward graph of one step, as AOTAutograd hands them to the "
        "backend. The MLP is `relu(x @ w1) @ w2`, the block a transformer layer; TP and FSDP are "
        "DTensor programs.",
        ("program, layout", *(f"W = {r}" for r in everywhere)),
        rows,
        bounds,
        Plot("Forward and backward graph", "nodes", curves),
    )
