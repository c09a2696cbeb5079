"""Drawings of captured graphs: everything is there once, in its place, and readable."""

import functools
import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

import localtensor_compile as lt
from localtensor_compile.cli import main
from localtensor_compile.draw import svg as svg_module
from localtensor_compile.draw.dot import dot
from localtensor_compile.draw.layout import Drawing, Joint, Lane, Local, drawing
from localtensor_compile.draw.svg import EM, LANE, svg
from localtensor_compile.golden.listing import COLLECTIVE, INPUT, OUTPUT
from localtensor_compile.golden.text import read
from tests import graph_programs as programs
from tests.test_zoo import ZOO

NAMES = ("tp_mlp_uneven", "dp_and_tp", "ring_attention", "simple_fsdp", "moe_all_to_all")
XMLNS = "{http://www.w3.org/2000/svg}"


@functools.cache
def document(name):
    """Of a golden: nothing has to run."""
    with open(f"graphs/zoo/{name}.txt") as file:
        return read(file.read(), name)


def bars(picture):
    rows = [row for section in picture.sections for row in section.rows if isinstance(row, Joint)]
    return [bar for joint in rows for bars in joint.rows for bar in bars]


# ---------------------------------------------------------------- what is drawn
@pytest.mark.parametrize("name", ZOO)
def test_every_line_of_every_rank_once(name):
    found = document(name)
    for section, (title, folded) in zip(drawing(found).sections, found.graphs.items()):
        assert section.title == title
        for rank in range(found.size):
            entries = [
                entry
                for row in section.rows
                if isinstance(row, Local)
                for entry in row.entries.get(rank, ())
            ]
            details = "\n".join(entry.detail for entry in entries)
            own = [line for line in folded.lines if rank in line.ranks]
            for line in own:
                if line.kind not in (COLLECTIVE, OUTPUT):
                    pattern = rf"^{re.escape(line.name)}: .* = {re.escape(line.op)}\("
                    assert len(re.findall(pattern, details, re.M)) == 1, (rank, line)
            inputs = sum(line.kind == INPUT for line in own)
            assert len(entries[0].text.removeprefix("in: ").split(", ")) == inputs


@pytest.mark.parametrize("name", ZOO)
def test_every_collective_once_per_group(name):
    found = document(name)
    drawn = sorted((bar.group, bar.ranks) for bar in bars(drawing(found)))
    expected = []
    for folded in found.graphs.values():
        for line in folded.lines:
            if line.kind == COLLECTIVE:
                group = next(a for a in reversed(line.arguments) if a in found.groups)
                families = [g for g in found.groups[group] if set(g) & set(line.ranks)]
                expected += [(group, g) for g in families]
    assert drawn == sorted(expected)


def test_bars_of_a_row_do_not_overlap():
    mesh = lt.capture(programs.grid, 4)
    joints = [r for s in drawing(mesh.document).sections for r in s.rows if isinstance(r, Joint)]
    assert [[[bar.ranks for bar in row] for row in joint.rows] for joint in joints] == [
        [[(0, 1), (2, 3)]],
        [[(0, 2)], [(1, 3)]],  # they would cross
    ]


def test_equal_ranks_share_a_lane():
    large = drawing(lt.capture(programs.mlp, 64).document)
    assert [lane.label for lane in large.lanes] == ["ranks 0-63"]
    small = drawing(lt.capture(programs.mlp, 2).document)
    height = [
        ElementTree.fromstring(svg(replace(picture, lanes=picture.lanes[:1]))).get("height")
        for picture in (large, drawing(lt.capture(programs.mlp, 2).document, rank=0))
    ]
    assert height[0] == height[1]
    assert [b.text for b in bars(large)] == ["all_reduce sum world 0-63 72 bytes"] * 2
    assert [b.text for b in bars(small)] == ["all_reduce sum world 0-1 72 bytes"] * 2


def test_lanes_of_ranks_that_differ():
    """The last rank pads."""
    picture = drawing(lt.capture(programs.uneven, 12).document)
    assert [lane.label for lane in picture.lanes] == ["ranks 0-10", "rank 11"]


def test_long_runs_are_shortened():
    found = document("tp_transformer")
    entries = [
        entry
        for section in drawing(found).sections
        for row in section.rows
        if isinstance(row, Local)
        for entry in row.entries[0]
    ]
    runs = [entry for entry in entries if re.match(r"\d+ ops: ", entry.text)]
    assert runs
    for entry in runs:
        assert len(entry.detail.splitlines()) >= int(entry.text.partition(" ")[0])


def test_one_rank():
    picture = drawing(document("tp_mlp_uneven"), rank=2)
    assert picture.lanes == (Lane((2,)),)
    texts = [e.text for s in picture.sections for r in s.rows if isinstance(r, Local)
             for e in r.entries[0]]  # fmt: skip
    assert not any("{" in text for text in texts), texts


# ---------------------------------------------------------------- SVG
def elements(text, tag, kind=None):
    found = ElementTree.fromstring(text).iter(f"{XMLNS}{tag}")
    return [e for e in found if kind is None or e.get("class") == kind]


def box(rect):
    x, y, width, height = (float(rect.get(k)) for k in ("x", "y", "width", "height"))
    return x, y, x + width, y + height


