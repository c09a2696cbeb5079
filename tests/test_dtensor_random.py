"""Random numbers of DTensors: what real CPU ranks draw, bit for bit, eager and compiled."""

import pytest

from tests.parallel import dtensor_random as programs
from tests.parallel.harness import refused, verify

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.xdist_group("gloo"),
    # What real CPU ranks are told as well.
    pytest.mark.filterwarnings("ignore:DTensor .* may not have complete support:UserWarning"),
]
WORLDS = [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
COMPILED = [
    programs.dropout,
    programs.seeded_per_rank,
    programs.drawn,
    programs.initialized,
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("program", COMPILED)
def test_compiled(program, world):
    verify(program, world)


@pytest.mark.parametrize("world", WORLDS)
def test_seeds_and_generators(world):
    verify(programs.reseeded, world, graphs=None)


def test_dropout_of_partial_is_refused():
    message = "in-place operations that require placement changes are not supported"
    refused(programs.dropout_of_partial, 3, "RuntimeError", message, compiled=False)


def test_offsets_on_cuda_devices():
    """Without a GPU: DTensor's tracker on a stand-in for the device's generator."""
    verify(programs.cuda_offsets, 4, graphs=None, backends=())
