"""Drawings of captured graphs: what they show, where, and that they can be read."""

import dataclasses
import functools
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import localtensor_compile as lt
from localtensor_compile import cli
from localtensor_compile.check.program import load_program
from localtensor_compile.draw.dot import dot
from localtensor_compile.draw.model import drawing
from localtensor_compile.draw.svg import svg
from localtensor_compile.golden.text import read
from tests import graph_programs as programs
from tests.drawing_checks import (
    SVG,
    arrows,
    dot_problems,
    lanes_without_arrow,
    of_kind,
    rects,
    svg_problems,
    unquoted,
)
from tests.hash_seeds import printed
from tests.test_zoo import ZOO

ROOT = Path(__file__).parents[1]
GOLDENS = sorted((ROOT / "graphs" / "zoo").glob("*.txt"))


def drawn(text):
    """Golden text as SVG and as GraphViz text; no data edges are known."""
    document = read(text)
    shown = drawing(document, {})
    return document, svg(shown), dot(shown)


# ---------------------------------------------------------------- the zoo
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda file: file.stem)
def test_zoo(golden):
    document, picture, source = drawn(golden.read_text())
    assert svg_problems(document, picture) == []
    assert dot_problems(document, source) == []


@functools.cache
def captured(name):
    if name in ZOO:
        program, world_size, arguments = ZOO[name]
        return lt.capture(functools.partial(program, **arguments), world_size)
    name, _, world_size = name.partition(" ")
    return lt.capture(getattr(programs, name), int(world_size))


CAPTURED = ["mlp 3", "grid 8", "grid 12", "uneven 4", "uneven 12", "offsets 3", "dp_and_tp"]


@pytest.mark.parametrize(
    "name", [*CAPTURED, "moe_all_to_all", pytest.param("simple_fsdp", marks=pytest.mark.slow)]
)
def test_captured(name):
    graphs = captured(name)
    picture = ET.fromstring(graphs.to_svg())
    assert svg_problems(graphs.document, picture) == []
    assert dot_problems(graphs.document, graphs.to_dot()) == []
    assert lanes_without_arrow(picture) == []


# ---------------------------------------------------------------- drawings that are wrong
def bar(root):
    return of_kind(list(root.iter(f"{SVG}g")), "bar")[0]


def box(root):
    return of_kind(list(root.iter(f"{SVG}g")), "box")[3]


def change(element, name, by):
    element.set(name, str(float(element.get(name)) + by))


def arrow_elsewhere(root):
    path = next(p for p in root.iter(f"{SVG}path") if p.get("class") == "arrow")
    path.set("d", "M1 1L2 2")


MUTANTS = {
    "no bar": lambda root: root.remove(bar(root)),
    "a bar twice": lambda root: root.append(bar(root)),
    "a bar moved": lambda root: change(bar(root).find(f"{SVG}rect"), "x", 180),
    "a narrow bar": lambda root: change(bar(root).find(f"{SVG}rect"), "width", -180),
    "a wide bar": lambda root: change(bar(root).find(f"{SVG}rect"), "width", 30),
    "another group": lambda root: bar(root).set("data-ranks", "0,2"),
    "another op": lambda root: bar(root).set("data-op", "broadcast 0"),
    "no box": lambda root: root.remove(box(root)),
    "a box moved": lambda root: change(box(root).find(f"{SVG}rect"), "y", 12),
    "a long text": lambda root: setattr(box(root).find(f"{SVG}text"), "text", "gelu" * 12),
    "a text elsewhere": lambda root: change(box(root).find(f"{SVG}text"), "x", -40),
    "no lane": lambda root: root.remove(of_kind(list(root.iter(f"{SVG}g")), "lane")[1]),
    "an arrow elsewhere": arrow_elsewhere,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_drawings_are_found(mutant):
    graphs = captured("dp_and_tp")
    root = ET.fromstring(graphs.to_svg())
    MUTANTS[mutant](root)
    assert svg_problems(graphs.document, root) != []


def test_a_missing_arrow_is_found():
    root = ET.fromstring(captured("dp_and_tp").to_svg())
    before = len(arrows(root))
    root.remove(next(p for p in root if p.get("class") == "arrow"))
    assert len(arrows(root)) == before - 1 and len(lanes_without_arrow(root)) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("}", ""),
        ('"', ""),
        ('"s0_r1_m0" [', '"s0_r2_m0" ['),
        ("rank 1", "rank 2"),
        ("tp 0-1", "tp 0,2"),
        ("all_reduce sum", "broadcast 0"),
    ],
)
def test_wrong_dot_is_found(old, new):
    graphs = captured("dp_and_tp")
    assert dot_problems(graphs.document, graphs.to_dot().replace(old, new, 1)) != []


