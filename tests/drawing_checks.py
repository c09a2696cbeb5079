"""What is wrong with a drawing, as SVG or GraphViz text, of given golden text.

The checks read the drawing's text and the folded lines, and share nothing with the code that draws.
"""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from localtensor_compile.golden.ranges import at_rank, parse_ranks, rank_set
from localtensor_compile.golden.text import Document

SVG = "{http://www.w3.org/2000/svg}"
ADVANCE = 0.602  # of DejaVu Sans Mono, the widest of the fonts that are asked for


@dataclass(frozen=True)
class Area:
    """A rectangle of a picture."""

    x: float
    y: float
    end: float
    bottom: float

    def overlaps(self, other: Area) -> bool:
        """By more than rounding and the width of a line."""
        return (
            min(self.end, other.end) - max(self.x, other.x) > 0.3
            and min(self.bottom, other.bottom) - max(self.y, other.y) > 0.3
        )

    def holds(self, other: Area) -> bool:
        return (
            self.x - 0.3 <= other.x
            and other.end <= self.end + 0.3
            and self.y - 0.3 <= other.y
            and other.bottom <= self.bottom + 0.3
        )


def area(rect: ET.Element) -> Area:
    x, y = float(rect.get("x", "0")), float(rect.get("y", "0"))
    return Area(x, y, x + float(rect.get("width", "0")), y + float(rect.get("height", "0")))


def text_area(text: ET.Element) -> Area:
    size = float(text.get("font-size", "0"))
    width = len(text.text or "") * ADVANCE * size
    x, y = float(text.get("x", "0")), float(text.get("y", "0"))
    start = x - width if "end" in text.get("class", "").split() else x
    return Area(start, y - 0.8 * size, start + width, y + 0.2 * size)


# ---------------------------------------------------------------- what there has to be
def collectives(document: Document) -> list[tuple[str, tuple[int, ...], frozenset[int]]]:
    """(op, group of ranks, those that have the line) in order, once for each group."""
    found = []
    for folded in document.graphs.values():
        for line in folded.lines:
            if line.kind != "collective":
                continue
            for rank in line.ranks:
                names = [at_rank(a, rank) for a in line.arguments]
                families = [document.groups[n] for n in names if n in document.groups]
                group = next(g for g in families[-1] if rank in g)
                one = (line.op, group, frozenset(group) & frozenset(line.ranks))
                if rank == min(one[2]):
                    found.append(one)
    return found


# ---------------------------------------------------------------- SVG
def svg_problems(document: Document, svg: str | ET.Element) -> list[str]:
    """Sentences about what is wrong; none for a drawing that is right."""
    root = ET.fromstring(svg) if isinstance(svg, str) else svg
    groups = list(root.iter(f"{SVG}g"))
    return [
        *_lanes(document, groups),
        *_bars(document, groups),
        *_boxes(document, groups),
        *_overlaps(root, groups),
        *_arrows(root, groups),
    ]


def of_kind(groups: list[ET.Element], kind: str) -> list[ET.Element]:
    return [g for g in groups if g.get("class", "").split()[0] == kind]


def rects(group: ET.Element, link: bool = False) -> list[Area]:
    return [area(r) for r in group.findall(f"{SVG}rect") if (r.get("class") == "link") is link]


def _by_section(groups: list[ET.Element]) -> list[dict[Area, tuple[int, ...]]]:
    """For each graph, the lanes' areas and ranks."""
    found: dict[float, dict[Area, tuple[int, ...]]] = {}
    for lane in of_kind(groups, "lane"):
        (place,) = rects(lane)
        found.setdefault(place.y, {})[place] = parse_ranks(lane.get("data-ranks", ""))
    return [found[y] for y in sorted(found)]


def _lanes(document: Document, groups: list[ET.Element]) -> Iterator[str]:
    titles = [s.findtext(f"{SVG}text") for s in of_kind(groups, "section")]
    if titles != list(document.graphs):
        yield f"sections {titles}"
    for lanes in _by_section(groups):
        held = sorted(r for ranks in lanes.values() for r in ranks)
        if held != list(range(document.size)):
            yield f"lanes of ranks {held}"
        if document.size <= 8 and len(lanes) != document.size:
            yield f"{len(lanes)} lanes"
    for lane in of_kind(groups, "lane"):
        ranks = lane.get("data-ranks")
        if lane.findtext(f"{SVG}text") not in (f"rank {ranks}", f"ranks {ranks}"):
            yield f"a lane's title is {lane.findtext(f'{SVG}text')}, its ranks {ranks}"


