"""A drawing as text for GraphViz: a cluster per lane, collectives between them."""

from __future__ import annotations

from collections.abc import Iterator

from .layout import Drawing, Entry, Joint, Section
from .svg import colours


def dot(drawing: Drawing) -> str:
    """The text of a DOT file."""
    lines = ["digraph ranks {", '  node [shape=box, fontname="monospace", fontsize=10];']
    for number, section in enumerate(drawing.sections):
        lines += _Section(drawing, section, number).lines()
    return "\n".join([*lines, "}"]) + "\n"


class _Section:
    def __init__(self, drawing: Drawing, section: Section, number: int) -> None:
        self.drawing, self.section, self.number = drawing, section, number
        self.colours = colours(drawing.groups)
        self.last: dict[int, str] = {}
        self.edges: list[str] = []
        self.made = 0

    def lines(self) -> Iterator[str]:
        yield f"  subgraph {_quoted(f'cluster_{self.number}')} {{"
        yield f"    label={_quoted(self.section.title)};"
        in_lanes: dict[int, list[str]] = {i: [] for i in range(len(self.drawing.lanes))}
        between = []
        for row in self.section.rows:
            if isinstance(row, Joint):
                for bar in (b for bars in row.rows for b in bars):
                    node = self._node()
                    colour = _quoted(self.colours.get(bar.group, "#57606a"))
                    between.append(
                        f"    {node} [label={_quoted(bar.text)}, tooltip={_quoted(bar.detail)}, "
                        f"color={colour}, penwidth=2];"
                    )
                    for lane in bar.lanes:
                        self._follow(lane, node)
                continue
            for lane, entries in row.entries.items():
                node = self._node()
                in_lanes[lane].append(f"      {node} {_box(entries)};")
                self._follow(lane, node)
        for i, ranks in enumerate(self.drawing.lanes):
            yield f"    subgraph {_quoted(f'cluster_{self.number}_{i}')} {{"
            yield f"      label={_quoted(ranks.label)};"
            yield from in_lanes[i]
            yield "    }"
        yield from between
        yield from self.edges
        yield "  }"

    def _node(self) -> str:
        self.made += 1
        return f"n{self.number}_{self.made}"

    def _follow(self, lane: int, node: str) -> None:
        if lane in self.last:
            self.edges.append(f"    {self.last[lane]} -> {node};")
        self.last[lane] = node


def _box(entries: tuple[Entry, ...]) -> str:
    label = "".join(f"{_escaped(e.text)}\\l" for e in entries)  # \l: aligned to the left
    detail = "\n".join(e.detail for e in entries)
    return f'[label="{label}", tooltip={_quoted(detail)}]'


def _quoted(text: str) -> str:
    return f'"{_escaped(text)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
