"""The benchmarks: their arithmetic, their sections and plots; what they time is not timed here."""

from __future__ import annotations

import importlib
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import against_jax, apart, models, report, timing, worlds
from tests.benchmarks.plot import Plot, svg
from tests.benchmarks.report import Bound, Section

SLOW = ("graph_nodes", "compile_time", "against_torch", "checking", "thousand_ranks")


def section(name="checking", **changes):
    values = {
        "name": name,
        "title": "Checking",
        "text": "How long.",
        "columns": ("what", "W"),
        "rows": [["check", "2"]],
        "threads": 1,
    }
    return Section(**(values | changes))


# ---------------------------------------------------------------- what is computed
@pytest.mark.parametrize("model", [models.mlp_model(3, 5, 7), models.block_model(2, 6, 64)])
def test_batched_form_is_the_same_program(model):
    ranks = 3
    operands = [t.double().detach() for t in models.stacked_operands(model, ranks)]
    batched = [t.clone().requires_grad_(i > 0) for i, t in enumerate(operands)]
    model.batched(*batched).sum().backward()
    for rank in range(ranks):
        mine = [t[rank].clone().requires_grad_(i > 0) for i, t in enumerate(operands)]
        loss = model.per_rank(*mine)
        loss.backward()
        torch.testing.assert_close(loss, model.batched(*batched)[rank])
        for one, all_ranks in zip(mine[1:], batched[1:]):
            torch.testing.assert_close(one.grad, all_ranks.grad[rank])


@pytest.mark.parametrize("layout", [worlds.STACKED, worlds.PER_RANK])
def test_contestants_hold_the_same_numbers(layout):
    model, ranks = models.mlp_model(3, 5, 7), 2
    stacked = models.stacked_operands(model, ranks)
    expected = model.batched(*stacked)
    world = worlds.mode(ranks, layout)
    with world:
        operands = [worlds.local(world, t) for t in stacked]
        loss = model.per_rank(*operands)
    for rank in range(ranks):
        torch.testing.assert_close(loss._local_tensors[rank], expected[rank])


@pytest.mark.parametrize("build", [models.tp_mlp, models.fsdp_mlp])
def test_sharded_modules_compute_the_whole(build):
    ranks, tokens, width, hidden = 2, 3, 4, 8
    whole = against_jax.wave(width, hidden, 2), against_jax.wave(hidden, width, 3)
    x = against_jax.wave(tokens, width, 1)
    world = worlds.mode(ranks)
    with world:
        torch.manual_seed(0)
        if build is models.tp_mlp:
            y = build(ranks, width, hidden, whole)(world.rank_map(lambda rank: x))
        else:
            model = build(ranks, width, hidden)
            y = model(world.rank_map(lambda rank: x))
            names = ("up", "down")
            full = [getattr(model, n).parametrizations.weight.original for n in names]
            whole = [w.full_tensor().detach().reconcile().t() for w in full]
    expected = torch.relu(x @ whole[0]) @ whole[1]
    for rank in range(ranks):
        torch.testing.assert_close(y._local_tensors[rank].detach(), expected)


def test_tensor_parallel_by_hand():
    width, hidden, ranks = 4, 8, 2
    w1, w2 = against_jax.wave(width, hidden, 2), against_jax.wave(hidden, width, 3)
    x = against_jax.wave(3, width, 1)
    loss = models.tp_mlp_batched(
        x.expand(ranks, -1, -1),
        w1.reshape(width, ranks, -1).permute(1, 0, 2),
        w2.reshape(ranks, -1, width),
    )
    y = torch.relu(x @ w1) @ w2
    torch.testing.assert_close(loss, (y * y).sum().expand(ranks))


def test_medians_take_turns():
    calls = []
    found = timing.single({n: lambda n=n: calls.append(n) or len(calls) for n in "ab"}, rounds=3)
    assert calls == list("ababab")
    assert found == {"a": 3, "b": 4}


# ---------------------------------------------------------------- what is written
def test_bounds():
    assert Bound("c", 10.0, at_least=10).kept and not Bound("c", 9.9, at_least=10).kept
    assert Bound("c", 1.1, at_most=1.1).kept and not Bound("c", 1.11, at_most=1.1).kept
    assert Bound("c", 59.0, at_most=60, unit=" s").row() == ["c", "at most 60 s", "59.0 s", "kept"]
    assert Bound("c", 9.0, at_least=10).row() == ["c", "at least 10x", "9.00x", "**missed**"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234, "1234")],
)
def test_figures(value, text):
    assert report.figure(value) == text


def test_markdown(monkeypatch):
    monkeypatch.setattr(report, "machine", lambda threads: f"a date, {threads} thread")
    plot = Plot("Curve", "s", {"a": {2: 1.0, 8: 2.0}})
    text = section(bounds=[Bound("fast", 12.0, at_least=10)], plot=plot).markdown()
    assert_expected_inline(
        text,
        """\
## Checking

How long.

| what | W |
| --- | --- |
| check | 2 |

| claim | bound | measured |  |
| --- | --- | --- | --- |
| fast | at least 10x | 12.0x | kept |

![Curve](benchmarks/checking.svg)

a date, 1 thread. `python -m tests.benchmarks checking`.""",
    )