# ---------------------------------------------------------------- what is drawn as one
def of_ranks(count):
    """A program that is equal on all ranks prints the same but for the size of the world."""
    text = str(captured("mlp 3"))
    return text.replace("world of 3 ranks", f"world of {count} ranks").replace(
        "group world: 0-2", f"group world: 0-{count - 1}"
    )


def test_equal_ranks_share_a_lane():
    _, small, _ = drawn(of_ranks(2))
    pictures = {n: drawn(of_ranks(n)) for n in (9, 16, 64)}
    roots = {n: ET.fromstring(picture) for n, (_, picture, _) in pictures.items()}
    for n, (document, picture, source) in pictures.items():
        assert svg_problems(document, picture) == [] and dot_problems(document, source) == []
        lanes = of_kind(list(roots[n].iter(f"{SVG}g")), "lane")
        assert [lane.get("data-ranks") for lane in lanes] == [f"0-{n - 1}"] * 2
        assert len(picture) < len(small)
    texts = {
        picture.replace(f"0-{n - 1}", "ALL").replace(f"world of {n} ", "world of N ")
        for n, (_, picture, _) in pictures.items()
    }
    assert len(texts) == 1
    heights = {root.get("height") for root in (*roots.values(), ET.fromstring(small))}
    assert len(heights) == 1  # as far down as 2 ranks side by side


@pytest.mark.slow
def test_64_ranks():
    graphs = lt.capture(programs.mlp, 64)
    assert svg_problems(graphs.document, graphs.to_svg()) == []
    assert len(graphs.to_svg()) < len(lt.capture(programs.mlp, 2).to_svg())


def test_ranks_with_other_programs_have_their_own_lane():
    lanes = of_kind(list(ET.fromstring(captured("uneven 12").to_svg()).iter(f"{SVG}g")), "lane")
    assert [lane.get("data-ranks") for lane in lanes] == ["0-10", "11"]


MANY = """\
world of 20 ranks
group pair: 0-1; 2-3; 4-5; 6-7; 8-9; 10-11; 12-13; 14-15; 16-17; 18-19

forward
    x: f32[{SIZES}] = input
    # forward: y = x.cos()
    cos: f32[{SIZES}] = aten.cos(x) @ {RANKS}
    all_reduce: f32[4] = all_reduce(x, sum, pair)  # {SIZES} bytes
    return[0](all_reduce)
"""


def many(sizes, ranks):
    return MANY.replace("{SIZES}", sizes).replace("{RANKS}", ranks)


def lane_ranks(picture):
    return [
        g.get("data-ranks") for g in of_kind(list(ET.fromstring(picture).iter(f"{SVG}g")), "lane")
    ]


def test_lanes_of_many_ranks():
    """By op and size where that makes few lanes, else by op, else one lane."""
    document, picture, source = drawn(many("{0-18: 4, 19: 3}", "0-18"))
    assert lane_ranks(picture) == ["0-18", "19"]
    assert svg_problems(document, picture) == [] and dot_problems(document, source) == []
    assert lane_ranks(drawn(many("{0-18: 4, 19: 3}", "0-19"))[1]) == ["0-18", "19"]
    assert lane_ranks(drawn(many("4", "0-19"))[1]) == ["0-19"]
    _, picture, _ = drawn(many("{rank + 1}", "0-18"))
    assert lane_ranks(picture) == ["0-18", "19"] and ">f32[{rank + 1}]<" in picture
    document, picture, _ = drawn(many("{rank + 1}", "0-18").replace(
        "    all_reduce:",
        "".join(f"    sin{r}: f32[4] = aten.sin(x) @ {r}\n" for r in range(9)) + "    all_reduce:",
    ))  # fmt: skip
    assert lane_ranks(picture) == ["0-19"] and ">f32[4] @ 3<" in picture
    assert svg_problems(document, picture) == []


