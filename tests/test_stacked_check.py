"""`lt.check` and `localtensor check` on the stacked layout, and what the layout logs."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import localtensor_compile as lt
from localtensor_compile.check.program import ProgramError


def mlp(world):
    x = world.rank_map(lambda r: torch.arange(12.0).reshape(3, 4).sin() + r)
    w = world.rank_map(lambda r: torch.arange(20.0).reshape(4, 5).cos() / (r + 1))

    def fn(x, w):
        y = (x @ w).relu()
        return torch.distributed._functional_collectives.all_reduce(y, "sum", dist.group.WORLD)

    return {"y": world.compile(fn)(x, w), "twice": x * 2}


def wrong_when_stacked(world):
    x = world.rank_map(lambda r: torch.full((3,), float(r)))
    mode = lt.local_tensor_mode()
    return {"y": world.compile(torch.sin)(x) + float(mode.stacked and world._backend is not None)}


def test_a_stacked_run_is_compared():
    report = lt.check(mlp, 3, layout="stacked", backends=["aot_eager"], oracle=None)
    assert report.ok, report
    assert report.layout == json.loads(report.to_json())["layout"] == "stacked"
    assert not any(engine.exact for engine in report.engines)
    assert ", stacked: every engine agrees on every rank." in str(report)
    kinds = {row.kind for row in report.rows if row.output == "twice"}
    assert kinds == {"bit-equal"}


def test_a_wrong_stacked_run_fails():
    report = lt.check(wrong_when_stacked, 2, layout="stacked", backends=["aot_eager"], oracle=None)
    assert not report.ok
    assert {row.kind for row in report.rows} == {"WRONG"}


@pytest.mark.gloo
def test_against_real_processes():
    report = lt.check(mlp, 2, layout="stacked", backends=["aot_eager"])
    assert report.ok, report


def test_auto_is_the_layout_that_it_chooses():
    assert lt.check(mlp, 2, layout="auto", backends=["dynamo"], oracle=None).layout == "per_rank"


def test_unknown_layout():
    with pytest.raises(ProgramError, match=r"unknown layout 'rows'.*per_rank, stacked, auto"):
        lt.check(mlp, 2, layout="rows", oracle=None)


# ---------------------------------------------------------------- what goes per rank
def test_an_op_without_a_batching_rule_is_counted():
    """vmap's own loop over the ranks is never taken: the op runs per rank, and that is counted."""
    library = torch.library.Library("stacked_check", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    with lt.LocalTensorMode(3, layout="stacked") as mode:
        x = lt.rank_map(lambda r: torch.full((2,), float(r)))
        y = torch.ops.stacked_check.twice(x)
        assert [y._local_tensors[r].tolist() for r in range(3)] == [[0, 0], [2, 2], [4, 4]]
        assert mode.stats()["per_rank"] == {"stacked_check.twice.default": 1}


def test_the_log_names_ops_that_go_per_rank():
    program = "\n".join(
        [
            "import torch, localtensor_compile as lt",
            "with lt.LocalTensorMode(2, layout='stacked'):",
            "    torch.ones(4).nonzero()",
        ]
    )
    env = {k: v for k, v in os.environ.items() if k != "TORCH_LOGS"}
    env["TORCH_LOGS"] = "+localtensor_compile.stacked"
    run = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    expected = "aten.nonzero.default runs once per rank: what it returns depends on the data"
    assert expected in run.stderr
