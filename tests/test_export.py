"""lt.export: programs of plain tensors, of all ranks and of each, that run on real processes."""

import pytest
import torch
from torch.utils import _pytree as pytree

import localtensor_compile as lt
from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.export.leaves import take_apart
from tests.parallel import exported
from tests.parallel.exported import MODELS, run_saved, saved, seeded

pytestmark = [
    # torch's own, in copies of exported programs
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
]
gloo = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]
CALLS = 2


def of_rank(tree, rank):
    values, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([take_apart(v).of_rank(rank) for v in values], spec)


def of_all(tree):
    values, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([take_apart(v).of_all for v in values], spec)


def assert_same(found, wanted):
    found, found_spec = pytree.tree_flatten(found)
    wanted, wanted_spec = pytree.tree_flatten(wanted)
    assert found_spec == wanted_spec
    for a, b in zip(found, wanted):
        if isinstance(b, torch.Tensor):
            assert type(a) is torch.Tensor and a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b


def same_everywhere(build, world, **options):
    """Simulated, as one program of all ranks, and as each rank's own on real processes."""
    with lt.LocalTensorMode(world):
        model, x = build()
        programs = lt.export(model, (x,), **options)
        files = {rank: saved(programs.rank(rank)) for rank in range(world)}
        module = programs.all_ranks.module()
        wanted = []
        for _ in range(CALLS):
            found = seeded(module, of_all(x))
            wanted.append(seeded(model, x))
            assert_same(found, of_all(wanted[-1]))
        state = of_all(dict(model.state_dict()))
    inputs = {rank: (of_rank(x, rank),) for rank in range(world)}
    real = shared_pool().run(run_saved, world, files, inputs, CALLS)
    for rank in range(world):
        found, held = real[rank]
        assert_same(found, of_rank(wanted, rank))
        for name, parts in state.items():
            part = parts[rank] if isinstance(parts, tuple) else parts
            assert torch.equal(held[name], part), name
    return programs


@pytest.mark.parametrize("name", MODELS)
class TestOnRealProcesses:
    pytestmark = gloo

    def test_model(self, name):
        same_everywhere(MODELS[name], 3)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_two_mesh_dimensions():
    same_everywhere(exported.two_dimensions, 4)
