"""Every small program, on every backend, against the same program on plain tensors of one rank."""

import functools

import pytest
import torch

from tests.programs import PROGRAMS
from tests.programs.harness import Program, Run, compare, run_local, run_plain

# What plain torch warns of too: programs that break the graph or write in place, a condition on a
# size that all ranks share, Inductor's lowering of diagonal(), complex numbers in Inductor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Pred is a Python constant"),
    pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex"),
]

NAMES = list(PROGRAMS)


def sample(step: int) -> list:
    """Every step-th program by default, the others as slow tests."""
    marks = lambda i: () if i % step == 0 else (pytest.mark.slow,)
    return [pytest.param(name, marks=marks(i)) for i, name in enumerate(NAMES)]


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


@pytest.mark.parametrize("name", sample(2))
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


# Where Inductor alone, on plain tensors of one rank, computes other values than eager or refuses.
INDUCTOR_DIFFERS = {"autocast", "inplace_foreach", "swaps_two_inputs"}
INDUCTOR_REFUSES = {"conv2d_uneven_batch"}
# Where it returns a view of an input, for `x + 0`.
INDUCTOR_SHARES = {"rank_map", "factory_zeros"}


@pytest.mark.parametrize("name", sample(12))
def test_inductor(name):
    """Close to plain eager. What Inductor gets wrong or refuses for one rank, it does for all."""
    program = PROGRAMS[name]
    if name in INDUCTOR_REFUSES:
        for run in (lambda: plain(name, "inductor"), lambda: run_local(program, "inductor")):
            with pytest.raises(AssertionError, match="expected size 3==3, stride"):
                run()
        return
    run = run_local(program, "inductor", inside=True)
    expected = plain(name, "inductor" if name in INDUCTOR_DIFFERS else None)
    compare(program, run, expected, exact=False, sharing=name not in INDUCTOR_SHARES)
    require_compiled(program, run)
