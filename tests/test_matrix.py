"""matrix(): degrees of parallelism against the unsharded model, and its command."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline

from localtensor_compile import CheckFailed, LocalTensorMode, ProgramError, World, matrix
from localtensor_compile.check.program import Program, load_program
from localtensor_compile.cli import main
from tests import matrix_programs as programs

FILE = str(Path(programs.__file__))
SIMULATED = {"oracle": None, "backends": ("eager", "aot_eager")}


def cells(report):
    return {(*c.degrees[:2], c.engine): c.kind for c in report.cells}


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_right_program():
    report = matrix(programs.program, dp=(1, 2), tp=(1, 2, 4), backends=("eager", "aot_eager"))
    assert report.ok and not report.wrong, str(report)
    kinds = cells(report)
    assert len(kinds) == 12
    assert kinds[1, 1, "eager"] == kinds[1, 1, "aot_eager"] == "bit-equal"
    assert report.reference == "the unsharded model (one real process)"
    for cell in report.cells:
        assert (cell.graphs, cell.graph_breaks) == (
            (None, None) if cell.engine == "eager" else (1, 0)
        )
        assert cell.relative < 1e-6
    report.raise_if_failed()


def test_forgotten_average_is_wrong_where_it_matters():
    report = matrix(programs.forgets_to_average, dp=(1, 2), tp=(1, 2), **SIMULATED)
    assert report.wrong
    for (dp, _, _), kind in cells(report).items():
        assert (kind == "WRONG") == (dp == 2)
    wrong = {d.output for c in report.cells for d in c.differences if d.wrong}
    assert wrong == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert re.search(
        r"dp=2, eager: 0\.weight, ranks 0-1: differs by \d\.\de[-+]\d+ of its", str(report)
    )
    assert str(report).endswith(
        "FAIL  forgets_to_average, 4 configurations, 6 outputs against the unsharded model: "
        "dp=2 eager, dp=2 aot_eager, dp=2 tp=2 eager, dp=2 tp=2 aot_eager."
    )
    with pytest.raises(CheckFailed, match="the matrix failed"):
        report.raise_if_failed()


def test_rtol():
    """The loss of tp ranks is off by 1e-3 * (tp - 1)."""
    assert not matrix(programs.depends_on_degree, dp=(1,), **SIMULATED).ok
    report = matrix(programs.depends_on_degree, dp=(1,), rtol=0.1, **SIMULATED)
    assert report.ok
    assert not matrix(programs.program, dp=(1,), tp=(2,), rtol=0.0, **SIMULATED).ok


def test_outputs_that_cannot_be_compared():
    report = matrix(programs.other_outputs, dp=(1,), tp=(1, 2), **SIMULATED)
    _, _, eager, _ = report.cells
    assert {d.output: (d.relative, d.wrong) for d in eager.differences} == dict.fromkeys(
        ("shape", "dtype", "old", "new"), (math.inf, True)
    )
    text = str(report)
    assert "shape, ranks 0-1: shape: torch.float32 [2], unsharded torch.float32 [1]" in text
    assert "dtype, ranks 0-1: dtype: torch.float64 [2], unsharded torch.float32 [2]" in text
    assert "old, ranks 0-1: only the unsharded model returns it" in text
    assert "new, ranks 0-1: it alone has it" in text


def test_a_run_that_fails():
    report = matrix(programs.fails_sharded, dp=(1,), tp=(1, 2), **SIMULATED)
    assert not report.ok and not report.wrong
    assert cells(report)[1, 2, "eager"] == "fails"
    assert "tp=2, eager failed: ValueError: as planned" in str(report)


REFUSED = {
    "dp zero": (
        programs.program,
        {"dp": (0,)},
        r"dp=\[0\]: degrees of parallelism are ints from 1",
    ),
    "tp empty": (programs.program, {"tp": ()}, r"tp=\[\]: degrees of parallelism"),
    "bool": (programs.program, {"tp": (True,)}, r"tp=\[True\]: degrees of parallelism"),
    "pipeline": (programs.program, {"pp": (1, 2)}, "pipelines are not simulated yet"),
    "engine": (programs.program, {"backends": ("fast",)}, "unknown backend 'fast'"),
    "oracle": (programs.program, {"oracle": "mpi"}, "unknown oracle 'mpi'"),
    "ignored": (programs.never_asks, {}, r"never asks world.degree\('dp'\).* \[1, 2\] of dp"),
    "alone": (programs.fails_alone, {}, "the unsharded model failed: ValueError: as planned"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    program, options, message = REFUSED[name]
    with pytest.raises(ProgramError, match=message):
        matrix(program, **{**SIMULATED, **options})


def test_refused_inside_a_world():
    with LocalTensorMode(2), pytest.raises(ProgramError, match="a process group already exists"):
        matrix(programs.program, **SIMULATED)


def test_degrees_of_a_world():
    world = World(4)
    assert (world.degree("dp"), world.degree("tp"), world.degree("pp")) == (1, 4, 1)
    assert world.asked == {"dp", "tp", "pp"}
    assert World(4, degrees={"dp": 4}).degree("tp") == 1
    with pytest.raises(ProgramError, match=r"degree\('ep'\): the names are dp, tp, pp"):
        world.degree("ep")


# ---- the command
def test_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    quick = ["--oracle", "none", "--backend", "eager", "--dp", "1", "--tp", "1,2"]
    assert main(["matrix", f"{FILE}:program", *quick]) == 0
    out, err = capsys.readouterr()
    out = re.sub(r"close \de-\d+", "close 1e-07", out).replace(FILE, "FILE")
    assert_expected_inline(
        out,
        """\
