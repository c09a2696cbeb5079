"""matrix(): one program under several degrees of parallelism, against the unsharded model.

check() asks whether engines agree on one world; this asks whether sharding changed what the program
computes. Gathered outputs of every rank are compared with those of one rank alone.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .compare import compare
from .engines import EAGER, GLOO, EngineRun, run_real, run_simulated
from .outputs import Outputs
from .program import DEGREES, Program, ProgramError, ProgramFunction, as_program
from .report import CheckFailed
from .runner import BACKENDS, validate_engines
from .text import plural, ranks_text, table

# Largest difference / largest value of the output. Sharding adds up in another order, which moves
# values by some units in the last place of the largest summand: 2**-24 in float32.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
    torch.float32: 2e-5,
    torch.float64: 1e-12,
    torch.complex64: 2e-5,
    torch.complex128: 1e-12,
}
_MAX_EXPLAINED = 5


class Progress(Protocol):
    """Hears of cells as they run."""

    def started(self, what: str) -> None: ...

    def finished(self, what: str, result: str) -> None: ...


@dataclass(frozen=True)
class Difference:
    """One output that is not as it is unsharded.

    `relative` is max |difference| / max |expected| over the ranks `ranks` that differ, inf where an
    output is missing or has another dtype or shape, which `note` then says.
    """

    output: str
    ranks: Sequence[int]
    relative: float
    wrong: bool
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One configuration on one engine.

    `kind` is "bit-equal", "close", "WRONG" or "fails"; `relative` the largest difference of any
    output, as in `Difference`; `graphs` and `graph_breaks` are None where nothing is compiled.
    """

    degrees: tuple[int, ...]
    engine: str
    kind: str
    seconds: float
    relative: float = 0.0
    graphs: int | None = None
    graph_breaks: int | None = None
    error: str | None = None
    traceback: str = ""
    differences: Sequence[Difference] = field(default_factory=tuple)

    @property
    def text(self) -> str:
        """As a table shows it: `close 3e-07`."""
        return f"close {self.relative:.0e}" if self.kind == "close" else self.kind


