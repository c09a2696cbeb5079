"""The compiled DTensor scoreboard: choices, verdicts, attribution with planted faults, workers."""

import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from localtensor_compile.cli import main
from localtensor_compile.scoreboard import attribution, engines, ops, table, workers
from localtensor_compile.scoreboard.cases import Case, cases_of
from localtensor_compile.scoreboard.engines import HANGS, Result
from localtensor_compile.scoreboard.measure import Plan, Steps, label, measure
from localtensor_compile.scoreboard.repro import HEADER, repro
from localtensor_compile.scoreboard.shardings import is_uneven, shardings, text
from localtensor_compile.scoreboard.store import Store
from localtensor_compile.scoreboard.verdicts import is_right, judge, same_bits
from localtensor_compile.values import op_table

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]

DOCS = Path(__file__).parents[1] / "docs" / "scoreboard.md"


# ---------------------------------------------------------------- which cases
@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([], []),
        ([()], ["R"]),
        ([(4,)], ["S(0)", "R"]),
        ([(4, 6)], ["S(0)", "S(1)", "R"]),
        ([(4, 6), ()], ["S(0) R", "S(1) R", "R R"]),
        (
            [(4,), (4,)],
            ["S(0) S(0)", "S(0) R", "R S(0)", "R R"],
        ),
        (
            [(4,), (5,)],
            ["S(0) R", "R S(0)", "S(0) S(0)", "R R"],
        ),
        # A scalar first: the largest of the others leads.
        ([(), (4, 4), (4, 4)], ["R S(0) S(0)", "R S(1) S(1)", "R S(0) R", "R S(1) R"]),
    ],
)
def test_shardings_in_order(shapes, expected):
    found = shardings(shapes, 100)
    assert len(set(found)) == len(found)
    assert [text(s) for s in found[: len(expected)]] == expected
    assert shapes == [] or (None,) * len(shapes) in found


def test_shardings_are_all_of_two_tensors_and_bounded():
    shapes = [(4, 6), (6, 4)]
    assert len(shardings(shapes, 100)) == 9  # {S(0), S(1), R} for each
    assert shardings(shapes, 4) == shardings(shapes, 100)[:4]
    assert len(shardings([(3, 3, 3)] * 200, 50)) == 50  # and takes no time


def test_uneven_is_about_sharded_dimensions_only():
    assert not is_uneven([(4, 5)], (0,), 4)
    assert is_uneven([(4, 5)], (1,), 4)
    assert is_uneven([(4, 4), (3,)], (0, 0), 2)
    assert not is_uneven([(3, 3)], (None,), 2)


def test_every_op_has_a_dtype_or_none_on_cpu():
    found = {name: ops.dtype_of(name) for name in ops.database()}
    assert len(found) > 600
    assert found["add"] is torch.float32
    assert found["bitwise_and"] is torch.int64
    assert found["view_as_real"] is torch.complex64


def test_samples_are_the_same_in_every_process_and_leave_nothing_behind():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    first = ops.samples("nn.functional.linear", "uneven", 2)
    drawn = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    ops.samples.cache_clear()
    second = ops.samples("nn.functional.linear", "uneven", 2)
    again = torch.rand(2), random.random(), np.random.rand()
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]
    assert len(first) == 2
    for a, b in zip(first, second):
        assert all(map(torch.equal, a.tensors, b.tensors))
        assert any(t.requires_grad for t in a.tensors)
    import torch.testing._internal.common_methods_invocations as common

    assert (common.S, common.M) == (5, 10)


def test_even_and_uneven_sizes():
    for world_size in (2, 4):
        even = [c for c in cases_of("abs", "even", 2, 5) if any(d is not None for d in c.sharding)]
        uneven = [c for c in cases_of("abs", "uneven", 2, 5) if c.sharding == (0,)]
        for cases, expected in ((even, False), (uneven, True)):
            shapes = [[tuple(t.shape) for t in c.load().tensors] for c in cases]
            assert cases
            assert {is_uneven(s, c.sharding, world_size) for s, c in zip(shapes, cases)} == {
                expected
            }


