"""Code written against torch.distributed._local_tensor runs with our package in its place."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from torch.distributed._local_tensor import __file__ as upstream_file
from torch.testing._internal.distributed.fake_pg import FakeStore

import localtensor_compile as lt
from localtensor_compile import _c10d

# Public names and those that other code is seen to read.
NAMES = """LocalTensor LocalRunnerMode LocalTensorMode LocalIntNode local_tensor_mode
enabled_local_tensor_mode
maybe_run_for_local_tensor maybe_disable_local_tensor_mode rank_map tensor_map reconcile_args
get_local_tensor_mode_list maybe_enable_local_tracker get_generator_seed_for_device_type
_for_each_rank_run_func _map_to_rank_local_val _combine_rank_results _LOCAL_TENSOR_ATTR_PREFIX
_is_local_tensor_attr _to_local_tensor_attr _from_local_tensor_attr _c10d""".split()

C10D_NAMES = """_local_functional_all_gather_into_tensor _local_functional_reduce_scatter_tensor
_local_functional_shard_dim_alltoall _local_functional_all_to_all_single _local_broadcast_
_local_reduce _local_all_reduce_ _local_allreduce_coalesced_
_local_reduce_scatter_tensor_coalesced_ _local_allgather_base_ _local_reduce_scatter_base_
_local_all_gather_ _local_allgather_into_tensor_coalesced_ _local_gather_ _local_scatter_
_local_alltoall_ _local_alltoall_base_ _local_barrier _local_monitored_barrier_ _local_send
_local_recv_ _local_recv_any_source_ _attach_rank local_p2p_op wait_all
_prepare_collective_groups""".split()


@pytest.mark.parametrize("name", NAMES)
def test_name_exists_and_is_ours(name):
    value = getattr(lt, name)
    module = getattr(value, "__module__", None) or getattr(value, "__name__", "localtensor_compile")
    if not isinstance(value, str):
        assert module.startswith("localtensor_compile")
    if hasattr(value, "__code__"):
        assert value.__code__.co_filename != upstream_file


@pytest.mark.parametrize("name", C10D_NAMES)
def test_c10d_name_exists_and_is_ours(name):
    assert getattr(_c10d, name).__module__.startswith("localtensor_compile")


def test_unknown_name_says_so():
    with pytest.raises(AttributeError, match="has no attribute 'LocalNothing'"):
        lt.LocalNothing  # noqa: B018


def test_attributes_that_people_read():
    t = lt.LocalTensor({0: torch.zeros(2, 3), 1: torch.ones(4, 3)})
    assert list(t._local_tensors) == [0, 1]
    assert t._ranks == frozenset({0, 1})
    assert torch.equal(t._local_tensor_1, torch.ones(4, 3))
    assert t.shape[0].node._local_ints == {0: 2, 1: 4}
    attrs, spec = t.__tensor_flatten__()
    assert attrs == ["_local_tensor_0", "_local_tensor_1"]
    inner = {a: getattr(t, a) for a in attrs}
    again = lt.LocalTensor.__tensor_unflatten__(inner, spec, t.size(), t.stride())
    assert all(again._local_tensors[r] is t._local_tensors[r] for r in (0, 1))
    with pytest.raises(AttributeError, match=r"holds no shard of rank 7, only of ranks \[0, 1\]"):
        t._local_tensor_7  # noqa: B018


def test_errors_are_the_builtins_that_torch_raises():
    with pytest.raises(ValueError):
        lt.LocalTensor({})
    with pytest.raises(AssertionError):
        lt.LocalTensor({0: torch.zeros(2), 1: torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(AssertionError):
        lt.LocalTensor({0: torch.zeros(2, requires_grad=True)})
    with pytest.raises(AssertionError):
        lt.LocalTensor({0: torch.zeros(2), 1: torch.ones(2)}).reconcile()


def test_uniform_int_node_is_a_constant():
    n = torch.SymInt(lt.LocalIntNode({0: 3, 1: 3}))
    assert n == 3 and int(n) == 3


def test_process_group_made_by_the_user():
    """torch's own tests make a fake process group first, and call collectives without a mode."""
    dist.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    try:
        shards = {r: torch.full((2,), float(r + 1)) for r in range(3)}
        t = lt.LocalTensor({r: s.clone() for r, s in shards.items()})
        dist.all_reduce(t)
        assert all(torch.equal(s, torch.full((2,), 6.0)) for s in t._local_tensors.values())
        with lt.LocalTensorMode(t._ranks) as mode:
            assert isinstance(torch.ones(2), lt.LocalTensor)
            with mode.disable():
                assert type(torch.ones(2)) is torch.Tensor
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_c10d_functions_run():
    with lt.LocalTensorMode(2):
        group = dist.group.WORLD
        t = lt.rank_map(lambda r: torch.full((2,), float(r)))
        out = _c10d._local_functional_all_gather_into_tensor(t, 2, group.group_name)
        assert torch.equal(out.reconcile(), torch.tensor([0.0, 0.0, 1.0, 1.0]))
        _c10d._local_all_reduce_([t], group, dist.ReduceOp.SUM)
        assert torch.equal(t.reconcile(), torch.ones(2))
        assert _c10d._prepare_collective_groups(group) == ([0, 1], [0], 0)
        with pytest.raises(
            lt.UnsupportedError, match="send of a LocalTensor: point-to-point calls"
        ):
            _c10d._local_send([t], group, 1, 0)
    reduced = _c10d._local_reduce("max", [torch.tensor([1, 5]), torch.tensor([4, 2])])
    assert reduced.tolist() == [4, 5]


def test_in_place_of_the_module():
    """sys.modules points at us: importers get our classes, and DTensor finds our mode."""
    program = """
        import sys
        import torch, torch.distributed
        import localtensor_compile as lt
        sys.modules["torch.distributed._local_tensor"] = lt
        sys.modules["torch.distributed._local_tensor._c10d"] = lt._c10d
        torch.distributed._local_tensor = lt
        from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        assert LocalTensor is lt.LocalTensor
        with LocalTensorMode(2):
            mesh = init_device_mesh("cpu", (2,))
            x = torch.arange(10.0).reshape(5, 2)
            d = distribute_tensor(x, mesh, [Shard(0)])
            assert d.to_local().shape[0].node._local_ints == {0: 3, 1: 2}
            assert torch.equal((d * 2).full_tensor().reconcile(), x.reconcile() * 2)
        print("right")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert result.stdout.strip() == "right", result.stderr
