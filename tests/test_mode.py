"""LocalTensorMode: what is true inside, and that nothing of it is left outside."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import localtensor_compile as lt
from localtensor_compile import LocalTensor, LocalTensorMode, rank_map, tensor_map
from localtensor_compile.world import torch_hooks


def snapshot():
    """Everything that a mode may replace, as (owner, name) -> the object itself."""
    state = {}
    for owner, name, _ in torch_hooks.all_replacements():
        if isinstance(owner, dict):
            state[id(owner), name] = owner.get(name)
        elif isinstance(owner, type):
            state[id(owner), name] = owner.__dict__.get(name)
        else:
            state[id(owner), name] = getattr(owner, name)
    state["function modes"] = list(_get_current_function_mode_stack())
    state["dispatch modes"] = list(_get_current_dispatch_mode_stack())
    state["modes"] = list(lt.get_local_tensor_mode_list())
    state["group"] = dist.is_initialized()
    state["tag"] = str(torch.compiler.config.cache_key_tag)
    state["rng"] = torch.get_rng_state().tolist()
    return state


@pytest.fixture
def no_trace():
    before = snapshot()
    yield
    after = snapshot()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value is after[key] or value == after[key], key


def test_enter_and_leave(no_trace):
    with LocalTensorMode(4) as mode:
        assert lt.local_tensor_mode() is mode
        assert dist.is_initialized() and dist.get_world_size() == 4
        assert isinstance(torch.zeros(2), LocalTensor)
    assert lt.local_tensor_mode() is None


def test_something_is_replaced():
    """The snapshot can fail: inside the mode it is another one."""
    before = snapshot()
    with LocalTensorMode(2):
        inside = snapshot()
    changed = [k for k in before if before[k] is not inside.get(k) and before[k] != inside.get(k)]
    assert len(changed) > 20


def test_nesting(no_trace):
    with LocalTensorMode(4) as outer:
        with LocalTensorMode({1, 3}) as inner:
            assert lt.local_tensor_mode() is inner
            assert sorted(torch.zeros(1)._ranks) == [1, 3]
        assert lt.local_tensor_mode() is outer
        assert sorted(torch.zeros(1)._ranks) == [0, 1, 2, 3]
        with outer:
            assert sorted(torch.zeros(1)._ranks) == [0, 1, 2, 3]


def test_disable(no_trace):
    with LocalTensorMode(2) as mode:
        mesh = init_device_mesh("cpu", (2,))
        with mode.disable():
            assert type(torch.zeros(2)) is torch.Tensor
            assert lt.enabled_local_tensor_mode() is None
            assert lt.local_tensor_mode() is mode
            assert mesh.get_local_rank() == 0
            with mode.disable():
                pass
            assert type(torch.zeros(2)) is torch.Tensor
        assert isinstance(torch.zeros(2), LocalTensor)
        mode.disable_()
        assert type(torch.zeros(2)) is torch.Tensor
        mode.enable_()
        assert isinstance(torch.zeros(2), LocalTensor)
    with lt.maybe_disable_local_tensor_mode():
        assert type(torch.zeros(2)) is torch.Tensor


class Boom(Exception):
    pass


def boom(*args, **kwargs):
    raise Boom


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        raise Boom


def in_dispatch(mode):
    rank_map(lambda r: torch.zeros(2)).apply_(boom)


def in_backward_compiled(mode):
    x = rank_map(lambda r: torch.zeros(2)).requires_grad_()

    def backend(gm, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        compile_fw = lambda g, i: make_boxed_func(g.forward)
        return aot_autograd(fw_compiler=compile_fw, bw_compiler=boom)(gm, inputs)

    torch.compile(lambda t: t.sin().sum(), backend=backend)(x).backward()


def while_tracing(mode):
    def user(t):
        lt.maybe_disable_local_tensor_mode()
        return t * undefined_name  # noqa: F821

    torch.compile(user, backend="eager", fullgraph=True)(rank_map(lambda r: torch.zeros(2)))


STAGES = {
    "body": lambda mode: boom(),
    "rank_map": lambda mode: rank_map(boom),
    "tensor_map": lambda mode: tensor_map(torch.zeros(2), boom),
    "disabled": lambda mode: mode.disable().__enter__() or boom(),
    "per rank": lambda mode: lt.maybe_run_for_local_tensor(boom)(torch.zeros(2)),
    "op": lambda mode: torch.zeros(2) @ torch.zeros(3),
    "factory": lambda mode: torch.zeros(-3),
    "collective": lambda mode: dist.broadcast(torch.zeros(2), 9),
    "functional": lambda mode: funcol.all_reduce(torch.zeros(2), "no", dist.group.WORLD),
    "group": lambda mode: dist.new_group([0, 77]),
    "subgroups": lambda mode: dist.new_subgroups_by_enumeration([[0, 1], [1, 0]]),
    "mesh": lambda mode: init_device_mesh("cpu", (3, 3)),
    "scatter": lambda mode: dist.scatter(torch.zeros(2), [torch.zeros(2)], src=1),
    "objects": lambda mode: dist.all_gather_object([None], 3),
    "dtensor": lambda mode: distribute_tensor(
        torch.zeros(2), init_device_mesh("cpu", (2,)), [Shard(5)]
    ),
    "backward": lambda mode: (
        RaisesInBackward.apply(torch.zeros(2, requires_grad=True)).sum().backward()
    ),
    "dispatch": in_dispatch,
    "backward compiler": in_backward_compiled,
    "tracing": while_tracing,
    "divergence": lambda mode: bool(rank_map(lambda r: torch.tensor(r)) > 0),
    "random": lambda mode: torch.rand(2).normal_(0, -1),
    "destroyed group": lambda mode: dist.destroy_process_group() or boom(),
}


@pytest.mark.parametrize("stage", STAGES)
def test_exception_leaves_no_trace(stage, no_trace):
    torch._dynamo.reset()
    with pytest.raises(Exception):  # noqa: B017
        with LocalTensorMode(2) as mode:
            STAGES[stage](mode)


@pytest.mark.parametrize(
    "name", ["installed", "cache_key", "init_simulated_process_group", "_install"]
)
def test_exception_while_entering(name, monkeypatch, no_trace):
    with monkeypatch.context() as patch:
        patch.setattr(torch_hooks, name, boom)
        mode = LocalTensorMode(2)
        with pytest.raises(Boom):
            mode.__enter__()
    assert not mode._exits


def test_exception_while_installing_the_nth_replacement(monkeypatch, no_trace):
    every = list(torch_hooks.all_replacements())
    for n in range(0, len(every), 7):

        def some(n=n):
            yield from every[:n]
            raise Boom

        with monkeypatch.context() as patch:
            patch.setattr(torch_hooks, "all_replacements", some)
            with pytest.raises(Boom), LocalTensorMode(2):
                pass


def test_another_thread_sees_no_world(no_trace):
    seen = {}

    def look():
        seen["tensor"] = type(torch.zeros(2))
        seen["mode"] = lt.local_tensor_mode()
        seen["rank"] = dist.get_rank()

    with LocalTensorMode(2):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == {"tensor": torch.Tensor, "mode": None, "rank": 0}


def test_two_threads_have_their_own_worlds(no_trace):
    barrier = threading.Barrier(2)
    seen = {}

    def work(ranks):
        with LocalTensorMode(ranks):
            barrier.wait()
            seen[len(ranks)] = sorted(torch.zeros(2)._ranks)
            barrier.wait()

    with LocalTensorMode(8):  # holds the process group for both
        threads = [threading.Thread(target=work, args=(set(range(n)),)) for n in (2, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {2: [0, 1], 5: [0, 1, 2, 3, 4]}


# ---------------------------------------------------------------- ranks, meshes, groups
def test_mesh_coordinates_of_every_rank():
    with LocalTensorMode(8):
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
        for dim, divisor in (("pp", 4), ("dp", 2), ("tp", 1)):
            expected = {r: r // divisor % 2 for r in range(8)}
            assert mesh.get_local_rank(dim).node._local_ints == expected
            assert mesh[dim].get_local_rank().node._local_ints == expected
            assert mesh[dim].get_coordinate()[0].node._local_ints == expected
        both = mesh["pp", "tp"].get_coordinate()
        assert [c.node._local_ints for c in both] == [
            {r: r // 4 for r in range(8)},
            {r: r % 2 for r in range(8)},
        ]
        flat = mesh["dp", "tp"]._flatten("flat")
        assert flat.get_local_rank().node._local_ints == {r: r % 4 for r in range(8)}
        assert mesh.get_rank().node._local_ints == {r: r for r in range(8)}


def test_short_lived_meshes_do_not_share_coordinates():
    with LocalTensorMode(4):
        for shape in ((2, 2), (4, 1), (1, 4), (2, 2)):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b"))
            found = mesh["b"].get_local_rank()
            found = found.node._local_ints if isinstance(found, torch.SymInt) else found
            size = shape[1]
            assert found == ({r: r % size for r in range(4)} if size > 1 else 0)
            del mesh


def test_ranks():
    with LocalTensorMode(4):
        everyone = {r: r for r in range(4)}
        assert dist.get_rank().node._local_ints == everyone
        assert dist.group.WORLD.rank().node._local_ints == everyone
        group = dist.new_group([1, 3])
        assert dist.get_rank(group).node._local_ints == {0: -1, 1: 0, 2: -1, 3: 1}
        assert dist.get_world_size(group) == 2
    with LocalTensorMode({2}):
        assert dist.get_rank() == 2


def test_group_of_its_own_and_families():
    """new_group alone leaves other ranks out; meshes and new_subgroups cover all of them."""
    with LocalTensorMode(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        alone = dist.new_group([2, 3])
        family, _ = dist.new_subgroups(2)
        enumerated, _ = dist.new_subgroups_by_enumeration([[0, 3], [1, 2]])
        expected = {
            mesh.get_group("a"): [2, 4, 2, 4],
            mesh.get_group("b"): [1, 1, 5, 5],
            alone: [0, 1, 5, 5],
            family: [1, 1, 5, 5],
            enumerated: [3, 3, 3, 3],
        }
        for group, sums in expected.items():
            x = rank_map(lambda r: torch.tensor([float(r)]))
            dist.all_reduce(x, group=group)
            assert [t.item() for t in x._local_tensors.values()] == sums


def test_mesh_made_before_the_mode():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        with LocalTensorMode(4):
            for dim, sums in (("a", [2, 4, 2, 4]), ("b", [1, 1, 5, 5])):
                x = rank_map(lambda r: torch.tensor([float(r)]))
                dist.all_reduce(x, group=mesh.get_group(dim))
                assert [t.item() for t in x._local_tensors.values()] == sums
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- per-rank code
def test_same_code_on_a_real_rank():
    """Without a mode rank_map and tensor_map are the code of the one real rank."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert rank_map(lambda r: torch.tensor(r + 5)).item() == 5
        assert tensor_map(torch.tensor(2), lambda r, t: t + r).item() == 2
        assert lt.maybe_run_for_local_tensor(lambda t: t + 1)(torch.tensor(2)).item() == 3
    finally:
        dist.destroy_process_group()


