"""Dynamic shapes: DTensors of several sizes, with as many graphs as real ranks compile."""

import pytest

from localtensor_compile import LocalTensorMode
from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.check.program import World
from tests.parallel import dtensor_dynamic as programs
from tests.parallel.harness import verify

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]
WAYS = {"automatic": (None, False), "dynamic": (True, False), "marked": (None, True)}


def graphs(size, rows, dynamic, mark):
    return programs.graphs(World(size, backend="aot_eager"), rows, dynamic, mark)


CASES = [
    *((2, rows, way) for rows in (programs.ROWS, programs.UNEVEN_ROWS) for way in WAYS),
    # Not automatic on 3 uneven ranks: where a rank's shard has the same size in two calls, plain
    # torch's backward returns a gradient of the first call's global size, and raises.
    *(pytest.param(3, programs.ROWS, way, marks=pytest.mark.slow) for way in WAYS),
    pytest.param(3, programs.UNEVEN_ROWS, "dynamic", marks=pytest.mark.slow),
    pytest.param(3, programs.UNEVEN_ROWS, "marked", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "rows", "way"), CASES)
def test_as_many_graphs_as_on_real_ranks(world, rows, way):
    dynamic, mark = WAYS[way]
    wanted = set(shared_pool().run(graphs, world, world, rows, dynamic, mark).values())
    arguments = {"rows": rows, "dynamic": dynamic, "mark": mark}
    report = verify(programs.sizes, world, graphs=max(wanted), **arguments)
    assert report.engines[-1].graphs == max(wanted) < len(rows)


def test_one_graph_per_size_where_sizes_are_static():
    with LocalTensorMode(2):
        assert graphs(2, programs.UNEVEN_ROWS, False, False) == len(programs.UNEVEN_ROWS)
