"""Plain text: words for ranks and dtypes, tables, and fitting both into columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import torch

INDENT = "    "


# ---- words
def ranks_text(ranks: Iterable[int]) -> str:
    """`0-2, 5` for [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in runs)


def dtype_text(dtype: torch.dtype) -> str:
    """`f32`, `bf16`, `i64`, `bool`."""
    name = str(dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("complex", "c"), ("uint", "u")):
        if name.startswith(long):
            return name.replace(long, short, 1)
    return name.replace("int", "i", 1) if name.startswith("int") else name


def plural(count: int, noun: str) -> str:
    """`1 rank`, `4 ranks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# ---- layout
def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text: the header, a rule, and one per further line."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    texts = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths)).rstrip() for line in lines]
    return [texts[0], "  ".join("-" * width for width in widths), *texts[1:]]


def table_width(lines: Sequence[Sequence[str]]) -> int:
    columns = list(zip(*lines))
    return sum(max(len(cell) for cell in column) for column in columns) + 2 * (len(columns) - 1)


def fitted(lines: list[list[str]], width: int, droppable: int) -> list[list[str]]:
    """`lines`, without their column `droppable` if they are wider than `width`."""
    if table_width(lines) <= width:
        return lines
    index = droppable % len(lines[0])
    return [[cell for i, cell in enumerate(line) if i != index] for line in lines]


def wrapped(text: str, width: int | None) -> str:
    """Each line of `text` wrapped to `width` columns; words are kept whole."""
    if width is None:
        return text
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def indented(texts: Iterable[str]) -> str:
    """All lines but the first one step to the right."""
    lines = [line for text in texts for line in text.splitlines()]
    return f"\n{INDENT}".join(lines)


def shortened(name: str, room: int) -> str:
    """`grad.blo..weight`: the middle goes, since both ends tell names apart."""
    if len(name) <= room:
        return name
    tail = (room - 2) // 2
    return f"{name[: room - 2 - tail]}..{name[-tail:]}"