def test_maps_are_differentiable():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.tensor([1.0 + r, 2.0])).requires_grad_()
        y = tensor_map(x, lambda r, t: t * (r + 1))
        y.sum().backward()
        grads = [g.tolist() for g in x.grad._local_tensors.values()]
        assert grads == [[1.0, 1.0], [2.0, 2.0]]


def test_reconcile_args():
    with LocalTensorMode(2):
        args, kwargs = lt.reconcile_args((torch.ones(2), 3), {"a": [torch.zeros(1)]})
        assert type(args[0]) is torch.Tensor and args[1] == 3
        assert type(kwargs["a"][0]) is torch.Tensor


def test_replicate_module():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    with LocalTensorMode(2):
        assert lt.replicate(module) is module
        for tensor in (*module.parameters(), *module.buffers()):
            assert isinstance(tensor, LocalTensor)
        weight = module[0].weight
        assert isinstance(weight, torch.nn.Parameter) and weight.requires_grad
        shards = list(weight._local_tensors.values())
        assert torch.equal(*shards) and shards[0].data_ptr() != shards[1].data_ptr()


def test_reduction_order():
    values = [1e8, 1.0, -1e8, 1.0]
    with LocalTensorMode(4, reduction="rank_order"):
        x = rank_map(lambda r: torch.tensor([values[r]] * 8))
        dist.all_reduce(x)
        left_fold = x.reconcile()
    total = torch.zeros(8)
    for v in values:
        total = total + torch.tensor([v] * 8)
    assert torch.equal(left_fold, total)
    with LocalTensorMode(4):
        x = rank_map(lambda r: torch.tensor([values[r]] * 8))
        dist.all_reduce(x)
        assert not torch.equal(x.reconcile(), left_fold)


def test_checkpoint_of_local_tensors(tmp_path):
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(2 + r))
        p = torch.nn.Parameter(rank_map(lambda r: torch.full((2,), float(r))))
        torch.save({"x": x, "p": p}, tmp_path / "c.pt")
        loaded = torch.load(tmp_path / "c.pt", weights_only=True)
    assert isinstance(loaded["p"], torch.nn.Parameter) and loaded["p"].requires_grad
    for r in (0, 1):
        assert torch.equal(loaded["x"]._local_tensors[r], x._local_tensors[r])
        assert torch.equal(loaded["p"]._local_tensors[r], p._local_tensors[r].detach())


def test_dtensor_of_a_replicated_plain_tensor():
    with LocalTensorMode(2) as mode:
        mesh = init_device_mesh("cpu", (2,))
        with mode.disable():
            plain = torch.arange(4.0)
        d = distribute_tensor(plain, mesh, [Replicate()])
        with mode.disable():
            assert torch.equal(d.to_local(), torch.arange(4.0))


def test_torch_profiler_inside():
    with lt.LocalTensorMode(2), torch.profiler.profile() as profile:
        torch.ones(3) + 1
    assert any(event.name == "aten::add" for event in profile.events())
