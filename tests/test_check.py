"""lt.check: loading programs, reading results, comparing engines, and the text of reports."""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from localtensor_compile import LocalTensorMode, local_tensor_mode
from localtensor_compile.check import program as program_module
from localtensor_compile.check.engines import run_simulated
from localtensor_compile.check.outputs import shards_of, to_plain
from localtensor_compile.check.program import (
    Program,
    ProgramError,
    World,
    as_program,
    is_importing,
    load_program,
    portable,
)
from localtensor_compile.check.report import CheckFailed, CheckReport, EngineResult
from localtensor_compile.check.runner import check, compare_outputs
from localtensor_compile.check.text import dtype_text, ranks_text

# torch's own, when it imports Inductor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

CPU = torch.device("cpu")


# ---- programs; at the top level, so that gloo processes can import them
def agreeing(world, scale=2.0):
    x = world.rank_map(lambda rank: torch.arange(4.0) + rank)
    y = world.compile(lambda x: x.sin() * scale)(x).clone()
    dist.all_reduce(y)
    return {"x": x, "sum": y, "scale": scale}


def simulated_differs(world):
    """Other values in simulation than in real processes, on rank 1 only."""
    wrong = 0.0 if local_tensor_mode() is None else 1.0
    return {
        "same": world.rank_map(lambda rank: torch.ones(3)),
        "wrong": world.rank_map(lambda rank: torch.tensor([0.0, wrong * (rank == 1)])),
    }


def real_raises(world):
    if local_tensor_mode() is None and dist.get_rank() == 1:
        raise ArithmeticError("only on the real rank 1")
    return {"x": world.compile(torch.sin)(torch.ones(2))}


