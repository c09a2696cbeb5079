"""What compiling costs and when it happens: graph size, recompiles, artifacts in other contexts."""

import contextlib
import inspect
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import localtensor_compile as lt
from localtensor_compile import LocalTensor, LocalTensorMode, RankDivergence


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


class Graphs:
    """A backend that keeps the forward and backward graphs that AOTAutograd makes."""

    def __init__(self):
        self.graphs = []
        self.backend = aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)

    def keep(self, gm, inputs):
        self.graphs.append(gm.graph)
        return make_boxed_func(gm.forward)

    @property
    def nodes(self):
        return [n for graph in self.graphs for n in graph.nodes if n.op == "call_function"]

    def count(self, namespace):
        return sum(
            isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == namespace
            for n in self.nodes
        )


def tensors(world, *shape, seed=0, rows=None, grad=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda r: torch.randn(*((rows[r],) if rows else ()), *shape, generator=generator)
    with lt.maybe_disable_local_tensor_mode():
        return LocalTensor({r: draw(r) for r in range(world)}, grad)


def mlp(x, w1, w2):
    return torch.relu(x @ w1) @ w2


def gather(x, w1, w2):
    hidden = funcol.all_gather_tensor_autograd(torch.relu(x @ w1), 0, dist.group.WORLD)
    return (hidden @ w2).sin()


PROGRAMS = {"no collective": (mlp, 0), "a collective each way": (gather, 2)}
SHAPES = (3, 4), (4, 5), (5, 2)


@contextlib.contextmanager
def fake_group(world):
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def nodes_of_one_rank(program, world):
    graphs = Graphs()
    args = [torch.randn(*shape, requires_grad=True) for shape in SHAPES]
    with fake_group(world):
        out = torch.compile(program, backend=graphs.backend, fullgraph=True)(*args)
        out.sum().backward()
    # A real rank's collective is a call and a wait; ours is the rank's item of the shared node.
    return len(graphs.nodes) - graphs.count("_c10d_functional") // 2


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_nodes_are_those_of_each_rank_and_one_per_collective(name, inside, world):
    program, collectives = PROGRAMS[name]
    one_rank = nodes_of_one_rank(program, world)
    torch._dynamo.reset()
    graphs = Graphs()
    args = [tensors(world, *s, seed=i, grad=True) for i, s in enumerate(SHAPES)]
    compiled = torch.compile(program, backend=graphs.backend, fullgraph=True)
    mode = LocalTensorMode(world) if inside else fake_group(world)
    with mode:
        compiled(*args).sum().backward()
    assert graphs.count("localtensor") == collectives
    assert len(graphs.nodes) == world * one_rank + collectives
    assert len(graphs.graphs) == 2


# ---------------------------------------------------------------- recompiles
def counted(fn, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(fn, backend=counter, fullgraph=True, **options), counter


INSIDE = pytest.mark.parametrize(
    "mode", [lambda: LocalTensorMode(3), contextlib.nullcontext], ids=["inside", "outside"]
)


def assert_mlp(out, *args):
    for rank, shard in out._local_tensors.items():
        assert torch.equal(shard, mlp(*(a._local_tensors[rank] for a in args)))


@INSIDE
def test_same_shapes_do_not_recompile(mode):
    compiled, counter = counted(mlp)
    with mode():
        for seed in range(4):
            args = [tensors(3, *s, seed=seed) for s in SHAPES]
            assert_mlp(compiled(*args), *args)
    assert counter.frame_count == 1


@INSIDE
def test_same_uneven_shapes_do_not_recompile(mode):
    compiled, counter = counted(mlp)
    weights = [tensors(3, *s, seed=9) for s in SHAPES[1:]]
    with mode():
        for seed in range(4):
            x = tensors(3, 4, seed=seed, rows=(3, 0, 2))
            assert_mlp(compiled(x, *weights), x, *weights)
    assert counter.frame_count == 1


@INSIDE
def test_other_uneven_shapes_recompile_once(mode):
    compiled, counter = counted(mlp)
    weights = [tensors(3, *s, seed=9) for s in SHAPES[1:]]
    with mode():
        for rows in ((3, 4, 2), (5, 6, 7), (2, 9, 3), (4, 4, 8), (11, 5, 2)):
            x = tensors(3, 4, rows=rows)
            assert_mlp(compiled(x, *weights), x, *weights)
    assert counter.frame_count <= 2


def test_dynamic_sizes_per_rank_do_not_recompile():
    compiled, counter = counted(mlp, dynamic=True)
    weights = [tensors(3, *s, seed=9) for s in SHAPES[1:]]
    for rows in ((13, 14, 12), (15, 16, 17), (22, 19, 23)):
        x = tensors(3, 4, rows=rows)
        assert_mlp(compiled(x, *weights), x, *weights)
    assert counter.frame_count == 1


def test_dtensor_does_not_recompile():
    with LocalTensorMode(4):
        mesh = init_device_mesh("cpu", (4,))
        compiled, counter = counted(lambda x: (x * 2).sum(0).full_tensor())
        for seed in range(3):
            torch.manual_seed(seed)
            whole = torch.randn(10, 3)
            out = compiled(distribute_tensor(whole, mesh, [Shard(0)]))
            for rank, shard in out._local_tensors.items():
                expected = (whole._local_tensors[rank] * 2).sum(0)
                torch.testing.assert_close(shard, expected)
    assert counter.frame_count == 1


def test_other_ranks_recompile():
    compiled, counter = counted(mlp)
    for count, ranks in enumerate(((0, 1), (0, 1, 2), (1, 2), (0, 1)), start=1):
        args = [LocalTensor({r: torch.randn(*s) for r in ranks}) for s in SHAPES]
        out = compiled(*args)
        assert tuple(out._local_tensors) == ranks
        assert_mlp(out, *args)
        assert counter.frame_count == min(count, 3)


def test_the_rank_is_no_reason_to_recompile():
    compiled, counter = counted(lambda x: x[dist.get_rank() :] * dist.get_rank())
    with LocalTensorMode(3):
        for seed in range(3):
            x = tensors(3, 4, 2, seed=seed)
            out = compiled(x)
            for rank, shard in out._local_tensors.items():
                assert torch.equal(shard, x._local_tensors[rank][rank:] * rank)
    assert counter.frame_count == 1


# ---------------------------------------------------------------- artifacts in other contexts
def total(x, w):
    return funcol.all_reduce(x @ w, "sum", dist.group.WORLD) / x.shape[0]


def assert_total(out, x, w):
    expected = sum(x._local_tensors[r] @ w._local_tensors[r] for r in x._local_tensors)
    for shard in out._local_tensors.values():
        torch.testing.assert_close(shard, expected / x.shape[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("first", ["inside", "outside"])
def test_compiled_inside_and_called_outside_or_the_reverse(backend, first):
    x, w = tensors(3, 2, 4), tensors(3, 4, 5, seed=1)
    with fake_group(3):
        compiled = torch.compile(total, backend=backend, fullgraph=True)
        for place in (first, "outside" if first == "inside" else "inside", first):
            with LocalTensorMode(3) if place == "inside" else contextlib.nullcontext():
                assert_total(compiled(x, w), x, w)


def test_called_in_another_world():
    compiled, _ = counted(total)
    for world in (2, 4, 3, 2):
        x, w = tensors(world, 2, 4), tensors(world, 4, 5, seed=1)
        with LocalTensorMode(world):
            assert_total(compiled(x, w), x, w)


def test_rank_dependent_artifact_in_another_world():
    compiled = torch.compile(
        lambda x: x * dist.get_rank() + dist.get_world_size(), backend="aot_eager", fullgraph=True
    )
    for world in (2, 3, 2):
        x = tensors(world, 3)
        with LocalTensorMode(world):
            out = compiled(x)
        for rank, shard in out._local_tensors.items():
            assert torch.equal(shard, x._local_tensors[rank] * rank + world)


def test_backward_in_another_context_than_forward():
    x, w = tensors(2, 3, 4, grad=True), tensors(2, 4, 5, seed=1)
    compiled = torch.compile(lambda x, w: (x @ w).sin(), backend="aot_eager", fullgraph=True)
    with LocalTensorMode(2):
        out = compiled(x, w).sum()
    out.backward()
    inside = x.grad
    x.grad = None
    out = compiled(x, w).sum()
    with LocalTensorMode(2):
        out.backward()
    for rank in (0, 1):
        assert torch.equal(inside._local_tensors[rank], x.grad._local_tensors[rank])


# ---------------------------------------------------------------- what reaches the user
def branch(x):
    return x + 1 if x.shape[0] > 2 else x - 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_divergence_reaches_the_user(backend):
    with LocalTensorMode(2), pytest.raises(RankDivergence) as error:
        x = tensors(2, 4, rows=(2, 3))
        torch.compile(branch, backend=backend, fullgraph=True)(x)
    text = str(error.value)
    assert "ranks disagree about a condition: rank 0: False, rank 1: True" in text
    assert "run the branch once per rank with rank_map, tensor_map" in text


def test_agreeing_branches_are_fine():
    compiled, _ = counted(branch)
    for rows, change in (((3, 4), 1), ((2, 1), -1), ((5, 3), 1)):
        x = tensors(2, 4, rows=rows)
        out = compiled(x)
        for rank, shard in out._local_tensors.items():
            assert torch.equal(shard, x._local_tensors[rank] + change)


def test_lines_of_the_user_in_the_graph():
    graphs = Graphs()
    with LocalTensorMode(2):
        args = [tensors(2, *s, grad=True) for s in SHAPES]
        torch.compile(gather, backend=graphs.backend, fullgraph=True)(*args).sum().backward()
    forward = [n for n in graphs.graphs[0].nodes if n.op == "call_function"]
    start = inspect.getsourcelines(gather)[1]
    for node in forward:
        assert f'File "{__file__}"' in node.stack_trace, node
    collective = next(
        n
        for n in forward
        if n.target.__class__ is torch._ops.OpOverload and n.target.namespace == "localtensor"
    )
    assert "all_gather_tensor_autograd" in collective.stack_trace
    assert f"line {start + 1}" in collective.stack_trace


def test_the_exception_of_the_user():
    def program(x):
        raise ValueError("mine")

    with LocalTensorMode(2), pytest.raises(ValueError, match="mine"):
        torch.compile(program, backend="aot_eager")(tensors(2, 3))
    assert lt.local_tensor_mode() is None


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_math_of_sizes(dynamic):
    compiled, _ = counted(lambda x: x / math.sqrt(x.shape[0]), dynamic=dynamic)
    x = tensors(2, 3, rows=(4, 9))
    out = compiled(x)
    for rank, shard in out._local_tensors.items():
        assert torch.equal(shard, x._local_tensors[rank] / math.sqrt(shard.shape[0]))


# ---------------------------------------------------------------- item() in one graph
ITEMS = {
    "multiplied": lambda x, y: y * x.item(),
    "returned": lambda x, y: x.item() + 1,
    "bool": lambda x, y: y + (x > 0).item(),
    "to_int": lambda x, y: y * int(x.item()),
    "from_int": lambda x, y: y * float((x * 2).long().item()),
    "filled": lambda x, y: torch.full((3,), x.item()) + y,
}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ITEMS)
def test_item_differs_between_ranks(name, backend):
    xs = {0: torch.tensor(1.5), 1: torch.tensor(-2.0)}
    ys = {0: torch.arange(3.0), 1: torch.ones(3)}
    counter = CompileCounterWithBackend(backend)
    with LocalTensorMode(2):  # fullgraph=True sets capture_scalar_outputs
        compiled = torch.compile(ITEMS[name], backend=counter, fullgraph=True)
        found = compiled(LocalTensor(xs), LocalTensor(ys))
    values = found._local_tensors if isinstance(found, LocalTensor) else found.node._values
    for rank in range(2):
        assert torch.equal(
            torch.as_tensor(values[rank]), torch.as_tensor(ITEMS[name](xs[rank], ys[rank]))
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_bytes_of_an_uneven_parameter(inside):
    """Dynamo counts them unless torch's own test suite is imported."""
    x = tensors(2, 3, rows=(2, 3))
    assert x.nbytes.node._local_ints == {0: 24, 1: 36}
    assert tensors(2, 3).nbytes == 12
    weight = torch.nn.Parameter(x)
    with torch._dynamo.config.patch(log_compilation_metrics=True):
        with LocalTensorMode(2) if inside else contextlib.nullcontext():
            compiled, counter = counted(lambda x: (x @ weight.t(), weight.nbytes + 1))
            out, size = compiled(tensors(2, 5, 3))
    assert counter.frame_count == 1
    assert size.node._local_ints == {0: 25, 1: 37}
    for rank, shard in out.detach()._local_tensors.items():
        expected = tensors(2, 5, 3)._local_tensors[rank] @ x._local_tensors[rank].t()
        assert torch.equal(shard, expected)


VIEWS = {
    "view": lambda x: x.view(x.shape),
    "view_as": lambda x: x.view_as(x),
    "t": lambda x: x.t(),
    "columns": lambda x: x[:, 2:5],
    "rows": lambda x: x[1:],
}


@pytest.mark.parametrize("rows", [(3, 2), (2, 0), (2, 1), (3, 1, 0)])
@pytest.mark.parametrize(
    ("name", "dynamic"),
    # torch raises for dynamic rows of any subclass.
    [(n, d) for n in VIEWS for d in (None, True) if (n, d) != ("rows", True)],
)
def test_view_of_uneven_shards_as_input(rows, name, dynamic):
    view = VIEWS[name](LocalTensor({r: torch.randn(n, 8) for r, n in enumerate(rows)}))
    torch._dynamo.reset()
    step = torch.compile(
        lambda x: x.sin().sum(1), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    out = step(view)
    for r, shard in view._local_tensors.items():
        assert torch.equal(out._local_tensors[r], shard.sin().sum(1))
