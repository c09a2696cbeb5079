"""Runs a program of this folder on every engine and says what must hold.

A program is a function `program(world, ...)` at the top level of a module here, so that real
processes can import it. `verify` compares eager simulation with real gloo processes and aot_eager
with eager, both bit for bit on every rank, and Inductor with tolerances where it is asked for.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from localtensor_compile.check.program import Program
from localtensor_compile.check.report import CheckReport
from localtensor_compile.check.runner import check

WORLDS = (2, 3, 4)


def verify(
    program: Any,
    world_size: int,
    *,
    graphs: int | None = 1,
    graph_breaks: int = 0,
    backends: tuple[str, ...] = ("aot_eager",),
    **bound: Any,
) -> CheckReport:
    """Check `program` with `bound` arguments, and that as much was compiled as is said.

    Args:
        program: the function.
        world_size: number of ranks.
        graphs: how many graphs Dynamo must capture; None to compare eager with gloo only.
        graph_breaks: how many graph breaks it must count.
        backends: the compiled engines.
        bound: further arguments of the program.
    """
    label = ", ".join([program.__name__, *(f"{k}={v}" for k, v in bound.items())])
    bound_program = Program(functools.partial(program, **bound), label)
    report = check(bound_program, world_size, backends=backends if graphs is not None else ())
    report.raise_if_failed()
    for engine in report.engines:
        if engine.graphs is not None:
            assert engine.graphs == graphs, f"{engine.name} captured {engine.graphs} graphs"
            assert engine.graph_breaks == graph_breaks, f"{engine.name}: {engine.graph_breaks}"
    return report


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


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal draws on every rank."""
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
