"""Every small program in the stacked layout, against the same program on plain tensors of one rank.

Bit for bit, strides and memory sharing included, but for programs whose matrix products torch's
batched kernels round in another way: those within 1e-6 of a tensor's largest element (ROUNDS).
"""

import zlib
from dataclasses import replace

import pytest

from tests.programs import PROGRAMS
from tests.programs.harness import Program, Run, compare, run_local
from tests.test_programs import (
    INDUCTOR_DIFFERS,
    INDUCTOR_REFUSES,
    INDUCTOR_SHARES,
    plain,
    require_compiled,
)
from tests.test_programs import pytestmark as pytestmark

NAMES = list(PROGRAMS)

ROUNDS = {
    "dot_and_mv",
    "inverse_and_determinant",
    "sequence_parallel_mlp",
    "tensor_parallel_mlp",
    "vocabulary_parallel_loss",
}


def sample(step: int) -> list:
    """About every step-th program by default, the others as slow tests."""
    marks = lambda n: () if zlib.crc32(n.encode()) % step == 0 else (pytest.mark.slow,)
    return [pytest.param(n, marks=marks(n)) for n in NAMES]


def same(name: str, run: Run, expected: Run) -> None:
    program = PROGRAMS[name]
    if name not in ROUNDS:
        compare(program, run, expected, exact=True)
        return
    compare(near(program), run, expected, exact=False)


def near(program: Program) -> Program:
    """Each tensor within 1e-6 of its largest element: what fp32 sums in another order give."""
    return replace(program, tolerance={"of_largest": 1e-6})


def test_what_rounds_does_round():
    """The list holds no program that is equal bit for bit."""
    for name in ROUNDS:
        with pytest.raises(AssertionError):
            compare(
                PROGRAMS[name],
                run_local(PROGRAMS[name], layout="stacked"),
                plain(name),
                exact=True,
            )


@pytest.mark.parametrize("name", sample(6))
def test_eager(name):
    same(name, run_local(PROGRAMS[name], layout="stacked"), plain(name))


@pytest.mark.parametrize("name", sample(16))
def test_aot_eager(name):
    """As in the per-rank layout: where AOTAutograd adds in another order, what it gives a rank."""
    run = run_local(PROGRAMS[name], "aot_eager", layout="stacked")
    try:
        same(name, run, plain(name))
    except AssertionError:
        same(name, run, plain(name, "aot_eager"))
    require_compiled(PROGRAMS[name], run)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if zlib.crc32(n.encode()) % 12 == 0])
def test_inductor(name):
    program = PROGRAMS[name]
    if name in INDUCTOR_REFUSES:
        pytest.skip("Inductor refuses the plain program too")
    run = run_local(program, "inductor", inside=True, layout="stacked")
    expected = plain(name, "inductor" if name in INDUCTOR_DIFFERS else None)
    compare(program, run, expected, exact=False, sharing=name not in INDUCTOR_SHARES)
    require_compiled(program, run)
