"""What a check found: one row per engine, output and rank, with text and JSON forms.

Knows nothing about how engines run. The text is plain; the command line only colours it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import LocalTensorError
from .compare import Comparison, tolerances
from .text import (
    INDENT,
    dtype_text,
    fitted,
    indented,
    plural,
    ranks_text,
    shortened,
    table,
    table_width,
    wrapped,
)

PASSING_KINDS = ("bit-equal", "close")
# Worst last: the kind of an output is the worst over its ranks.
KINDS = (*PASSING_KINDS, "WRONG", "shape", "dtype", "missing")

_MAX_EXPLAINED = 8  # failing outputs explained in the text unless verbose
_MIN_NAME = 12


class CheckFailed(LocalTensorError, AssertionError):
    """Engines disagree, or one of them failed."""


@dataclass(frozen=True)
class Row:
    """One output of one engine on one rank, against the same of its reference engine.

    `kind` is "bit-equal"; "close" (differs within the tolerances of its dtype, which passes only
    where bits need not be equal); "WRONG"; "shape" or "dtype" where these differ; "missing" where
    only one of the two engines has it on this rank, and then `comparison` is None.
    """

    output: str
    rank: int
    engine: str
    reference: str
    kind: str
    comparison: Comparison | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.kind in PASSING_KINDS


@dataclass(frozen=True)
class EngineResult:
    """How one engine ran.

    Attributes:
        name: "gloo", "eager" or a torch.compile backend.
        reference: the engine it is compared with, None for the one that nothing checks.
        exact: whether its values must have the bits of the reference.
        seconds: wall time.
        graphs: graphs captured, None where nothing is compiled.
        graph_breaks: None where nothing is compiled.
        error: "Type: message" of what it raised, None if it ran.
        traceback: of the error, the user's frames.
    """

    name: str
    reference: str | None
    exact: bool
    seconds: float
    graphs: int | None = None
    graph_breaks: int | None = None
    error: str | None = None
    traceback: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`. `str()` of it is a table; `ok` says whether everything agreed.

    `layout` is that of the simulated ranks: "per_rank" or "stacked".
    """

    program: str
    world_size: int
    seed: int
    engines: Sequence[EngineResult]
    rows: Sequence[Row] = field(default_factory=tuple)
    layout: str = "per_rank"

    @property
    def ok(self) -> bool:
        """Whether every engine ran, something was compared, and every row passed."""
        return (
            bool(self.rows)
            and all(engine.error is None for engine in self.engines)
            and all(row.passed for row in self.rows)
        )

    def raise_if_failed(self) -> None:
        """Raises:
        CheckFailed: not `ok`; the message is the report.
        """
        if not self.ok:
            raise CheckFailed(f"the check failed.\n{self}")

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None, verbose: bool = False) -> str:
        """The report as plain text.

        Args:
            width: columns to fit tables into; None for as many as they need.
            verbose: one more line per engine, output and rank.
        """
        parts = [_output_table(self, width)]
        if verbose:
            parts.append(_detail_table(self, width))
        parts += [_failures(self, width, verbose), _engine_table(self)]
        parts.append(wrapped(_verdict(self), width))
        return "\n\n".join(part for part in parts if part)

    def to_json(self) -> str:
        """The report as JSON text. Infinities and NaNs are strings; `version` is 1."""
        return json.dumps(
            {
                "version": 1,
                "torch": torch.__version__,
                "program": self.program,
                "world_size": self.world_size,
                "seed": self.seed,
                "layout": self.layout,
                "ok": self.ok,
                "engines": [vars(engine) for engine in self.engines],
                "rows": [_row_json(row) for row in self.rows],
            },
            indent=1,
            allow_nan=False,
        )


# ---- words
def value_text(rows: Sequence[Row]) -> str:
    """`f32[2, 3..4]`: dtype and shape of an output, with the range of sizes that ranks have."""
    found = [row.comparison for row in rows if row.comparison is not None]
    shapes = {comparison.expected_shape for comparison in found}
    if len({len(shape) for shape in shapes}) != 1:
        return "varies" if shapes else ""
    sizes = [(min(dim), max(dim)) for dim in zip(*shapes)]
    dims = ", ".join(str(lo) if lo == hi else f"{lo}..{hi}" for lo, hi in sizes)
    return f"{dtype_text(found[0].expected_dtype)}[{dims}]"


