"""Every small program, on every backend, against the same program on plain tensors of one rank."""

import functools

import pytest
import torch

from tests.programs import PROGRAMS
from tests.programs.harness import Program, Run, compare, run_local, run_plain

# Programs that break the graph or write in place make torch warn, in plain torch too.
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = list(PROGRAMS)


def sample(step: int, limits: dict[str, str] | None = None) -> list:
    """Every step-th program by default, the others as slow tests."""
    return [
        with_limit(name, () if i % step == 0 else (pytest.mark.slow,), limits or LIMITS)
        for i, name in enumerate(NAMES)
    ]


# What does not work compiled yet. Each raises; none gives a wrong value.
LIMITS = {
    "take_along_dim": "torch's broadcasting asks for an int that differs per rank",
    "cond_on_a_tensor": "torch.cond runs its branches with shards that are not fake tensors",
    "func_hessian": "forward over reverse mode differentiation of the wrapper",
}


# Dynamo's graph run as it is calls pybind with the per-rank size, which AOTAutograd has resolved.
EAGER_LIMITS = {**LIMITS, "interpolate": "a pybind function that takes plain ints only"}


def with_limit(name: str, marks: tuple, limits: dict[str, str]) -> object:
    if name in limits:
        marks = (*marks, pytest.mark.xfail(reason=limits[name], strict=False))
    return pytest.param(name, marks=marks)


@functools.cache
def plain(name: str, backend: str | None = None) -> Run:
    torch._dynamo.reset()
    return run_plain(PROGRAMS[name], backend)


def require_compiled(program: Program, run: Run) -> None:
    """Nothing counts as compiled that was not."""
    assert (run.graphs, run.breaks) == (program.graphs, program.breaks)


def test_enough_programs():
    assert len(NAMES) >= 120


@pytest.mark.parametrize("name", NAMES)
def test_eager(name):
    compare(PROGRAMS[name], run_local(PROGRAMS[name]), plain(name), exact=True)


@pytest.mark.parametrize("name", sample(2, EAGER_LIMITS))
def test_eager_backend(name):
    """Dynamo alone: the graph runs as it was traced."""
    program = PROGRAMS[name]
    run = run_local(program, "eager")
    compare(program, run, plain(name), exact=True)
    require_compiled(program, run)


@pytest.mark.parametrize("name", sample(1))
def test_aot_eager(name):
    """Bit for bit; where AOTAutograd adds gradients in another order, what it gives one rank."""
    program = PROGRAMS[name]
    run = run_local(program, "aot_eager")
    try:
        compare(program, run, plain(name), exact=True)
    except AssertionError:
        compare(program, run, plain(name, "aot_eager"), exact=True)
    require_compiled(program, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", sample(1))
def test_inductor(name):
    program = PROGRAMS[name]
    run = run_local(program, "inductor", inside=True)
    compare(program, run, plain(name), exact=False)
    require_compiled(program, run)