# ---------------------------------------------------------------- verdicts
def result(*forward, backward=None, error=None):
    return Result(list(forward), backward, error)


def test_verdict_is_that_of_the_worst_rank():
    x = torch.ones(3)
    off = torch.tensor([1.0, 1.0, 2.0])
    forward, backward = judge({0: result(x), 1: result(off)}, result(x))
    assert (forward.kind, backward.kind) == ("wrong", "none")
    assert forward.reason == (
        "rank 1: 1 of 3 values differ, by up to 1; the first at [2]: 2.0 instead of 1.0"
    )


@pytest.mark.parametrize(
    ("value", "expected", "kind"),
    [
        (torch.ones(2), torch.ones(2), "equal"),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), "equal"),
        (torch.ones(2) + 1e-6, torch.ones(2), "close"),
        # An order of summing errs by what is added up, not by what is left.
        (torch.tensor([1e4, 0.05]), torch.tensor([1e4, 0.0]), "close"),
        (torch.tensor([1.0, 1e-3]), torch.tensor([1.0, 0.0]), "wrong"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "wrong"),
        (torch.ones(2), torch.ones(3), "wrong"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "wrong"),
        (torch.tensor(float("inf")), torch.tensor(1.0), "wrong"),
        (3, 3, "equal"),
        (torch.tensor(3), 3, "equal"),
        (True, False, "wrong"),
        (None, torch.zeros(2), "equal"),  # a gradient that is left out
        (None, torch.ones(2), "wrong"),
    ],
)
def test_verdict_of_one_value(value, expected, kind):
    found = judge({0: result(value)}, result(expected))[0]
    assert found.kind == kind, found
    assert (found.error is None) == (kind in ("equal",) or found.error is None)


def test_random_values_need_shape_and_dtype():
    draw = torch.rand(3)
    assert judge({0: result(draw)}, result(torch.rand(3)), random=True)[0].kind == "random"
    verdict = judge({0: result(draw)}, result(torch.rand(4)), random=True)[0]
    assert (verdict.kind, verdict.reason) == ("wrong", "rank 0: float32[3] instead of float32[4]")


def test_missing_gradients_and_errors():
    x = torch.ones(1)
    with_gradient = result(x, backward=[x])
    assert judge({0: result(x)}, with_gradient)[1].kind == "wrong"
    assert judge({0: with_gradient}, result(x))[1].kind == "wrong"
    failed = judge({0: Result(error="E: no")}, with_gradient)
    assert [(v.kind, v.reason) for v in failed] == [("fails", "E: no"), ("none", None)]
    failed = judge({0: Result([x], None, "E: no")}, with_gradient)
    assert [(v.kind, v.reason) for v in failed] == [("equal", None), ("fails", "E: no")]


# ---------------------------------------------------------------- whose fault
RIGHT, WRONG = result(torch.ones(2)), result(torch.zeros(2))
OTHER = result(torch.full((2,), 5.0))
FAILED = Result(error="E: no")
HUNG = Result(error=HANGS)
CASE = Case("abs", "even", 0, 2, (0,))


@pytest.mark.parametrize(
    ("found", "real", "fault", "evidence"),
    [
        (FAILED, FAILED, "DTensor", "real ranks: E: no"),
        (FAILED, HUNG, "DTensor", f"real ranks: {HANGS}"),
        (FAILED, WRONG, "DTensor", "real ranks get a wrong value"),
        (FAILED, RIGHT, "ours", "real ranks get it right"),
        (WRONG, WRONG, "DTensor", "real ranks get the same values"),
        (WRONG, RIGHT, "ours", "real ranks get it right"),
        (WRONG, OTHER, "ours", "real ranks get it wrong too, but other values"),
        (WRONG, FAILED, "ours", "a wrong value where real ranks raise E: no"),
    ],
)
def test_fault_of_an_eager_case(found, real, fault, evidence):
    assert attribution.eager_fault({0: RIGHT, 1: found}, {0: RIGHT, 1: real}, RIGHT, False) == (
        fault,
        evidence,
    )


