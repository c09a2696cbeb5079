"""A drawing as SVG: lanes side by side, time from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from .layout import Bar, Drawing, Joint, Local

LANE, GAP, MARGIN = 270, 14, 16
LINE, PAD, BAR, BAR_GAP = 15, 5, 22, 6
# Width of a character of the monospace fonts below, per em.
EM = 0.61
SIZE, SMALL = 11, 10
_FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Okabe and Ito, "Color Universal Design" (2008): distinct to colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
_DARK_TEXT = ("#56B4E9", "#E69F00", "#F0E442")


def svg(drawing: Drawing) -> str:
    """The text of an SVG file."""
    return _Svg(drawing).text()


def shortened(text: str, width: float, size: int = SIZE) -> str:
    """`text`, cut with an ellipsis where it is wider than `width` pixels."""
    room = int(width / (size * EM))
    return text if len(text) <= room else text[: max(room - 1, 0)] + "…"


class _Svg:
    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.colours = colours(drawing.groups)
        self.out: list[str] = []
        self.y = 0.0

    def text(self) -> str:
        lanes = self.drawing.lanes
        width = 2 * MARGIN + len(lanes) * LANE + (len(lanes) - 1) * GAP
        self.y = MARGIN
        self._legend(width)
        self._header()
        first = self.y
        body = self.out
        self.out = []
        for section in self.drawing.sections:
            self._write(MARGIN, self.y + 14, section.title, 13, "bold")
            self.y += 24
            for row in section.rows:
                self._local(row) if isinstance(row, Local) else self._joint(row)
            self.y += 10
        height = round(self.y + MARGIN)
        lines = list(self._lane_lines(first, self.y))
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{_FONT}">'
        )
        background = f'<rect class="page" width="{width}" height="{height}" fill="#ffffff"/>'
        return "\n".join([head, background, *body, *lines, *self.out, "</svg>"]) + "\n"

    # ---- parts
    def _legend(self, width: float) -> None:
        x = float(MARGIN)
        for name in self.drawing.groups:
            label = shortened(f"group {name}", width - 2 * MARGIN - 16, SMALL)
            needed = 16 + len(label) * SMALL * EM + 14
            if x > MARGIN and x + needed > width - MARGIN:
                x, self.y = MARGIN, self.y + 16
            self._rect("key", x, self.y, 10, 10, self.colours[name])
            self._write(x + 16, self.y + 9, label, SMALL)
            x += needed
        self.y += 22 if self.drawing.groups else 0

    def _header(self) -> None:
        for i, lane in enumerate(self.drawing.lanes):
            self._rect("lane", self._x(i), self.y, LANE, 22, "#e8eaed", title=lane.label)
            label = shortened(lane.label, LANE - 2 * PAD, 12)
            self._write(self._x(i) + PAD, self.y + 15, label, 12, "bold")
        self.y += 28

    def _lane_lines(self, top: float, bottom: float) -> Iterator[str]:
        for i in range(len(self.drawing.lanes)):
            x = self._x(i) + LANE / 2
            yield (
                f'<line x1="{x:g}" y1="{top:g}" x2="{x:g}" y2="{bottom:g}" stroke="#c6cad0" '
                'stroke-dasharray="2 3"/>'
            )

    def _local(self, row: Local) -> None:
        tallest = 0
        for lane, entries in row.entries.items():
            height = len(entries) * LINE + 2 * PAD
            tallest = max(tallest, height)
            x = self._x(lane)
            self._rect("ops", x, self.y, LANE, height, "#f6f8fa", "#c6cad0")
            for k, entry in enumerate(entries):
                text = shortened(entry.text, LANE - 2 * PAD)
                y = self.y + PAD + (k + 1) * LINE - 4
                self._write(x + PAD, y, text, SIZE, title=entry.detail)
        self.y += tallest + 8

    def _joint(self, joint: Joint) -> None:
        for row in joint.rows:
            for bar in row:
                self._bar(bar)
            self.y += BAR + BAR_GAP
        self.y += 2

    def _bar(self, bar: Bar) -> None:
        left = self._x(bar.lanes[0])
        width = self._x(bar.lanes[-1]) + LANE - left
        colour = self.colours.get(bar.group, "#57606a")
        self._rect("bar", left, self.y, width, BAR, colour, title=bar.detail, round_=4)
        for lane in set(range(bar.lanes[0], bar.lanes[-1] + 1)) - set(bar.lanes):
            # The bar passes under a lane that has no part in it.
            self._rect("gap", self._x(lane), self.y + 4, LANE, BAR - 8, "#ffffff")
        text = shortened(bar.text, LANE - 2 * PAD if self._has_gap(bar) else width - 2 * PAD)
        ink = "#1f2328" if colour in _DARK_TEXT else "#ffffff"
        self._write(left + PAD, self.y + 15, text, SIZE, "bold", ink, bar.detail)

    def _has_gap(self, bar: Bar) -> bool:
        return len(bar.lanes) < bar.lanes[-1] - bar.lanes[0] + 1

    # ---- elements
    def _x(self, lane: int) -> float:
        return MARGIN + lane * (LANE + GAP)

    def _rect(
        self,
        kind: str,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        stroke: str = "none",
        title: str = "",
        round_: int = 2,
    ) -> None:
        inside = f"<title>{escape(title)}</title>" if title else ""
        self.out.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'rx="{round_}" fill="{fill}" stroke="{stroke}">{inside}</rect>'
        )

    def _write(
        self,
        x: float,
        y: float,
        text: str,
        size: int,
        weight: str = "normal",
        fill: str = "#1f2328",
        title: str = "",
    ) -> None:
        inside = f"<title>{escape(title)}</title>" if title else ""
        self.out.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" '
            f'fill="{fill}">{inside}{escape(text)}</text>'
        )


def colours(groups: Sequence[str]) -> dict[str, str]:
    """Group -> its colour in a drawing."""
    return {group: _COLOURS[i % len(_COLOURS)] for i, group in enumerate(groups)}