def _worst(rows: Iterable[Row]) -> str:
    return max((row.kind for row in rows), key=KINDS.index)


# ---- the tables
def _output_table(report: CheckReport, width: int | None) -> str:
    engines = [engine for engine in report.engines if engine.reference is not None]
    header = ["output", "value", *(engine.name for engine in engines)]
    lines = []
    for output, rows in _by_output(report.rows).items():
        cells = [_cell([row for row in rows if row.engine == e.name], e) for e in engines]
        lines.append([output, value_text(rows), *cells])
    if not lines:
        return ""
    if width is not None:
        header, *lines = fitted([header, *lines], width, droppable=1)
        excess = table_width([header, *lines]) - width
        if excess > 0:
            room = max(_MIN_NAME, max(len(line[0]) for line in lines) - excess)
            lines = [[shortened(line[0], room), *line[1:]] for line in lines]
    return "\n".join(table([header, *lines]))


def _cell(rows: Sequence[Row], engine: EngineResult) -> str:
    if not rows:
        return "error" if engine.error is not None else "-"
    failed = [row for row in rows if not row.passed]
    if failed:
        where = "" if len(failed) == len(rows) else f" ({ranks_text(r.rank for r in failed)})"
        return f"{_worst(failed)}{where}"
    kind = _worst(rows)
    return kind if kind == "bit-equal" else f"close {_max_abs(rows):.0e}"


def _max_abs(rows: Iterable[Row]) -> float:
    return max(row.comparison.max_abs for row in rows if row.comparison is not None)


def _detail_table(report: CheckReport, width: int | None) -> str:
    """Per output a line with its name, below it a line per engine and rank."""
    lines = [["  rank", "engine", "kind", "max abs", "max rel", "max ulp", "differ", "value"]]
    for row in report.rows:
        numbers = ["", "", "", "", row.note]
        c = row.comparison
        if c is not None:
            differ = f"{c.mismatches}/{c.numel}"
            ulp = "-" if c.max_ulp is None else str(c.max_ulp)
            numbers = [f"{c.max_abs:.2g}", f"{c.max_rel:.2g}", ulp, differ, value_text([row])]
        lines.append([f"  {row.rank}", row.engine, row.kind, *numbers])
    if len(lines) == 1:
        return ""
    if width is not None:
        lines = fitted(lines, width, droppable=-1)
    header, rule, *texts = table(lines)
    by_output: dict[str, list[str]] = {}
    for row, text in zip(report.rows, texts):
        by_output.setdefault(row.output, []).append(text)
    blocks = [line for name, group in by_output.items() for line in (name, *group)]
    return "\n".join([header, rule, *blocks])


def _engine_table(report: CheckReport) -> str:
    lines = [["engine", "against", "graphs", "breaks", "time", "outputs"]]
    for engine in report.engines:
        against = "-"
        if engine.reference is not None:
            against = f"{engine.reference}, {'exact' if engine.exact else 'close'}"
        lines.append(
            [
                engine.name,
                against,
                "-" if engine.graphs is None else str(engine.graphs),
                "-" if engine.graph_breaks is None else str(engine.graph_breaks),
                f"{engine.seconds:.1f} s",
                _summary(report, engine),
            ]
        )
    return "\n".join(table(lines))


def _summary(report: CheckReport, engine: EngineResult) -> str:
    if engine.error is not None:
        return "error"
    if engine.reference is None:
        return "ran"
    rows = [row for row in report.rows if row.engine == engine.name]
    counts = Counter(_worst(group) for group in _by_output(rows).values())
    return ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) or "-"


def _verdict(report: CheckReport) -> str:
    outputs = len(_by_output(report.rows))
    what = f"{report.program}, {plural(report.world_size, 'rank')}, {plural(outputs, 'output')}"
    if report.layout == "stacked":
        what += ", stacked"
    if report.ok:
        rounded = {row.output for row in report.rows if row.kind == "close"}
        end = ""
        if report.layout == "stacked" and rounded:
            end = f" Not every bit: {', '.join(sorted(rounded))} within tolerances."
        return f"PASS  {what}: every engine agrees on every rank.{end}"
    broken = [engine.name for engine in report.engines if engine.error is not None]
    wrong = list(dict.fromkeys(row.engine for row in report.rows if not row.passed))
    reasons = [f"{', '.join(broken)} failed"] if broken else []
    reasons += [f"values of {', '.join(wrong)} differ"] if wrong else []
    return f"FAIL  {what}: {'; '.join(reasons) or 'nothing was compared'}."


