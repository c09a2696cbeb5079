"""Golden text: ranges, folding, reading, explaining a change, files and literals."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import localtensor_compile as lt
from localtensor_compile.golden.diff import explain, explanation
from localtensor_compile.golden.ranges import (
    at_rank,
    parse_ranks,
    rank_set,
    split_at,
    varying_text,
)
from localtensor_compile.golden.text import read, write


# ---------------------------------------------------------------- ranges
@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([0], "0"),
        ([0, 1, 2], "0-2"),
        ([0, 1, 2, 5], "0-2,5"),
        ([0, 2], "0,2"),
        ([0, 2, 4, 6], "0-6:2"),
        ([1, 5, 9, 13], "1-13:4"),
        (range(64), "0-63"),
        ([0, 4, 5, 6], "0,4-6"),
    ],
)
def test_sets_of_ranks(ranks, text):
    assert rank_set(ranks) == text
    assert parse_ranks(text) == tuple(ranks)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({0: "a", 1: "a"}, "a"),
        ({0: "43", 1: "43", 2: "42"}, "{0-1: 43, 2: 42}"),
        ({0: "0", 1: "4", 2: "8"}, "{4*rank}"),
        ({0: "1", 1: "2"}, "{rank + 1}"),
        ({0: "4", 1: "2", 2: "0"}, "{0: 4, 1: 2, 2: 0}"),
        ({2: "0", 3: "5"}, "{5*rank - 10}"),
        ({0: "split[0]", 1: "split[1]"}, "split[{rank}]"),
        ({0: "[0, 1]", 1: "[1, 0]"}, "{0: [0, 1], 1: [1, 0]}"),
        ({0: "x1", 1: "x2"}, "{0: x1, 1: x2}"),
    ],
)
def test_values_that_differ(values, text):
    assert varying_text(values) == text
    assert {rank: at_rank(text, rank) for rank in values} == values


def test_one_rank_of_a_line():
    line = "aten.slice(x, {0-1: [1, {rank}], 2: [9, 9]}, {0,2: a, 1: b})"
    assert at_rank(line, 1) == "aten.slice(x, [1, 1], b)"
    assert at_rank(line, 2) == "aten.slice(x, [9, 9], a)"


def test_splitting_leaves_brackets_and_strings_alone():
    assert split_at("a, [b, c], 'd, e', {0: f, 1: g}", ", ") == [
        "a",
        "[b, c]",
        "'d, e'",
        "{0: f, 1: g}",
    ]


# ---------------------------------------------------------------- reading and explaining
TEXT = textwrap.dedent("""\
    world of 4 ranks
    group dp: 0,2; 1,3
    group tp: 0-1; 2-3

    forward
        x: f32[3, 6] = input
        w: f32[6, {0-2: 3, 3: 2}] = parameter
        # forward: h = F.gelu(x @ w)
        mm: f32[3, {0-2: 3, 3: 2}] = aten.mm(x, w)
        gelu: f32[3, {0-2: 3, 3: 2}] = aten.gelu(mm)
        # forward: return funcol.all_reduce(h, "sum", tp)
        constant_pad_nd: f32[3, 3] = aten.constant_pad_nd(gelu, [0, 1]) @ 3
        all_reduce: f32[3, 3] = all_reduce({0-2: gelu, 3: constant_pad_nd}, sum, tp)  # 36 bytes
        slice: f32[3, 1] = aten.slice(all_reduce, 1, {rank}, {rank + 1})
        neg: f32[3, 1] = aten.neg(slice)
        return[0](neg)
    """)


def test_text_is_read_back():
    assert write(read(TEXT)) == TEXT


CHANGES = {
    "nothing": ("", "", None),
    "removed": (
        "    neg: f32[3, 1] = aten.neg(slice)\n    return[0](neg)",
        "    return[0](slice)",
        ("removed", "aten.neg", (0, 1, 2, 3)),
    ),
    "reduce op": (", sum, tp)", ", max, tp)", ("changed", "all_reduce", (0, 1, 2, 3))),
    "group": (", sum, tp)", ", sum, dp)", ("changed", "all_reduce", (0, 1, 2, 3))),
    "one rank's slice": (
        "1, {rank}, {rank + 1})",
        "1, {0: 0, 1: 1, 2: 2, 3: 0}, {0: 1, 1: 2, 2: 3, 3: 1})",
        ("changed", "aten.slice", (3,)),
    ),
    "one rank's shape": (
        "gelu: f32[3, {0-2: 3, 3: 2}]",
        "gelu: f32[3, {0-1: 3, 2-3: 2}]",
        ("changed", "aten.gelu", (2,)),
    ),
    "who pads": ("[0, 1]) @ 3", "[0, 1]) @ 2-3", ("changed", "aten.constant_pad_nd", (2,))),
    "the groups": ("group tp: 0-1; 2-3", "group tp: 0-3", ("world", "group tp", (0, 1, 2, 3))),
    "an input": (
        "x: f32[3, 6] = input",
        "x: f32[5, 6] = input",
        ("changed", "input", (0, 1, 2, 3)),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_explanation(name):
    old, new, expected = CHANGES[name]
    assert old in TEXT
    found = explain(read(TEXT), read(TEXT.replace(old, new) if old else TEXT))
    if expected is None:
        assert found == []
    else:
        assert (found[0].kind, found[0].op, found[0].ranks) == expected, list(map(str, found))


def test_sentences():
    new = read(TEXT.replace(", sum, tp)", ", max, tp)").replace("aten.gelu(mm)", "aten.relu(mm)"))
    assert explanation(read(TEXT), new).splitlines() == [
        "forward, ranks 0-3: aten.gelu(mm) was removed  [forward: h = F.gelu(x @ w)]",
        "forward, ranks 0-3: aten.relu(mm) was added  [forward: h = F.gelu(x @ w)]",
        "forward, ranks 0-3: all_reduce({0-2: gelu, 3: constant_pad_nd}, sum, tp) became "
        "all_reduce({0-2: gelu, 3: constant_pad_nd}, max, tp)  "
        '[forward: return funcol.all_reduce(h, "sum", tp)]',
    ]
    renamed = re.sub(r"(?<![.\w])mm\b", "product", TEXT)
    assert explanation(read(TEXT), read(renamed)).startswith("only names or comments changed")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"FILE, line 1: expected `world of N ranks`, found ''.*EXPECTTEST_ACCEPT=1"),
        ("world of 2 ranks\n\n    x = input\n", r"FILE, line 3 is no line of golden text: 'x = in"),
        (
            "world of 2 ranks\n<<<<<<< HEAD\nforward\n=======\n",
            r"FILE, line 2: a merge conflict \(<<<<<<<\)\. Resolve it",
        ),
        ("world of 2 ranks\n\nforward\n    y: f32[1] = f(x\n", "FILE, line 4 is no line of golden"),
    ],
)
def test_text_that_cannot_be_read(text, message):
    with pytest.raises(lt.GoldenError, match=message):
        read(text, "FILE")


# ---------------------------------------------------------------- files and literals
@pytest.fixture
def accept(monkeypatch):
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    return monkeypatch


@pytest.fixture(autouse=True)
def compare(monkeypatch):
    monkeypatch.delenv("EXPECTTEST_ACCEPT", raising=False)


def test_file_is_compared_and_accepted(tmp_path, monkeypatch):
    file = tmp_path / "graphs" / "mlp.txt"
    with pytest.raises(lt.GoldenMismatch, match=r"no golden file .*mlp\.txt\. Write it with EXPEC"):
        lt.assert_golden(TEXT, file)
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    lt.assert_golden(TEXT, file)
    monkeypatch.delenv("EXPECTTEST_ACCEPT")
    lt.assert_golden(TEXT, file)
    assert file.read_text() == TEXT and list(file.parent.iterdir()) == [file]
    with pytest.raises(lt.GoldenMismatch) as error:
        lt.assert_golden(TEXT.replace(", sum, tp", ", max, tp"), file)
    text = str(error.value)
    assert "forward, ranks 0-3: all_reduce(" in text and "became all_reduce(" in text
    assert "-    all_reduce: f32[3, 3]" in text and "run again with EXPECTTEST_ACCEPT=1" in text
    assert file.read_text() == TEXT


@pytest.mark.parametrize("found", ["<<<<<<< HEAD\n", "my notes\n"])
def test_files_that_are_no_goldens_are_not_overwritten(tmp_path, accept, found):
    file = tmp_path / "notes.txt"
    file.write_text(found)
    with pytest.raises(lt.GoldenError, match=r"notes\.txt, line 1"):
        lt.assert_golden(TEXT, file)
    assert file.read_text() == found


def test_literal_is_compared():
    lt.assert_expected_inline(TEXT, TEXT)
    with pytest.raises(lt.GoldenMismatch, match="neg"):
        lt.assert_expected_inline(TEXT.replace("aten.neg", "aten.abs"), TEXT)


def test_literals_are_not_accepted_by_several_processes(accept):
    accept.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(lt.GoldenError, match=r"pytest-xdist cannot do.*without -n"):
        lt.assert_expected_inline(TEXT, "")


def test_literal_is_rewritten(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import localtensor_compile as lt\n"
        f"TEXT = {TEXT!r}\n"
        'lt.assert_expected_inline(TEXT, """""")\n'
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    run = lambda **more: subprocess.run(
        [sys.executable, str(file)], env={**environment, **more}, capture_output=True, text=True
    )
    assert "the golden text is empty" in run().stderr
    assert run(EXPECTTEST_ACCEPT="1").returncode == 0
    assert 'inline(TEXT, """\\\nworld of 4 ranks' in file.read_text()
    assert run().returncode == 0


