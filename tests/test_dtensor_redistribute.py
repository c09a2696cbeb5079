"""Redistribution between all pairs of placements, bit for bit as real gloo processes do it.

Eager runs every pair, compiled runs a sample by default: a pair on an uneven 2-D mesh takes Dynamo
and AOTAutograd about as long as gloo needs for all of them.
"""

import pytest

from tests.parallel import dtensor_redistribute as redistribute
from tests.parallel.harness import refused, verify, worlds

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]
slow = pytest.mark.slow

# Even, uneven and empty shards.
ONE_DIM = [
    (3, (7, 4)),
    pytest.param(2, (3, 1), marks=slow),
    pytest.param(4, (8, 4), marks=slow),
    pytest.param(4, (6, 2), marks=slow),
    pytest.param(6, (4, 7), marks=slow),
    pytest.param(8, (9, 8), marks=slow),
]


@pytest.mark.parametrize(("world", "shape"), ONE_DIM)
def test_one_mesh_dim(world, shape):
    verify(redistribute.one_dim, world, shape=shape)


MORE_DIMS = [
    (4, (2, 2), (5, 3), 1),
    pytest.param(6, (2, 3), (7, 4), 1, marks=slow),
    pytest.param(6, (3, 2), (4, 5), 1, marks=slow),
    pytest.param(8, (2, 4), (2, 1), 1, marks=slow),
    pytest.param(8, (2, 4), (8, 8), 1, marks=slow),
    pytest.param(8, (2, 2, 2), (9, 5), 3, marks=slow),
    pytest.param(8, (2, 2, 2), (2, 3), 7, marks=slow),
]


@pytest.mark.parametrize(("world", "mesh_shape", "shape", "every"), MORE_DIMS)
def test_more_mesh_dims(world, mesh_shape, shape, every):
    verify(
        redistribute.more_dims, world, mesh_shape=mesh_shape, shape=shape, every=every, graphs=None
    )


COMPILED = [
    (4, (2, 2), (5, 3), 14, 1),
    pytest.param(4, (2, 2), (5, 3), 3, 1, marks=slow),
    pytest.param(6, (2, 3), (4, 6), 5, 1, marks=slow),
    pytest.param(8, (2, 2, 2), (9, 5), 90, 1, marks=slow),
]


@pytest.mark.parametrize(("world", "mesh_shape", "shape", "every", "graphs"), COMPILED)
def test_more_mesh_dims_compiled(world, mesh_shape, shape, every, graphs):
    arguments = {"mesh_shape": mesh_shape, "shape": shape, "every": every}
    verify(redistribute.more_dims, world, graphs=graphs, **arguments)


# Two uneven dimensions swapped: the ranks' guards together leave one value for a symbol.
RECOMPILED = [
    ({"first": 48, "every": 999, "dynamic": True}, 1),
    pytest.param({"every": 4, "per_graph": 10}, 5, marks=slow),
]


@pytest.mark.parametrize(("pairs", "graphs"), RECOMPILED)
def test_dynamic_shapes(pairs, graphs):
    verify(redistribute.more_dims, 4, graphs=graphs, mesh_shape=(2, 2), shape=(5, 3), **pairs)


@pytest.mark.parametrize("shape", [(8, 4), pytest.param((7, 5), marks=slow)])
def test_strided_shards(shape):
    verify(redistribute.strided, 4, mesh_shape=(2, 2), shape=shape, graphs=None)


def test_strided_shards_compiled():
    verify(redistribute.strided_alone, 4)


def test_strided_shards_refused():
    """torch does not redistribute uneven strided shards."""
    refused(redistribute.uneven_strided, 4, "AssertionError", "", compiled=False)


@pytest.mark.parametrize("world", worlds(3))
def test_conjugates_of_uneven_shards(world):
    verify(redistribute.conjugates, world)