def compiled_differs(world, error=1.0):
    @world.compile
    def f(x, ranks):
        return x + ranks * error if torch.compiler.is_compiling() else x

    ranks = world.rank_map(lambda rank: torch.tensor([0.0, rank // 2]))
    return {"y": f(torch.ones(2), ranks), "same": torch.ones(1)}


def compiled_returns_other_things(world):
    f = world.compile(lambda x: x * 2)
    y = f(torch.ones(2, 2))
    if world.compiled:
        return {"shape": y[0], "dtype": y.double(), "extra": y}
    return {"shape": y, "dtype": y, "lost": y}


def compiled_raises(world):
    @world.compile
    def f(x):
        print("a graph break")
        return x

    return {"y": f(torch.ones(2))}


def quick(program, world_size=4, backends=("dynamo",), **options):
    return check(program, world_size, backends=backends, **{"oracle": None, **options})


# ---- loading a program
def write(folder, text, name="user_program.py"):
    file = folder / name
    file.write_text(text)
    return str(file)


@pytest.fixture(autouse=True)
def clean_imports():
    """load_program adds to sys.path and sys.modules, as running a script would."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if "user_program" in name:
            del sys.modules[name]


def test_load_program(tmp_path):
    file = write(
        tmp_path,
        "import user_program_helper\n"
        "def program(world): return {}\n"
        "class Group:\n"
        "    @staticmethod\n"
        "    def other(world): return {}\n",
    )
    write(tmp_path, "", "user_program_helper.py")
    assert load_program(file).name == f"{file}:program"
    assert load_program(f"{file}:Group.other").function.__name__ == "other"


def test_two_files_of_one_name(tmp_path):
    functions = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = write(tmp_path / folder, f"def program(world): return {folder!r}")
        functions.append(load_program(file).function)
    assert [f(None) for f in functions] == ["a", "b"]
    assert functions[0].__module__ != functions[1].__module__


def test_load_program_errors(tmp_path):
    with pytest.raises(ProgramError, match=r"no such file: nowhere.py \(looked from /"):
        load_program("nowhere.py:f")
    with pytest.raises(ProgramError, match=r"is a directory: name a Python file, as in .*/FILE.py"):
        load_program(str(tmp_path))
    file = write(tmp_path, "from os import getcwd\ndef first(w): 0\ndef second(w): 0\nx = 1\n")
    with pytest.raises(
        ProgramError,
        match=r"should define a function program\(world\), but there is none. Functions in the "
        r"file: first, second. Name one as .*user_program.py:FUNCTION",
    ):
        load_program(file)
    with pytest.raises(ProgramError, match=r"function x\(world\), but it is not callable"):
        load_program(f"{file}:x")


def test_import_error_shows_only_the_users_lines(tmp_path):
    file = write(tmp_path, "def f():\n    raise KeyError('gone')\nf()\n")
    with pytest.raises(ProgramError, match="could not be imported") as caught:
        load_program(file)
    text = str(caught.value)
    assert "line 2, in f" in text and "KeyError: 'gone'" in text
    assert "importlib" not in text and "check/program.py" not in text
    file = write(tmp_path, "def f(:\n")
    with pytest.raises(ProgramError, match=r"line 1(.|\n)*SyntaxError"):
        load_program(file)
    assert not any("user_program" in name for name in sys.modules)


def test_a_file_is_imported_and_not_run(tmp_path):
    load = "from localtensor_compile.check.program import is_importing\nseen = is_importing()\n"
    function = load_program(write(tmp_path, f"{load}def program(world): return seen")).function
    assert function(None) is True
    assert not is_importing()


def test_as_program():
    assert as_program(agreeing) == Program(agreeing, "agreeing")
    assert as_program(functools.partial(agreeing, scale=1.0)).name == "agreeing"
    assert as_program(Program(agreeing, "n")).name == "n"
    with pytest.raises(ProgramError, match=r"a program is a function .* found dict"):
        as_program({"x": 1})


# ---- World
def test_world_mesh():
    with LocalTensorMode(4):
        world = World(4)
        assert world.mesh().shape == (4,)
        assert world.mesh(4, "tp").mesh_dim_names == ("tp",)
        mesh = world.mesh((2, 2), ("dp", "tp"))
        assert (mesh.shape, mesh.mesh_dim_names) == ((2, 2), ("dp", "tp"))


def test_world_compile():
    assert World(1).compile(torch.sin) is torch.sin
    world = World(1, backend="eager")
    assert world.compile(lambda x: x + 1)(torch.ones(1)).item() == 2
    assert world.compiled == 1
    with pytest.raises(ProgramError, match=r"backend='inductor'\): the engine .* chooses"):
        world.compile(torch.sin, backend="inductor")


# ---- what a program returned
def test_outputs_of_every_kind():
    with LocalTensorMode(2) as mode:
        mesh = World(2).mesh(2, "tp")
        sharded = distribute_tensor(torch.arange(3.0), mesh, [Shard(0)])
        rank = mesh.get_local_rank()
        values = shards_of(
            {
                "sharded": sharded,
                "waiting": sharded.redistribute(mesh, [Replicate()], async_op=True),
                "local": mode.rank_map(lambda r: torch.full((2,), float(r))).requires_grad_(),
                "rank": rank,
                "int": 3,
                "float": 0.5,
                "bool": True,
            },
            (0, 1),
        )
        with mode.disable():
            values |= shards_of({"plain": torch.ones(1)}, (0, 1))
    found = {
        name: [shards[rank].tolist() for rank in (0, 1)]
        for name, shards in to_plain(values).items()
    }
    assert found == {
        "sharded": [[0, 1], [2]],
        "waiting": [[0, 1, 2]] * 2,
        "local": [[0, 0], [1, 1]],
        "rank": [0, 1],
        "int": [3, 3],
        "float": [0.5, 0.5],
        "bool": [True, True],
        "plain": [[1], [1]],
    }


def test_outputs_are_copies():
    value = torch.ones(2)
    plain = to_plain(shards_of({"x": value}, (0,)))
    value.add_(1)
    assert plain["x"][0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, r"the program returned None; return a dict of named tensors"),
        (torch.ones(1), r"the program returned a Tensor; return a dict"),
        ({}, r"returned an empty dict: there is nothing to compare"),
        ({1: torch.ones(1)}, r"a result named 1: names are strings, found int"),
        ({"g": None}, r"returned None as 'g'.* gradient of a parameter that the loss does not"),
        ({"l": [1]}, r"returned a list as 'l': return a tensor or a number"),
    ],
)
def test_outputs_that_cannot_be_compared(result, text):
    with pytest.raises(ProgramError, match=text):
        shards_of(result, (0,))
    report = quick(lambda world: result, 1)
    assert [engine.error.split(":")[0] for engine in report.engines] == ["ProgramError"] * 2


# ---- arguments of check
def test_check_refuses():
    with pytest.raises(ProgramError, match="world_size is 0, but a program needs at least one"):
        check(agreeing, 0)
    with pytest.raises(ProgramError, match=r"unknown backend 'induktor'\. Known: eager, "):
        check(agreeing, 1, backends=("induktor",))
    with pytest.raises(ProgramError, match="unknown oracle 'mpi': it is 'gloo' or None"):
        check(agreeing, 1, oracle="mpi")
    with pytest.raises(ProgramError, match="nothing to compare: eager alone"):
        check(agreeing, 1, backends=("eager",), oracle=None)
    with LocalTensorMode(2), pytest.raises(ProgramError, match="a process group already exists"):
        check(agreeing, 2)


def test_a_closure_cannot_go_to_real_processes():
    text = r"real processes cannot be given this program: .*<lambda>.*oracle=None \(--oracle none\)"
    with pytest.raises(ProgramError, match=text):
        check(lambda world: {}, 2)
    assert quick(lambda world: agreeing(world), 2).ok


def test_portable_carries_bound_arguments():
    carried = portable(as_program(functools.partial(agreeing, scale=3.0)))
    assert carried.target.name == "agreeing"
    function = carried.load(program_module.Programs())
    assert function.keywords == {"scale": 3.0} and function.func.__name__ == "agreeing"


# ---- engines
def test_engines_agree():
    report = quick(agreeing, 3, ("dynamo", "aot_eager"))
    report.raise_if_failed()
    assert report.ok and {row.kind for row in report.rows} == {"bit-equal"}
    assert len(report.rows) == 2 * 3 * 3  # engines, outputs, ranks
    assert [(e.name, e.reference, e.graphs, e.graph_breaks) for e in report.engines] == [
        ("eager", None, None, None),
        ("dynamo", "eager", 1, 0),
        ("aot_eager", "eager", 1, 0),
    ]


def test_seed_and_generators():
    values = []

    def draws(world):
        values.append(torch.randn(3))
        return {"x": values[-1], "y": world.compile(torch.sin)(values[-1])}

    before = torch.get_rng_state()
    assert quick(draws, 2).ok  # so every engine starts from the seed
    quick(draws, 2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    first, _, other, _ = (to_plain(shards_of({"x": v}, (0,)))["x"][0] for v in values)
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.set_rng_state(before)
    assert torch.equal(first, expected) and not torch.equal(first, other)


def test_threads_are_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = []
        run_simulated(
            Program(lambda world: threads.append(torch.get_num_threads()), "p"), 1, None, 0, CPU
        )
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_a_difference_on_some_ranks():
    report = quick(compiled_differs)
    assert not report.ok
    assert [(row.output, row.rank) for row in report.rows if not row.passed] == [("y", 2), ("y", 3)]
    with pytest.raises(CheckFailed, match=r"(?s)the check failed.*y +f32\[2\] +WRONG \(2-3\)"):
        report.raise_if_failed()


def test_close_passes_only_where_bits_may_differ():
    tiny = functools.partial(compiled_differs, error=1e-6)
    kinds = {
        engine: {row.kind for row in quick(tiny, 4, (engine,)).rows if row.output == "y"}
        for engine in ("aot_eager", "aot_eager_decomp_partition")
    }
    assert kinds == {
        "aot_eager": {"bit-equal", "WRONG"},
        "aot_eager_decomp_partition": {"bit-equal", "close"},
    }


def test_shape_dtype_and_missing():
    report = quick(compiled_returns_other_things, 1)
    assert {row.output: row.kind for row in report.rows} == {
        "shape": "shape",
        "dtype": "dtype",
        "lost": "missing",
        "extra": "missing",
    }
    text = str(report)
    assert "rank 0: shape [2], eager has [2, 2]" in text
    assert "rank 0: dtype torch.float64, eager has torch.float32" in text
    assert "rank 0: eager returned it, dynamo did not" in text
    assert "rank 0: dynamo returned it, eager did not" in text


def test_an_engine_that_raises_does_not_stop_the_others():
    report = quick(compiled_raises, 2, ("dynamo", "aot_eager"))
    errors = {engine.name: engine.error for engine in report.engines}
    assert errors["eager"] is None and not report.ok
    assert "Unsupported" in errors["dynamo"] and "Unsupported" in errors["aot_eager"]
    assert "dynamo, aot_eager failed: " in str(report)
    assert __file__ in report.engines[1].traceback
    assert "site-packages" not in report.engines[1].traceback


def test_nothing_compiled():
    errors = [
        quick(program, 1).engines[1].error
        for program in (
            lambda world: {"x": torch.ones(1)},
            lambda world: {"x": torch.ones(1), "f": float(world.compile(torch.sin) is None)},
        )
    ]
    assert errors[0].startswith("NothingCompiled: nothing was compiled: ")
    assert "never calls world.compile" in errors[0]
    assert "calls world.compile, but Dynamo captured no graph" in errors[1]


def test_graph_breaks_are_counted():
    def program(world):
        def f(x):
            x = x.sin()
            torch._dynamo.graph_break()
            return x.cos()

        return {"x": world.compile(f, fullgraph=False)(torch.ones(2))}

    engine = quick(program, 2).engines[1]
    assert (engine.graphs, engine.graph_breaks) == (2, 1)


def test_progress_hears_of_every_engine():
    heard = []

    class Listener:
        def started(self, engine):
            heard.append(engine)

        def finished(self, result):
            heard.append((result.name, result.error))

    quick(agreeing, 1, progress=Listener())
    assert heard == ["eager", ("eager", None), "dynamo", ("dynamo", None)]


# ---- real processes
@pytest.mark.gloo
def test_eager_equals_real_processes():
    report = check(functools.partial(agreeing, scale=0.3), 3, backends=("inductor",))
    report.raise_if_failed()
    assert [(e.name, e.reference, e.exact) for e in report.engines] == [
        ("gloo", None, False),
        ("eager", "gloo", True),
        ("inductor", "eager", False),
    ]
    assert {row.rank for row in report.rows if row.engine == "eager"} == {0, 1, 2}


@pytest.mark.gloo
def test_a_difference_from_real_processes():
    report = check(simulated_differs, 3, backends=("eager",))
    failed = [(row.output, row.rank, row.kind) for row in report.rows if not row.passed]
    assert failed == [("wrong", 1, "WRONG")]
    assert "first at [1]: 1.0, gloo has 0.0" in str(report)


@pytest.mark.gloo
def test_real_processes_that_raise():
    report = check(real_raises, 2, backends=("dynamo",))
    gloo, eager, dynamo = report.engines
    assert "only on the real rank 1" in gloo.error and not report.ok
    assert (eager.error, dynamo.error) == (None, None)
    assert {row.engine for row in report.rows} == {"dynamo"}


# ---- text
def test_words():
    assert ranks_text([5, 0, 1, 2]) == "0-2, 5"
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)
    assert [dtype_text(d) for d in dtypes] == ["f32", "bf16", "i64", "u8", "bool", "c64"]


def engine(name, reference="eager", exact=False, **more):
    compiled = {} if reference in (None, "gloo") else {"graphs": 1, "graph_breaks": 0}
    return EngineResult(name, reference, exact, 1.25, **{**compiled, **more})


def example_report():
    """eager and aot_eager fine, inductor close, wrong and missing, a fourth engine broken."""
    expected = {
        "loss": {0: torch.tensor(2.0), 1: torch.tensor(2.0)},
        "grad.blocks.0.attention.weight": {0: torch.ones(3, 2), 1: torch.ones(2, 2)},
        "grad.blocks.0.attention.bias": {0: torch.ones(2), 1: torch.ones(2)},
    }
    actual = {
        "loss": {0: torch.tensor(2.0), 1: torch.tensor(2.0 + 2**-22)},
        "grad.blocks.0.attention.weight": {0: torch.ones(3, 2), 1: torch.ones(2, 2)},
        "grad.blocks.0.attention.bias": {0: torch.ones(2)},
    }
    actual["grad.blocks.0.attention.weight"][1][1, 0] = 1.5
    exact, inductor = engine("eager", "gloo", True), engine("inductor")
    broken = engine(
        "other", error="ValueError: no", traceback='  File "p.py", line 3, in f', graphs=None
    )
    rows = compare_outputs(exact, expected, expected) + compare_outputs(inductor, actual, expected)
    return CheckReport("p.py:program", 2, 0, (engine("gloo", None), exact, inductor, broken), rows)


def test_text_of_a_report():
    assert_expected_inline(
        example_report().text(90),
        """\
output                          value         eager      inductor     other
------------------------------  ------------  ---------  -----------  -----
loss                            f32[]         bit-equal  close 2e-07  error
grad.blocks.0.attention.weight  f32[2..3, 2]  bit-equal  WRONG (1)    error
grad.blocks.0.attention.bias    f32[2]        bit-equal  missing (1)  error

other failed: ValueError: no
      File "p.py", line 3, in f
inductor: grad.blocks.0.attention.weight differs from eager
    rank 1: 1 of 4 values differ (1 beyond rtol 1.3e-06, atol 1e-05); max abs 0.5, max rel
    0.5, 4194304 ulp; first at [1, 0]: 1.5, eager has 1.0
inductor: grad.blocks.0.attention.bias differs from eager
    rank 1: eager returned it, inductor did not

engine    against       graphs  breaks  time   outputs
--------  ------------  ------  ------  -----  ---------------------------
gloo      -             -       -       1.2 s  ran
eager     gloo, exact   -       -       1.2 s  3 bit-equal
inductor  eager, close  1       0       1.2 s  1 close, 1 WRONG, 1 missing
other     eager, close  -       0       1.2 s  error

FAIL  p.py:program, 2 ranks, 3 outputs: other failed; values of inductor differ.""",
    )


def test_text_on_narrow_terminals():
    assert max(map(len, example_report().text(80, verbose=True).splitlines())) <= 80
    assert_expected_inline(
        example_report().text(50).split("\n\n")[0],
        """\
output               eager      inductor     other
-------------------  ---------  -----------  -----
loss                 bit-equal  close 2e-07  error
grad.bloc..n.weight  bit-equal  WRONG (1)    error
grad.bloc..ion.bias  bit-equal  missing (1)  error""",
    )


def test_verbose_text():
    assert_expected_inline(
        example_report().text(80, verbose=True).split("\n\n")[1],
        """\
  rank  engine    kind       max abs  max rel  max ulp  differ
------  --------  ---------  -------  -------  -------  ------
loss
  0     eager     bit-equal  0        0        0        0/1
  1     eager     bit-equal  0        0        0        0/1
  0     inductor  bit-equal  0        0        0        0/1
  1     inductor  close      2.4e-07  1.2e-07  1        1/1
grad.blocks.0.attention.weight
  0     eager     bit-equal  0        0        0        0/6
  1     eager     bit-equal  0        0        0        0/4
  0     inductor  bit-equal  0        0        0        0/6
  1     inductor  WRONG      0.5      0.5      4194304  1/4
grad.blocks.0.attention.bias
  0     eager     bit-equal  0        0        0        0/2
  1     eager     bit-equal  0        0        0        0/2
  0     inductor  bit-equal  0        0        0        0/2
  1     inductor  missing""",
    )


def test_long_failures_are_cut_unless_verbose():
    expected = {f"x{i}": {0: torch.zeros(1)} for i in range(12)}
    actual = {f"x{i}": {0: torch.ones(1)} for i in range(12)}
    inductor = engine("inductor")
    report = CheckReport("p", 1, 0, (inductor,), compare_outputs(inductor, actual, expected))
    assert "... and 4 more (-v shows all)." in str(report)
    assert "x11 differs from eager" not in str(report)
    assert "x11 differs from eager" in report.text(verbose=True)


def test_verdicts():
    fine = engine("inductor")
    values = {"x": {0: torch.zeros(1)}}
    report = CheckReport("p", 1, 0, (fine,), compare_outputs(fine, values, values))
    assert str(report).endswith("PASS  p, 1 rank, 1 output: every engine agrees on every rank.")
    empty = CheckReport("p", 1, 0, (fine,), ())
    assert not empty.ok and str(empty).endswith("nothing was compared.")


def test_json():
    report = example_report()
    found = json.loads(report.to_json())
    assert (found["version"], found["ok"], found["world_size"]) == (1, False, 2)
    assert found["engines"][3]["error"] == "ValueError: no"
    rows = {(row["engine"], row["output"], row["rank"]): row for row in found["rows"]}
    assert len(rows) == len(report.rows) == 12
    wrong = rows["inductor", "grad.blocks.0.attention.weight", 1]
    assert wrong["first"] == {"index": [1, 0], "actual": 1.5, "expected": 1.0}
    assert (wrong["max_abs"], wrong["max_ulp"], wrong["passed"]) == (0.5, 2**22, False)
    assert rows["inductor", "grad.blocks.0.attention.bias", 1]["kind"] == "missing"


def test_json_of_infinite_errors():
    inductor = engine("inductor")
    values = ({"x": {0: torch.tensor([v])}} for v in (float("nan"), 1.0))
    report = CheckReport("p", 1, 0, (inductor,), compare_outputs(inductor, *values))
    row = json.loads(report.to_json())["rows"][0]
    assert (row["max_abs"], row["first"]["actual"]) == ("inf", "nan")
