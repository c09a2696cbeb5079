"""A drawing as SVG, by the standard library alone; the same bytes in every process."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

from .arrows import Arrow
from .colours import COLOURS
from .fonts import FONT, legal
from .model import Drawing
from .place import Item, Page, Rect, Text, placed

_STYLE = f"""\
text {{ font-family: {FONT}; fill: #1f2328; white-space: pre; }}
.b {{ font-weight: bold; }}
.end {{ text-anchor: end; }}
.page {{ fill: #ffffff; }}
.lane rect {{ fill: #f3f4f6; }}
.section rect {{ fill: #3b4250; }}
.section text {{ fill: #ffffff; }}
.box rect {{ fill: #ffffff; stroke: #8c939d; rx: 3; }}
.input rect {{ fill: #e7e9ec; }}
.return rect {{ fill: #e7e9ec; stroke-width: 2; }}
.several rect {{ stroke-dasharray: 4 2; }}
.bar rect {{ stroke-width: 1.5; rx: 3; }}
.arrow {{ fill: none; stroke: #4b5563; }}
.head {{ fill: #4b5563; }}"""


def svg(drawing: Drawing) -> str:
    """The text of an SVG file."""
    return "\n".join(_page(placed(drawing))) + "\n"


def _page(page: Page) -> Iterable[str]:
    width, height = _number(page.width), _number(page.height)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    )
    yield f"<title>{_text_of(page.title)}</title>"
    yield f"<style>\n{_STYLE}"
    for i, (line, fill) in enumerate(COLOURS):
        yield f".g{i} rect {{ fill: {fill}; stroke: {line}; }}"
    yield "</style>"
    yield (
        '<defs><marker id="head" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" '
        'markerHeight="6" orient="auto"><path class="head" d="M0 0L6 3L0 6z"/></marker></defs>'
    )
    yield f'<rect class="page" width="{width}" height="{height}"/>'
    for item in page.lanes:
        yield _item(item)
    for arrow in page.arrows:
        yield _arrow(arrow)
    for item in page.items:
        yield _item(item)
    yield "</svg>"


def _item(item: Item) -> str:
    kind = item.kind if item.colour is None else f"{item.kind} g{item.colour}"
    data = "".join(f" data-{name}={_attribute(text)}" for name, text in item.data.items())
    parts = [f'<g class="{kind}"{data}>']
    if item.tooltip:
        parts.append(f"<title>{_text_of(item.tooltip)}</title>")
    parts += [_rect(r, "link") for r in item.links]
    parts += [_rect(r) for r in item.rects]
    parts += [_text(t) for t in item.texts]
    return "".join([*parts, "</g>"])


def _rect(rect: Rect, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    x, y, width, height = map(_number, (rect.x, rect.y, rect.width, rect.height))
    return f'<rect{name} x="{x}" y="{y}" width="{width}" height="{height}"/>'


def _text(text: Text) -> str:
    kinds = " ".join(["b"] * text.bold + ["end"] * text.end)
    name = f' class="{kinds}"' if kinds else ""
    return (
        f'<text{name} x="{_number(text.x)}" y="{_number(text.y)}" '
        f'font-size="{_number(text.size)}">{_text_of(text.text)}</text>'
    )


def _arrow(arrow: Arrow) -> str:
    points = "L".join(f"{_number(x)} {_number(y)}" for x, y in arrow.points)
    return f'<path class="arrow" d="M{points}" marker-end="url(#head)"/>'


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text_of(text: str) -> str:
    return escape(legal(text))


def _attribute(text: str) -> str:
    return quoteattr(legal(text))