@pytest.mark.parametrize(
    ("backend", "found", "plain", "lower_is_right", "real", "fault"),
    [
        ("aot_eager", FAILED, {"aot_eager": FAILED}, False, RIGHT, "torch.compile"),
        ("aot_eager", WRONG, {"aot_eager": WRONG}, False, RIGHT, "torch.compile"),
        ("inductor", FAILED, {"inductor": FAILED, "aot_eager": RIGHT}, True, RIGHT, "Inductor"),
        ("inductor", FAILED, {"inductor": FAILED}, False, RIGHT, "torch.compile"),
        ("inductor", WRONG, {"inductor": WRONG, "aot_eager": WRONG}, True, RIGHT, "torch.compile"),
        ("aot_eager", FAILED, {"aot_eager": RIGHT}, False, FAILED, "DTensor"),
        ("aot_eager", FAILED, {"aot_eager": RIGHT}, False, WRONG, "DTensor"),
        ("aot_eager", WRONG, {"aot_eager": RIGHT}, False, WRONG, "DTensor"),
        ("inductor", WRONG, {"inductor": RIGHT}, True, WRONG, "Inductor"),
        ("inductor", FAILED, {"inductor": RIGHT}, False, FAILED, "DTensor"),
        ("aot_eager", FAILED, {"aot_eager": RIGHT}, False, RIGHT, "ours"),
        ("aot_eager", WRONG, {"aot_eager": RIGHT}, False, RIGHT, "ours"),
        ("inductor", WRONG, {"inductor": RIGHT}, True, OTHER, "ours"),
        ("inductor", WRONG, {"inductor": RIGHT}, True, FAILED, "ours"),
    ],
)
def test_fault_of_a_compiled_case(backend, found, plain, lower_is_right, real, fault):
    got, _ = attribution.compiled_fault(
        CASE,
        backend,
        {0: found},
        RIGHT,
        False,
        plain=lambda case, backend: plain[backend],
        real=lambda case, backend: {0: real},
        lower_is_right=lower_is_right,
    )
    assert got == fault


def run_measure(op, world_size=2, lost=(), **plan):
    steps = []
    plan = Plan(**{"backends": ("eager",), "samples": 1, "shardings": 2, **plan})
    record = measure(op, world_size, plan, Steps(steps.append, dict(lost)))
    return record, steps


def verdicts(record, backend):
    return [v for c in record["cases"] for v in c["results"].get(backend, ())]


def test_wrong_value_on_one_rank_is_ours(monkeypatch):
    """Planted in the simulation only: real ranks get it right."""
    erf = torch.ops.aten.erf.default
    right = op_table.handler_of(erf)

    def wrong(func, args, kwargs):
        value = right(func, args, kwargs)
        value._local_tensors[1].add_(0.25)
        return value

    monkeypatch.setitem(op_table._chosen, erf, wrong)
    record, steps = run_measure("erf")
    found = verdicts(record, "eager")[0]
    assert (found["kind"], found["fault"]) == ("wrong", "ours")
    assert re.search(r"rank 0: .* by up to 0.25; .* \[real ranks get it right\]", found["reason"])
    assert "eager on real ranks, first" in steps
    assert "2 wrong ; 2= |" in table.row(record, ["eager"])


def test_refusal_that_real_ranks_do_not_have_is_ours(monkeypatch):
    def refuse(func, args, kwargs):
        raise RuntimeError("not on my watch")

    monkeypatch.setitem(op_table._chosen, torch.ops.aten.erf.default, refuse)
    found = verdicts(run_measure("erf")[0], "eager")[0]
    assert (found["kind"], found["fault"]) == ("fails", "ours")
    assert found["reason"] == "RuntimeError: not on my watch [real ranks get it right]"


