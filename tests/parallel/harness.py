"""Runs a program of this folder on every engine and says what must hold.

A program is a function `program(world, ...)` at the top level of a module here, so that real
processes can import it. `verify` compares eager simulation with real gloo processes and aot_eager
with eager, both bit for bit on every rank, and Inductor with tolerances where it is asked for.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from localtensor_compile.check._gloo_target import Programs
from localtensor_compile.check.engines import run_on_this_rank, run_simulated
from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.check.program import (
    PortableProgram,
    Program,
    World,
    as_program,
    portable,
)
from localtensor_compile.check.report import CheckReport
from localtensor_compile.check.runner import check

WORLDS = (2, 3, 4)


def worlds(*default: int) -> list[Any]:
    """World sizes to parametrize with; those not in `default` only in `make test-all`."""
    return [w if w in default else pytest.param(w, marks=pytest.mark.slow) for w in WORLDS]


def eager(program: Any, world_size: int, **bound: Any) -> None:
    """`verify` without a compiled engine."""
    verify(program, world_size, graphs=None, **bound)


def verify(
    program: Any,
    world_size: int,
    *,
    graphs: int | None = 1,
    graph_breaks: int = 0,
    backends: tuple[str, ...] = ("aot_eager",),
    compiled_reference: str = "eager",
    **bound: Any,
) -> CheckReport:
    """Check `program` with `bound` arguments, and that as much was compiled as is said.

    Args:
        program: the function.
        world_size: number of ranks.
        graphs: how many graphs Dynamo must capture; None to compare eager with gloo only.
        graph_breaks: how many graph breaks it must count.
        backends: the compiled engines.
        compiled_reference: "eager", or "gloo" where AOTAutograd itself computes something in
            another order than eager: aot_eager is compared with compiled real processes, bit for
            bit, and must make as many graphs and breaks.
        bound: further arguments of the program.
    """
    label = ", ".join([program.__name__, *(f"{k}={v}" for k, v in bound.items())])
    bound_program = Program(functools.partial(program, **bound), label)
    if compiled_reference == "gloo":
        _same_as_compiled_real_ranks(bound_program, world_size, graphs, graph_breaks)
        backends = ()
    report = check(bound_program, world_size, backends=backends if graphs is not None else ())
    report.raise_if_failed()
    for engine in report.engines:
        if engine.graphs is not None:
            assert engine.graphs == graphs, f"{engine.name} captured {engine.graphs} graphs"
            assert engine.graph_breaks == graph_breaks, f"{engine.name}: {engine.graph_breaks}"
    return report


def _same_as_compiled_real_ranks(
    program: Program, world_size: int, graphs: int | None, graph_breaks: int
) -> None:
    run = run_simulated(program, world_size, "aot_eager", 0, torch.device("cpu"))
    assert run.error is None, f"{run.error}\n{run.traceback}"
    assert (run.graphs, run.graph_breaks) == (graphs, graph_breaks)
    real = compiled_on_real_ranks(program, world_size)
    for rank, (outputs, *counted) in real.items():
        assert counted == [graphs, graph_breaks], f"real rank {rank}: graphs, breaks {counted}"
        for name, value in outputs.items():
            found = run.outputs[name][rank]
            assert torch.equal(found, value), f"{name} of rank {rank}: {found} instead of {value}"


def refused(
    program: Any, world_size: int, kind: str, message: str, *, compiled: bool = True, **bound: Any
) -> None:
    """Check that real ranks, simulated ones and compiled ones refuse `program` alike.

    Args:
        kind: name of the exception's type.
        message: a regular expression that each engine's message must match.
    """
    bound_program = Program(functools.partial(program, **bound), program.__name__)
    report = check(bound_program, world_size, backends=("aot_eager",) if compiled else ())
    for engine in report.engines:
        assert engine.error is not None, f"{engine.name} did not refuse"
        assert kind in engine.error, f"{engine.name}: {engine.error}"
        assert re.search(message, engine.error, re.DOTALL), f"{engine.name}: {engine.error}"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """The same normal draws on every rank; of the default dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Set parameters to draws that depend on their names and shapes only."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + i) / parameter.shape[-1] ** 0.5)
    return module


def gradients(module: nn.Module, prefix: str = "grad") -> dict[str, Tensor]:
    """The gradient of every parameter, by name; local shards of DTensors."""
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if grad is None:
            raise ValueError(f"{name} has no gradient")
        found[f"{prefix} {name}"] = grad.to_local() if isinstance(grad, DTensor) else grad
    return found


def compiled_on_real_ranks(
    program: Any, world_size: int, backend: str = "aot_eager"
) -> dict[int, tuple[dict[str, Tensor], int, int]]:
    """What plain torch does: {rank: (outputs, graphs, graph breaks)} of compiled real processes."""
    target = portable(as_program(program))
    found = shared_pool().run(_compiled_on_this_rank, world_size, target, backend)
    return dict(found)


def _compiled_on_this_rank(
    target: PortableProgram, backend: str
) -> tuple[dict[str, Tensor], int, int]:
    torch.compiler.reset()
    counters.clear()
    world = World(dist.get_world_size(), "cpu", backend)
    outputs = run_on_this_rank(target.load(_programs), world, 0)
    breaks = sum(counters["graph_break"].values())
    return outputs, counters["stats"]["unique_graphs"], breaks


_programs = Programs()