dp  tp  pp  ranks  eager
--  --  --  -----  -----------
1   1   1   1      bit-equal
1   2   1   2      close 1e-07

PASS  FILE:program, 2 configurations, 6 outputs against the unsharded model.
""",
    )
    assert "tp=2 eager: close" in err
    assert main(["matrix", f"{FILE}:depends_on_degree", *quick]) == 1
    assert main(["matrix", f"{FILE}:depends_on_degree", *quick, "--rtol", "0.1"]) == 0
    assert main(["matrix", f"{FILE}:fails_sharded", *quick]) == 1
    capsys.readouterr()
    assert main(["matrix", f"{FILE}:never_asks", *quick]) == 2
    assert "localtensor matrix: " in capsys.readouterr().err
    assert main(["matrix", f"{FILE}:other_outputs", *quick, "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == 1 and not found["ok"]
    assert found["cells"][1]["tp"] == 2 and found["cells"][1]["kind"] == "WRONG"
    assert found["cells"][1]["differences"][0]["relative"] == "inf"


@pytest.mark.parametrize("argument", ("0", "a", ""))
def test_bad_degrees(argument, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["matrix", f"{FILE}:program", "--tp", argument])
    assert exit.value.code == 2
    assert "is no list of degrees: ints from 1, as in 1,2" in capsys.readouterr().err


# ---- the demo
SMALL = {
    "layers": 1, "dim": 16, "heads": 4, "hidden": 30, "batch": 2, "length": 8, "steps": 2,
}  # fmt: skip


def test_demo_transformer(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    load_program(str(Path(__file__).parents[1] / "docs" / "examples" / "tp_transformer.py"))
    module = sys.modules["tp_transformer"]
    program = functools.partial(module.program, config=module.Config(**SMALL))
    report = matrix(Program(program, "small"), dp=(2,), tp=(1, 2), **SIMULATED)
    assert report.ok, str(report)


# ---- found with it
def test_view_whose_size_1_has_another_stride():
    """`view` computes the stride of a dimension of size 1, its fake keeps that of the base."""
    with LocalTensorMode(2) as mode:
        x = torch.as_strided(mode.rank_map(lambda r: torch.ones(9) * r), (1, 8), (9, 1))
        view = x.view_as(x)
        assert (x.stride(), view.stride()) == ((9, 1), (8, 1))
        for dynamic in (False, True):
            torch._dynamo.reset()
            out = torch.compile(lambda t: t * 3, backend="aot_eager", dynamic=dynamic)(view)
            for rank, shard in out._local_tensors.items():
                assert torch.equal(shard, torch.full((1, 8), 3.0 * rank))