@dataclass(frozen=True)
class MatrixReport:
    """The result of `matrix`. `str()` of it is a table."""

    program: str
    reference: str
    outputs: int
    engines: Sequence[str]
    cells: Sequence[Cell]

    @property
    def ok(self) -> bool:
        """Whether every cell ran and none is wrong."""
        return bool(self.cells) and all(c.kind in ("bit-equal", "close") for c in self.cells)

    @property
    def wrong(self) -> bool:
        """Whether a cell computed something else than the unsharded model."""
        return any(c.kind == "WRONG" for c in self.cells)

    def raise_if_failed(self) -> None:
        """Raises:
        CheckFailed: not `ok`; the message is the report.
        """
        if not self.ok:
            raise CheckFailed(f"the matrix failed.\n{self}")

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """The report as plain text."""
        parts = [self._table(), *(_explained(c) for c in self.cells if _to_explain(c))]
        configurations = len({c.degrees for c in self.cells})
        what = (
            f"{self.program}, {plural(configurations, 'configuration')}, "
            f"{plural(self.outputs, 'output')} against {self.reference}"
        )
        bad = [f"{_name(c.degrees)} {c.engine}" for c in self.cells if c.kind in ("WRONG", "fails")]
        verdict = f"FAIL  {what}: {', '.join(bad)}." if bad else f"PASS  {what}."
        return "\n\n".join([*parts, verdict])

    def _table(self) -> str:
        rows = [[*DEGREES, "ranks", *self.engines]]
        for degrees in dict.fromkeys(c.degrees for c in self.cells):
            cells = {c.engine: c.text for c in self.cells if c.degrees == degrees}
            numbers = [str(d) for d in (*degrees, math.prod(degrees))]
            rows.append([*numbers, *(cells[engine] for engine in self.engines)])
        return "\n".join(table(rows))

    def to_json(self) -> str:
        """The report as JSON text; infinities are strings; `version` is 1."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        cells = []
        for c in self.cells:
            differences = [
                {k: plain(v) for k, v in vars(d).items()} | {"ranks": list(d.ranks)}
                for d in c.differences
            ]
            about = {k: plain(v) for k, v in vars(c).items() if k != "degrees"}
            cells.append(dict(zip(DEGREES, c.degrees)) | about | {"differences": differences})
        return json.dumps(
            {
                "version": 1,
                "torch": torch.__version__,
                "program": self.program,
                "reference": self.reference,
                "outputs": self.outputs,
                "ok": self.ok,
                "cells": cells,
            },
            indent=1,
            allow_nan=False,
        )


def matrix(
    program: Program | ProgramFunction,
    *,
    dp: Sequence[int] = (1, 2),
    tp: Sequence[int] = (1, 2),
    pp: Sequence[int] = (1,),
    backends: Sequence[str] = BACKENDS,
    oracle: str | None = GLOO,
    seed: int = 0,
    device: torch.device | str = "cpu",
    rtol: float | None = None,
    timeout: float = 600.0,
    progress: Progress | None = None,
) -> MatrixReport:
    """Run `program` with every combination of degrees and compare with one rank alone.

    The program asks `world.degree("dp")` and so on, and shards accordingly. Outputs that are
    DTensors are gathered; others must be the same on every rank as they are unsharded: a loss that
    is averaged over "dp", say.

    Args:
        program: program(world) -> dict of named tensors or numbers.
        dp, tp, pp: degrees of data, tensor and pipeline parallelism.
        backends: engines, as for `check`.
        oracle: "gloo" runs the unsharded model in a process of its own, without any simulation;
            None runs it on one simulated rank.
        seed: for torch.manual_seed, the same in every run.
        device: where the program runs.
        rtol: largest difference, relative to the largest value of an output, that counts as close.
            By default TOLERANCES of the output's dtype.
        timeout: seconds for the unsharded model.
        progress: told when a cell starts and ends.

    Raises:
        ProgramError: degrees that are no positive ints, pipelines (not simulated yet), unknown
            engines, an unsharded model that fails, or a program that never asks for a degree.
    """
    program = as_program(program)
    device = torch.device(device)
    chosen = dict(zip(DEGREES, (tuple(dp), tuple(tp), tuple(pp))))
    _validate(chosen)
    engines = tuple(dict.fromkeys(backends))
    validate_engines(program, engines, oracle)
    hears = _Silent() if progress is None else progress

    hears.started("unsharded")
    if oracle is None:
        ones = dict.fromkeys(DEGREES, 1)
        alone = run_simulated(program, 1, None, seed, device, degrees=ones, whole=True)
    else:
        alone = run_real(program, 1, seed, device, timeout, whole=True)
    hears.finished("unsharded", "ran" if alone.error is None else "failed")
    if alone.error is not None:
        raise ProgramError(f"the unsharded model failed: {alone.error}\n{alone.traceback}")

    cells = []
    for degrees in itertools.product(*chosen.values()):
        for engine in engines:
            hears.started(f"{_name(degrees)} {engine}")
            run = run_simulated(
                program,
                math.prod(degrees),
                None if engine == EAGER else engine,
                seed,
                device,
                degrees=dict(zip(DEGREES, degrees)),
                whole=True,
            )
            _require_asked(program, run, chosen)
            cell = _cell(degrees, engine, run, alone.outputs, rtol)
            cells.append(cell)
            hears.finished(f"{_name(degrees)} {engine}", cell.text)
    reference = "the unsharded model" + (" (one real process)" if oracle else "")
    return MatrixReport(program.name, reference, len(alone.outputs), engines, tuple(cells))


class _Silent:
    def started(self, what: str) -> None: ...

    def finished(self, what: str, result: str) -> None: ...


def _validate(chosen: dict[str, tuple[int, ...]]) -> None:
    for name, values in chosen.items():
        bad = [v for v in values if not isinstance(v, int) or isinstance(v, bool) or v < 1]
        if bad or not values:
            raise ProgramError(
                f"{name}={list(values)}: degrees of parallelism are ints from 1 up, at least one."
            )
    if any(v > 1 for v in chosen["pp"]):
        raise ProgramError(
            f"pp={list(chosen['pp'])}: pipelines are not simulated yet; leave pp at 1."
        )


def _require_asked(program: Program, run: EngineRun, chosen: dict[str, tuple[int, ...]]) -> None:
    if run.error is not None:
        return
    ignored = [n for n, values in chosen.items() if set(values) != {1} and n not in run.asked]
    if ignored:
        raise ProgramError(
            f"{program.name} never asks world.degree({ignored[0]!r}), so the degrees "
            f"{list(chosen[ignored[0]])} of {ignored[0]} would all be the same program. Build the "
            'mesh with it, as in world.mesh((world.degree("dp"), world.degree("tp")), '
            '("dp", "tp")).'
        )


def _cell(
    degrees: tuple[int, ...], engine: str, run: EngineRun, expected: Outputs, rtol: float | None
) -> Cell:
    about: dict[str, Any] = {
        "degrees": degrees,
        "engine": engine,
        "seconds": run.seconds,
        "graphs": run.graphs,
        "graph_breaks": run.graph_breaks,
    }
    if run.error is not None:
        return Cell(kind="fails", error=run.error, traceback=run.traceback, **about)
    ranks = range(math.prod(degrees))
    found = tuple(_differences(run.outputs, expected, ranks, rtol))
    wrong = any(d.wrong for d in found)
    kind = "WRONG" if wrong else "close" if found else "bit-equal"
    relative = max((d.relative for d in found), default=0.0)
    return Cell(kind=kind, relative=relative, differences=found, **about)


def _differences(
    actual: Outputs, expected: Outputs, ranks: range, rtol: float | None
) -> Iterator[Difference]:
    for name in dict.fromkeys([*expected, *actual]):
        if name not in expected or name not in actual:
            has = "only the unsharded model returns it" if name in expected else "it alone has it"
            yield Difference(name, tuple(ranks), math.inf, True, has)
            continue
        wanted = next(iter(expected[name].values()))
        differing: dict[int, float] = {}
        note = ""
        for rank in ranks:
            value = actual[name].get(rank)
            if value is None:
                differing[rank], note = math.inf, "missing on these ranks"
                continue
            comparison = compare(value, wanted)
            if comparison.kind == "bit-equal":
                continue
            differing[rank] = comparison.max_abs / _largest(wanted)
            if comparison.kind in ("shape", "dtype"):
                differing[rank] = math.inf
                note = (
                    f"{comparison.kind}: {value.dtype} {list(value.shape)}, unsharded "
                    f"{wanted.dtype} {list(wanted.shape)}"
                )
        if differing:
            relative = max(differing.values())
            allowed = TOLERANCES.get(wanted.dtype, 0.0) if rtol is None else rtol
            yield Difference(name, tuple(differing), relative, not relative <= allowed, note)


def _largest(values: torch.Tensor) -> float:
    """The largest finite absolute value, 1 where there is none or it is 0."""
    wide = torch.complex128 if values.is_complex() else torch.float64
    size = values.to(wide).abs()
    size = size[size.isfinite()]
    return float(size.max()) or 1.0 if size.numel() else 1.0


# ---- words
def _name(degrees: Sequence[int]) -> str:
    return " ".join(f"{name}={d}" for name, d in zip(DEGREES, degrees) if d > 1) or "unsharded"


def _to_explain(cell: Cell) -> bool:
    return cell.kind in ("WRONG", "fails") or bool(cell.graph_breaks)


def _explained(cell: Cell) -> str:
    where = f"{_name(cell.degrees)}, {cell.engine}"
    if cell.error is not None:
        return "\n".join([f"{where} failed: {cell.error}", cell.traceback]).rstrip()
    lines = []
    if cell.graph_breaks:
        lines.append(
            f"{where}: {plural(cell.graphs or 0, 'graph')}, "
            f"{plural(cell.graph_breaks, 'graph break')}: parts of it ran uncompiled"
        )
    wrong = [d for d in cell.differences if d.wrong]
    for d in wrong[:_MAX_EXPLAINED]:
        amount = d.note or f"differs by {d.relative:.1e} of its largest value"
        lines.append(f"{where}: {d.output}, ranks {ranks_text(d.ranks)}: {amount}")
    if len(wrong) > _MAX_EXPLAINED:
        lines.append(f"{where}: ... and {len(wrong) - _MAX_EXPLAINED} more outputs")
    return "\n".join(lines)