def test_compiled_refusal_that_real_ranks_do_not_have_is_ours(monkeypatch):
    """Planted where fake tensors run only: eager is right."""
    erf = torch.ops.aten.erf.default
    right = op_table.handler_of(erf)

    def refuse(func, args, kwargs):
        if torch.compiler.is_compiling():
            raise RuntimeError("not on my watch")
        return right(func, args, kwargs)

    monkeypatch.setitem(op_table._chosen, erf, refuse)
    record, _ = run_measure("erf", backends=("eager", "aot_eager"))
    assert {v["kind"] for v in verdicts(record, "eager")} <= {"equal", "close"}
    found = verdicts(record, "aot_eager")[0]
    assert (found["kind"], found["fault"]) == ("fails", "ours")
    assert found["reason"].endswith("[compiled on real ranks: right]")


def test_op_without_a_rule_is_dtensors():
    record, _ = run_measure("cdist", backends=("eager", "aot_eager"))
    message = (
        "NotImplementedError: Operator aten._cdist_forward.default does not have a sharding "
        "strategy registered."
    )
    for verdict in verdicts(record, "eager")[::2]:
        assert (verdict["kind"], verdict["fault"]) == ("fails", "DTensor")
        assert verdict["reason"] == f"{message} [real ranks: {message}]"
    assert verdicts(record, "aot_eager") == []  # what fails in eager is not compiled


def test_value_that_real_ranks_get_wrong_too_is_dtensors():
    """The gradient of a mean over shards, divided by the size of the shard."""
    record, _ = run_measure("nn.functional.soft_margin_loss")
    found = verdicts(record, "eager")[1]
    assert (found["kind"], found["fault"]) == ("wrong", "DTensor")
    assert found["reason"].endswith("[real ranks get the same values]")


def test_op_that_cannot_be_traced_is_torch_compiles():
    record, _ = run_measure("equal", backends=("eager", "aot_eager"))
    assert {v["kind"] for v in verdicts(record, "eager")} == {"equal", "none"}
    found = verdicts(record, "aot_eager")[0]
    assert (found["kind"], found["fault"]) == ("fails", "torch.compile")
    assert "[the unsharded op alike: Unsupported: Data dependent operator]" in found["reason"]


def test_ops_that_are_not_measured_say_why():
    assert run_measure("arange")[0]["reason"] == "takes no tensor: DTensor has no part in it"
    record, _ = run_measure("to_sparse")
    assert record["cases"] or record["reason"]


@pytest.mark.slow
def test_real_ranks_go_on_after_waiting():
    waits = Case("addmv", "uneven", 1, 2, (None, 0, None))
    right = Case("abs", "even", 0, 2, (0,))
    found = engines.real([right, waits, right], 4, None, together=True)
    expected = engines.plain([right])[0]
    assert [is_right(r, expected) for r in found] == [True, False, True]


def test_an_error_of_one_real_rank_names_it():
    case = Case("_native_batch_norm_legit", "uneven", 0, 2, (1, None, None, None, None))
    message = "RuntimeError: input tensor must have at least one element, but got input_sizes = "
    found = engines.real([case], 4, None)[0]
    assert {r.error for r in found.values()} == {f"{message}[5, 0, 5] (only on rank 3)"}
    assert engines.is_divided(found)
    assert engines.simulated([case], 4, None)[0][0].error == f"{message}[5, 0, 5]"


def test_real_ranks_that_wait_for_each_other_are_a_result(monkeypatch):
    monkeypatch.setitem(engines._PATIENCE, None, 0.0)
    found = engines.real([Case("abs", "even", 0, 2, (0,))], 2, None)[0]
    assert {r.error for r in found.values()} == {HANGS}
    assert engines.is_divided(found)


def test_real_ranks_have_the_bits_of_simulated_ones():
    cases = cases_of("nn.functional.linear", "uneven", 1, 4)
    for simulated, real in zip(
        engines.simulated(cases, 4, "aot_eager"), engines.real(cases, 4, None)
    ):
        assert all(same_bits(simulated[r], real[r]) for r in range(4))


