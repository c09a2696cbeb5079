"""DTensor's own functions against real gloo processes, bit for bit, and compiled whole."""

import pytest
from torch.distributed.tensor import Shard, distribute_tensor

from localtensor_compile import LocalTensorMode, RankDivergence
from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.check.program import World
from tests.parallel import dtensor_api as api
from tests.parallel.harness import draw, refused, verify, worlds

slow = pytest.mark.slow
gloo = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]
pytestmark = [
    *gloo,
    pytest.mark.filterwarnings("ignore:Slicing a flattened dim:UserWarning"),
]

ONE_DIM = [
    api.from_local,
    api.from_local_uneven,
    api.grad_placements,
    api.mapped,
    api.from_group,
    api.overlapped,
    api.other_dtypes,
    api.views,
    api.in_place,
]
TWO_DIMS = [api.submeshes, api.flattened]
NOT_COMPILED = [api.from_local_checked, api.sources, api.scalars]


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize("program", ONE_DIM)
def test_compiled(program, world):
    verify(program, world)


@pytest.mark.parametrize("world", [4, pytest.param(8, marks=slow)])
@pytest.mark.parametrize("program", TWO_DIMS)
def test_meshes(program, world):
    verify(program, world)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize("to", ["replicate", "rows", "columns", "tokens"])
def test_masked_partial(to, world):
    verify(api.masked, world, to=to)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize("program", NOT_COMPILED)
def test_eager(program, world):
    verify(program, world, graphs=None)


@pytest.mark.parametrize("world", [4, pytest.param(6, marks=slow)])
@pytest.mark.parametrize("program", [api.chunk_lists, api.factories])
def test_eager_on_two_mesh_dims(program, world):
    verify(program, world, graphs=None)


# Dynamo asks for the gradient of what it compiles the second hook for.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("world", worlds(3))
def test_distribute_module(world):
    """One graph for the module and one for each of the two hooks, as for real ranks."""
    verify(api.module, world, graphs=3)


PROXY = "Failed to convert args/kwargs to proxy"
PARTIAL = "redistributing to Partial is for internal use only"
# program: (the exception's name, what it says, whether it is compiled as well)
REFUSED = {
    api.close: ("RuntimeError", "Sharding propagation failed for aten.allclose", False),
    api.grad_of_chunk: ("RuntimeError", "got mixed torch.Tensor and DTensor", True),
    api.plain_operand: ("RuntimeError", "got mixed torch.Tensor and DTensor", True),
    api.other_mesh: ("RuntimeError", "on inputs with different meshes", True),
    api.dim_too_large: ("IndexError", "Dimension out of range", False),
    api.to_partial: ("RuntimeError", PARTIAL, True),
    api.wrong_count: ("ValueError", "must have the same length as `device_mesh.ndim`", False),
    api.two_partials: ("ValueError", "Mixed Partial reduce types are not supported", False),
    api.shape_alone: ("RuntimeError", "Please pass both shape and stride", False),
}


@pytest.mark.filterwarnings("ignore:Error detected in SplitBackward0")
@pytest.mark.parametrize("program", REFUSED)
def test_refused_as_on_real_ranks(program):
    kind, message, compiled = REFUSED[program]
    refused(program, 4, kind, message, compiled=compiled)


def run_compiled(name, world_size):
    """In a worker process: the program compiled on this real rank."""
    try:
        getattr(api, name)(World(world_size, backend="aot_eager"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (api.compiled_factory, PROXY),
        (api.split_of_shards, "doesn't allow specify shard_order"),
    ],
)
def test_not_compiled_on_real_ranks_either(program, message):
    for text in shared_pool().run(run_compiled, 2, program.__name__, 2).values():
        assert message in text
    with LocalTensorMode(2), pytest.raises(Exception, match=message):
        program(World(2, backend="aot_eager"))


def test_item_of_partial():
    """DTensor does not reduce before item(): real ranks get different numbers, one program none."""
    found = shared_pool().run(item_of_partial, 2)
    assert found[0] != found[1]
    with LocalTensorMode(2), pytest.raises(RankDivergence, match="one Python float is needed"):
        api.item_of_partial(World(2))


def item_of_partial():
    return api.item_of_partial(World(2))["item"]


def test_repr():
    with LocalTensorMode(2):
        x = distribute_tensor(draw(3, 2), World(2).mesh(names="d"), [Shard(0)])
        text = repr(x)
    assert text.startswith("DTensor(local_tensor=LocalTensor(\n  0: tensor([[")
    assert "placements=(Shard(dim=0),)" in text
