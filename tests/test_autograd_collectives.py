"""torch.distributed.nn against gloo, forward and backward."""

import pytest

from tests.parallel.autograd_collectives import NAMES, collective
from tests.parallel.harness import WORLDS, verify

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional:FutureWarning")
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_collective(world, name):
    verify(collective, world, graphs=None, name=name)
