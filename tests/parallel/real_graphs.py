"""The graphs that a real process compiles, as the lines of golden text."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.fx as fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.distributed.distributed_c10d import _resolve_process_group

from localtensor_compile.capture.names import frame_names, input_of, output_of
from localtensor_compile.check.program import World
from localtensor_compile.golden.fold import GroupNames, fold
from localtensor_compile.golden.listing import listing
from localtensor_compile.golden.text import line_text


def lines_on_this_rank(program: Any, **bound: Any) -> dict[str, list[str]]:
    """Title -> lines of what this process compiles when it runs the program."""
    frames: list[dict[str, Any]] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Any:
        graphs: dict[str, Any] = {}
        frames.append({"names": frame_names(module.graph), "graphs": graphs})

        def keep(title: str, graph: fx.GraphModule, _: Any) -> Any:
            graphs[title] = graph
            return make_boxed_func(graph.forward)

        return aot_autograd(
            fw_compiler=functools.partial(keep, "forward"),
            bw_compiler=functools.partial(keep, "backward"),
            partition_fn=min_cut_rematerialization_partition,
        )(module, inputs)

    torch.compiler.reset()
    program(World(dist.get_world_size(), backend=backend), **bound)
    rank = dist.get_rank()
    found = {}
    for number, frame in enumerate(frames):
        saved = None
        for title, graph in frame["graphs"].items():
            _name(graph.graph, frame["names"], title)
            steps = listing(graph.graph, lambda n: tuple(dist.get_process_group_ranks(_group(n))))
            folded = fold({rank: steps}, GroupNames(dist.get_world_size()), saved)
            saved = folded.names
            suffix = f" {number}" if len(frames) > 1 else ""
            found[f"{title}{suffix}"] = [line_text(line, (rank,)) for line in folded.lines]
    return found


def _group(name: str) -> Any:
    return _resolve_process_group(name)


def _name(graph: fx.Graph, names: Any, title: str) -> None:
    for node in graph.nodes:
        node.meta["flat_name"] = node.name
        if node.op == "placeholder":
            known = input_of(node, names)
            kind = known.kind if title == "forward" or known.kind == "tangent" else "saved"
            node.meta["user_name"], node.meta["input_kind"] = known.label, kind
        elif node.op == "output":
            descs = node.meta.get("desc") or ()
            node.meta["user_names"] = [
                "return" if d is None else output_of(d, names).label for d in descs
            ]
