"""Factories and per-rank numbers in compiled code: each program against plain torch per rank."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from localtensor_compile import LocalTensor, LocalTensorMode
from localtensor_compile.world import torch_hooks
from localtensor_compile.world.factories import on_ranks
from localtensor_compile.world.torch_hooks import factories as hooks
from tests.factory_programs import (
    GROUPS,
    PLAIN,
    RANK_NUMBER,
    ROWS,
    WORLD,
    expected,
    inputs,
    require_same,
    written,
)
from tests.test_factories import OPTIMIZERS, Scaled, gradient, start, steps

# torch's own, raised while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated"),
]
SCALAR = np.float32(3.0)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        if not any(name == "load" for _, name, _ in torch_hooks.all_replacements()):
            for owner, name, replacement in hooks.replacements():
                stack.callback(torch_hooks._replace(owner, name, replacement))
        yield


@pytest.fixture
def x():
    return LocalTensor(inputs())


class Counting:
    """A backend that counts the graphs it gets."""

    def __init__(self, backend):
        self.backend = lookup_backend(backend)
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return self.backend(graph, example_inputs)


def compiled(fn, backend="aot_eager", **options):
    return torch.compile(fn, backend=backend, fullgraph=True, **options)


def require_equal(result, wanted):
    if isinstance(result, (list, tuple)):
        assert len(result) == len(wanted)
        for got, want in zip(result, wanted):
            require_equal(got, want)
        return
    assert type(result) is type(wanted) is LocalTensor
    for r, want in wanted._local_tensors.items():
        assert torch.equal(result._local_tensors[r], want)


# ---------------------------------------------------------------- each factory
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("eager", False), ("aot_eager", False), ("aot_eager", True)]
)
@pytest.mark.parametrize("group", GROUPS)
def test_equals_plain_torch_on_each_rank(group, backend, dynamic, x):
    programs = GROUPS[group]

    def run(x):
        r = x.shape[0] - 2 if dynamic else RANK_NUMBER
        return [program(x.shape[0], r, x) for program in programs.values()]

    with LocalTensorMode(WORLD):
        results = compiled(run, backend, dynamic=dynamic)(x)
    for (name, program), result in zip(programs.items(), results):
        require_same(result, expected(program), name)


def test_inductor(x):
    names = [
        *("sizes.zeros", "sizes.full", "ranges.arange", "ranges.arange_bounds", "values.tensor"),
        *("values.tensor_ranks", "values.full_rank", "indexes.row", "indexes.slice_block"),
        *("indexes.set_row", "splits.split", "plain.mul", "plain.row", "like.in_place"),
        *("values.tensor_array", "values.as_tensor_array"),
    ]
    programs = {name: GROUPS[name.split(".")[0]][name.split(".")[1]] for name in names}

    def run(x):
        return [program(x.shape[0], RANK_NUMBER, x) for program in programs.values()], x * SCALAR

    with LocalTensorMode(WORLD):
        results, scaled = compiled(run, "inductor")(x)
    for (name, program), result in zip(programs.items(), results):
        require_same(result, expected(program), name)
    require_same(scaled, {r: t * 3 for r, t in inputs().items()}, "a NumPy scalar")


def test_backward(x):
    def loss(x):
        weight = torch.full((x.shape[0], 4), 2.0) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        first, second = x.split([RANK_NUMBER + 1, x.shape[0] - RANK_NUMBER - 1])
        return (x * weight).sum() + (x[RANK_NUMBER] ** 2).sum() + first.sum() + 0 * second.sum()

    grads = []
    with LocalTensorMode(WORLD):
        for fn in (loss, compiled(loss), compiled(loss, dynamic=True)):
            leaf = x.detach().clone().requires_grad_()
            fn(leaf).backward()
            grads.append(leaf.grad)
    require_equal(grads[1:], [grads[0], grads[0]])
    for r, t in inputs().items():
        want = torch.tensor([2.0, 4.0, 6.0, 8.0]).repeat(ROWS[r], 1)
        want[r] += 2 * t[r]
        want[: r + 1] += 1
        assert torch.equal(grads[0]._local_tensors[r], want)


def test_gradient_of_a_plain_tensor_is_per_rank(x):
    with LocalTensorMode(WORLD) as mode:
        with mode.disable():
            weight = PLAIN.clone().requires_grad_()
        compiled(lambda x, w: (w[x.shape[0] - 2] * x.shape[0]).sum())(x, weight).backward()
    for r, n in ROWS.items():
        want = torch.zeros_like(PLAIN)
        want[r] = n
        assert torch.equal(weight.grad._local_tensors[r], want)


# ---------------------------------------------------------------- graphs
def test_nodes_grow_with_the_ranks():
    sizes = []
    for world in (1, 2, 4, 8):
        torch._dynamo.reset()
        graphs = []

        def keep(graph, _, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
        with LocalTensorMode(world) as mode:
            x = mode.rank_map(lambda r: torch.ones(r + 2, 4))
            compiled(lambda x: x * torch.ones(x.shape[0], 4) + torch.arange(4.0), backend)(x)
        calls = [n for n in graphs[0].graph.nodes if n.op == "call_function"]
        assert {str(n.target).split(".")[0] for n in calls} == {"aten"}
        sizes.append(len(calls))
    assert sizes == [4, 8, 16, 32]


def test_one_node_of_the_dynamo_graph_per_factory(x):
    backend = Counting("eager")
    with LocalTensorMode(WORLD):
        compiled(lambda x: x + torch.zeros(x.shape[0], 4) + torch.ones(4), backend)(x)
    assert [n.target for n in backend.graphs[0].graph.nodes].count(on_ranks) == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_recompile_for_new_sizes(backend):
    def run(x):
        n = x.shape[0]
        return x + torch.zeros(n, 4), torch.arange(n), torch.tensor([n, 1]), x[n - 1]

    counts = []
    for dynamic in (True, None):
        counting = Counting(backend)
        fn = compiled(run, counting, dynamic=dynamic)
        for rows in (5, 7, 11, 6, 20):
            with LocalTensorMode(WORLD) as mode:
                x = mode.rank_map(lambda r: torch.ones(rows + r, 4))
                require_equal(fn(x), run(x))
        counts.append(len(counting.graphs))
    assert counts == [1, 2]


def test_other_ranks_recompile():
    counting = Counting("aot_eager")

    def run(x):
        return x + torch.ones(4)

    fn = compiled(run, counting)
    counts = []
    for world in (3, 3, 2, 3, 2):
        with LocalTensorMode(world) as mode:
            x = mode.rank_map(lambda r: torch.ones(2, 4))
            require_equal(fn(x), run(x))
        counts.append(len(counting.graphs))
    assert counts == [1, 1, 2, 2, 2]
    require_equal(fn(x), x + 1)  # outside of the mode its factories are plain, as in eager
    assert len(counting.graphs) == 3


def test_second_process_finds_the_graph_in_the_cache(x):
    def run(x):
        return x + torch.full((x.shape[0], 4), 3.5)

    with torch._inductor.utils.fresh_cache(), LocalTensorMode(WORLD):
        for key in ("autograd_cache_miss", "autograd_cache_hit"):
            torch._dynamo.reset()
            counters.clear()
            require_equal(compiled(run, "inductor")(x), run(x))
            assert counters["aot_autograd"][key] == 1


# ---------------------------------------------------------------- what surrounds the call
def test_backward_outside_of_the_mode(x):
    x.requires_grad_()
    with LocalTensorMode(WORLD):
        loss = compiled(lambda x: (x * torch.full((x.shape[0], 4), 3.0)).sum())(x)
    loss.backward()
    require_equal(x.grad, torch.full_like(x, 3.0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graph_breaks(backend, x):
    def run(x):
        a = torch.zeros(x.shape[0], 4)
        torch._dynamo.graph_break()
        b = torch.ones(x.shape[0], 4) + torch.tensor([1.0, 2.0, 3.0, 4.0])
        torch._dynamo.graph_break()
        return x + a + b, torch.arange(x.shape[0])

    counting = Counting(backend)
    with LocalTensorMode(WORLD):
        require_equal(torch.compile(run, backend=counting)(x), run(x))
    assert len(counting.graphs) >= 2


def test_disabled_inside(x):
    with LocalTensorMode(WORLD) as mode:

        def run(x):
            with mode.disable():
                plain = torch.zeros(2), torch.tensor([1.0]), torch.arange(3)
            mapped = mode.rank_map(lambda r: torch.full((r + 2, 4), float(r)))
            return plain, x + mapped + torch.ones(4)

        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            plain, mapped = compiled(run, backend)(x)
            assert [type(t) for t in plain] == [torch.Tensor] * 3
            require_equal(mapped, run(x)[1])


def test_nested_worlds():
    def run(x):
        return x + torch.ones(x.shape[0], 4)

    with LocalTensorMode(4), LocalTensorMode({1, 2}) as inner:
        x = inner.rank_map(lambda r: torch.ones(r, 4))
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            require_equal(compiled(run, backend)(x), run(x))


@pytest.mark.parametrize("outside", [False, True])
def test_default_device(outside, x):
    def run(x):
        return torch.zeros(x.shape[0]), torch.arange(x.shape[0]), torch.rand(2)

    with LocalTensorMode(WORLD):
        if outside:
            torch.set_default_device("meta")
            try:
                results = compiled(run)(x)
            finally:
                torch.set_default_device(None)
        else:
            with torch.device("meta"):
                results = compiled(run)(x)
        assert [t.device.type for t in results] == ["meta"] * 3
        assert [t.device.type for t in compiled(run)(x)] == ["cpu"] * 3


def test_new_leaf(x):
    def run(x):
        weight = torch.ones(4, requires_grad=True)
        return (x * weight).sum(), weight

    with LocalTensorMode(WORLD):
        loss, weight = torch.compile(run, backend="aot_eager")(x)
        loss.backward()
    require_equal(weight.grad, x.sum(0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_checkpoint_and_transforms(backend, x):
    def scaled(x):
        return (x * torch.full((x.shape[0], 4), 3.0)).sin()

    def run(x):
        loss = checkpoint(scaled, x, use_reentrant=False).sum()
        grad = torch.func.grad(lambda t: (t * torch.arange(4.0)).sum())(x)
        return loss + grad.sum()

    grads = []
    with LocalTensorMode(WORLD):
        for fn in (run, compiled(run, backend)):
            leaf = x.detach().clone().requires_grad_()
            fn(leaf).backward()
            grads.append(leaf.grad)
    require_equal(grads[1], grads[0])


def test_autograd_function(x):
    with LocalTensorMode(WORLD):
        x.requires_grad_()
        compiled(lambda x: Scaled.apply(x).sum())(x).backward()
    for r, n in ROWS.items():
        assert x.grad._local_tensors[r].tolist() == [[1, 2, 3, 4]] * n


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x.split([1, x.shape[0]]), "add up to the length of dimension 0 on every rank"),
        (lambda x: PLAIN.mul_(x.shape[0]), "into a plain tensor of shape"),
        (lambda x: written(PLAIN, x.shape[0] - 2, 1.0), "into a plain tensor of shape"),
        (lambda x: x.nan_to_num(x.shape[0]), "one Python int is needed"),
        (lambda x: torch.dropout(PLAIN, 0.5, True), "would draw random numbers for a plain tensor"),
    ],
)
def test_errors(call, message, x):
    before = PLAIN.clone()
    with LocalTensorMode(WORLD), pytest.raises(Exception, match=message):
        compiled(call)(x)
    assert torch.equal(PLAIN, before)


# ---------------------------------------------------------------- optimizers
def compiled_steps(make, parameter, gradients):
    def make_compiled(parameters):
        optimizer = make(parameters)
        optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
        return optimizer

    torch._dynamo.reset()
    return steps(make_compiled, parameter, gradients)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw_foreach", "adam_fused"])
def test_optimizers(name):
    make = OPTIMIZERS[name]
    with LocalTensorMode(WORLD) as mode:
        parameter = nn.Parameter(mode.rank_map(start))
        gradients = [mode.rank_map(lambda r: gradient(s, r)) for s in range(3)]
        result, state = compiled_steps(make, parameter, gradients)
        assert all(isinstance(v, LocalTensor) for v in state.values() if v is not None and v.dim())
        with mode.disable():
            plain, gradients = nn.Parameter(start(1)), [gradient(s, 1) for s in range(3)]
        plain, state = compiled_steps(make, plain, gradients)
        assert not any(isinstance(value, LocalTensor) for value in state.values())
    for r in range(WORLD):
        gradients = [gradient(s, r) for s in range(3)]
        want, _ = compiled_steps(make, nn.Parameter(start(r)), gradients)
        assert torch.equal(result._local_tensors[r], want)
        if r == 1:
            assert torch.equal(plain, want)