def test_groups_that_share_a_lane_are_above_each_other():
    """Groups 0-1 to 16-17 are in one lane, of 18-19 a rank is and the other is not."""
    _, picture, _ = drawn(many("{0-18: 4, 19: 3}", "0-18"))
    first, second = of_kind(list(ET.fromstring(picture).iter(f"{SVG}g")), "bar")
    assert first.get("data-ranks").startswith("0-1; 2-3;") and len(rects(first)) == 1
    assert second.get("data-ranks") == "18-19"
    assert rects(first)[0].bottom < rects(second)[0].y
    assert first.findtext(f"{SVG}text") == "all_reduce sum, pair 9 groups, 4 bytes"


def test_ranks_that_do_not_have_the_line_of_their_group():
    """As where ranks call it from different lines."""
    document, picture, source = drawn(
        "world of 3 ranks\ngroup world: 0-2\n\nforward\n    x: f32[4] = input\n"
        "    all_reduce: f32[4] = all_reduce(x, sum, world) @ 0,2  # 16 bytes\n"
        "    all_reduce_1: f32[4] = all_reduce(x, sum, world) @ 1  # 16 bytes\n"
    )
    assert "<title>all_reduce sum, world 0-2, 16 bytes, without 1\n" in picture
    assert "all_reduce sum, world 0-2, 16 bytes, without 0,2" in source
    first, second = of_kind(list(ET.fromstring(picture).iter(f"{SVG}g")), "bar")
    assert len(rects(first)) == 2 and len(rects(second)) == 1
    assert svg_problems(document, picture) == [] and dot_problems(document, source) == []


def test_ranks_whose_groups_have_several_names():
    document, picture, source = drawn(
        "world of 5 ranks\ngroup a: 0-1\ngroup b: 2,4\n\nforward\n    x: f32[4] = input @ 0-2,4\n"
        "    all_reduce: f32[4] = all_reduce(x, sum, {0-1: a, 2,4: b}) @ 0-2,4  # 16 bytes\n"
    )
    assert svg_problems(document, picture) == [] and dot_problems(document, source) == []
    groups = list(ET.fromstring(picture).iter(f"{SVG}g"))
    assert [b.get("data-group") for b in of_kind(groups, "bar")] == ["a", "b"]
    colours = [b.get("class") for b in of_kind(groups, "bar")]
    legend = [g.get("class") for g in of_kind(groups, "legend") if "bar" in g.get("class")]
    assert legend == ["legend bar g0", "legend bar g1"] and colours == ["bar g0", "bar g1"]
    assert [lane.get("data-ranks") for lane in of_kind(groups, "lane")] == ["0", "1", "2", "3", "4"]


def test_long_runs_are_one_box():
    ops = "".join(f"    mul_{i}: f32[4] = aten.mul.Tensor(x, {i})\n" for i in range(13))
    ops += "    view: f32[4] = aten.view(x, [4])\n    neg: f32[4] = aten.neg(view)\n"
    text = f"world of 2 ranks\n\nforward\n    x: f32[4] = input\n{ops}    return[0](neg)\n"
    document, picture, _ = drawn(text)
    assert svg_problems(document, picture) == []
    assert ">15 ops</text>" in picture and ">mul x13, neg, view</text>" in picture
    assert "\nmul_12: f32[4] = aten.mul.Tensor(x, 12)\n" in picture
    _, picture, _ = drawn("\n".join(t for t in text.split("\n") if "mul_1" not in t))
    assert " ops<" not in picture and picture.count(">mul</text>") == 2 * 9