class TestCase(lt.GoldenTestCase):
    """As a user's test class."""

    def test_literal(self):
        self.assertExpectedInline("plain text", """plain text""")
        with pytest.raises(AssertionError):
            self.assertExpectedInline("plain text", """other text""")

    def test_file(self):
        with pytest.raises(lt.GoldenMismatch, match=r"graphs/golden/file\.txt"):
            self.assertGolden(TEXT)


# ---------------------------------------------------------------- other versions of torch
def test_file_of_this_torch(tmp_path, monkeypatch):
    """Written only where the graph is another one, and preferred where it is there."""
    monkeypatch.delenv("EXPECTTEST_ACCEPT", raising=False)
    file = tmp_path / "graph.txt"
    own = tmp_path / f"graph.torch-{'.'.join(torch.__version__.split('.')[:2])}.txt"
    file.write_text(TEXT)
    other = TEXT.replace("aten.mm", "aten.bmm")
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "torch")
    lt.assert_golden(TEXT, file)
    assert not own.exists()
    lt.assert_golden(other, file)
    assert own.read_text() == other and file.read_text() == TEXT
    monkeypatch.delenv("EXPECTTEST_ACCEPT")
    lt.assert_golden(other, file)
    with pytest.raises(lt.GoldenMismatch, match=f"the graph is not that of {own}"):
        lt.assert_golden(TEXT, file)
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    lt.assert_golden(TEXT, file)
    assert not own.exists()