@pytest.mark.parametrize("name", NAMES)
def test_bars_span_the_lanes_of_their_group(name):
    picture = drawing(document(name))
    text = svg(picture)
    lanes = [box(r) for r in elements(text, "rect", "lane")]
    assert len(lanes) == document(name).size
    drawn = [box(r) for r in elements(text, "rect", "bar")]
    assert len(drawn) == len(bars(picture)) > 0
    for (left, _, right, _), bar in zip(drawn, bars(picture)):
        assert left == lanes[min(bar.ranks)][0] and right == lanes[max(bar.ranks)][2]


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def text_box(element):
    size = float(element.get("font-size"))
    x, y = float(element.get("x")), float(element.get("y"))
    words = "".join(element.itertext())
    title = element.find(f"{XMLNS}title")
    words = words.removeprefix(title.text if title is not None else "")
    return x, y - 0.75 * size, x + len(words) * size * EM, y + 0.2 * size


def require_readable(text):
    boxes = [box(r) for kind in ("ops", "bar", "lane", "key") for r in elements(text, "rect", kind)]
    for a, b in itertools.combinations(boxes, 2):
        assert not overlap(a, b), (a, b)
    words = [text_box(t) for t in elements(text, "text")]
    for a, b in itertools.combinations(words, 2):
        assert not overlap(a, b), (a, b)
    page = box({**ElementTree.fromstring(text).attrib, "x": 0, "y": 0})
    for a in (*boxes, *words):
        assert page[0] <= a[0] and a[2] <= page[2] and page[1] <= a[1] and a[3] <= page[3]
    for a in words:  # a text that begins in a box stays in it
        for b in boxes:
            if overlap(a, b):
                assert b[0] <= a[0] and a[2] <= b[2] and b[1] <= a[1] and a[3] <= b[3], (a, b)


@pytest.mark.parametrize("name", ZOO)
def test_nothing_overlaps(name):
    require_readable(svg(drawing(document(name))))


def test_the_check_of_overlaps_finds_some(monkeypatch):
    monkeypatch.setattr(svg_module, "LINE", 6)
    with pytest.raises(AssertionError):
        require_readable(svg(drawing(document("dp_and_tp"))))


def test_bar_passes_under_other_lanes():
    picture = drawing(lt.capture(programs.grid, 4).document)
    gaps = [box(r) for r in elements(svg(picture), "rect", "gap")]
    lanes = [box(r)[0] for r in elements(svg(picture), "rect", "lane")]
    assert [lanes.index(gap[0]) for gap in gaps] == [1, 2]
    assert all(gap[2] - gap[0] == LANE for gap in gaps)


def test_special_characters():
    found = document("tp_mlp_uneven")
    title = 'a < b & "c" \\ d'
    graphs = {title: found.graphs["forward"]}
    picture = drawing(replace(found, graphs=graphs))
    assert title in [t.text for t in elements(svg(picture), "text")]
    assert 'label="a < b & \\"c\\" \\\\ d";' in dot(picture)


# ---------------------------------------------------------------- DOT
@pytest.mark.parametrize("name", NAMES)
def test_dot(name):
    picture = drawing(document(name))
    text = dot(picture)
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert '"' not in outside and outside.count("{") == outside.count("}")
    nodes = re.findall(r"^\s*(n\d+_\d+) \[", text, re.M)
    assert len(nodes) == len(set(nodes))
    edges = re.findall(r"^\s*(n\d+_\d+) -> (n\d+_\d+);$", text, re.M)
    assert {n for edge in edges for n in edge} <= set(nodes)
    assert text.count("penwidth") == len(bars(picture))
    assert text.count("subgraph") == len(picture.sections) * (1 + len(picture.lanes))


# ---------------------------------------------------------------- for users
def test_same_in_every_process():
    code = (
        "import hashlib\nfrom tests.test_draw import document, drawing, dot, svg\n"
        "d = drawing(document('dp_and_tp'))\n"
        "print(hashlib.sha256((svg(d) + dot(d)).encode()).hexdigest())"
    )
    path = ":".join(filter(None, sys.path))

    def run(seed):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": path, "PATH": ""}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    assert run("1") == run("2") != ""


def test_of_captured_graphs():
    graphs = lt.capture(programs.uneven, 3)
    assert isinstance(drawing(graphs.document), Drawing)
    assert graphs.to_svg() == svg(drawing(graphs.document))
    assert graphs.to_dot(rank=1) == dot(drawing(graphs.document, 1))


def test_command_line(tmp_path, capsys):
    program = "tests/graph_programs.py:uneven"
    files = [str(tmp_path / "graphs.svg"), str(tmp_path / "graphs.dot")]
    arguments = ["graph", program, "--nproc-per-node", "3"]
    assert main([*arguments, "--svg", files[0], "--dot", files[1], "--rank", "2"]) == 0
    assert capsys.readouterr().out == f"wrote {files[0]}\nwrote {files[1]}\n"
    assert "rank 2" in (tmp_path / "graphs.svg").read_text()
    assert "rank 1" not in (tmp_path / "graphs.dot").read_text()
    assert main([*arguments, "--svg", str(tmp_path / "no" / "graphs.svg")]) == 2
    assert "localtensor graph: [Errno 2] No such file" in capsys.readouterr().err
