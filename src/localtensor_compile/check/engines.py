"""Runs one program on one engine: simulated ranks, eager or compiled, or real gloo processes.

Every run starts from the same state: fresh Dynamo, one thread, the same seed on all ranks.
Comparing results is not done here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UnsupportedError
from ..world.mode import LocalTensorMode
from ._gloo_target import GlooError, Programs
from .gloo import shared_pool
from .outputs import Outputs, shards_of, to_plain
from .program import (
    PortableProgram,
    Program,
    ProgramFunction,
    World,
    portable,
    user_frames,
)

GLOO = "gloo"
EAGER = "eager"
# Dynamo alone: torch.compile calls that backend "eager", but here "eager" is not compiled at all.
DYNAMO = "dynamo"


class NothingCompiled(UnsupportedError):
    """A compiled engine ran, but no part of the program was compiled."""


@dataclass
class EngineRun:
    """What one engine did. `outputs` is empty where `error` is not None."""

    seconds: float = 0.0
    outputs: Outputs = field(default_factory=dict)
    graphs: int | None = None
    graph_breaks: int | None = None
    error: str | None = None
    traceback: str = ""
    asked: frozenset[str] = frozenset()


def run_simulated(
    program: Program,
    world_size: int,
    backend: str | None,
    seed: int,
    device: torch.device,
    *,
    degrees: Mapping[str, int] | None = None,
    whole: bool = False,
    layout: str = "per_rank",
) -> EngineRun:
    """Run on simulated ranks in this process, compiled with `backend` unless it is None.

    Args:
        degrees: degrees of parallelism for the program's World.
        whole: whether outputs that are DTensors are gathered.
        layout: of the LocalTensorMode.
    """

    def run(result: EngineRun) -> None:
        torch.compiler.reset()
        counters = _compile_counters()
        counters.clear()
        world = World(world_size, device, "eager" if backend == DYNAMO else backend, degrees)
        with simulated_world(world_size, seed, device, layout) as mode:
            values = shards_of(program.function(world), sorted(mode.ranks), whole)
        result.asked = frozenset(world.asked)
        if backend is not None:
            result.graphs = counters["stats"]["unique_graphs"]
            result.graph_breaks = sum(counters["graph_break"].values())
            if result.graphs == 0:
                raise NothingCompiled(_nothing_compiled(program, world))
        result.outputs = to_plain(values)

    return _measured(run)


@contextlib.contextmanager
def simulated_world(
    world_size: int, seed: int, device: torch.device, layout: str = "per_rank"
) -> Iterator[LocalTensorMode]:
    """A world with one thread per op and seeded random numbers, which leaves the caller's alone."""
    mode = LocalTensorMode(world_size, layout=layout)
    with one_thread(), forked_rng(device), mode:
        torch.manual_seed(seed)
        yield mode


def run_real(
    program: Program,
    world_size: int,
    seed: int,
    device: torch.device,
    timeout: float,
    *,
    whole: bool = False,
) -> EngineRun:
    """Run eager on real processes joined by gloo; with `whole` DTensors are gathered."""

    def run(result: EngineRun) -> None:
        found = shared_pool().run(
            _on_real_rank, world_size, portable(program), seed, str(device), whole, timeout=timeout
        )
        for rank, outputs in found.items():
            for name, value in outputs.items():
                result.outputs.setdefault(name, {})[rank] = value

    return _measured(run)


_programs = Programs()


def _on_real_rank(
    program: PortableProgram, seed: int, device: str, whole: bool
) -> dict[str, torch.Tensor]:
    """In a worker process: this rank's value of every output."""
    world = World(dist.get_world_size(), device)
    return run_on_this_rank(program.load(_programs), world, seed, whole)


def run_on_this_rank(
    function: ProgramFunction, world: World, seed: int, whole: bool = False
) -> dict[str, torch.Tensor]:
    """In a process that is one rank of a process group: run, and return this rank's outputs."""
    torch.manual_seed(seed)
    rank = dist.get_rank()
    values = shards_of(function(world), (rank,), whole)
    return {name: shards[rank] for name, shards in to_plain(values).items()}


def _measured(run: Callable[[EngineRun], None]) -> EngineRun:
    """Time `run`. An engine that raises is a result, not the end of the check."""
    result = EngineRun()
    start = time.perf_counter()
    try:
        run(result)
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
        # A GlooError already holds the tracebacks of the workers.
        result.traceback = "" if isinstance(error, GlooError) else user_frames(error)
    result.seconds = time.perf_counter() - start
    return result


def _nothing_compiled(program: Program, world: World) -> str:
    if world.compiled == 0:
        return (
            f"nothing was compiled: {program.name} never calls world.compile(function or module). "
            "Compile the part that is to be checked with it."
        )
    return (
        f"nothing was compiled: {program.name} calls world.compile, but Dynamo captured no graph. "
        "Is the compiled function called, and does it run torch ops?"
    )


def _compile_counters() -> Any:
    """Dynamo's counters: "stats" -> "unique_graphs", "graph_break" -> reason -> count."""
    from torch._dynamo.utils import counters

    return counters


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One intra-op thread, as in the gloo processes: more threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def forked_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    return torch.random.fork_rng(devices)
