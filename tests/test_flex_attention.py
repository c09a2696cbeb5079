"""torch's context parallelism of flex attention, against gloo."""

import pytest

from tests.parallel import flex_attention as programs
from tests.parallel.harness import eager
from tests.parallel.real_compile import verify_as_real

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.xdist_group("gloo"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]
slow = pytest.mark.slow
CASES = [(2, "causal", False), (2, "window", True), (3, "window", False), (3, "causal", True)]


@slow
@pytest.mark.parametrize(("world", "mask", "balanced"), CASES)
def test_attention(world, mask, balanced):
    eager(programs.attention, world, mask=mask, balanced=balanced)


COMPILED = [CASES[0], pytest.param(*CASES[1], marks=slow)]


@pytest.mark.parametrize(("world", "mask", "balanced"), COMPILED)
def test_attention_compiled(world, mask, balanced):
    """Two graphs: torch compiles the making of the block mask too."""
    arguments = {"mask": mask, "balanced": balanced, "compiled": True}
    verify_as_real(programs.attention, world, graphs=2, **arguments)
