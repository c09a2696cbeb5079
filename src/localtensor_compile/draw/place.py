"""Where everything of a drawing is on a page: rectangles, texts and arrows with coordinates.

Time runs downwards. Widths come from the texts, heights from the rows; texts that do not fit end
in an ellipsis and are whole in the tooltip.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..golden.listing import INPUT, OP, OUTPUT
from ..golden.ranges import rank_set
from .arrows import Arrow, Span, arrows, gutter_width
from .colours import group_colours
from .fonts import fit, width, wrap
from .lanes import lane_title
from .model import SEVERAL, Bar, Box, Drawing, Mark, Place, Section, lanes_of_mark

MARGIN = 16.0
PAD = 8.0  # between a box and its text
LANE_GAP = 12.0
NARROWEST, WIDEST, WIDEST_ALONE = 150.0, 320.0, 520.0
PAGE_NARROWEST = 400.0

TITLE, HEAD, NAME, SMALL = 15.0, 13.0, 12.0, 10.5  # font sizes
BOX_HEIGHT, BAR_HEIGHT, BAR_WITH_SOURCE = 22.0, 24.0, 38.0
LINE_HEIGHT = 14.0
MOST_LINES = 4  # of a box for several ops
BOX_GAP, BAR_GAP = 4.0, 18.0


@dataclass(frozen=True)
class Rect:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Text:
    """A line of text whose baseline is at `y`; `x` is its right end where `end`."""

    x: float
    y: float
    size: float
    text: str
    bold: bool = False
    end: bool = False


@dataclass(frozen=True)
class Item:
    """Something that is drawn, with its tooltip.

    Attributes:
        kind: how it looks: `lane`, `box`, `bar`, ...
        data: what it stands for, by name.
        links: thin rectangles that join its parts.
        colour: index of a colour, for what belongs to a process group.
    """

    kind: str
    rects: tuple[Rect, ...] = ()
    texts: tuple[Text, ...] = ()
    tooltip: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    links: tuple[Rect, ...] = ()
    colour: int | None = None


@dataclass(frozen=True)
class Page:
    """A drawing with coordinates; later items are on top of earlier ones, arrows below boxes."""

    title: str
    width: float
    height: float
    lanes: tuple[Item, ...]
    arrows: tuple[Arrow, ...]
    items: tuple[Item, ...]


def placed(drawing: Drawing) -> Page:
    """A drawing on a page."""
    return _Page(drawing).page()


class _Page:
    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.colours = group_colours(drawing.groups)
        marks = [m for s in drawing.sections for row in s.rows for m in row]
        self.lane_width = _lane_width(marks, drawing)
        self.rows = [self._rows(section) for section in drawing.sections]
        self.gutter = max(
            (gutter_width(s, rows) for s, rows in zip(drawing.sections, self.rows)), default=0.0
        )
        count = len(drawing.lanes)
        self.width = 2 * MARGIN + count * (self.lane_width + self.gutter)
        self.width += (count - 1) * LANE_GAP
        self.lanes: list[Item] = []
        self.arrows: list[Arrow] = []
        self.items: list[Item] = []

    def page(self) -> Page:
        title = self.drawing.title
        self.items.append(Item("title", texts=(_text(MARGIN, MARGIN, 24, TITLE, title, True),)))
        y = self._add_legend(MARGIN + 34)
        for number, section in enumerate(self.drawing.sections):
            y = self._add_section(section, self.rows[number], y + MARGIN)
        items = tuple(self.items)
        return Page(title, self.width, y + MARGIN, tuple(self.lanes), tuple(self.arrows), items)

    def _x(self, lane: int) -> float:
        return MARGIN + lane * (self.lane_width + self.gutter + LANE_GAP)

    # ---- vertical
    def _rows(self, section: Section) -> dict[Place, Span]:
        """Where each mark begins and ends, from the section's first row."""
        found: dict[Place, Span] = {}
        y, before = 0.0, False
        for i, row in enumerate(section.rows):
            bars = any(isinstance(mark, Bar) for mark in row)
            if i:
                y += BAR_GAP if bars or before else BOX_GAP
            before = bars
            levels = _levels(row)
            heights: dict[int, float] = {}
            for mark, level in zip(row, levels):
                heights[level] = max(heights.get(level, 0.0), self._height(mark))
            tops, top = {}, y
            for level in sorted(heights):
                tops[level] = top
                top += heights[level] + BOX_GAP
            for j, level in enumerate(levels):
                found[i, j] = Span(tops[level], tops[level] + heights[level])
            y = top - BOX_GAP
        return found

    def _height(self, mark: Mark) -> float:
        if isinstance(mark, Bar):
            return BAR_WITH_SOURCE if mark.source else BAR_HEIGHT
        if mark.kind != SEVERAL:
            return BOX_HEIGHT
        return BOX_HEIGHT + LINE_HEIGHT * len(self._wrapped(mark)) + 2

    def _wrapped(self, box: Box) -> list[str]:
        return wrap(box.type, self.lane_width - 2 * PAD, SMALL, MOST_LINES)

    # ---- items
    def _add_legend(self, y: float) -> float:
        """What the colours mean; returns where it ends."""
        marks = (m for s in self.drawing.sections for row in s.rows for m in row)
        kinds = {mark.kind for mark in marks if isinstance(mark, Box)}
        shown: list[tuple[str, str, str, int | None]] = [
            (f"box {kind}", text, "", None)
            for kind, text in (
                (INPUT, "input"),
                (OP, "op"),
                (SEVERAL, "several, listed in the tooltip"),
                (OUTPUT, "output"),
            )
            if kind in kinds
        ]
        for name, colour in self.colours.items():
            members = "; ".join(rank_set(g) for g in sorted(self.drawing.groups[name]))
            text = f"collectives of {name}: {members}"
            shown.append(("bar", text, text, colour))
        x = MARGIN
        for kind, text, tooltip, number in shown:
            room = self.width - 2 * MARGIN - 20
            held = fit(text, room, SMALL)
            if x > MARGIN and x + 20 + width(held, SMALL) > self.width - MARGIN:
                x, y = MARGIN, y + 18
            swatch = Rect(x, y, 14, 14)
            label = _text(x + 20, y, 14, SMALL, held)
            self.items.append(Item(f"legend {kind}", (swatch,), (label,), tooltip, colour=number))
            x += 20 + width(held, SMALL) + 16
        return y + 18

    def _add_section(self, section: Section, rows: Mapping[Place, Span], y: float) -> float:
        """Draws a graph; returns where it ends."""
        room = self.width - 2 * MARGIN
        title = _text(MARGIN + PAD, y, 26, HEAD, fit(section.title, room - 2 * PAD, HEAD), True)
        self.items.append(Item("section", (Rect(MARGIN, y, room, 26),), (title,), section.title))
        head = y + 26 + BOX_GAP
        top = head + 24 + BOX_GAP
        end = top + max((span.bottom for span in rows.values()), default=0.0) + PAD
        for i, lane in enumerate(self.drawing.lanes):
            self._add_lane(i, lane_title(lane), rank_set(lane), head, end)
        moved = {place: Span(s.top + top, s.bottom + top) for place, s in rows.items()}
        lanes = [(self._x(i), self.lane_width) for i in range(len(self.drawing.lanes))]
        self.arrows += arrows(section, moved, lanes)
        for (i, j), span in moved.items():
            mark = section.rows[i][j]
            if isinstance(mark, Bar):
                self._add_bar(mark, span)
            else:
                self._add_box(mark, span)
        return end

    def _add_lane(self, i: int, title: str, ranks: str, y: float, end: float) -> None:
        room = self.lane_width
        column = Rect(self._x(i), y, room, end - y)
        text = _text(self._x(i) + PAD, y, 24, NAME, fit(title, room - 2 * PAD, NAME), True)
        self.lanes.append(Item("lane", (column,), (text,), title, {"ranks": ranks}))

    def _add_box(self, box: Box, span: Span) -> None:
        x, room = self._x(box.lane), self.lane_width - 2 * PAD
        name = fit(box.name, room, NAME)
        texts = [_text(x + PAD, span.top, BOX_HEIGHT, NAME, name, True)]
        if box.kind == SEVERAL:
            y = span.top + BOX_HEIGHT - 2
            for line in self._wrapped(box):
                texts.append(_text(x + PAD, y, LINE_HEIGHT, SMALL, line))
                y += LINE_HEIGHT
        else:
            kind = fit(box.type, room - width(name, NAME) - PAD, SMALL)
            if kind:
                x_end = x + self.lane_width - PAD
                texts.append(_text(x_end, span.top, BOX_HEIGHT, SMALL, kind, end=True))
        rect = Rect(x, span.top, self.lane_width, span.bottom - span.top)
        self.items.append(Item(f"box {box.kind}", (rect,), tuple(texts), "\n".join(box.details)))

    def _add_bar(self, bar: Bar, span: Span) -> None:
        runs = _runs(bar.lanes)
        rects = []
        for first, last in runs:
            x = self._x(first)
            room = self._x(last) + self.lane_width - x
            rects.append(Rect(x, span.top, room, span.bottom - span.top))
        middle = (span.top + span.bottom) / 2
        links = tuple(
            Rect(a.x + a.width, middle - 2, b.x - a.x - a.width, 4)
            for a, b in itertools.pairwise(rects)
        )
        x, room = rects[0].x + PAD, rects[0].width - 2 * PAD
        texts = [_text(x, span.top + 1, BAR_HEIGHT - 2, NAME, fit(bar.label, room, NAME), True)]
        if bar.source:
            source = fit(bar.source, room, SMALL)
            texts.append(_text(x, span.top + 20, LINE_HEIGHT, SMALL, source))
        groups = "; ".join(map(rank_set, bar.groups))
        self.items.append(
            Item(
                "bar",
                tuple(rects),
                tuple(t for t in texts if t.text),
                "\n".join([f"{bar.label}", f"groups of ranks: {groups}", *bar.details]),
                {"op": bar.op, "group": bar.group, "ranks": groups},
                links,
                self.colours.get(bar.group, 0),
            )
        )


