"""A benchmark's section of docs/benchmarks.md: table, bounds kept or missed, plot, machine."""

from __future__ import annotations

import datetime
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .machine import cores
from .plot import Plot, svg

DOCS = Path(__file__).resolve().parents[2] / "docs"
FILE, PLOTS = "benchmarks.md", "benchmarks"


@dataclass(frozen=True)
class Bound:
    """One claim and what was measured for it. `limit` is kept by a value of at least, or at most
    that much."""

    claim: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    @property
    def kept(self) -> bool:
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    def row(self) -> list[str]:
        kind, limit = (
            ("at least", self.at_least) if self.at_least is not None else ("at most", self.at_most)
        )
        return [
            self.claim,
            f"{kind} {limit:g}{self.unit}",
            f"{figure(self.value)}{self.unit}",
            "kept" if self.kept else "**missed**",
        ]


@dataclass
class Section:
    """What one script found.

    Attributes:
        name: of the script.
        title: of the section.
        text: what was measured and how, as markdown.
        columns, rows: the table.
        bounds: claims of the project that the figures are held against.
        plot: a curve over the number of ranks, where it says something.
        threads: how many threads torch computed with.
    """

    name: str
    title: str
    text: str
    columns: Sequence[str]
    rows: list[Sequence[str]]
    bounds: list[Bound] = field(default_factory=list)
    plot: Plot | None = None
    threads: int = field(default_factory=torch.get_num_threads)

    def markdown(self) -> str:
        parts = [f"## {self.title}", self.text.strip(), _table(self.columns, self.rows)]
        if self.bounds:
            rows = [bound.row() for bound in self.bounds]
            parts.append(_table(("claim", "bound", "measured", ""), rows))
        if self.plot is not None:
            parts.append(f"![{self.plot.title}]({PLOTS}/{self.name}.svg)")
        parts.append(f"{machine(self.threads)}. `python -m tests.benchmarks {self.name}`.")
        return "\n\n".join(parts)


def figure(value: float) -> str:
    """A number with three digits that count."""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.{2 if abs(value) < 10 else 1}f}"


def progress(name: str, row: Sequence[str]) -> None:
    """A row as it is found; the table comes at the end."""
    print(f"{name}: {', '.join(row)}", file=sys.stderr, flush=True)


def milliseconds(seconds: float) -> str:
    return f"{figure(seconds * 1e3)} ms"


def ratio(value: float) -> str:
    return f"{figure(value)}x"


def machine(threads: int) -> str:
    """Where and when: date, torch, processor architecture, cores, threads."""
    return (
        f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, "
        f"{cores()} cores, {threads} thread{'s' * (threads != 1)}"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(section: Section, order: Sequence[str], docs: Path = DOCS) -> None:
    """Replace the section in docs/benchmarks.md (or add it, in `order`), and its plot.

    Raises:
        ValueError: a name that is not in `order`.
    """
    file = docs / FILE
    head, found = read(file)
    if section.name not in order:
        raise ValueError(f"no benchmark is named {section.name!r}: {', '.join(order)}")
    found[section.name] = section.markdown()
    text = [head.strip()]
    for name in order:
        if name in found:
            text.append(f"{_begin(name)}\n{found[name].strip()}\n{_end(name)}")
    file.write_text("\n\n".join(text) + "\n", encoding="ascii")
    if section.plot is not None:
        folder = docs / PLOTS
        folder.mkdir(exist_ok=True)
        (folder / f"{section.name}.svg").write_text(svg(section.plot), encoding="ascii")


def read(file: Path) -> tuple[str, dict[str, str]]:
    """What stands before the first section, and the sections by name."""
    text = file.read_text(encoding="ascii")
    pattern = re.compile(r"<!-- benchmark (\w+) -->\n(.*?)\n<!-- end \1 -->", re.DOTALL)
    head = text.partition("<!-- benchmark ")[0]
    return head, {m[1]: m[2] for m in pattern.finditer(text)}


def _begin(name: str) -> str:
    return f"<!-- benchmark {name} -->"


def _end(name: str) -> str:
    return f"<!-- end {name} -->"