# ---------------------------------------------------------------- stopping and going on
def test_steps_that_ended_a_process_are_not_run_again():
    record, steps = run_measure("abs", lost={"eager even 0 S(0)": "timed out after 1 s"})
    assert "eager even 0 S(0)" not in steps and "eager uneven 0 S(0)" in steps
    found = verdicts(record, "eager")[0]
    assert found["reason"] == "timed out after 1 s [real ranks get it right]"


def test_cases_of_an_op_that_times_out_are_left_out():
    late = "timed out after 1 s"
    lost = {"aot_eager all": late, "aot_eager even 0 R": late}
    record, steps = run_measure("exp", lost=lost, backends=("eager", "aot_eager"), shardings=5)
    compiled = [s for s in steps if s.startswith("aot_eager")]
    assert compiled[0] == "aot_eager even 0 S(0)" and "uneven" not in "".join(compiled)
    assert len([c for c in record["cases"] if "aot_eager" in c["results"]]) == 2


def test_store_goes_on_after_a_torn_line(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    store = Store(path, {"samples": 1}, "2.13")
    store.add({"op": "a", "world_size": 2, "plan": {"samples": 1}})
    store.add({"op": "a", "world_size": 4, "plan": {"samples": 1}})
    with path.open("a") as file:
        file.write('{"op": "b", "wor')
    again = Store(path, {"samples": 1}, "2.13")
    assert set(again.records) == {("a", 2), ("a", 4)}
    again.add({"op": "c", "world_size": 2, "plan": {"samples": 1}})
    assert set(Store(path, {"samples": 1}, "2.13").records) == {("a", 2), ("a", 4), ("c", 2)}
    assert not Store(path, {"samples": 2}, "2.13").records
    assert not Store(path, {"samples": 1}, "2.14").records


def planted(op, world_size, plan, steps):
    """In a worker: ops named after what they do."""
    steps.run("first", lambda: None, lambda text: None)

    def step():
        if op == "hangs":
            time.sleep(100)
        if op == "dies":
            os.kill(os.getpid(), 9)
        return "fine"

    return {"op": op, "world_size": world_size, "said": steps.run("second", step, lambda t: t)}


def test_workers_survive_hangs_and_crashes():
    found, begun = {}, []
    workers.run(
        [workers.Task(op, 2) for op in ("good", "hangs", "dies")],
        Plan(),
        jobs=2,
        timeout=3,
        done=lambda r: found.__setitem__(r["op"], r["said"]),
        at=lambda task, step: begun.append((task.op, step)),
        how=planted,
    )
    assert found == {
        "good": "fine",
        "hangs": "timed out after 3 s",
        "dies": "the process was killed by SIGKILL",
    }
    assert begun.count(("hangs", "first")) == 2 and begun.count(("hangs", "second")) == 1


# ---------------------------------------------------------------- the table
def test_cells():
    def case(uneven, *kinds):
        pair = [{"kind": k, **({"error": 3e-7} if k == "close" else {})} for k in kinds]
        return {"uneven": uneven, "results": {"eager": pair}}

    record = {
        "op": "f",
        "dtype": "float32",
        "cases": [
            case(False, "equal", "close"),
            case(False, "equal", "none"),
            case(True, "random", "none"),
            case(True, "fails", "none"),
        ],
    }
    assert table.row(record, ["eager", "aot_eager"]) == (
        "| `f` | float32 | 2= ; 1~1e-06 | 1? 1 fails ; - | - | - |"
    )


def test_repro_runs(capsys):
    record, _ = run_measure("nn.functional.linear", 4)
    case = record["cases"][0]
    line = repro(record, case)
    assert line == (
        "torch.nn.functional.linear(shard(torch.randn((4, 4), requires_grad=True), S(0)), "
        "shard(torch.randn((4,), requires_grad=True), R))"
    ) or line.startswith("torch.nn.functional.linear(shard(")
    program = HEADER.format(world_size=4).replace("    ...", f"    print({line})  #")
    exec(program, {})
    assert "DTensor(" in capsys.readouterr().out
    assert label(Case("abs", "even", 0, 1, (0,))) == "even 0 S(0)"


# ---------------------------------------------------------------- the command
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "("], "'(' is no regular expression"),
        (["--ops", "no_such_op"], "no op matches 'no_such_op'"),
        (["--world-size", "1"], "a world of 1 shards nothing"),
        (["--world-size", "two"], "'two' is no whole number of at least 1"),
        (["--backend", "eager,tvm"], "unknown 'tvm': there are eager, aot_eager, inductor"),
        (["--shard", "3/2"], "'3/2' is none of 1/N to N/N"),
        (["--jobs", "0"], "'0' is no whole number of at least 1"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    try:
        code = main(["scoreboard", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_command_goes_on_where_it_was(tmp_path, capsys):
    results, report = tmp_path / "results.jsonl", tmp_path / "report.md"
    options = ["--world-size", "2", "--backend", "eager", "--results", str(results)]

    def run(*more):
        code = main(["scoreboard", "--ops", "^(abs|arange)$", *options, *more])
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, err = run("--shard", "1/2")
    assert (code, len(results.read_text().splitlines())) == (0, 1)
    assert "1/1 abs on 2 ranks: 6 cases in" in err
    code, out, err = run("--report", str(report))
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [r["op"] for r in lines] == ["abs", "arange"]
    assert "abs on 2" not in err and "arange on 2 ranks: not measured, takes no tensor" in err
    assert out == "PASS: cases at fault: ours 0, DTensor 0, torch.compile 0, Inductor 0\n"
    assert run()[2] == ""
    text = report.read_text()
    assert re.search(r"^\| `abs` \| float32 \| .*= ; .*= \| .* \|$", text, re.M)
    assert "### ours\n\nNone.\n" in text
    assert "| takes no tensor: DTensor has no part in it | `arange` |" in text


# ---------------------------------------------------------------- the published table
# Ops of every kind: pointwise, reductions, products, views, indices, normalisation, integers,
# random numbers, failures. One number of ranks each.
PUBLISHED = {
    "abs": 4,
    "bitwise_and": 2,
    "equal": 2,
    "nn.functional.embedding": 2,
    "rand_like": 2,
    "softmax": 4,
    "sum": 4,
    "unbind": 2,
    "where": 2,
}
PUBLISHED_SLOW = {"add": 2, "cat": 2, "cumsum": 4, "gather": 2, "mm": 4, "sort": 2, "transpose": 2}


@pytest.mark.parametrize(
    ("op", "world_size"),
    [pytest.param(*item, id=item[0]) for item in PUBLISHED.items()]
    + [pytest.param(*item, id=item[0], marks=pytest.mark.slow) for item in PUBLISHED_SLOW.items()],
)
def test_published_results(op, world_size):
    """docs/scoreboard.md tells what this checkout does."""
    assert published(DOCS.read_text(), world_size, op) == outcome(
        table.row(
            measure(
                op, world_size, Plan(backends=("eager", "aot_eager")), Steps(lambda _: None, {})
            ),
            ["eager", "aot_eager"],
        )
    )


def published(text, world_size, op):
    section = text.split(f"## {world_size} ranks\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith(f"| `{op}` |")]
    assert len(rows) == 1, f"{op} is not in the table of {world_size} ranks"
    return outcome(rows[0])


def outcome(row):
    """Op, dtype, and what is right, wrong or fails in eager and aot_eager.

    Equal and close count alike: matrix products of other CPUs have other bits.
    """
    cells = [cell.strip() for cell in row.strip("|").split("|")][:6]
    return cells[:2] + [[_sums(part) for part in cell.split(" ; ")] for cell in cells[2:]]


def _sums(part):
    right = sum(map(int, re.findall(r"(\d+)[=~?]", part)))
    return right, *re.findall(r"\d+ (?:wrong|fails)", part)