# ---------------------------------------------------------------- sizes
def _lane_width(marks: Iterable[Mark], drawing: Drawing) -> float:
    """As wide as the widest op and its type, if it has one; bars have their lanes together."""
    count = len(drawing.lanes)
    page = PAGE_NARROWEST - 2 * MARGIN - (count - 1) * LANE_GAP
    wanted = [NARROWEST, page / count]
    wanted += [width(lane_title(lane), NAME) + 2 * PAD for lane in drawing.lanes]
    for mark in marks:
        if isinstance(mark, Bar):
            first, last = _runs(mark.lanes)[0]
            wanted.append((width(mark.label, NAME) + 2 * PAD) / (last - first + 1))
        elif mark.kind == OUTPUT or mark.type.startswith("("):
            wanted.append(width(mark.name, NAME) + 2 * PAD)
        elif mark.kind != SEVERAL:
            wanted.append(width(mark.name, NAME) + width(mark.type, SMALL) + 3 * PAD)
    return min(max(wanted), WIDEST_ALONE if count == 1 else WIDEST)


def _levels(row: Sequence[Mark]) -> list[int]:
    """For each mark of a row, the first level where no other mark has one of its lanes.

    A bar also takes the lanes between its own, which its links cross.
    """
    taken: list[list[tuple[int, int]]] = []
    levels = []
    for mark in row:
        lanes = lanes_of_mark(mark)
        first, last = lanes[0], lanes[-1]
        for level, spans in enumerate(taken):  # noqa: B007
            if all(last < a or b < first for a, b in spans):
                break
        else:
            level = len(taken)
            taken.append([])
        taken[level].append((first, last))
        levels.append(level)
    return levels


def _runs(lanes: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of lanes side by side."""
    runs: list[tuple[int, int]] = []
    for lane in lanes:
        if runs and runs[-1][1] == lane - 1:
            runs[-1] = runs[-1][0], lane
        else:
            runs.append((lane, lane))
    return runs


def _text(
    x: float,
    top: float,
    height: float,
    size: float,
    text: str,
    bold: bool = False,
    end: bool = False,
) -> Text:
    """A line of text in the middle of a height."""
    return Text(x, top + height / 2 + 0.35 * size, size, text, bold, end)
