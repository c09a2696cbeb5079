"""What real programs use on each rank: DDP, FSDP2, DTensor, torch.compile; and what is refused."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import localtensor_compile as lt
from localtensor_compile import LocalRunnerMode, LocalTensorMode, WorldError
from localtensor_compile._c10d import local_p2p_op, wait_all
from tests.test_runner import run


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 8, generator=generator)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4))


def train(model, rank):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(batch(rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def averaged(ranks):
    """The parameters of one process that takes the mean of all ranks' gradients."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for rank in range(ranks):
            (model(batch(rank)).square().mean() / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("seed", [None, 4])
def test_ddp(seed):
    def fn(rank):
        model = DistributedDataParallel(mlp(), bucket_cap_mb=0.0001)
        train(model, rank)
        return [p.detach() for p in model.module.parameters()]

    out = run(fn, 3, seed=seed)
    for rank in range(3):
        for found, first, expected in zip(out[rank], out[0], averaged(3)):
            assert torch.equal(found, first)
            torch.testing.assert_close(found, expected)


def test_fsdp():
    def fn(rank):
        model = mlp()
        mesh = init_device_mesh("cpu", (3,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, rank)
        return [p.full_tensor().detach() for p in model.parameters()]

    out = run(fn, 3, seed=1)
    for found, expected in zip(out[2], averaged(3)):
        torch.testing.assert_close(found, expected)


def tensor_parallel(rank, backend=None):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = mlp()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    called = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    loss = called(batch(rank // 2)).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.full_tensor() for p in model.parameters())]


@pytest.fixture(scope="module")
def eager_parallel():
    return run(tensor_parallel)


def test_tensor_parallel(eager_parallel):
    for rank in range(4):
        model = mlp()
        loss = model(batch(rank // 2)).square().mean()
        loss.backward()
        expected = [loss.detach(), *(p.grad for p in model.parameters())]
        for found, one in zip(eager_parallel[rank], expected):
            torch.testing.assert_close(found, one)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_tensor_parallel(backend, eager_parallel):
    out = run(lambda rank: tensor_parallel(rank, backend), seed=2)
    for rank in range(4):
        assert all(torch.equal(a, b) for a, b in zip(out[rank], eager_parallel[rank]))


def with_rank(x):
    y = x * (dist.get_rank() + 1)
    dist.all_reduce(y)
    return y + dist.get_rank()


def test_compiled_code_belongs_to_its_rank():
    """Dynamo takes the rank for a constant; one compiled function is called by all ranks."""
    compiled = torch.compile(with_rank, backend="aot_eager", fullgraph=True)
    for seed in (None, 3):
        out = run(lambda rank: compiled(torch.ones(2)), seed=seed)
        assert {r: x.tolist() for r, x in out.items()} == {r: [10.0 + r] * 2 for r in range(4)}


def test_functional_collectives_in_a_graph_wait():
    def fn(rank):
        @torch.compile(backend="aot_eager", fullgraph=True)
        def f(x):
            gathered = funcol.all_gather_tensor(x, 0, dist.group.WORLD)
            return gathered.view(4, -1).sum(1) * x.sum()

        return f(torch.full((3,), rank + 1.0))

    out = run(fn, seed=9)
    for rank in range(4):
        assert out[rank].tolist() == [3.0 * s * 3 * (rank + 1) for s in (1, 2, 3, 4)]


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
def test_calls_between_graphs_are_not_compiled():
    """Dynamo has no graph form of broadcast and send: what they call is left alone."""

    def fn(rank):
        @torch.compile(backend="eager")
        def f(x):
            y = x + rank
            dist.broadcast(y, 1)
            if rank == 0:
                dist.send(y * 2, 1)
            else:
                dist.recv(y, 0)
            return y + 1

        return f(torch.zeros(2)).tolist()

    assert run(fn, 2) == {0: [2.0, 2.0], 1: [3.0, 3.0]}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_data_parallel(kind, backend):
    def fn(rank, backend=None):
        model = mlp()
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        train(model if backend is None else torch.compile(model, backend=backend), rank)
        parameters = [p.detach() for p in model.parameters()]
        return [p.full_tensor() if kind == "fsdp" else p for p in parameters]

    expected = run(fn, 2)
    found = run(lambda rank: fn(rank, backend), 2, seed=1)
    for rank in range(2):
        for a, b in zip(found[rank], expected[rank]):
            torch.testing.assert_close(a, b)
            assert backend == "inductor" or torch.equal(a, b)


def test_waiting_inside_a_compilation_is_refused():
    def fn(rank):
        def backend(graph, inputs):
            dist.barrier()
            return graph.forward

        return torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))

    with pytest.raises(Exception, match=r"must wait while torch\.compile compiles, where no"):
        run(fn, 2)


def test_configuration_of_the_caller_holds_on_ranks():
    import torch._dynamo.config as config

    with config.patch(recompile_limit=3):
        assert run(lambda rank: config.recompile_limit, 2) == {0: 3, 1: 3}


# ---------------------------------------------------------------- worlds in threads
def test_simulated_worlds_in_threads():
    """Collectives inside one SPMD thread, and between threads."""

    def fn(rank):
        with LocalTensorMode(4):
            x = lt.rank_map(lambda r: torch.full((2,), float(r)))
            dist.all_reduce(x)
        y = torch.full((1,), float(rank))
        dist.all_reduce(y)
        return x.reconcile().tolist(), y.tolist()

    assert run(fn, seed=5) == {r: ([6.0, 6.0], [6.0]) for r in range(4)}


@pytest.fixture
def world_of_six():
    dist.init_process_group("fake", rank=0, world_size=6, store=FakeStore())
    yield init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "pp"))
    dist.destroy_process_group()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_spmd_threads_send_shards(world_of_six, seed):
    mesh = world_of_six

    def peers(stage, step):
        rows = [m.mesh for m in mesh._get_all_submeshes("pp")]
        to = {int(row[stage]): int(row[(stage + step) % 2]) for row in rows}
        return torch.SymInt(lt.LocalIntNode(to))

    def fn(stage):
        with LocalTensorMode(6):
            x = distribute_tensor(torch.arange(24.0).view(6, 4), mesh["dp"], [Shard(0)]) * 2
            y = distribute_tensor(torch.zeros(6, 4), mesh["dp"], [Shard(0)])
            if stage == 0:
                wait_all(local_p2p_op(peers(0, 1), x, dist.isend))
            else:
                wait_all(local_p2p_op(peers(1, -1), y, dist.irecv))
            return y.to_local()

    with LocalRunnerMode(6, 2, fn, seed=seed) as mode:
        pass
    received = mode.results[1]._local_tensors
    for rank in range(6):
        rows = torch.arange(24.0).view(6, 4)[rank // 2 * 2 :][:2] * 2
        assert torch.equal(received[rank], rows if rank % 2 else torch.zeros(2, 4))


def test_what_was_made_outside_is_refused(world_of_six):
    group = dist.new_group([0, 1])
    with (
        pytest.raises(WorldError, match="a DeviceMesh that was made outside the ranks' threads"),
        LocalRunnerMode(6, 6, lambda rank: world_of_six.get_local_rank("pp")),
    ):
        pass
    with (
        pytest.raises(WorldError, match="a process group that was made outside the ranks' thr"),
        LocalRunnerMode(6, 6, lambda rank: dist.all_reduce(torch.ones(1), group=group)),
    ):
        pass

    def inside(rank):
        mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "pp"))
        x = torch.full((1,), float(rank))
        dist.all_reduce(x, group=mesh.get_group("pp"))
        return int(x), mesh.get_coordinate()

    with LocalRunnerMode(6, 6, inside) as mode:
        pass
    assert mode.results == {r: (r // 2 * 4 + 1, (r // 2, r % 2)) for r in range(6)}


# ---------------------------------------------------------------- errors
def test_only_one_runner_at_a_time():
    def fn(rank):
        with LocalRunnerMode(2, 2, lambda r: r):
            pass

    with pytest.raises(WorldError, match="only one LocalRunnerMode can be active at a time"):
        run(fn, 2)


@pytest.mark.parametrize("ranks, threads", [(0, 1), (2, 3), (2, 0)])
def test_numbers_of_threads(ranks, threads):
    with pytest.raises(WorldError, match=f"got {ranks} ranks and {threads} threads. It needs"):
        LocalRunnerMode(ranks, threads, print)


def test_objects_and_the_run_lock():
    seen = []

    def fn(rank):
        mode = LocalRunnerMode.current()
        assert LocalRunnerMode.runner_context.id == rank
        mode._assert_holds_run_lock()
        if rank == 0:
            mode._wait_recv(-1, 0, seen.append)
            assert mode._get_recv_object(1, 0) is None
            with pytest.raises(WorldError, match="Cannot signal None"):
                mode._signal_send(0, 1, None)
        else:
            mode._signal_send(1, 0, "object")
        mode._release_run_lock()
        with pytest.raises(WorldError, match="does not hold the run lock"):
            mode._assert_holds_run_lock()
        mode._acquire_run_lock()
        mode._assert_holds_run_lock()

    with LocalRunnerMode(2, 2, fn) as mode:
        pass
    assert seen == ["object"]
    with pytest.raises(WorldError, match="does not hold the run lock"):
        mode._assert_holds_run_lock()


def test_a_send_that_does_not_fit():
    def fn(rank):
        if rank == 0:
            dist.send(torch.ones(4), 1)
        else:
            dist.recv(torch.ones(4, dtype=torch.float64), 0)

    with pytest.raises(lt.CollectiveError) as error:
        run(fn, 2)
    line = fn.__code__.co_firstlineno
    here = "tests/test_runner_torch.py"
    assert f"rank 0 sends float32 (4,) at {here}:{line + 2}, but rank 1" in str(error.value)
    assert f"into float64 (4,) at {here}:{line + 4}" in str(error.value)


def test_a_larger_recv_keeps_its_end_as_with_gloo():
    def fn(rank):
        if rank == 0:
            dist.send(torch.ones(2), 1)
            return None
        x = torch.zeros(4)
        dist.recv(x, 0)
        return x.tolist()

    assert run(fn, 2)[1] == [1.0, 1.0, 0.0, 0.0]


def test_shapes_that_do_not_fit_name_all_calls():
    def fn(rank):
        dist.all_reduce(torch.ones(2 + rank))

    with pytest.raises(lt.CollectiveError) as error:
        run(fn, 2)
    assert "needs the same shape on every rank" in str(error.value)
    assert "rank 1: all_reduce(SUM) of float32 (3,) at tests/test_runner_torch.py" in str(
        error.value
    )


def test_a_dtensor_is_no_memory():
    def fn(rank):
        mesh = init_device_mesh("cpu", (2,))
        dist.all_reduce(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))

    with pytest.raises(lt.CollectiveError, match="got a DTensor, which is no memory that can be"):
        run(fn, 2)


def test_a_local_tensor_of_one_rank():
    def fn(rank):
        dist.send(lt.LocalTensor({0: torch.ones(1), 1: torch.ones(1)}), 1 - rank)

    with pytest.raises(lt.CollectiveError, match="which holds shards of several ranks, by rank 0"):
        run(fn, 2)


def test_at_names_what_is_missing():
    with pytest.raises(WorldError, match=r"at\(0\) looks at a rank that runs in a thread, but no"):
        lt.at(0)

    def fn(rank):
        mine = rank * 10
        if rank == 0:
            with pytest.raises(WorldError, match=r"at\(7\): the ranks are \[0, 1\]"):
                lt.at(7)
            with pytest.raises(WorldError, match="rank 1 has not begun"):
                lt.at(1).line  # noqa: B018
        dist.barrier()
        views = [lt.at(0)["mine"], lt.at(1).eval("mine + rank"), lt.at(1).locals["rank"]]
        with pytest.raises(KeyError, match="'other' is no variable of fn on rank 1"):
            lt.at(1)["other"]
        dist.barrier()
        return views, mine

    assert run(fn, 2)[0] == ([0, 11, 1], 0)