# ---- failures in words
def _failures(report: CheckReport, width: int | None, verbose: bool) -> str:
    causes: dict[tuple[str, str], list[str]] = {}
    for engine in report.engines:
        if engine.error is not None:
            causes.setdefault((engine.error, engine.traceback), []).append(engine.name)
    parts = [
        indented([wrapped(f"{', '.join(names)} failed: {error}", width), traceback])
        for (error, traceback), names in causes.items()
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        if not row.passed:
            groups.setdefault((row.engine, row.output), []).append(row)
    shown = list(groups.values()) if verbose else list(groups.values())[:_MAX_EXPLAINED]
    parts += [_output_failure(rows, report, width) for rows in shown]
    if len(groups) > len(shown):
        parts.append(f"... and {len(groups) - len(shown)} more (-v shows all).")
    return "\n".join(parts)


def _output_failure(rows: Sequence[Row], report: CheckReport, width: int | None) -> str:
    first = rows[0]
    exact = next(engine.exact for engine in report.engines if engine.name == first.engine)
    texts: dict[str, list[int]] = {}
    for row in rows:
        texts.setdefault(explain(row, exact), []).append(row.rank)
    room = None if width is None else width - len(INDENT)
    lines = [f"{first.engine}: {first.output} differs from {first.reference}"]
    for text, ranks in texts.items():
        noun = "rank" if len(ranks) == 1 else "ranks"
        lines.append(wrapped(f"{noun} {ranks_text(ranks)}: {text}", room))
    return indented(lines)


def explain(row: Row, exact: bool) -> str:
    """One row in words. `exact` says whether the bits had to be equal."""
    c = row.comparison
    if c is None:
        return row.note
    if c.kind == "shape":
        return f"shape {list(c.actual_shape)}, {row.reference} has {list(c.expected_shape)}"
    if c.kind == "dtype":
        return f"dtype {c.actual_dtype}, {row.reference} has {c.expected_dtype}"
    if c.first is None:
        return "every bit is equal"
    index, found, wanted = c.first
    rtol, atol = tolerances(c.expected_dtype)
    limit = "bits must be equal" if exact else f"{c.beyond} beyond rtol {rtol:g}, atol {atol:g}"
    ulp = "" if c.max_ulp is None else f", {c.max_ulp} ulp"
    return (
        f"{c.mismatches} of {c.numel} values differ ({limit}); "
        f"max abs {c.max_abs:.3g}, max rel {c.max_rel:.3g}{ulp}; "
        f"first at {list(index)}: {found!r}, {row.reference} has {wanted!r}"
    )


def _by_output(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.output, []).append(row)
    return groups


# ---- JSON
def _row_json(row: Row) -> dict[str, Any]:
    result: dict[str, Any] = {
        "output": row.output,
        "rank": row.rank,
        "engine": row.engine,
        "reference": row.reference,
        "kind": row.kind,
        "passed": row.passed,
    }
    c = row.comparison
    if c is None:
        return {**result, "note": row.note}
    index, found, wanted = c.first or ((), None, None)
    return {
        **result,
        "dtype": str(c.expected_dtype),
        "shape": list(c.expected_shape),
        "actual_dtype": str(c.actual_dtype),
        "actual_shape": list(c.actual_shape),
        "numel": c.numel,
        "mismatches": c.mismatches,
        "beyond_tolerance": c.beyond,
        "max_abs": _number(c.max_abs),
        "max_rel": _number(c.max_rel),
        "max_ulp": c.max_ulp,
        "signed_zeros": c.signed_zeros,
        "first": None
        if c.first is None
        else {"index": list(index), "actual": _number(found), "expected": _number(wanted)},
    }


def _number(value: Any) -> Any:
    if isinstance(value, complex):
        return str(value)
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
