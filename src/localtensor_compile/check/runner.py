"""check(): one SPMD program on several engines, compared rank by rank and output by output.

Decides which engines run and what each is compared with; running, comparing and reporting are in
engines.py, compare.py and report.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from ..world.mode import LAYOUTS, is_stacked_layout
from .compare import compare
from .engines import DYNAMO, EAGER, GLOO, EngineRun, run_real, run_simulated
from .outputs import Outputs
from .program import Program, ProgramError, ProgramFunction, as_program, portable
from .report import CheckReport, EngineResult, Row

BACKENDS = (EAGER, "aot_eager", "inductor")

# Engines that run the same kernels as eager, so that not a bit may differ.
_EXACT = frozenset({EAGER, DYNAMO, "aot_eager"})


class Progress(Protocol):
    """Hears of engines as they run."""

    def started(self, engine: str) -> None: ...

    def finished(self, result: EngineResult) -> None: ...


def check(
    program: Program | ProgramFunction,
    world_size: int,
    *,
    backends: Sequence[str] = BACKENDS,
    oracle: str | None = GLOO,
    seed: int = 0,
    device: torch.device | str = "cpu",
    timeout: float = 600.0,
    progress: Progress | None = None,
    layout: str = "per_rank",
) -> CheckReport:
    """Run `program` on every engine and compare them, rank by rank and output by output.

    Eager simulation must equal real gloo processes bit for bit; "dynamo" and "aot_eager" must equal
    eager bit for bit; other backends must be close to eager, within the tolerances of
    torch.testing.assert_close. Eager always runs, since the others are compared with it. An engine
    that raises is reported; the others still run.

    Args:
        program: program(world) -> dict of named tensors or numbers. See World.
        world_size: number of ranks.
        backends: "eager" (not compiled), "dynamo" (captured by Dynamo and run as it is), or any
            backend of torch.compile.
        oracle: "gloo", or None to start no processes.
        seed: for torch.manual_seed on every rank, before every run.
        device: where the program runs (world.device).
        timeout: seconds that the real processes may take.
        progress: told when an engine starts and ends.
        layout: of the simulated ranks, as in LocalTensorMode: "per_rank", "stacked" or "auto". In
            the stacked layout matrix products are batched kernels, which may round in another way
            than a process's own: eager is then compared with gloo within tolerances too, and so is
            "aot_eager" with eager. The report says for each output whether it was bit-equal.

    Raises:
        ProgramError: an unknown layout, backend or oracle, no rank, nothing to compare, a program
            that real processes cannot import, or a process group that already exists here.
    """
    program = as_program(program)
    device = torch.device(device)
    compiled = list(dict.fromkeys(name for name in backends if name != EAGER))
    _validate(program, world_size, compiled, oracle)
    if layout not in LAYOUTS:
        raise ProgramError(f"unknown layout {layout!r}. Known: {', '.join(LAYOUTS)}.")
    stacked = is_stacked_layout(layout, world_size)

    def simulated(backend: str | None) -> EngineRun:
        return run_simulated(program, world_size, backend, seed, device, layout=layout)

    plan: list[tuple[str, str | None, Callable[[], EngineRun]]] = []
    if oracle is not None:
        plan.append((GLOO, None, lambda: run_real(program, world_size, seed, device, timeout)))
    plan.append((EAGER, oracle, functools.partial(simulated, None)))
    plan += [(name, EAGER, functools.partial(simulated, name)) for name in compiled]

    engines: list[EngineResult] = []
    rows: list[Row] = []
    runs: dict[str, EngineRun] = {}
    for name, reference, run_engine in plan:
        if progress is not None:
            progress.started(name)
        run = runs[name] = run_engine()
        result = EngineResult(
            name,
            reference,
            name in _EXACT and not stacked,
            run.seconds,
            run.graphs,
            run.graph_breaks,
            run.error,
            run.traceback,
        )
        engines.append(result)
        if reference is not None and run.error is None and runs[reference].error is None:
            rows += compare_outputs(result, run.outputs, runs[reference].outputs)
        if progress is not None:
            progress.finished(result)
    return CheckReport(
        program.name,
        world_size,
        seed,
        tuple(engines),
        tuple(rows),
        "stacked" if stacked else "per_rank",
    )


def compare_outputs(engine: EngineResult, actual: Outputs, expected: Outputs) -> list[Row]:
    """One row per output and rank that the engine or its reference has."""
    reference = str(engine.reference)
    rows = []
    for name in dict.fromkeys([*expected, *actual]):
        mine, theirs = actual.get(name, {}), expected.get(name, {})
        for rank in sorted({*mine, *theirs}):
            if rank not in mine or rank not in theirs:
                has, lacks = (
                    (reference, engine.name) if rank in theirs else (engine.name, reference)
                )
                note = f"{has} returned it, {lacks} did not"
                rows.append(Row(name, rank, engine.name, reference, "missing", None, note))
                continue
            comparison = compare(mine[rank], theirs[rank])
            kind = comparison.kind
            if kind == "differs":
                kind = "close" if comparison.close and not engine.exact else "WRONG"
            rows.append(Row(name, rank, engine.name, reference, kind, comparison))
    return rows


def _validate(
    program: Program, world_size: int, compiled: Sequence[str], oracle: str | None
) -> None:
    if world_size < 1:
        raise ProgramError(f"world_size is {world_size}, but a program needs at least one rank.")
    if oracle is None and not compiled:
        raise ProgramError(
            "nothing to compare: eager alone, without real processes. Add a backend or the oracle."
        )
    validate_engines(program, compiled, oracle)


def validate_engines(program: Program, engines: Sequence[str], oracle: str | None) -> None:
    """Raises:
    ProgramError: an unknown engine or oracle, a program that real processes cannot import, or a
        process group that exists already.
    """
    known = [DYNAMO, *torch.compiler.list_backends(exclude_tags=())]
    for name in engines:
        if name not in (EAGER, *known):
            raise ProgramError(
                f"unknown backend {name!r}. Known: {', '.join([EAGER, *sorted(known)])}."
            )
    if oracle not in (GLOO, None):
        raise ProgramError(f"unknown oracle {oracle!r}: it is {GLOO!r} or None.")
    if dist.is_initialized():
        raise ProgramError(
            "check() and matrix() make worlds of their own, but a process group already exists "
            "here. Call them outside any LocalTensorMode; under torchrun call "
            "localtensor_compile.main(program)."
        )
    if oracle is not None:
        portable(program)
