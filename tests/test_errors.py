"""Bad input: an exception of ours that says what was found, on which ranks, and what to do."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

import localtensor_compile as lt
from localtensor_compile import (
    CollectiveError,
    LocalIntNode,
    LocalTensor,
    LocalTensorMode,
    PlainTensorError,
    RankDivergence,
    ShardError,
    UnsupportedError,
    WorldError,
    rank_map,
)


def local(*shards, **options):
    return LocalTensor(dict(enumerate(shards)), **options)


def differing():
    return local(torch.tensor(1.0), torch.tensor(2.0))


# ---------------------------------------------------------------- building a LocalTensor
def test_inside_a_local_tensor():
    inner = local(torch.zeros(2), torch.zeros(2))
    message = (
        r"the shard of rank 0 is a LocalTensor itself \(of ranks \[0, 1\]\).*"
        r"rank_map\(lambda rank: \.\.\.\)"
    )
    with pytest.raises(ShardError, match=message):
        local(inner, inner)
    with LocalTensorMode(2), pytest.raises(ShardError, match=message):
        local(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.zeros(2, dtype=torch.int32), "same dtype.*rank 0: torch.float32, rank 1: .*int32"),
        (torch.zeros(2).to_sparse(), "same layout.*rank 0: torch.strided, rank 1: .*sparse_coo"),
        (torch.zeros(2, device="meta"), "same device.*rank 0: cpu, rank 1: meta"),
        (torch.zeros(2, 2), "same number of dimensions.*rank 0: 1, rank 1: 2"),
    ],
)
def test_shards_that_disagree(other, message):
    with pytest.raises(ShardError, match=message):
        local(torch.zeros(2), other)


def test_conjugate_bit_on_one_rank():
    z = torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(ShardError, match=r"same conjugate bit.*rank 0: False, rank 1: True"):
        local(z, z.conj())


def test_shards_that_require_grad():
    message = r"the shard of rank 1 requires grad.*LocalTensor\(\.\.\., requires_grad=True\)"
    with pytest.raises(ShardError, match=message):
        local(torch.zeros(2), torch.zeros(2, requires_grad=True))


def test_no_ranks():
    with pytest.raises(ShardError, match=r"at least one rank, but got none. Give it a dict"):
        LocalTensor({})
    with pytest.raises(WorldError, match="LocalTensorMode needs at least one rank, but got 0"):
        LocalTensorMode(0)
    with pytest.raises(WorldError, match="LocalTensorMode needs at least one rank, but got none"):
        LocalTensorMode(set())
    with pytest.raises(ShardError, match="LocalIntNode needs the value of at least one rank"):
        LocalIntNode({})


def test_ranks_that_are_no_ranks():
    with pytest.raises(ShardError, match=r"ranks are ints from 0 up, but LocalTensor got \[-1\]"):
        LocalTensor({-1: torch.zeros(1)})
    with pytest.raises(WorldError, match=r"but LocalTensorMode got \['a'\]"):
        LocalTensorMode({"a"})


def test_shards_that_are_no_tensors():
    with pytest.raises(ShardError, match=r"rank 0 is no tensor but float.*torch\.tensor"):
        local(1.0)


def test_unknown_tensor_subclass():
    two = TwoTensor(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ShardError, match="of the tensor subclass TwoTensor, which LocalTensor"):
        local(two)


def test_operation_with_unknown_tensor_subclass():
    class Refuses(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return NotImplemented

    other = torch.Tensor._make_wrapper_subclass(Refuses, (2,))
    message = (
        r"aten.add.Tensor got a LocalTensor together with Refuses, and neither knows the other"
    )
    with pytest.raises(UnsupportedError, match=message):
        local(torch.zeros(2), torch.zeros(2)) + other


# ---------------------------------------------------------------- worlds
def test_ranks_outside_the_world():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        message = r"got ranks \[2, 3\], but the process group that exists has ranks 0 to 1"
        with pytest.raises(WorldError, match=message), LocalTensorMode(4):
            pass
    finally:
        dist.destroy_process_group()


def test_unknown_reduction():
    with pytest.raises(WorldError, match=r"unknown reduction 'tree'.*gloo, rank_order"):
        LocalTensorMode(2, reduction="tree")


def test_replicate_without_a_world():
    with pytest.raises(WorldError, match=r"replicate\(\) needs ranks, or an active"):
        lt.replicate(torch.zeros(2))


def test_coordinates_of_ranks_outside_the_mesh():
    with LocalTensorMode(4):
        mesh = DeviceMesh("cpu", [0, 1])
        with pytest.raises(WorldError, match=r"ranks \[2, 3\] are not part of the DeviceMesh"):
            mesh.get_coordinate()


def test_collective_after_the_mode_ended():
    with LocalTensorMode(2):
        group = dist.group.WORLD.group_name
        x = rank_map(lambda r: torch.ones(2))
    assert torch.equal((x + 1).reconcile(), torch.full((2,), 2.0))  # ops need no mode
    message = r"the process group '0' is not part of the simulated world.*inside LocalTensorMode"
    with pytest.raises(CollectiveError, match=message):
        torch.ops._c10d_functional.all_reduce(x, "sum", group)


def test_values_of_different_ranks():
    a = LocalTensor({0: torch.zeros(2), 1: torch.zeros(2)})
    b = LocalTensor({0: torch.zeros(2), 2: torch.zeros(2)})
    with pytest.raises(ShardError, match=r"values of ranks \[0, 1\] together .* \[0, 2\]"):
        a + b
    with pytest.raises(ShardError, match=r"values of ranks \[0, 1\] and of ranks \[0, 2\]"):
        torch.cat([a, b])


# ---------------------------------------------------------------- collectives
def test_collective_on_an_unknown_group():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(2))
        with pytest.raises(CollectiveError, match="the process group 'nobody' is not part of"):
            torch.ops._c10d_functional.all_reduce(x, "sum", "nobody")


def test_collective_with_missing_ranks():
    with LocalTensorMode(3):
        x = LocalTensor({0: torch.ones(2).reconcile(), 2: torch.ones(2).reconcile()})
        message = r"ranks \[0, 1, 2\] got a LocalTensor without shards of ranks \[1\]"
        with pytest.raises(CollectiveError, match=message):
            dist.all_reduce(x)


def test_functional_collective_by_ranks_outside_the_group():
    with LocalTensorMode(3):
        group = dist.new_group([0, 2])
        x = rank_map(lambda r: torch.ones(2))
        message = r"all_reduce on the group of ranks \[0, 2\] got shards of ranks \[1\]"
        with pytest.raises(CollectiveError, match=message):
            funcol.all_reduce(x, "sum", group)


def test_mesh_group_that_is_no_regular_grid():
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = DeviceMesh("cpu", [[0, 1], [3, 2]])  # made before the mode could record its groups
        group = mesh.get_group(0)
        irregular = dist.new_group([0, 1, 3], group_desc="mesh_x")
        with LocalTensorMode(4):
            x = rank_map(lambda r: torch.ones(2))
            with pytest.raises(CollectiveError, match=r"\[0, 3\].*does not tile a world of 4"):
                dist.all_reduce(x, group=group)
            with pytest.raises(CollectiveError, match=r"\[0, 1, 3\].*is not a regular grid"):
                dist.all_reduce(x, group=irregular)
    finally:
        dist.destroy_process_group()


def test_mismatched_shapes():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(2 + r))
        found = r"ranks? .*shapes are rank 0: \(2,\), rank 1: \(3,\).*fails, hangs or"
        for call in (
            lambda: dist.all_reduce(x),
            lambda: funcol.all_reduce(x, "sum", dist.group.WORLD),
            lambda: funcol.all_gather_tensor(x, 0, dist.group.WORLD),
            lambda: dist.broadcast(x, 0),
            lambda: dist.reduce(x, 0),
        ):
            with pytest.raises(CollectiveError, match=found):
                call()


def test_reduce_scatter_that_does_not_divide():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(3))
        with pytest.raises(CollectiveError, match=r"into 2 equal parts.*its size is 3. Pad it"):
            torch.ops._c10d_functional.reduce_scatter_tensor(
                x, "sum", 2, dist.group.WORLD.group_name
            )


def test_output_of_another_shape_or_dtype():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(2))
        out = rank_map(lambda r: torch.ones(3))
        with pytest.raises(CollectiveError, match=r"shape \(3,\), but it receives \(4,\)"):
            torch.ops.c10d._allgather_base_(out, x, dist.group.WORLD.boxed())
        out = [rank_map(lambda r: torch.ones(2, dtype=torch.int64)) for _ in range(2)]
        with pytest.raises((CollectiveError, ValueError), match=r"dtype|type"):
            dist.all_gather(out, x)


@pytest.mark.parametrize(
    ("input_splits", "output_splits", "message"),
    [
        ([1, 2], [1, 2], r"rank 1 sends 1 rows to rank 0, but rank 0 expects 2 rows from it"),
        ([1, 1], [1, 1], r"splits of rank 0 are \[1, 1\], which sum to 2, but .* 3 rows"),
        ([1, 1, 1], [1, 1, 1], r"got 3 splits for a group of 2 ranks"),
        ([], [], r"the 3 rows of rank 0 do not divide by the 2 ranks"),
    ],
)
def test_bad_splits(input_splits, output_splits, message):
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(3))
        with pytest.raises(CollectiveError, match=message):
            torch.ops._c10d_functional.all_to_all_single(
                x, output_splits, input_splits, dist.group.WORLD.group_name
            )


def test_unknown_reduce_op():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(3))
        with pytest.raises(CollectiveError, match=r"unknown reduce op 'median'.*sum, avg"):
            torch.ops._c10d_functional.all_reduce(x, "median", dist.group.WORLD.group_name)


def test_root_outside_the_group():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(3))
        with pytest.raises(CollectiveError, match=r"root is group rank 5.*group ranks 0 to 1"):
            torch.ops._c10d_functional.broadcast(x, 5, dist.group.WORLD.group_name)


def test_point_to_point():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.ones(3))
        with pytest.raises(UnsupportedError, match="point-to-point calls need a program per rank"):
            dist.send(x, 1)


def test_local_and_plain_tensors_in_one_collective():
    with LocalTensorMode(2) as mode:
        x = rank_map(lambda r: torch.ones(2))
        with mode.disable():
            plain = torch.empty(4)
        with pytest.raises(CollectiveError, match=r"together with a plain tensor of shape \(4,\)"):
            torch.ops.c10d._allgather_base_(plain, x, dist.group.WORLD.boxed())


def test_collective_on_plain_tensors_counts_them_on_every_rank():
    with LocalTensorMode(4) as mode:
        with mode.disable():
            plain = torch.tensor([1.0, 2.0])
            gathered = torch.empty(8)
        dist.all_reduce(plain)
        assert plain.tolist() == [4.0, 8.0]
        dist.broadcast(plain, 2)
        assert plain.tolist() == [4.0, 8.0]
        dist.all_gather_into_tensor(gathered, plain)
        assert gathered.tolist() == [4.0, 8.0] * 4


def test_collective_on_plain_tensors_that_would_differ_per_rank():
    with LocalTensorMode(2) as mode:
        with mode.disable():
            plain, out = torch.ones(4), torch.empty(2)
        message = r"on plain tensors of shapes .*another result on every rank.*replicate\(tensor\)"
        with pytest.raises(PlainTensorError, match=message):
            dist.reduce_scatter_tensor(out, plain)
        with pytest.raises(PlainTensorError, match=message):
            dist.all_to_all_single(torch.empty_like(plain), plain)


def test_functional_collective_on_a_plain_tensor():
    """Never left as it was: counted on all ranks, or refused."""
    with LocalTensorMode(2) as mode:
        with mode.disable():
            plain = torch.ones(4)
        group = dist.group.WORLD
        reduced = funcol.all_reduce(plain, "sum", group)
        gathered = funcol.all_gather_tensor(plain, 0, group)
        with mode.disable():
            assert torch.equal(reduced, torch.full((4,), 2.0))
            assert torch.equal(gathered, torch.ones(8))
        message = "_c10d_functional.reduce_scatter_tensor on plain tensors of shapes"
        with pytest.raises(PlainTensorError, match=message):
            funcol.reduce_scatter_tensor(plain, "sum", 0, group)

        def compiled(t):
            return funcol.all_reduce(t * 2, "sum", group) + 1

        torch._dynamo.reset()
        result = torch.compile(compiled, backend="aot_eager", fullgraph=True)(plain)
        with mode.disable():
            assert torch.equal(result, torch.full((4,), 5.0))


def test_data_of_a_plain_tensor():
    with LocalTensorMode(2) as mode:
        with mode.disable():
            plain = torch.ones(4)
        with pytest.raises(
            PlainTensorError, match=r"tensor\.data = \.\.\. would put the values of se"
        ):
            plain.data = torch.zeros(4)


# ---------------------------------------------------------------- writes into plain tensors
@pytest.mark.parametrize(
    "write",
    [
        lambda plain, x: plain.copy_(x),
        lambda plain, x: plain.add_(x),
        lambda plain, x: plain.mul_(x[0]),
        lambda plain, x: torch.add(x, x, out=plain),
        lambda plain, x: torch._foreach_add_([plain], [x]),
        lambda plain, x: plain.index_put_((torch.tensor([0, 1]),), x),
        lambda plain, x: plain.__setitem__(0, x[0]),
        lambda plain, x: plain.masked_fill_(x > 0, 1.0),
        lambda plain, x: plain.scatter_(0, x.long() * 0, 1.0),
    ],
)
def test_write_into_a_plain_tensor(write):
    x = local(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    plain = torch.zeros(2)
    message = r"would write the values of several ranks into one plain tensor of shape .*rank_map"
    with pytest.raises(PlainTensorError, match=message):
        write(plain, x)
    assert plain.tolist() == [0.0, 0.0]


def test_write_into_a_plain_tensor_while_compiling():
    x = local(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    torch._dynamo.reset()
    plain = torch.zeros(2)
    compiled = torch.compile(lambda p, t: p.copy_(t * 2), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="would write the values of several ranks into one plain"):
        compiled(plain, x)
    assert plain.tolist() == [0.0, 0.0]


# ---------------------------------------------------------------- one Python value
def test_branch_on_data():
    message = r"the ranks disagree about: rank 0: False, rank 1: True.*torch.where"
    with pytest.raises(RankDivergence, match=message):
        bool(differing() > 1.5)


def test_branch_on_shape():
    x = local(torch.zeros(2), torch.zeros(3))
    message = r"ranks disagree about a condition: rank 0: True, rank 1: False.*maybe_run_for_local"
    with pytest.raises(RankDivergence, match=message):
        bool(x.shape[0] == 2)


def test_int_of_a_size():
    x = local(torch.zeros(2), torch.zeros(3), torch.zeros(3))
    message = r"one Python int is needed.*rank 0: 2, ranks 1-2: 3.*rank_map"
    with pytest.raises(RankDivergence, match=message):
        int(x.shape[0])
    with pytest.raises(RankDivergence, match=message):
        list(range(x.shape[0]))


def test_item():
    with pytest.raises(RankDivergence, match=r"one Python float is needed.*rank 0: 1.0, rank 1: 2"):
        differing().item()
    with pytest.raises(RankDivergence, match="one Python float is needed"):
        float(differing())
    flags = local(torch.tensor(True), torch.tensor(False))
    with pytest.raises(RankDivergence, match="rank 0: True, rank 1: False"):
        flags.item()
    number = local(torch.tensor(3), torch.tensor(5)).item()
    assert number.node._local_ints == {0: 3, 1: 5}
    with pytest.raises(RankDivergence, match=r"one Python int is needed.*rank 0: 3, rank 1: 5"):
        int(number)


def test_tolist():
    x = local(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    message = r"tolist\(\) needs the same value on every rank.*rank 0: \[1.0, 2.0\], rank 1"
    with pytest.raises(RankDivergence, match=message):
        x.tolist()
    ints = local(torch.tensor([[1, 2]]), torch.tensor([[1, 3]])).tolist()
    assert ints[0][0] == 1
    assert ints[0][1].node._local_ints == {0: 2, 1: 3}


def test_reconcile_and_numpy():
    message = r"needs the same value on every rank.*rank 0: 1.0, rank 1: 2.0.*tensor_map"
    with pytest.raises(RankDivergence, match=message):
        differing().reconcile()
    with pytest.raises(RankDivergence, match=message):
        differing().numpy()
    uneven = local(torch.zeros(2), torch.zeros(3))
    with pytest.raises(RankDivergence, match=r"shape \(2,\) on rank 0 and \(3,\) on rank 1"):
        uneven.reconcile()


def test_lists_of_different_lengths():
    x = local(torch.zeros(4), torch.zeros(2))
    message = r"aten.split.Tensor returned sequences of different lengths: rank 0: 2, rank 1: 1"
    with pytest.raises(RankDivergence, match=message):
        x.split(2)


def test_results_that_do_not_combine():
    with LocalTensorMode(2):
        x = rank_map(lambda r: torch.full((2,), float(r)))

        @lt.maybe_run_for_local_tensor
        def kind(t):
            return "big" if t[0] > 0 else "small"

        @lt.maybe_run_for_local_tensor
        def mixed(t):
            return t if t[0] > 0 else 3

        @lt.maybe_run_for_local_tensor
        def keys(t):
            return {"a": t} if t[0] > 0 else {"b": t}

        message = r"kind\(\) gave a str that the ranks disagree about: rank 0: small, rank 1: big"
        with pytest.raises(RankDivergence, match=message):
            kind(x)
        with pytest.raises(RankDivergence, match="different types: rank 0: int, rank 1: Tensor"):
            mixed(x)
        with pytest.raises(RankDivergence, match="dicts with different keys"):
            keys(x)


def test_callback_that_returns_no_tensor():
    with LocalTensorMode(2) as mode:
        with pytest.raises(ShardError, match="the callback returned int on rank 0"):
            rank_map(lambda r: 3)
        x = rank_map(lambda r: torch.zeros(2))
        with pytest.raises(ShardError, match="returned a tensor on no rank"):
            mode.tensor_map(x, lambda r, t: None)


def test_unsupported_torch(monkeypatch):
    from localtensor_compile.world import torch_hooks

    monkeypatch.setattr(torch_hooks, "VERSION", (2, 10))
    with pytest.raises(UnsupportedError, match=r"torch 2\.11 to 2\.15, but this is torch 2\.10"):
        with LocalTensorMode(2):
            pass


def test_mesh_is_built_inside():
    with LocalTensorMode(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        with pytest.raises(RuntimeError, match="mesh_dim"):
            mesh.get_local_rank()
        with pytest.raises(KeyError, match="mesh_dim 'pp' is not one of"):
            mesh.get_local_rank("pp")


@pytest.mark.parametrize("layout", ["per_rank", "stacked"])
def test_premul_sum_without_its_factor(layout):
    with LocalTensorMode(2, layout=layout):
        op = dist._make_nccl_premul_sum(2.0)
        with pytest.raises(CollectiveError, match=r"PREMUL_SUM arrives here without its factor"):
            dist.all_reduce(torch.ones(2), op=op)
