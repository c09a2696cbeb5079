"""Compiled programs on real gloo ranks, and whether simulated ranks compile as much of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from localtensor_compile.check._gloo_target import Programs
from localtensor_compile.check.engines import run_on_this_rank, run_simulated
from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.check.program import PortableProgram, Program, World, portable

_programs = Programs()


def on_this_rank(program: PortableProgram, backend: str) -> dict[str, Any]:
    """In a worker: the outputs, the number of graphs and the reasons of graph breaks."""
    torch.compiler.reset()
    counters.clear()
    world = World(dist.get_world_size(), "cpu", backend)
    outputs = run_on_this_rank(program.load(_programs), world, seed=0)
    graphs = counters["stats"]["unique_graphs"]
    breaks = sum(counters["graph_break"].values())
    torch.compiler.reset()
    return {"outputs": outputs, "graphs": graphs, "breaks": breaks}


def verify_as_real(
    program: Any,
    world_size: int,
    *,
    graphs: int,
    graph_breaks: int = 0,
    backend: str = "aot_eager",
    **bound: Any,
) -> None:
    """Check that `program` compiles into `graphs` on real and simulated ranks, to equal bits."""
    bound_program = Program(functools.partial(program, **bound), program.__name__)
    real = shared_pool().run(on_this_rank, world_size, portable(bound_program), backend)
    for rank, found in real.items():
        counted = (found["graphs"], found["breaks"])
        assert counted == (graphs, graph_breaks), f"real rank {rank}: {counted}"
    run = run_simulated(bound_program, world_size, backend, 0, torch.device("cpu"))
    assert run.error is None, f"{run.error}\n{run.traceback}"
    assert (run.graphs, run.graph_breaks) == (graphs, graph_breaks), (
        f"simulated: {run.graphs} graphs, {run.graph_breaks} breaks"
    )
    assert run.outputs.keys() == real[0]["outputs"].keys()
    for name, shards in run.outputs.items():
        for rank, found in real.items():
            assert torch.equal(shards[rank], found["outputs"][name]), f"{name} of rank {rank}"
