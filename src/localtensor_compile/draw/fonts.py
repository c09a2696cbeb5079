"""Text in drawings: how wide it is, what fits a width, without the font at hand."""

from __future__ import annotations

import re
import textwrap
import unicodedata

FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"

ELLIPSIS = "\u2026"
_ADVANCE = 0.61  # of the size: the widest of these fonts, whose characters are all as wide


# What XML 1.0 has no way to write.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def legal(text: str) -> str:
    """The text with a replacement character for each that a drawing cannot have."""
    return _ILLEGAL.sub("\ufffd", text)


def width(text: str, size: float) -> float:
    """Width of a line of text in `FONT`."""
    return _cells(text) * _ADVANCE * size


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, room: float, size: float) -> str:
    """The text, or its beginning and an ellipsis; nothing where not even three letters fit."""
    room += 0.01  # the widths are sums of fractions
    if width(text, size) <= room:
        return text
    kept = text
    while kept and width(kept + ELLIPSIS, size) > room:
        kept = kept[:-1]
    return kept.rstrip(" ,") + ELLIPSIS if len(kept) > 2 else ""


def wrap(text: str, room: float, size: float, most: int) -> list[str]:
    """Lines that fit, `most` of them, the last with an ellipsis if that is not all."""
    letters = max(int(room / (_ADVANCE * size)), 1)
    lines = textwrap.wrap(text, letters, break_on_hyphens=False)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} {lines[most]}"]
    return [fit(line, room, size) for line in lines]