def late(world, count):
    """Takes what was first in the last of `count` collectives."""

    def reduced(x):
        early = [x * n for n in range(2, count + 2)]
        return [funcol.all_reduce(e, "sum", dist.group.WORLD) for e in reversed(early)]

    return {"out": world.compile(reduced)(torch.ones(2))}


def test_arrows_from_further_up_are_beside_the_lane():
    graphs = lt.capture(functools.partial(late, count=5), 2)
    root = ET.fromstring(graphs.to_svg())
    assert svg_problems(graphs.document, root) == [] and lanes_without_arrow(root) == []
    straight = [points for points in arrows(root) if len(points) == 2]
    lanes = [rects(g)[0] for g in of_kind(list(root.iter(f"{SVG}g")), "lane")]
    into_first, out_of_last = straight[:2], straight[2:]
    assert [(x, x2) for (x, _), (x2, _) in into_first] == [((n.x + n.end) / 2,) * 2 for n in lanes]
    assert len(out_of_last) == 0  # what is next returns another
    aside = [points for points in arrows(root) if len(points) > 2]
    assert len(aside) == 4 * 2 and len({points[1][0] for points in aside}) == 4 * 2


def test_longest_arrows_are_left_out():
    graphs = lt.capture(functools.partial(late, count=6), 2)
    root = ET.fromstring(graphs.to_svg())
    assert svg_problems(graphs.document, root) == []
    assert lanes_without_arrow(root) == ["all_reduce sum of ranks 0", "all_reduce sum of ranks 1"]


# ---------------------------------------------------------------- text
ODD = """\
world of 2 ranks
group GROUP: 0-1

forward
    NAME: f32[4] = input
    # forward: y = f(x < 3 && "a\\n", CODE) if z else "\u6f22\u5b57" * 40
    all_reduce: f32[4] = all_reduce(NAME, sum, GROUP)  # 16 bytes
    return[0](all_reduce)
"""
NAMES = {"NAME": "x<&>\"'", "GROUP": '"t<p', "CODE": "\x01\x7f\ud800"}


def with_names(text):
    return functools.reduce(lambda text, name: text.replace(name, NAMES[name]), NAMES, text)


def test_text_is_escaped():
    document = read(ODD)
    lines = [
        dataclasses.replace(
            line,
            name=with_names(line.name),
            arguments=tuple(map(with_names, line.arguments)),
            source=with_names(line.source),
        )
        for line in document.graphs["forward"].lines
    ]
    folded = dataclasses.replace(document.graphs["forward"], lines=tuple(lines))
    groups = {with_names(name): family for name, family in document.groups.items()}
    document = dataclasses.replace(document, groups=groups, graphs={"<forward>": folded})
    picture, source = (draw(drawing(document, {})) for draw in (svg, dot))
    assert svg_problems(document, picture) == [] and dot_problems(document, source) == []
    root = ET.fromstring(picture)
    assert NAMES["NAME"] in [t.text for t in root.iter(f"{SVG}text")]
    assert bar(root).get("data-group") == NAMES["GROUP"]
    code = 'forward: y = f(x < 3 && "a\\n", {}) if z else "\u6f22\u5b57" * 40'
    assert code.format("\ufffd\x7f\ufffd") in bar(root).findtext(f"{SVG}title")
    for text in (picture, source):
        text.encode()  # as files are written
    line = next(line for line in source.splitlines() if "octagon" in line)
    label = line.partition("label=")[2].partition(", tooltip=")[0]
    assert unquoted(label).split("\n")[1] == code.format("\ufffd\x7f\ufffd")


SCRIPT = """
import localtensor_compile as lt
from tests import graph_programs as programs
for graphs in (lt.capture(programs.mlp, 3), lt.capture(programs.grid, 8)):
    print(graphs.to_svg(), graphs.to_dot())
"""