def test_machine_names_no_host():
    text = report.machine(1)
    assert torch.__version__ in text and "1 thread" in text
    assert os.uname().nodename not in text


def test_sections_are_replaced_and_keep_their_order(tmp_path):
    file = tmp_path / report.FILE
    file.write_text("# Benchmarks\n\nWords.\n")
    order = ("first", "second", "third")
    report.write(section("third", text="old"), order, tmp_path)
    plot = Plot("Curve", "s", {"a": {2: 1.0, 8: 2.0}})
    report.write(section("first", plot=plot), order, tmp_path)
    report.write(section("third", text="new"), order, tmp_path)
    head, found = report.read(file)
    assert head.strip() == "# Benchmarks\n\nWords."
    assert list(found) == ["first", "third"]
    assert "new" in found["third"] and "old" not in found["third"]
    assert [p.name for p in (tmp_path / report.PLOTS).iterdir()] == ["first.svg"]
    with pytest.raises(ValueError, match="no benchmark is named 'fourth': first, second, third"):
        report.write(section("fourth"), order, tmp_path)


def test_documented_sections_are_those_of_the_scripts():
    _, found = report.read(report.DOCS / report.FILE)
    assert set(found) <= set(benchmarks.NAMES)
    for name, text in found.items():
        linked = f"]({report.PLOTS}/{name}.svg)" in text
        assert linked == (report.DOCS / report.PLOTS / f"{name}.svg").exists()


def test_plot():
    curves = {"a < b": {1: 1.0, 8: 30.0, 64: 900.0}, "flat": {1: 2.0, 64: 2.0}}
    root = ElementTree.fromstring(svg(Plot("Title", "ms", curves)))
    space = "{http://www.w3.org/2000/svg}"
    texts = [t.text for t in root.iter(f"{space}text")]
    assert texts[0] == "Title (ms)" and {"a < b", "flat", "1", "8", "64", "1000"} <= set(texts)
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{space}circle")]
    assert len(dots) == 5
    assert dots[0][0] == dots[3][0] and dots[2][0] == dots[4][0]  # same ranks
    assert dots[0][1] > dots[1][1] > dots[2][1] and dots[3][1] == dots[4][1]  # upwards
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    with pytest.raises(ValueError, match="a logarithmic plot needs positive figures"):
        svg(Plot("Title", "ms", {"a": {1: 0.0}}))


# ---------------------------------------------------------------- the scripts
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in benchmarks.NAMES]
)
def test_script_runs_on_tiny_sizes(name, monkeypatch):
    monkeypatch.delenv("JAX_PYTHON", raising=False)
    found = benchmarks.run(name, quick=True)
    if name == "against_jax":
        assert found == "JAX_PYTHON names no Python that has jax"
        return
    assert found.name == name and found.rows
    assert {len(row) for row in found.rows} == {len(found.columns)}
    if found.plot is not None:
        ElementTree.fromstring(svg(found.plot))


def test_quick_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "run", lambda name, quick: section(name))
    assert benchmarks.main(["checking", "--quick", "--docs", str(tmp_path)]) == 0
    assert "## Checking" in capsys.readouterr().out and not list(tmp_path.iterdir())
    (tmp_path / report.FILE).write_text("# Benchmarks\n")
    assert benchmarks.main(["checking", "--docs", str(tmp_path)]) == 0
    assert "<!-- benchmark checking -->" in (tmp_path / report.FILE).read_text()


def test_unknown_and_skipped(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["speed"])
    assert "no benchmark named speed; there are graph_nodes, " in capsys.readouterr().err
    monkeypatch.setattr(benchmarks, "run", lambda name, quick: "no jax here")
    assert benchmarks.main(["against_jax"]) == 0
    assert capsys.readouterr().out == "against_jax: skipped: no jax here\n"


def test_every_script_is_run_in_a_process_of_its_own(monkeypatch, tmp_path):
    commands = []

    class Done:
        returncode = 0

    monkeypatch.setattr(
        benchmarks.subprocess, "run", lambda command, **k: commands.append(command) or Done
    )
    assert benchmarks.main(["--quick", "--docs", str(tmp_path)]) == 0
    assert [c[3] for c in commands] == list(benchmarks.NAMES)
    assert {tuple(c[:3]) for c in commands} == {(sys.executable, "-m", "tests.benchmarks")}
    assert all(c[-1] == "--quick" for c in commands)
    Done.returncode = 1
    assert benchmarks.main(["memory", "checking"]) == 1


def test_every_script_is_named():
    folder = Path(benchmarks.__file__).parent
    scripts = {
        file.stem for file in folder.glob("*.py") if "\ndef run(quick: bool)" in file.read_text()
    }
    assert scripts == set(benchmarks.NAMES)
    assert all(importlib.import_module(f"tests.benchmarks.{n}").__doc__ for n in scripts)


def test_a_measurement_apart_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"No module named tests\.benchmarks\.nothing"):
        apart.run_apart("nothing", 2)
