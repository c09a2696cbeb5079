"""Context parallelism: ring attention and the all-gather form, against gloo."""

import pytest

from tests.parallel import context_parallel as cp
from tests.parallel.harness import WORLDS, refused, verify

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]


@pytest.mark.parametrize("world", [3, *(pytest.param(w, marks=pytest.mark.slow) for w in (2, 4))])
@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("form", ("ring", "all-gather"))
def test_attention(world, causal, form):
    verify(cp.attention, world, form=form, causal=causal)


@pytest.mark.parametrize("world", WORLDS)
def test_permute_tensor(world):
    verify(cp.rank_in_ring, world, graphs=None)


BACKENDS = {
    "FLASH_ATTENTION": (
        "NotImplementedError",
        "_scaled_dot_product_flash_attention_for_cpu.default does not have a sharding strategy",
    ),
    "MATH": ("RuntimeError", "got mixed torch.Tensor and DTensor"),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_context_parallel_of_torch_is_refused_on_cpu_as_by_real_ranks(backend):
    refused(cp.torch_context_parallel, 2, *BACKENDS[backend], compiled=False, backend=backend)
