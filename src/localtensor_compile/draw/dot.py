"""A drawing as GraphViz source text: ranks as clusters, collectives as nodes between them.

The text needs no graphviz to write. Edges are data: what takes a result of what in a rank. Others,
dotted or invisible, keep what is later in the program further down.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from .colours import COLOURS, group_colours
from .fonts import legal
from .lanes import lane_title
from .model import Bar, Box, Drawing, Edge, Mark, Place, Section

_HEAD = (
    "  rankdir=TB; newrank=true; compound=true;",
    '  node [shape=box, style="filled", fillcolor="#ffffff", fontname="monospace", fontsize=11];',
    '  graph [fontname="monospace", fontsize=12];',
    '  edge [color="#4b5563", arrowsize=0.6];',
)


def dot(drawing: Drawing) -> str:
    """The text of a .dot file."""
    return "\n".join(_graph(drawing)) + "\n"


def _graph(drawing: Drawing) -> Iterable[str]:
    yield f"digraph {_quoted(drawing.title)} {{"
    yield from _HEAD
    yield f"  label={_quoted(drawing.title)};"
    for number, section in enumerate(drawing.sections):
        yield from _Section(drawing, number, section).lines()
    yield "}"


class _Section:
    def __init__(self, drawing: Drawing, number: int, section: Section) -> None:
        self.drawing = drawing
        self.name = f"s{number}"
        self.section = section
        self.colours = group_colours(drawing.groups)

    def lines(self) -> Iterable[str]:
        yield f'  subgraph "cluster_{self.name}" {{'
        yield f"    label={_quoted(self.section.title)};"
        for lane, ranks in enumerate(self.drawing.lanes):
            yield f'    subgraph "cluster_{self.name}_lane{lane}" {{'
            yield f'      label={_quoted(lane_title(ranks))}; style=filled; color="#f3f4f6";'
            # GraphViz leaves out clusters without nodes.
            yield f'      "{self.name}_lane{lane}" [shape=point, style=invis];'
            for place in self.section.of_lane(lane):
                mark = self._mark(place)
                if isinstance(mark, Box):
                    yield f"      {self._box(place, mark)}"
            yield "    }"
        for i, row in enumerate(self.section.rows):
            for j, mark in enumerate(row):
                if isinstance(mark, Bar):
                    yield f"    {self._bar((i, j), mark)}"
        for lane in range(len(self.drawing.lanes)):
            yield from (f"    {edge}" for edge in self._edges(lane))
        yield "  }"

    def _mark(self, place: Place) -> Mark:
        return self.section.rows[place[0]][place[1]]

    def _id(self, place: Place) -> str:
        return f"{self.name}_r{place[0]}_m{place[1]}"

    def _box(self, place: Place, box: Box) -> str:
        label = "\n".join(filter(None, (box.name, _wrapped(box.type))))
        return _node(self._id(place), label, "\n".join(box.details))

    def _bar(self, place: Place, bar: Bar) -> str:
        line, fill = COLOURS[self.colours.get(bar.group, 0)]
        label = "\n".join(filter(None, (bar.label, bar.source)))
        more = f', shape=octagon, penwidth=1.5, color="{line}", fillcolor="{fill}"'
        return _node(self._id(place), label, "\n".join(bar.details), more)

    def _edges(self, lane: int) -> Iterable[str]:
        """Data, and from each mark to the next one of the lane where that is no data."""
        data = [e for e in self.section.edges if e.lane == lane]
        for edge in data:
            yield f'"{self._id(edge.source)}" -> "{self._id(edge.target)}";'
        places = self.section.of_lane(lane)
        for above, below in itertools.pairwise(places):
            if Edge(above, below, lane) not in data:
                style = "invis"
                for place in (above, below):
                    if isinstance(self._mark(place), Bar) and not _touches(data, place):
                        style = "dotted, arrowhead=none"
                yield f'"{self._id(above)}" -> "{self._id(below)}" [style={style}];'


def _touches(edges: Iterable[Edge], place: Place) -> bool:
    return any(place in (e.source, e.target) for e in edges)


def _node(name: str, label: str, tooltip: str, more: str = "") -> str:
    return f'"{name}" [label={_quoted(label)}, tooltip={_quoted(tooltip)}{more}];'


def _wrapped(text: str, letters: int = 40, most: int = 4) -> str:
    """The text in lines, for nodes are as wide as their longest line."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + len(word) >= letters:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".lstrip()
    lines.append(line)
    return "\n".join(lines if len(lines) <= most else [*lines[:most], "..."])


def _quoted(text: str) -> str:
    """A quoted id, in which GraphViz reads no escapes but those that are meant here."""
    text = legal(text).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + text.replace("\r", "").replace("\n", "\\n") + '"'
