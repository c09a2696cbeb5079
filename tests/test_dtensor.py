"""DTensor over LocalTensor: eager and compiled, forward and backward, against the unsharded op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from localtensor_compile import LocalTensor, LocalTensorMode, rank_map, replicate
from localtensor_compile.errors import CollectiveError

BACKENDS = [
    None,
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.slow),
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compiled(fn, backend):
    torch._dynamo.reset()
    counters.clear()
    return fn if backend is None else torch.compile(fn, backend=backend, fullgraph=True)


def require_one_graph(backend):
    if backend is not None:
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


def whole(value):
    """The full tensor on each rank as a LocalTensor."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    value = value.wait() if hasattr(value, "wait") else value
    assert isinstance(value, LocalTensor)
    return value


def assert_every_rank(value, expected):
    for rank, shard in whole(value)._local_tensors.items():
        assert type(shard) is torch.Tensor
        torch.testing.assert_close(shard, expected.detach(), msg=lambda m, r=rank: f"rank {r}: {m}")


S, R = Shard, Replicate()
# name: (world, mesh shape, [(tensor, placements)], function of DTensors and the mesh, unsharded)
X, W, U, V = draw(8, 8), draw(8, 8, seed=1), draw(7, 5, seed=2), draw(5, 6, seed=3)
PROGRAMS = {
    "mm S0 R": ([(X, [S(0)]), (W, [R])], lambda m, a, b: a @ b),
    "mm R S1": ([(X, [R]), (W, [S(1)])], lambda m, a, b: a @ b),
    "mm to partial": ([(X, [S(1)]), (W, [S(0)])], lambda m, a, b: a @ b),
    "mm to replicate": (
        [(X, [S(1)]), (W, [S(0)])],
        lambda m, a, b: to(a @ b, m, R).relu(),
    ),
    "mm to shard": ([(X, [S(1)]), (W, [S(0)])], lambda m, a, b: to(a @ b, m, S(0)).relu()),
    "shard 0 to 1": ([(X, [S(0)])], lambda m, a: to(a, m, S(1)).sin()),
    "shard to replicate": ([(X, [S(1)])], lambda m, a: to(a, m, R).sin()),
    "replicate to shard": ([(X, [R])], lambda m, a: to(a, m, S(1)).sin()),
    "uneven pointwise": ([(U, [S(0)])], lambda m, a: a.sin() * 2),
    "uneven to replicate": ([(U, [S(0)])], lambda m, a: to(a, m, R).sin()),
    "uneven from replicate": ([(U, [R])], lambda m, a: to(a, m, S(0)).sin()),
    "uneven shard 0 to 1": ([(U, [S(0)])], lambda m, a: to(a, m, S(1)).sin()),
    "uneven mm to shard": ([(U, [S(1)]), (V, [S(0)])], lambda m, a, b: to(a @ b, m, S(0))),
    "uneven softmax": ([(U, [S(0)])], lambda m, a: a.softmax(-1)),
    "uneven softmax over shards": ([(U, [S(1)])], lambda m, a: a.softmax(-1)),
    "uneven sum": ([(U, [S(0)])], lambda m, a: a.sum(0)),
    "uneven mean": ([(U, [S(0)])], lambda m, a: a.mean()),
    "empty shards": ([(U[:2], [S(0)])], lambda m, a: a.sin() * 2),
    "layer norm": ([(U, [S(0)])], lambda m, a: F.layer_norm(a, (5,))),
    "broadcast add": ([(U, [S(0)]), (U[0], [R])], lambda m, a, b: a + b),
    "transpose": ([(U, [S(0)])], lambda m, a: a.t() @ a),
}


def to(tensor, mesh, *placements):
    return tensor.redistribute(mesh, placements) if mesh is not None else tensor


def run_program(inputs, fn, shape, backend):
    with LocalTensorMode(4) as mode:
        mesh = init_device_mesh("cpu", shape)
        leaves = [
            distribute_tensor(replicate(t), mesh, p).detach().requires_grad_() for t, p in inputs
        ]
        out = compiled(lambda *a: fn(mesh, *a), backend)(*leaves)
        require_one_graph(backend)
        full = out.full_tensor()
        (full * full.detach()).sum().backward()
        with mode.disable():
            plain = [t.clone().requires_grad_() for t, _ in inputs]
            expected = fn(None, *plain)
            (expected * expected.detach()).sum().backward()
        assert_every_rank(full.detach(), expected)
        for leaf, reference in zip(leaves, plain):
            assert_every_rank(leaf.grad, reference.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, backend):
    inputs, fn = PROGRAMS[name]
    run_program(inputs, fn, (4,), backend)


def test_world_after_world_with_equal_meshes():
    """DTensor's caches must not hand out the mesh of a world that is gone."""
    for name in ("uneven pointwise", "uneven from replicate"):
        inputs, fn = PROGRAMS[name]
        run_program(inputs, fn, (4,), "aot_eager")


TWO_DIMS = {
    "shard shard": ([(U, [S(0), S(0)])], lambda m, a: to(a, m, R, R).sin()),
    "shard 0, shard 1": ([(U, [S(0), S(1)])], lambda m, a: to(a, m, R, S(0)).sin()),
    "partial": ([(U, [R, S(1)])], lambda m, a: to(a @ a.t(), m, S(0), R)),
    "mm": ([(X, [S(0), R]), (W, [R, S(1)])], lambda m, a, b: a @ b),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TWO_DIMS)
