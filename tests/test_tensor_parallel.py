"""Tensor, sequence and loss parallelism: bit for bit as real gloo processes, compiled whole."""

import pytest

from tests.parallel import tensor_parallel
from tests.parallel.harness import WORLDS, verify

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]


@pytest.mark.parametrize("world", WORLDS)
def test_mlp(world):
    verify(tensor_parallel.mlp, world)