def _bars(document: Document, groups: list[ET.Element]) -> Iterator[str]:
    sections = _by_section(groups)
    left = collectives(document)
    ops = list(dict.fromkeys(op for op, _, _ in left))
    found = []
    for bar in sorted(of_kind(groups, "bar"), key=lambda b: rects(b)[0].y):
        op = bar.get("data-op", "").split()[0]
        found.append(op)
        present: set[int] = set()
        for group in map(parse_ranks, bar.get("data-ranks", "").split("; ")):
            one = next((c for c in left if c[:2] == (op, group)), None)
            if one is None:
                yield f"{op} of {rank_set(group)} is in no line, or drawn twice"
                continue
            left.remove(one)
            present |= one[2]
        yield from _span(bar, present, sections)
    yield from (f"{op} of {rank_set(group)} is not drawn" for op, group, _ in left)
    if list(dict.fromkeys(found)) != ops:
        yield "collectives in another order"


def _span(
    bar: ET.Element, present: set[int], sections: list[dict[Area, tuple[int, ...]]]
) -> Iterator[str]:
    """A bar is over the lanes of these ranks and over no other."""
    own = rects(bar)
    lanes = next((s for s in sections if any(a.y < own[0].y < a.bottom for a in s)), {})
    name = f"the bar {bar.findtext(f'{SVG}text')}"
    for lane, held in lanes.items():
        over = any(r.x < lane.end - 0.3 and lane.x + 0.3 < r.end for r in own)
        if over is present.isdisjoint(held):
            yield f"{name} {'is' if over else 'is not'} over ranks {rank_set(held)}"
    for rect in own:
        if not any(abs(rect.x - a.x) < 0.3 for a in lanes):
            yield f"{name} begins beside a lane"
        if not any(abs(rect.end - a.end) < 0.3 for a in lanes):
            yield f"{name} ends beside a lane"


def _boxes(document: Document, groups: list[ET.Element]) -> Iterator[str]:
    """Each line is in one box of each lane that has it, as far as tooltips say."""
    boxes = [(rects(b)[0], b) for b in of_kind(groups, "box")]
    for lanes, folded in zip(_by_section(groups), document.graphs.values()):
        for lane, ranks in lanes.items():
            own = [b for place, b in boxes if lane.holds(place)]
            shown = [n for b in own for n in _names(b.findtext(f"{SVG}title"))]
            wanted = [
                line.op if line.kind == "return" else line.name
                for line in folded.lines
                if line.kind != "collective" and not set(ranks).isdisjoint(line.ranks)
            ]
            if shown != wanted:
                yield f"ranks {rank_set(ranks)} have {shown}, not {wanted}"


def _names(tooltip: str | None) -> list[str]:
    lines = [line for line in (tooltip or "").split("\n") if not line.startswith("# ")]
    # A size is named `x.size(0)`.
    return [re.split(r": | = |\((?!\d+\))", line)[0] for line in lines]


def _overlaps(root: ET.Element, groups: list[ET.Element]) -> Iterator[str]:
    placed: list[tuple[Area, str, ET.Element]] = []
    for group in groups:
        kind = group.get("class", "").split()[0]
        texts = group.findall(f"{SVG}text")
        held = rects(group)
        for text in texts:
            place = text_area(text)
            placed.append((place, f"text {text.text}", group))
            if kind in ("box", "bar", "section", "lane") and not any(r.holds(place) for r in held):
                yield f"text {text.text} is not in its {kind}"
        for a, b in itertools.combinations(texts, 2):
            if text_area(a).overlaps(text_area(b)):
                yield f"texts {a.text} and {b.text} overlap"
        if kind != "lane":
            placed += [(r, f"a {kind}", group) for r in [*held, *rects(group, link=True)]]
    page = area(next(root.iter(f"{SVG}rect")))
    placed.sort(key=lambda p: p[0].y)
    for i, (place, name, group) in enumerate(placed):
        if not page.holds(place):
            yield f"{name} is not on the page"
        for other, its_name, its_group in placed[i + 1 :]:
            if other.y > place.bottom:
                break
            if group is not its_group and place.overlaps(other):
                yield f"{name} and {its_name} overlap"


def _arrows(root: ET.Element, groups: list[ET.Element]) -> Iterator[str]:
    """Arrows begin and end at something, and no box is in their way."""
    boxes = [r for b in of_kind(groups, "box") for r in rects(b)]
    marks = boxes + [r for b in of_kind(groups, "bar") for r in rects(b)]
    for points in arrows(root):
        for x, y in (points[0], points[-1]):
            grown = (Area(m.x - 0.3, m.y - 0.3, m.end + 0.3, m.bottom + 0.3) for m in marks)
            if not any(m.x <= x <= m.end and m.y <= y <= m.bottom for m in grown):
                yield f"an arrow ends at nothing: {x}, {y}"
        for (x, y), (x2, y2) in itertools.pairwise(points):
            line = Area(min(x, x2) - 0.2, min(y, y2) - 0.2, max(x, x2) + 0.2, max(y, y2) + 0.2)
            if any(line.overlaps(box) for box in boxes):
                yield f"an arrow crosses a box at {x}, {y}"


