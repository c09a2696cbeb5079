"""A pytest plugin: tests whose body runs on all ranks of a simulated world, and golden graphs.

    @pytest.mark.world_size(2, 4)
    def test_all_reduce(world, mesh):
        x = world.rank_map(lambda rank: torch.full((3,), float(rank)))
        dist.all_reduce(x)
        return {"sum": x}

    def test_graph(golden):
        golden(lt.capture(program, 4))

`--localtensor-oracle=gloo` runs each body on real gloo processes too, and compares what it returns
bit for bit. Loaded by pytest through the entry point `pytest11`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .check.program import World

NONE, GLOO = "none", "gloo"
SIMULATED = "simulated"
_PER_RANK = ("world", "mesh", "ranks")
_OURS = (*_PER_RANK, "world_size", "localtensor_engine")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("localtensor", "simulated distributed PyTorch")
    group.addoption(
        "--localtensor-oracle",
        choices=(NONE, GLOO),
        default=NONE,
        help="run tests of simulated worlds on real processes too, and compare (default: none)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "world_size(*sizes): numbers of ranks of the test's world (default: 2)"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world_size" in metafunc.fixturenames and not _is_parametrized(metafunc, "world_size"):
        marker = metafunc.definition.get_closest_marker("world_size")
        sizes = marker.args if marker is not None else (2,)
        metafunc.parametrize("world_size", _sizes(sizes, metafunc.definition.nodeid))
    if "localtensor_engine" in metafunc.fixturenames:
        engines: list[Any] = [SIMULATED]
        if metafunc.config.getoption("--localtensor-oracle") == GLOO:
            engines.append(pytest.param(GLOO, marks=pytest.mark.xdist_group(GLOO)))
        metafunc.parametrize("localtensor_engine", engines)


def _is_parametrized(metafunc: pytest.Metafunc, name: str) -> bool:
    for marker in metafunc.definition.iter_markers("parametrize"):
        names = marker.args[0] if marker.args else marker.kwargs.get("argnames", ())
        if name in (names.replace(",", " ").split() if isinstance(names, str) else names):
            return True
    return False


def _sizes(sizes: tuple[Any, ...], nodeid: str) -> tuple[int, ...]:
    bad = [s for s in sizes if not isinstance(s, int) or isinstance(s, bool) or s < 1]
    if bad or not sizes:
        raise pytest.UsageError(
            f"{nodeid}: world_size{sizes} should be numbers of ranks, as in "
            "@pytest.mark.world_size(2, 4)."
        )
    return sizes


# ---------------------------------------------------------------- a test in a world
@pytest.fixture
def localtensor_engine() -> str:
    """`simulated`, or `gloo` where the body runs on real processes too."""
    return SIMULATED


@pytest.fixture
def world_size() -> int:
    """Number of ranks: from the marker `world_size`."""
    return 2


@pytest.fixture
def world(world_size: int, localtensor_engine: str) -> Iterator[World | None]:
    """A localtensor_compile World of simulated ranks, in which the test runs."""
    import torch

    from .check.engines import simulated_world
    from .check.program import World

    if localtensor_engine == GLOO:
        yield None  # made in every process
        return
    with simulated_world(world_size, 0, torch.device("cpu")):
        yield World(world_size)


@pytest.fixture
def mesh(world: World | None) -> Any:
    """A one-dimensional DeviceMesh over the world."""
    return None if world is None else world.mesh()


@pytest.fixture
def ranks(world: World | None, world_size: int) -> tuple[int, ...]:
    """All ranks of the world."""
    return tuple(range(world_size))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs the body of a test that uses a world; what it returns is compared, not warned about."""
    given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    engine = pyfuncitem.funcargs.get("localtensor_engine")
    if engine is None or inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    if engine == SIMULATED:
        pyfuncitem.obj(**given)
    else:
        _run_on_real_ranks(pyfuncitem, given)
    return True


def _run_on_real_ranks(item: pytest.Function, given: Mapping[str, Any]) -> None:
    from .check._gloo_target import target_of
    from .check.program import Program, ProgramError
    from .check.runner import check

    if item.cls is not None:
        pytest.fail(
            f"{item.name}: real processes cannot call methods of a test class. Make it a function, "
            "or run without --localtensor-oracle=gloo.",
            pytrace=False,
        )
    wanted = tuple(n for n in given if n in _PER_RANK)
    bound = {n: v for n, v in given.items() if n not in _PER_RANK}
    body = functools.partial(run_body, target_of(_function(item)), wanted, bound)
    try:
        size: Any = item.funcargs["world_size"]
        report = check(Program(body, item.name), size, backends=(), oracle=GLOO)
    except ProgramError as error:
        handed = ", ".join(n for n in bound if n not in _OURS)
        pytest.fail(
            f"{item.name} cannot run on real processes: {error}"
            + (f" It uses the fixtures {handed}." if handed else ""),
            pytrace=False,
        )
    if not report.ok:
        pytest.fail(str(report), pytrace=False)


def _function(item: pytest.Function) -> Callable[..., Any]:
    return inspect.unwrap(item.obj)


def run_body(
    target: Any, wanted: tuple[str, ...], bound: Mapping[str, Any], world: World
) -> dict[str, Any]:
    """The body of a test as a program: on simulated ranks and, imported there, on real ones."""
    import torch

    from .check._gloo_target import Programs

    per_rank = {
        "world": lambda: world,
        "mesh": world.mesh,
        "ranks": lambda: tuple(range(world.size)),
    }
    own = {name: per_rank[name]() for name in wanted}
    result = Programs().function(target)(**own, **bound)
    return result if result else {"finished": torch.ones(())}


# ---------------------------------------------------------------- golden graphs
class Golden:
    """What the fixture `golden` gives: compares graphs with a file or with a text in the test.

    Attributes:
        folder: where files are: `graphs/FILE` beside pytest's root directory.
        name: of the test's file there.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def __call__(self, graphs: Any, name: str | None = None) -> None:
        """Compare with the golden file of this test, or with the one of that name.

        Raises:
            GoldenMismatch: other graphs; EXPECTTEST_ACCEPT=1 accepts them.
            GoldenError: a file that is no golden text.
        """
        from .golden.files import assert_golden

        assert_golden(graphs, self.folder / f"{name or self.name}.txt")

    def inline(self, graphs: Any, expect: str) -> None:
        """Compare with a string literal, which EXPECTTEST_ACCEPT=1 rewrites."""
        from .golden.files import assert_expected_inline

        assert_expected_inline(graphs, expect, skip=1)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares graphs with the golden file graphs/TEST_FILE/TEST.txt, or with a text inline."""
    stem = request.path.stem.removeprefix("test_")
    name = re.sub(r"[^\w.-]+", "_", request.node.name.removeprefix("test_")).strip("_")
    return Golden(request.config.rootpath / "graphs" / stem, name)