def test_program_on_two_mesh_dims(name, backend):
    inputs, fn = TWO_DIMS[name]
    run_program(inputs, fn, (2, 2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_submesh_with_shapes_that_differ_between_its_copies(backend):
    """Each row of the mesh holds its own tensor: the global shape is one per rank."""
    with LocalTensorMode(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        x = rank_map(lambda r: U[: 2 + r // 2])

        def fn(t):
            d = DTensor.from_local(t, mesh["tp"], [Shard(0)])
            return (d * 2).full_tensor()

        out = whole(compiled(fn, backend)(x))
        for rank, shard in out._local_tensors.items():
            rows = U[: 2 + rank // 2]
            assert torch.equal(shard, torch.cat([rows, rows]) * 2)


class MLP(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 8)

    def forward(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))


PLANS = {
    "tensor": {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()},
    "sequence": {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("world", "hidden"), [(2, 16), (4, 16), (4, 10), (3, 7)])
def test_parallelize_module(world, hidden, plan, backend):
    """Uneven hidden sizes make uneven parameters. One train step, with an optimizer."""
    torch.manual_seed(0)
    reference = MLP(hidden)
    x = draw(3, 12, 8)
    with LocalTensorMode(world) as mode:
        mesh = init_device_mesh("cpu", (world,))
        with mode.disable():
            module = MLP(hidden)
            module.load_state_dict(reference.state_dict())
        module = parallelize_module(replicate(module), mesh, dict(PLANS[plan]))
        inputs = replicate(x)
        if plan == "sequence":
            inputs = distribute_tensor(inputs, mesh, [Shard(1)])
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        out = compiled(module, backend)(inputs)
        require_one_graph(backend)
        full = out.full_tensor() if isinstance(out, DTensor) else out
        (full * full.detach()).mean().backward()
        optimizer.step()
        with mode.disable():
            expected = reference(x)
            (expected * expected.detach()).mean().backward()
            grads = [p.grad.clone() for p in reference.parameters()]
            torch.optim.AdamW(reference.parameters(), lr=0.1).step()
        assert_every_rank(full, expected)
        for mine, grad, theirs in zip(module.parameters(), grads, reference.parameters()):
            assert_every_rank(mine.grad, grad)
            assert_every_rank(mine.detach(), theirs)


def test_bad_placement_is_refused_as_by_torch():
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(AssertionError, match="Sharding dim 3 greater than tensor ndim 1"):
            distribute_tensor(torch.zeros(4), mesh, [Shard(3)])


# ---------------------------------------------------------------- found by the scoreboard
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("index", [0, 5])
def test_embedding_of_one_index(world_size, index):
    """DTensor masks the row with a 0-dim bool, which differs between ranks."""
    weight = draw(7, 3)
    with LocalTensorMode(world_size):
        mesh = init_device_mesh("cpu", (world_size,))
        sharded = distribute_tensor(replicate(weight), mesh, [Shard(0)]).requires_grad_()
        at = distribute_tensor(replicate(torch.tensor(index)), mesh, [Replicate()])
        out = F.embedding(at, sharded)
        out.sum().backward()
        assert_every_rank(out, weight[index])
        assert_every_rank(
            sharded.grad, F.one_hot(torch.tensor(index), 7)[:, None].expand(7, 3).float()
        )


def test_bool_of_each_rank_as_index():
    x = draw(3, 4)
    flags = {rank: torch.tensor(rank != 1) for rank in range(3)}
    writes = (
        lambda t, b: t.__setitem__((b, slice(None)), 0.0),
        lambda t, b: t.__setitem__(b, torch.full((4,), 7.0)),
        lambda t, b: t.__setitem__((slice(1, 3), b), -1.0),
    )
    with LocalTensorMode(3):
        changed = [replicate(x) for _ in writes]
        for target, write in zip(changed, writes):
            write(target, LocalTensor(flags))
        read = replicate(x)[:, LocalTensor(flags)]
    for rank, flag in flags.items():
        for target, write in zip(changed, writes):
            expected = x.clone()
            write(expected, flag)
            assert torch.equal(target._local_tensors[rank], expected)
        assert torch.equal(read._local_tensors[rank], x[:, flag])


def test_tangent_with_other_strides_than_traced():
    """A shard of one column has the strides of both layouts, its gradient those of one of them."""
    x = draw(1, 2, 3)
    with LocalTensorMode(2):
        mesh = init_device_mesh("cpu", (2,))
        leaf = distribute_tensor(replicate(x), mesh, [Shard(2)]).requires_grad_()
        step = compiled(lambda t: t.transpose(-1, -2).full_tensor(), "aot_eager")
        out = step(leaf)
        weights = draw(1, 3, 2, seed=1)
        (grad,) = torch.autograd.grad(out, leaf, weights)
        require_one_graph("aot_eager")
        assert_every_rank(grad, weights.transpose(-1, -2))


def test_gradient_that_is_a_conjugate_view_is_refused_as_on_real_ranks():
    x = draw(4, 5, 6)
    with LocalTensorMode(4):
        mesh = init_device_mesh("cpu", (4,))
        leaf = distribute_tensor(replicate(x), mesh, [Shard(0)]).requires_grad_()
        out = torch.fft.ihfft(leaf, n=10, dim=1, norm="ortho").full_tensor()
        with pytest.raises(
            CollectiveError,
            match=r"all_gather_into_tensor of a complex tensor .* Call resolve_conj\(\) on it, or "
            r"on the output whose gradient it is, first\.",
        ):
            torch.autograd.grad(out, leaf, torch.ones(4, 6, 6, dtype=torch.complex64))