def arrows(root: ET.Element) -> list[list[tuple[float, float]]]:
    """The points of each arrow."""
    found = []
    for path in root.iter(f"{SVG}path"):
        if path.get("class") == "arrow":
            pairs = path.get("d", "").removeprefix("M").split("L")
            found.append([tuple(map(float, pair.split())) for pair in pairs])
    return found


def lanes_without_arrow(root: ET.Element) -> list[str]:
    """Bars and lanes where no arrow says which data a collective takes."""
    groups = list(root.iter(f"{SVG}g"))
    ends = [points[-1] for points in arrows(root)]
    found = []
    for bar in of_kind(groups, "bar"):
        for lanes in _by_section(groups):
            for lane, ranks in lanes.items():
                over = [r for r in rects(bar) if r.x < lane.end and lane.x < r.end]
                over = [r for r in over if lane.y < r.y < lane.bottom]
                for rect in over:
                    # A gutter is right of its lane.
                    if not any(
                        lane.x < x < lane.end + 36 and rect.y - 0.3 < y < rect.bottom
                        for x, y in ends
                    ):
                        found.append(f"{bar.get('data-op')} of ranks {rank_set(ranks)}")
    return found


# ---------------------------------------------------------------- GraphViz
_STRING = r'"(?:[^"\\]|\\.)*"'
_TOKEN = re.compile(rf"{_STRING}|->|[{{}}\[\];,=]|[\w.]+|\s+|.", re.DOTALL)


def dot_problems(document: Document, dot: str) -> list[str]:
    """Sentences about what is wrong; none for a text that is right."""
    tokens = [t for t in _TOKEN.findall(dot) if not t.isspace()]
    found = [f"not a token: {t}" for t in tokens if re.fullmatch(r"[^\w{}\[\];,=]", t)]
    depth: list[str] = []
    for token in tokens:
        if token in "{[":
            depth.append(token)
        elif token in "}]" and (not depth or depth.pop() + token not in ("{}", "[]")):
            return [*found, "brackets do not match"]
    if depth:
        return [*found, "brackets do not close"]
    return found + list(_dot_graph(document, dot))


def _dot_graph(document: Document, dot: str) -> Iterator[str]:
    nodes: Counter[str] = Counter()
    lane_of: dict[str, tuple[int, ...]] = {}
    bars: dict[str, str] = {}
    edges: list[tuple[str, str]] = []
    shown: list[tuple[str, str]] = []
    lanes: list[tuple[int, ...]] = []
    lane: tuple[int, ...] = ()
    for line in dot.splitlines():
        line = line.strip()
        if line == "}":
            lane = ()
        elif found := re.match(r'label="ranks? ([^"]*)"', line):
            lane = parse_ranks(found[1])
            lanes.append(lane)
        elif found := re.match(rf"({_STRING}) -> ({_STRING})", line):
            edges.append((found[1], found[2]))
            if "style=invis" not in line:
                shown.append((found[1], found[2]))
        elif found := re.match(rf"({_STRING}) \[(?:label=({_STRING}))?", line):
            nodes[found[1]] += 1
            if lane:
                lane_of[found[1]] = lane
            else:
                bars[found[1]] = unquoted(found[2])
    for name, count in nodes.items():
        if count > 1:
            yield f"{name} is there {count} times"
    for end in itertools.chain(*edges):
        if end not in nodes:
            yield f"an edge to {end}, which is nowhere"
    held = Counter(r for ranks in lanes for r in ranks)
    if held != Counter(dict.fromkeys(range(document.size), len(document.graphs))):
        yield f"lanes {lanes}"
    wanted = collectives(document)
    if document.size <= 8 and len(bars) != len(wanted):
        yield f"{len(bars)} collectives, not {len(wanted)}"
    for (name, label), (op, group, there) in zip(bars.items(), wanted):
        if document.size <= 8 and not (
            label.startswith(op) and f" {rank_set(group)}" in label.split("\n")[0]
        ):
            yield f"{label} is not {op} of {rank_set(group)}"
        if document.size <= 8:
            linked = {
                r
                for edge in shown
                if name in edge
                for end in edge
                for r in lane_of.get(end, _ranks_of(bars.get(end, ""), end, name))
            }
            if not there <= linked:
                yield f"{label} is linked with {linked}"


def _ranks_of(label: str, end: str, name: str) -> tuple[int, ...]:
    """Ranks of another collective that a collective is linked with."""
    if end == name or not label:
        return ()
    found = re.search(r", \S+ ([\d,:-]+)(, |$)", label.split("\n")[0])
    return parse_ranks(found[1]) if found else ()


def unquoted(text: str) -> str:
    """What a quoted id says."""
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text[1:-1])
