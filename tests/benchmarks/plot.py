"""Curves over the number of ranks as a small SVG file; both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from localtensor_compile.draw.colours import COLOURS
from localtensor_compile.draw.fonts import FONT

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 210, 40, 46


@dataclass(frozen=True)
class Plot:
    """Curves of positive figures.

    Attributes:
        title: above the plot.
        unit: of the vertical axis.
        curves: name -> {number of ranks: figure}.
    """

    title: str
    unit: str
    curves: Mapping[str, Mapping[int, float]]


def svg(plot: Plot) -> str:
    """The text of an SVG file.

    Raises:
        ValueError: nothing to draw, or a figure that is not positive.
    """
    figures = [y for curve in plot.curves.values() for y in curve.values()]
    if not figures or min(figures) <= 0:
        raise ValueError(f"{plot.title}: a logarithmic plot needs positive figures, got {figures}")
    return "\n".join(_lines(plot, figures)) + "\n"


def _lines(plot: Plot, figures: Sequence[float]) -> Iterable[str]:
    ranks = sorted({x for curve in plot.curves.values() for x in curve})
    decades = range(math.floor(math.log10(min(figures))), math.ceil(math.log10(max(figures))) + 1)
    low, high = 10.0 ** decades[0], 10.0 ** max(decades[-1], decades[0] + 1)

    def across(x: float) -> float:
        return _between(x, ranks[0], ranks[-1], LEFT, WIDTH - RIGHT)

    def up(y: float) -> float:
        return _between(y, low, high, HEIGHT - BOTTOM, TOP)

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{escape(FONT, {chr(34): "&apos;"})}" '
        'font-size="12">'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    yield _text(LEFT, 22, f"{plot.title} ({plot.unit})", weight="bold")
    for decade in decades:
        y = up(10.0**decade)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#d8dce0"/>'
        yield _text(LEFT - 8, y + 4, f"{10.0**decade:g}", anchor="end")
    for x in ranks:
        yield f'<path d="M{across(x):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eef0f2"/>'
        yield _text(across(x), HEIGHT - BOTTOM + 18, str(x), anchor="middle")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "ranks", anchor="middle")
    for i, (name, curve) in enumerate(plot.curves.items()):
        colour = COLOURS[i % len(COLOURS)][0]
        points = [(across(x), up(y)) for x, y in sorted(curve.items())]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for x, y in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        y = TOP + 10 + 18 * i
        yield f'<path d="M{WIDTH - RIGHT + 14} {y}h16" stroke="{colour}" stroke-width="3"/>'
        yield _text(WIDTH - RIGHT + 36, y + 4, name)
    yield "</svg>"


def _between(value: float, low: float, high: float, start: float, end: float) -> float:
    if low == high:
        return (start + end) / 2
    return start + (end - start) * math.log(value / low) / math.log(high / low)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="#1f2328">{escape(text)}</text>'
    )
