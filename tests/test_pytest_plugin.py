"""The pytest plugin: worlds by marker, the same body on real processes, golden files."""

import pytest

import localtensor_compile as lt
from tests import graph_programs as programs

pytestmark = pytest.mark.filterwarnings("ignore:.*assertion rewriting.*")

BODY = """
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

@pytest.mark.world_size(2, 3)
def test_sum(world, mesh, ranks):
    x = world.rank_map(lambda rank: torch.full((2,), float(rank)))
    y = funcol.all_reduce(x, "sum", mesh)
    assert mesh.size() == len(ranks) == dist.get_world_size()
    return {"sum": y}

def test_default_size(world_size, world):
    assert dist.get_world_size() == world_size == 2

@pytest.mark.parametrize(("scale", "world_size"), [(2.0, 1), (3.0, 2)])
def test_parameters(world, scale):
    return {"x": torch.ones(1) * scale}
"""


@pytest.fixture(scope="module")
def loaded():
    """pytester forgets modules that its runs import, and torch's compiler is imported only once."""
    lt.capture(programs.mlp, 2)


@pytest.fixture
def run(pytester, monkeypatch, loaded):
    monkeypatch.delenv("EXPECTTEST_ACCEPT", raising=False)

    def run(body, *arguments):
        pytester.makepyfile(test_it=body)
        return pytester.runpytest_inprocess(
            "-p", "localtensor_compile.pytest_plugin", "-p", "no:cacheprovider", *arguments
        )

    return run


def test_bodies_run_in_simulated_worlds(run):
    run(BODY).assert_outcomes(passed=5)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_bodies_run_on_real_processes_too(run):
    run(BODY, "--localtensor-oracle=gloo").assert_outcomes(passed=10)


OTHER = """
def test_unpicklable(world, tmp_path, capsys):
    pass

class TestMethods:
    def test_method(self, world):
        pass
"""


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_what_real_processes_do_not_confirm_fails(run):
    found = run(OTHER, "--localtensor-oracle=gloo")
    text = found.stdout.str()
    assert "cannot call methods of a test class" in text
    assert "test_unpicklable" in text and "cannot run on real processes" in text


def test_bad_sizes_are_named(run):
    body = "import pytest\n@pytest.mark.world_size(0)\ndef test_it(world): pass\n"
    text = run(body).stdout.str()
    assert "world_size(0,) should be numbers of ranks, as in @pytest.mark.world_size(2, 4)" in text


GOLDEN = """
import torch
import localtensor_compile as lt

def program(world):
    return {"x": world.compile(lambda x: x * FACTOR)(torch.ones(2))}

FACTOR = 2

def test_graph(golden):
    golden(lt.capture(program, 2))
"""


def test_golden_files(run, pytester, monkeypatch):
    run(GOLDEN).stdout.fnmatch_lines(["*there is no golden file*graphs/it/graph.txt*"])
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    run(GOLDEN).assert_outcomes(passed=1)
    monkeypatch.delenv("EXPECTTEST_ACCEPT")
    run(GOLDEN).assert_outcomes(passed=1)
    text = (pytester.path / "graphs" / "it" / "graph.txt").read_text()
    assert "mul: f32[2] = aten.mul.Tensor(x, 2)" in text
    changed = run(GOLDEN.replace("FACTOR = 2", "FACTOR = 3")).stdout.str()
    assert "forward, ranks 0-1: aten.mul.Tensor(x, 2) became aten.mul.Tensor(x, 3)" in changed


def test_golden_files_under_xdist(run, monkeypatch):
    monkeypatch.setenv("EXPECTTEST_ACCEPT", "1")
    run(GOLDEN, "-n", "2", "-p", "xdist").assert_outcomes(passed=1)
