"""Collectives on the stacked layout: bit for bit what the per-rank layout gives."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.device_mesh import init_device_mesh

import localtensor_compile as lt
from localtensor_compile.collectives.reduction import OPS, legal, reduce_shards, reduce_to_root
from localtensor_compile.collectives.row_reduction import reduce_rows, reduce_rows_to_root
from localtensor_compile.values.stack import ShardsOfStack
from tests import collective_cases
from tests.collective_cases import run_one

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


# ---------------------------------------------------------------- reductions of rows
@pytest.mark.parametrize("way", ("few ops", "much data"))
@pytest.mark.parametrize("order", ("gloo", "rank_order"))
def test_rows_are_reduced_as_shards_are(way, order, monkeypatch):
    if way == "much data":
        monkeypatch.setattr("localtensor_compile.collectives.reduction.SMALL", 0)
    for size in (1, 2, 3, 5, 8):
        for shape in ((), (0, 3), (1,), (3, 5), (37,)):
            for dtype in DTYPES:
                for op in OPS:
                    if op != "premul_sum" and legal(op, dtype) is None:
                        check_rows(size, shape, dtype, op, order)


def check_rows(size, shape, dtype, op, order):
    rows = torch.randn(2, size, 3, *shape) * 10.0 ** torch.randint(-2, 3, (2, size, 3, *shape))
    rows = rows.to(dtype)
    total = reduce_rows(rows, op, order=order)
    left = reduce_rows_to_root(rows, op, size // 2, order=order)
    for outer, inner in ((0, 0), (1, 2)):
        shards = [rows[outer, k, inner] for k in range(size)]
        what = (size, shape, dtype, op)
        assert same(total[outer, inner], reduce_shards(shards, op, order=order)), what
        for k, expected in enumerate(reduce_to_root(shards, op, size // 2, order=order)):
            assert same(left[outer, k, inner], expected), (*what, k)


def test_rows_with_a_factor_each():
    rows = torch.randn(2, 4, 3, 5)
    factors = [1.5, -2.0, 0.1, 3.0]
    got = reduce_rows(rows, "premul_sum", factor=factors)
    shards = [rows[1, k, 2] for k in range(4)]
    assert same(got[1, 2], reduce_shards(shards, "premul_sum", factor=factors))


# ---------------------------------------------------------------- every collective
def outcomes(world, layout, chosen):
    with lt.LocalTensorMode(world, layout=layout) as mode:
        made = collective_cases.groups()
        results = {}
        for name, fn, group, dtype, op, rows in chosen:
            members = contextlib.nullcontext()
            if group == "subgroup" and not name.startswith(IN_PLACE):
                members = lt.LocalTensorMode(mode.ranks - {1}, layout=layout)
            with members:
                results[name] = run_one(fn, made[group], dtype, op, rows)
        return results, mode.stats()


IN_PLACE = ("all_", "reduce", "broadcast", "gather", "scatter")


@pytest.mark.parametrize(
    "world", [3, *(pytest.param(w, marks=pytest.mark.slow) for w in (1, 4, 8))]
)
def test_every_collective(world):
    chosen = [
        c for c in collective_cases.cases(world, quick=True) if c[1] is not collective_cases.objects
    ]
    expected, _ = outcomes(world, "per_rank", chosen)
    got, stats = outcomes(world, "stacked", chosen)
    compared = 0
    for name, tensors in expected.items():
        ours = got[name]
        if isinstance(tensors, str):
            assert isinstance(ours, str), name
            assert ours.partition(":")[0] == tensors.partition(":")[0], (name, ours, tensors)
            continue
        assert not isinstance(ours, str), (name, ours)
        for mine, theirs in zip(ours, tensors, strict=True):
            assert tuple(mine._local_tensors) == tuple(theirs._local_tensors), name
            for rank, shard in theirs._local_tensors.items():
                compared += 1
                assert same(mine._local_tensors[rank], shard), (name, rank)
    assert compared > 200
    # The cases themselves make uneven shards with slices; no collective goes per rank.
    assert all(k.startswith("aten.") for k in stats["per_rank"]), stats["per_rank"]


# ---------------------------------------------------------------- meshes
def on_every_dimension(mesh, x):
    outs = []
    for name in mesh.mesh_dim_names:
        group = mesh.get_group(name)
        size = dist.get_world_size(group)
        wide = x.repeat(size, size)
        outs += [
            funcol.all_reduce(x, "sum", group),
            funcol.all_gather_tensor(x, 0, group),
            funcol.all_gather_tensor(x, 1, group),
            funcol.reduce_scatter_tensor(wide, "avg", 0, group),
            funcol.all_to_all_single(wide, None, None, group),
            funcol.broadcast(x, size - 1, group),
            torch.ops._dtensor.shard_dim_alltoall(wide, 0, 1, group.group_name),
        ]
    return [funcol.wait_tensor(o) for o in outs]


def mesh_results(layout, shape, backend=None):
    world = torch.Size(shape).numel()
    with lt.LocalTensorMode(world, layout=layout):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))
        g = torch.Generator()
        x = lt.rank_map(lambda r: torch.randn(3, 5, generator=g.manual_seed(r)))
        fn = on_every_dimension
        if backend is not None:
            torch.compiler.reset()
            fn = torch.compile(fn, backend=backend, fullgraph=True)
        return fn(mesh, x)


@pytest.mark.parametrize("shape", ((2, 3), (2, 2, 2), (3, 2, 2)))
def test_on_meshes(shape):
    expected = mesh_results("per_rank", shape)
    for backend in (None, "aot_eager"):
        got = mesh_results("stacked", shape, backend)
        for mine, theirs in zip(got, expected, strict=True):
            assert type(mine._local_tensors) is ShardsOfStack
            for rank, shard in theirs._local_tensors.items():
                assert same(mine._local_tensors[rank], shard)


def test_on_a_mesh_with_inductor():
    expected = mesh_results("per_rank", (2, 3))
    for mine, theirs in zip(mesh_results("stacked", (2, 3), "inductor"), expected, strict=True):
        for rank, shard in theirs._local_tensors.items():
            torch.testing.assert_close(mine._local_tensors[rank], shard)


# ---------------------------------------------------------------- in place, on some ranks
@pytest.mark.parametrize("members", ((0, 1), (1, 3), (3, 0, 2)))
def test_ranks_outside_the_group_keep_their_rows(members):
    with lt.LocalTensorMode(4, layout="stacked") as mode:
        group = dist.new_group(list(members))
        x = lt.rank_map(lambda r: torch.full((2,), float(r)))
        stack = x._local_tensors.stack
        dist.all_reduce(x, group=group)
        assert x._local_tensors.stack is stack
        assert not mode.stats()["per_rank"]
        total = float(sum(members))
        for rank in range(4):
            expected = total if rank in members else float(rank)
            assert stack[rank].tolist() == [expected, expected]


def test_in_place_in_memory_order():
    def run(layout):
        with lt.LocalTensorMode(4, layout=layout):
            x = lt.rank_map(lambda r: torch.randn(7, 5, generator=torch.Generator().manual_seed(r)))
            view = x.t()
            dist.all_reduce(view)
            return x

    mine, theirs = run("stacked"), run("per_rank")
    for rank in range(4):
        assert same(mine._local_tensors[rank], theirs._local_tensors[rank])


def test_groups_that_leave_ranks_out_need_one_shape():
    with pytest.raises(lt.CollectiveError, match="stack of 4 rows got groups of 2 rows"):
        torch.ops.localtensor.stacked_all_gather(torch.zeros(4, 2), [0, 1], 2)


# ---------------------------------------------------------------- gradients and nodes
def sharded_loss(x, w):
    h = funcol.all_reduce(
        funcol.wait_tensor(funcol.all_gather_tensor_autograd(x @ w, 0, WORLD())), "sum", WORLD()
    )
    return funcol.reduce_scatter_tensor_autograd(h.relu(), "sum", 0, WORLD()).square().sum()


def WORLD():
    return dist.group.WORLD


def gradients(world, layout, backend=None):
    graphs = []

    def keep(graph, _):
        graphs.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    with lt.LocalTensorMode(world, layout=layout):
        g = torch.Generator()
        x, w = (
            lt.rank_map(
                lambda r: torch.randn(4, 4, generator=g.manual_seed(9 * r + k))
            ).requires_grad_()
            for k in (0, 1)
        )
        fn = sharded_loss
        if backend == "aot":
            torch.compiler.reset()
            fn = torch.compile(fn, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        fn(x, w).sum().backward()
        return (x.grad, w.grad), graphs


def test_backward():
    expected, _ = gradients(4, "per_rank")
    for backend in (None, "aot"):
        got, _ = gradients(4, "stacked", backend)
        for mine, theirs in zip(got, expected, strict=True):
            for rank, shard in theirs._local_tensors.items():
                torch.testing.assert_close(mine._local_tensors[rank], shard)


def test_nodes_do_not_grow_with_the_ranks():
    _, few = gradients(2, "stacked", "aot")
    _, many = gradients(16, "stacked", "aot")
    assert len(few) == 2 and few == many
