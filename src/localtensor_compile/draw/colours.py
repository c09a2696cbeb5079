"""The colours of process groups."""

from __future__ import annotations

from collections.abc import Iterable

# Okabe and Ito's, which the colour-blind can tell apart: outlines; fills are a tint.
COLOURS = (
    ("#0072b2", "#cce3f0"),
    ("#d55e00", "#f7dfcc"),
    ("#009e73", "#ccece3"),
    ("#cc79a7", "#f5e4ed"),
    ("#e69f00", "#faeccc"),
    ("#56b4e9", "#ddf0fb"),
    ("#b8a800", "#fcf9d0"),
)


def group_colours(names: Iterable[str]) -> dict[str, int]:
    """Name of a group -> index into `COLOURS`; they repeat where there are more groups."""
    return {name: i % len(COLOURS) for i, name in enumerate(sorted(names))}
