"""Llama, GPT-2 and Mixtral of the transformers package, tensor and expert parallel.

Needs the extra `models` (`make test-all` installs it). The weights are random and tiny: nothing is
downloaded.
"""

import pytest

from localtensor_compile import matrix
from tests.parallel import hf_models
from tests.parallel.harness import WORLDS, verify

MODELS = (hf_models.llama, hf_models.gpt2, hf_models.mixtral)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gloo,
    pytest.mark.xdist_group("gloo"),
    pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__),
]


@pytest.mark.parametrize("world", WORLDS)
def test_train_step_against_gloo(model, world):
    verify(model, world)


def test_train_step_against_the_unsharded_model(model):
    report = matrix(model, dp=(1,), tp=(1, *WORLDS))
    report.raise_if_failed()
    assert {c.graphs for c in report.cells} == {None, 1}
    assert not any(c.graph_breaks for c in report.cells)
