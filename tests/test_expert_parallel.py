"""Mixture of experts with uneven all_to_all, whose splits come from routing data."""

import re

import pytest

from localtensor_compile.check.runner import check
from tests.parallel import expert_parallel as ep
from tests.parallel.harness import verify, worlds

CASES = {
    "one expert": {"local_experts": 1},
    "two experts": {"local_experts": 2},
    "uneven tokens": {"uneven": True, "tokens": 3},
    "all to one expert": {"skewed": True, "tokens": 4},
}


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize("name", CASES)
def test_mixture_of_experts(world, name):
    verify(ep.mixture_of_experts, world, **CASES[name])


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", worlds())
def test_mixture_of_experts_with_inductor(world):
    verify(ep.mixture_of_experts, world, backends=("inductor",))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("aot_eager", "position 1 sends 2 rows to position 0, but position 0 expects 0"),
        # Inductor makes an assertion of torch._check, and leaves its message out.
        pytest.param("inductor", r"RuntimeError: Eq\(u\d+, u\d+\)", marks=pytest.mark.slow),
    ],
)
def test_splits_that_disagree(backend, message):
    """Compiled code, too, stops, though the splits are known only when it runs."""
    report = check(ep.splits_that_disagree, 2, backends=[backend], oracle=None)
    eager, compiled = report.engines
    assert "rank 1 sends 2 rows to rank 0, but rank 0 expects 0 rows from it" in eager.error
    assert re.search(message, compiled.error)