@pytest.mark.parametrize("seeds", [(1,), pytest.param(range(2, 8), marks=pytest.mark.slow)])
def test_drawings_are_the_same_in_every_process(seeds):
    here = [captured("mlp 3"), captured("grid 8")]
    assert printed(SCRIPT, seeds) == {"".join(f"{g.to_svg()} {g.to_dot()}\n" for g in here)}


# ---------------------------------------------------------------- one rank
def test_one_rank():
    graphs = captured("uneven 4")
    root = ET.fromstring(graphs.to_svg(rank=3))
    assert lane_ranks(graphs.to_svg(rank=3)) == ["3"]
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert "constant_pad_nd" in texts and "f32[2, 2]" in texts and "f32[3, 2]" in texts
    assert "all_gather_into_tensor, world 0-3, 24 bytes" in texts
    assert "constant_pad_nd" not in graphs.to_svg(rank=0)
    assert "constant_pad_nd" in graphs.to_dot(rank=3)
    assert "constant_pad_nd" not in graphs.to_dot(rank=0)


# ---------------------------------------------------------------- command line
def command(capsys, *arguments):
    code = cli.main(["graph", *arguments])
    return code, capsys.readouterr()


FILE = programs.__file__


def test_command_draws(capsys, tmp_path):
    picture, source = tmp_path / "grid.svg", tmp_path / "grid.dot"
    arguments = [f"{FILE}:grid", "--nproc-per-node", "8", "--svg", str(picture)]
    code, out = command(capsys, *arguments, "--dot", str(source))
    assert code == 0 and out.out == f"wrote {picture}\nwrote {source}\n"
    assert picture.read_text(encoding="utf-8") == captured("grid 8").to_svg()
    assert source.read_text(encoding="utf-8") == captured("grid 8").to_dot()
    _, out = command(capsys, *arguments, "--rank", "5", "--collectives")
    assert out.out.startswith(f"wrote {picture}\ngraph ")
    assert picture.read_text(encoding="utf-8") == captured("grid 8").to_svg(rank=5)


def test_command_draws_and_compares(capsys, tmp_path):
    picture = tmp_path / "mlp.svg"
    arguments = [f"{FILE}:mlp", "--stage", "backward", "--svg", str(picture)]
    code, out = command(capsys, *arguments, "--diff", f"{FILE}:mlp")
    assert code == 0 and out.out == f"wrote {picture}\nno difference\n"
    groups = list(ET.fromstring(picture.read_text(encoding="utf-8")).iter(f"{SVG}g"))
    assert [s.findtext(f"{SVG}text") for s in of_kind(groups, "section")] == ["backward"]


def test_command_cannot_write(capsys, tmp_path):
    file = tmp_path / "nowhere" / "grid.svg"
    for flag in ("--svg", "--dot"):
        code, out = command(capsys, f"{FILE}:grid", flag, str(file))
        assert code == 2 and out.out == ""
        assert out.err == (
            f"localtensor graph: cannot write {file}: No such file or directory. Name a file in a "
            "folder that there is and that you may write to.\n"
        )


def test_stages_that_are_not_drawn(capsys, tmp_path):
    file = tmp_path / "grid.svg"
    code, out = command(capsys, f"{FILE}:grid", "--stage", "dynamo", "--svg", str(file))
    assert code == 2 and not file.exists()
    assert out.err == (
        "localtensor graph: there is no graph to draw: of stage=dynamo nothing is of each rank. "
        "Capture 'joint', 'forward' or 'backward' too.\n"
    )
    with pytest.raises(lt.CaptureError, match="there is no rank 4 in a world of 4 ranks"):
        captured("uneven 4").to_dot(rank=4)


# ---------------------------------------------------------------- documentation
def test_drawing_in_the_readme():
    file = ROOT / "docs" / "examples" / "functional_collectives.svg"
    program = load_program(str(file.with_suffix(".py")))
    assert file.read_text(encoding="utf-8") == lt.capture(program, 4).to_svg(), (
        f"write it anew: localtensor graph {file.with_suffix('.py')} --nproc-per-node 4 --svg ..."
    )
    assert "docs/examples/functional_collectives.svg" in (ROOT / "README.md").read_text()
