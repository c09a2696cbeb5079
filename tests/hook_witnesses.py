"""For every name of torch that a mode replaces: something that goes wrong without the replacement.

A witness runs inside LocalTensorMode(4), unless it makes a world itself, and raises where it does
not find what real ranks would have. tests/test_torch_hooks.py runs each with all replacements, and
with all but one.
"""

from __future__ import annotations

import atexit
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as checkpoint_module
import torch.distributed.distributed_c10d as c10d
import torch.distributed.nn.functional as dist_nn
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    _collective_utils,
    distribute_tensor,
    placement_types,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from localtensor_compile import LocalTensor, LocalTensorError, LocalTensorMode, World, rank_map
from localtensor_compile.values.stack import ShardsOfStack
from localtensor_compile.world.factories import FactoryMode
from tests.parallel import data_parallel, dtensor_random
from tests.witnesses import CACHEABLE, Witnesses, require_cacheable

WORLD = 4
WITNESSES = Witnesses()
needs, needs_each = WITNESSES.needs, WITNESSES.needs_each
# Nothing to see without a CUDA device; tests/gpu runs them.
CUDA = frozenset(
    f"{module}.{name}"
    for module in ("torch.cuda", "torch.cuda.random")
    for name in (
        "manual_seed", "manual_seed_all", "seed", "seed_all", "initial_seed", "get_rng_state",
        "get_rng_state_all", "set_rng_state", "set_rng_state_all",
    )
)  # fmt: skip


def values(number: Any) -> list[Any]:
    """A per-rank number, or one for all, as a list by rank."""
    node = getattr(number, "node", None)
    return [*node._values.values()] if node is not None else [number] * WORLD


def same(tensor: Any, *shards: Any) -> None:
    """`tensor` has these shards (lists); one for all ranks where only one is given."""
    assert isinstance(tensor, LocalTensor), type(tensor)
    found = [t.tolist() for t in tensor._local_tensors.values()]
    expected = list(shards) if len(shards) > 1 else list(shards) * len(found)
    assert found == expected, f"{found} instead of {expected}"


def own_rank() -> LocalTensor:
    """[r, r] on rank r."""
    return rank_map(lambda r: torch.full((2,), float(r)))


def plain(*size: int, value: float = 1.0) -> torch.Tensor:
    from localtensor_compile import maybe_disable_local_tensor_mode

    with maybe_disable_local_tensor_mode():
        return torch.full(size, value)


# ---------------------------------------------------------------- autograd
class MakesOnes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        made = torch.ones(2)
        assert isinstance(made, LocalTensor), "a factory in backward makes a plain tensor"
        return grad * made


@needs("torch.autograd._engine_run_backward")
def backward_through_torch_autograd() -> None:
    x = own_rank().requires_grad_()
    MakesOnes.apply(x).sum().backward()
    same(x.grad, [1.0, 1.0])


@needs("torch.autograd.graph._engine_run_backward")
def backward_through_torch_autograd_graph() -> None:
    """As torch.compiler's own tracing of backward calls it."""
    x = own_rank().requires_grad_()
    out = MakesOnes.apply(x).sum()
    with torch.overrides._pop_mode_temporarily():
        torch.autograd.graph._engine_run_backward(
            (out,), (torch.ones_like(out),), False, False, (), allow_unreachable=True,
            accumulate_grad=True,
        )  # fmt: skip
    same(x.grad, [1.0, 1.0])


# ---------------------------------------------------------------- meshes
def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))


@needs("DeviceMesh.get_coordinate")
def mesh_coordinates() -> None:
    assert [values(c) for c in grid().get_coordinate()] == [[0, 0, 1, 1], [0, 1, 0, 1]]


@needs("DeviceMesh._sym_get_coordinate")
def mesh_coordinate_of_one_dimension() -> None:
    assert values(grid()._sym_get_coordinate(1)) == [0, 1, 0, 1]


@needs("DeviceMesh.get_rank")
def mesh_rank() -> None:
    assert values(grid().get_rank()) == [0, 1, 2, 3]


@needs("DeviceMesh.get_local_rank")
def mesh_local_rank() -> None:
    assert values(grid().get_local_rank("a")) == [0, 0, 1, 1]


@needs("DeviceMesh._get_all_submeshes")
def mesh_of_every_row() -> None:
    assert [m.mesh.tolist() for m in grid()._get_all_submeshes("b")] == [[0, 1], [2, 3]]


@needs("DeviceMesh._is_current_rank_part_of_mesh")
def mesh_without_rank_0() -> None:
    with LocalTensorMode({2, 3}):
        mesh = DeviceMesh("cpu", [2, 3])
        assert mesh._is_current_rank_part_of_mesh()


@needs("DeviceMesh.__init__")
def mesh_of_a_tensor_made_inside() -> None:
    mesh = DeviceMesh("cpu", torch.arange(WORLD))
    assert type(mesh.mesh) is torch.Tensor


@needs("DeviceMesh._init_one_process_group")
def mesh_groups_of_all_ranks() -> None:
    mesh = DeviceMesh("cpu", [[0, 3], [1, 2]], mesh_dim_names=("a", "b"))
    summed = funcol.all_reduce(own_rank(), "sum", mesh["b"].get_group())
    same(funcol.wait_tensor(summed), [3.0, 3.0], [3.0, 3.0], [3.0, 3.0], [3.0, 3.0])
    summed = funcol.all_reduce(own_rank(), "sum", mesh["a"].get_group())
    same(funcol.wait_tensor(summed), [1.0, 1.0], [1.0, 1.0], [5.0, 5.0], [5.0, 5.0])


# ---------------------------------------------------------------- ranks
@needs_each(*(f"{m}.get_rank" for m in ("torch.distributed", "torch.distributed.distributed_c10d")))
def rank_in_a_subgroup(name: str) -> None:
    group = grid().get_group("b")
    assert values(_function(name)(group)) == [0, 1, 0, 1]


@needs("torch._dynamo.trace_rules.torch_name_rule_map[torch.distributed.get_rank]")
def rank_in_a_compiled_frame() -> None:
    step = torch.compile(lambda x: x + dist.get_rank(), backend="eager", fullgraph=True)
    same(step(torch.zeros(1)), [0.0], [1.0], [2.0], [3.0])


@needs("ProcessGroup.rank")
def rank_of_a_group() -> None:
    assert values(dist.group.WORLD.rank()) == [0, 1, 2, 3]


# ---------------------------------------------------------------- groups
@needs_each("torch.distributed.new_group", "torch.distributed.distributed_c10d.new_group")
def group_without_rank_0(name: str) -> None:
    module = dist if name == "torch.distributed.new_group" else c10d
    x = own_rank()
    dist.all_reduce(x, group=module.new_group([1, 2]))
    same(x, [0.0, 0.0], [3.0, 3.0], [3.0, 3.0], [3.0, 3.0])


@needs("torch.distributed.device_mesh.new_group")
def mesh_groups_made_one_by_one() -> None:
    mesh_groups_of_all_ranks()


@needs_each(
    "torch.distributed.new_subgroups_by_enumeration",
    "torch.distributed.distributed_c10d.new_subgroups_by_enumeration",
)
def subgroups(name: str) -> None:
    module = c10d if "c10d" in name else dist
    own, _ = module.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    x = own_rank()
    dist.all_reduce(x, group=own)
    same(x, [2.0, 2.0], [4.0, 4.0], [2.0, 2.0], [4.0, 4.0])


# ---------------------------------------------------------------- objects
def _both(*names: str) -> list[str]:
    return [f"{m}.{n}" for n in names for m in _MODULES]


_MODULES = {"torch.distributed": dist, "torch.distributed.distributed_c10d": c10d}


def _function(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return getattr(_MODULES[module], function)


@needs_each(*_both("all_gather_object"))
def gathered_objects(name: str) -> None:
    found = [None] * WORLD
    _function(name)(found, {"rank": dist.get_rank()})
    assert found == [{"rank": r} for r in range(WORLD)]


@needs_each(*_both("gather_object"))
def gathered_objects_of_a_root(name: str) -> None:
    found = [None] * WORLD
    _function(name)("object", found, dst=1)
    assert found == ["object"] * WORLD


@needs_each(*_both("broadcast_object_list"))
def broadcast_objects(name: str) -> None:
    found = ["object", 3]
    _function(name)(found, src=2)
    assert found == ["object", 3]


@needs_each(*_both("scatter_object_list"))
def scattered_objects(name: str) -> None:
    found = [None]
    _function(name)(found, ["same"] * WORLD, src=1)
    assert found == ["same"]


# ---------------------------------------------------------------- collectives with a root
@needs_each(*_both("scatter"))
def scattered(name: str) -> None:
    out = torch.empty(2)
    _function(name)(out, [own_rank() + 10 * k for k in range(WORLD)], src=1)
    same(out, *([10.0 * k + 1] * 2 for k in range(WORLD)))


@needs_each(*_both("gather"))
def gathered(name: str) -> None:
    out = [torch.empty(2) for _ in range(WORLD)]
    _function(name)(own_rank(), out, dst=1)
    for k in range(WORLD):
        assert out[k]._local_tensors[1].tolist() == [float(k)] * 2


@needs("torch.distributed.tensor._collective_utils.mesh_scatter")
def mesh_scatter() -> None:
    out = torch.empty(2)
    tensors = [own_rank() + 10 * k for k in range(WORLD)]
    _collective_utils.mesh_scatter(out, tensors, init_device_mesh("cpu", (WORLD,)), group_src=1)
    same(out, *([10.0 * k + 1] * 2 for k in range(WORLD)))


@needs("torch.distributed.tensor.placement_types.mesh_scatter")
def distribute_from_another_rank() -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    whole = rank_map(lambda r: torch.arange(4.0) + 10 * r)
    sharded = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=1)
    same(sharded.to_local(), *([10.0 + k] for k in range(WORLD)))


@needs("_Gather.forward")
def differentiable_gather() -> None:
    out = dist_nn.gather(own_rank(), 1)
    assert [t._local_tensors[1].tolist() for t in out] == [[float(k)] * 2 for k in range(WORLD)]


@needs("_Scatter.forward")
def differentiable_scatter() -> None:
    out = dist_nn.scatter([own_rank() + 10 * k for k in range(WORLD)], 1)
    same(out, *([10.0 * k + 1] * 2 for k in range(WORLD)))


@needs("_Broadcast.backward")
def differentiable_broadcast() -> None:
    x = own_rank().requires_grad_()
    dist_nn.broadcast(x, 1).sum().backward()
    same(x.grad, [0.0, 0.0], [4.0, 4.0], [0.0, 0.0], [0.0, 0.0])


# ---------------------------------------------------------------- plain tensors in a world
def _group() -> Any:
    return dist.group.WORLD


def _refuses(call: Callable[[], Any]) -> None:
    from localtensor_compile import PlainTensorError

    try:
        call()
    except PlainTensorError:
        return
    raise AssertionError("a collective on plain tensors did nothing")


def _list(count: int = WORLD) -> list[torch.Tensor]:
    return [plain(2, value=0.0) for _ in range(count)]


def _stays(call: Callable[[torch.Tensor], Any], expected: float) -> None:
    x = plain(2, value=3.0)
    work = call(x)
    assert x.tolist() == [expected] * 2, x
    # torch's fake group finishes nothing, but says so as well; ours hands out the tensors.
    assert [t.tolist() for t in work.result()] == [[expected] * 2]


REFUSED: dict[str, Callable[[], Any]] = {
    "reduce": lambda: _group().reduce([plain(2)], dist.ReduceOptions()),
    "allgather_coalesced": lambda: _group().allgather_coalesced([_list()], [plain(2)]),
    "allgather_into_tensor_coalesced": lambda: _group().allgather_into_tensor_coalesced(
        [plain(8)], [plain(2)]
    ),
    "all_gather_single_coalesced": lambda: _group().all_gather_single_coalesced(
        [plain(8)], [plain(2)]
    ),
    "reduce_scatter": lambda: _group().reduce_scatter([plain(2)], [_list()]),
    "_reduce_scatter_base": lambda: _group()._reduce_scatter_base(
        plain(2), plain(8), dist.ReduceScatterOptions()
    ),
    "reduce_scatter_single": lambda: _group().reduce_scatter_single(
        plain(2), plain(8), dist.ReduceScatterOptions()
    ),
    "reduce_scatter_tensor_coalesced": lambda: _group().reduce_scatter_tensor_coalesced(
        [plain(2)], [plain(8)]
    ),
    "reduce_scatter_single_coalesced": lambda: _group().reduce_scatter_single_coalesced(
        [plain(2)], [plain(8)]
    ),
    "gather": lambda: _group().gather([_list()], [plain(2)], dist.GatherOptions()),
    "scatter": lambda: _group().scatter([plain(2)], [_list()], dist.ScatterOptions()),
    "alltoall": lambda: _group().alltoall(_list(), _list(), dist.AllToAllOptions()),
    "alltoall_base": lambda: _group().alltoall_base(
        plain(8), plain(8), [], [], dist.AllToAllOptions()
    ),
    "all_to_all_single": lambda: _group().all_to_all_single(
        plain(8), plain(8), [], [], dist.AllToAllOptions()
    ),
    "send": lambda: _group().send([plain(2)], 1, 0),
    "recv": lambda: _group().recv([plain(2)], 1, 0),
    "recv_anysource": lambda: _group().recv_anysource([plain(2)], 0),
}


@needs_each(*(f"ProcessGroup.{name}" for name in REFUSED))
def refused_on_plain_tensors(name: str) -> None:
    _refuses(REFUSED[name.removeprefix("ProcessGroup.")])


@needs("ProcessGroup.allreduce")
def all_reduce_of_a_plain_tensor() -> None:
    x = plain(2)
    dist.all_reduce(x)
    assert x.tolist() == [float(WORLD)] * 2


@needs("ProcessGroup.allreduce_coalesced")
def all_reduces_of_plain_tensors() -> None:
    x = plain(2)
    _group().allreduce_coalesced([x], dist.AllreduceCoalescedOptions())
    assert x.tolist() == [float(WORLD)] * 2


@needs("ProcessGroup.broadcast")
def broadcast_of_a_plain_tensor() -> None:
    options = dist.BroadcastOptions()
    _stays(lambda x: _group().broadcast([x], options), 3.0)


# ---------------------------------------------------------------- FSDP
FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param"
FSDP_MEMORY = (f"{FSDP}.alloc_storage", f"{FSDP}.free_storage", f"{FSDP}_group.alloc_storage")


@needs(*FSDP_MEMORY, f"{FSDP}._chunk_with_empty")
def fully_sharded_step() -> None:
    """5 rows on 4 ranks: the chunks of ranks differ, the last one is empty."""
    model = nn.Linear(3, 5, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(15.0).view(5, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    shards = model.weight.to_local()._local_tensors
    assert [t.tolist() for t in shards.values()] == [
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
        [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]],
        [[12.0, 13.0, 14.0]],
        [],
    ]
    unsharded = weakref_of_unsharded(model)
    for _ in range(2):
        model(torch.ones(2, 3)).sum().backward()
    assert all(t.untyped_storage().nbytes() == 0 for t in unsharded()._local_tensors.values())
    assert [t.tolist() for t in model.weight.grad.to_local()._local_tensors.values()] == [
        [[4.0] * 3] * 2,
        [[4.0] * 3] * 2,
        [[4.0] * 3],
        [],
    ]


def weakref_of_unsharded(model: Any) -> Callable[[], Any]:
    """The tensor that holds all rows while they are in use, once there is one."""
    group = model._get_fsdp_state()._fsdp_param_group
    return lambda: group.fsdp_params[0].all_gather_outputs[0]


@needs("FSDPParam.reset_sharded_param")
def fully_sharded_on_a_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 5, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.weight.fill_(2.0)
    same(model(torch.ones(1, 3)).detach(), [[6.0] * 5])


# ---------------------------------------------------------------- DDP
@needs("torch.distributed.Reducer", "torch.distributed.Logger")
def averaged_gradients() -> None:
    model = DistributedDataParallel(nn.Linear(2, 1, bias=False))
    model(own_rank().view(1, 2)).sum().backward()
    same(model.module.weight.grad, [[1.5, 1.5]])


@needs("torch.distributed._register_comm_hook")
def communication_hook() -> None:
    data_parallel.hook(World(WORLD), "halved")


@needs("torch.distributed._register_builtin_comm_hook")
def builtin_communication_hook() -> None:
    data_parallel.hook(World(WORLD), "ALLREDUCE")


@needs(
    "torch.distributed._compute_bucket_assignment_by_size",
    "torch.distributed._broadcast_coalesced",
)
def parameters_that_differ_between_groups() -> None:
    data_parallel.other_sizes_per_group(World(WORLD))


@needs("torch.distributed._verify_params_across_processes")
def parameters_that_differ_within_a_group() -> None:
    model = nn.Linear(2, 1)
    model.weight = nn.Parameter(rank_map(lambda r: torch.ones(1, 2 + r)))
    try:
        DistributedDataParallel(model)
    except LocalTensorError as error:
        assert "needs the same module on every rank" in str(error)


# ---------------------------------------------------------------- checkpoints
def new_folder() -> str:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _checkpointed() -> tuple[dict[str, Any], str]:
    """A state dict that was saved, and where."""
    x = distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (WORLD,)), [Shard(0)])
    folder = new_folder()
    checkpoint_module.save({"x": x}, checkpoint_id=folder)
    return {"x": x}, folder


@needs("torch.distributed.checkpoint.state_dict_saver._save_state_dict")
def saved_by_every_rank() -> None:
    _, folder = _checkpointed()
    files = sorted(p.name for p in Path(folder).iterdir())
    assert files == [".metadata", *(f"__{r}_0.distcp" for r in range(WORLD))], files


@needs("torch.distributed.checkpoint.state_dict_loader._load_state_dict")
def loaded_by_every_rank() -> None:
    state, folder = _checkpointed()
    with torch.no_grad():
        state["x"].zero_()
    checkpoint_module.load(state, checkpoint_id=folder)
    same(state["x"].to_local(), [0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [])


@needs_each(
    "torch.distributed.checkpoint.async_save",
    "torch.distributed.checkpoint.state_dict_saver.async_save",
)
def asynchronous_checkpoint(name: str) -> None:
    from localtensor_compile import UnsupportedError

    module = checkpoint_module if name.endswith("checkpoint.async_save") else state_dict_saver
    try:
        module.async_save({"x": torch.ones(2)}, checkpoint_id=new_folder())
    except UnsupportedError:
        return
    raise AssertionError("a thread that knows no ranks was started")


# ---------------------------------------------------------------- splits
@needs_each(*_both("all_to_all_single"))
def splits_that_differ(name: str) -> None:
    """Rank 0 gives its row to the last rank, and so on: splits are numbers per rank."""
    given = rank_map(lambda r: torch.tensor([int(k == WORLD - 1 - r) for k in range(WORLD)]))
    splits = given.tolist()
    out = torch.empty(1)
    _function(name)(out, rank_map(lambda r: torch.tensor([float(r)])), splits, splits)
    same(out, [3.0], [2.0], [1.0], [0.0])


@needs("torch.distributed._functional_collectives.permute_tensor")
def permutation() -> None:
    x = rank_map(lambda r: torch.tensor([float(r)]))
    out = funcol.permute_tensor(x, [1, 2, 3, 0], _group())
    same(funcol.wait_tensor(out), [3.0], [0.0], [1.0], [2.0])


# ---------------------------------------------------------------- DTensor
@needs_each(
    *(
        f"torch.distributed._local_tensor.{name}"
        for name in (
            "get_local_tensor_mode_list", "_for_each_rank_run_func"
        )
    )
)  # fmt: skip
def uneven_redistribute(name: str) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    x = distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])
    same(x.to_local(), [0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [])
    same(x.redistribute(placements=[Replicate()]).to_local(), [float(i) for i in range(6)])
    whole = distribute_tensor(torch.arange(6.0), mesh, [Replicate()])
    torch._dynamo.mark_dynamic(whole, 0)
    step = torch.compile(
        lambda t: (t.redistribute(placements=[Shard(0)]) * 2).full_tensor(), backend="aot_eager"
    )
    same(step(whole), [2.0 * i for i in range(6)])


@needs("torch.distributed._local_tensor.maybe_enable_local_tracker")
def offsets_of_cuda_generators() -> None:
    """DTensor's tracker, with a stand-in for a CUDA device's generator."""
    found = dtensor_random.cuda_offsets(World(WORLD, "cpu", None))
    state = found[f"(8, 12) {(Shard(0), Shard(1))} inside"]
    # rank r holds shard r, of 4 x 6 values; of 16 bytes the last 8 are the offset
    first, *others = [int(t[8:].view(torch.int64)) for t in state._local_tensors.values()]
    assert [offset - first for offset in others] == [24, 48, 72]


@needs("torch.export._trace._export")
def exported_program() -> None:
    x = rank_map(lambda r: torch.ones(r + 2, 3))
    program = torch.export.export(nn.Softmax(1), (x,)).run_decompositions()
    assert [t.shape[0] for t in program.module()(x)._local_tensors.values()] == [2, 3, 4, 5]


@needs("Replicate._make_replicate_tensor")
def plain_tensor_that_is_replicated() -> None:
    x = distribute_tensor(plain(2), init_device_mesh("cpu", (WORLD,)), [Replicate()]).to_local()
    x.add_(dist.get_rank())
    same(x, *([1.0 + r] * 2 for r in range(WORLD)))


@needs("torch.distributed.tensor.experimental._context_parallel._attention._create_cp_block_mask")
def rank_in_block_mask() -> None:
    """Rank r has the queries of block r from the front and of block r from the back."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    length, mesh = 2 * 128 * WORLD, init_device_mesh("cpu", (WORLD,))
    causal = lambda b, h, q, kv: q >= kv
    _attention._cp_options.enable_load_balance = True  # others may have set torch's global
    with torch.compiler.set_stance("force_eager"):  # torch compiles create_block_mask
        mask = _attention._create_cp_block_mask(causal, 1, 1, length, length, mesh)
    same(mask.full_kv_num_blocks, *([[[r, 2 * WORLD - 1 - r]]] for r in range(WORLD)))


@needs("Shard._custom_chunk")
def cut_twice() -> None:
    x = distribute_tensor(torch.arange(3.0), grid(), [Shard(0), Shard(0)])
    same(x.to_local(), [0.0], [1.0], [2.0], [])


@needs_each(
    "torch._utils._chunk_or_narrow_cat",
    "torch.distributed._functional_collectives._chunk_or_narrow_cat",
)
def gathered_along_another_dimension(name: str) -> None:
    x = rank_map(lambda r: torch.ones(r // 2 * 2, 2))  # no rows on ranks 0 and 1
    out = funcol.all_gather_tensor(x, 1, grid().get_group("b"))
    sizes = [t.shape for t in funcol.wait_tensor(out)._local_tensors.values()]
    assert sizes == [(0, 4), (0, 4), (2, 4), (2, 4)]


@needs_each(
    "torch.distributed.tensor._api.compute_global_tensor_info",
    "torch.distributed.tensor._utils.compute_global_tensor_info",
)
def global_shape_of_local_tensors(name: str) -> None:
    """Rank by rank, and so no single shape: as on real ranks, whose guesses differ."""
    mesh = init_device_mesh("cpu", (WORLD,))
    x = rank_map(lambda r: torch.ones(3, 2 - r // 3).t())
    out = DTensor.from_local(x, mesh, [Shard(1)])
    assert values(out.shape[0]) == [2, 2, 2, 1] and values(out.shape[1]) == [12] * WORLD


@needs("ShardingPropagator._propagate_tensor_meta_non_cached")
def global_shapes_that_differ() -> None:
    mesh = grid()
    x = rank_map(lambda r: torch.ones(2 + r // 2, 2))
    out = DTensor.from_local(x, mesh["b"], [Shard(0)]) * 2
    assert values(out.shape[0]) == [4, 4, 6, 6]


# ---------------------------------------------------------------- random state
def _of_random(name: str) -> Any:
    module = torch.random if name.startswith("torch.random.") else torch
    return getattr(module, name.rpartition(".")[2])


@needs_each("torch.manual_seed", "torch.random.manual_seed")
def seeds(name: str) -> None:
    _of_random(name)(dist.get_rank())  # a number per rank
    assert values(torch.initial_seed()) == [0, 1, 2, 3]


@needs_each("torch.seed", "torch.random.seed")
def new_seeds(name: str) -> None:
    torch.manual_seed(0)
    _of_random(name)()
    found = torch.rand(4)
    torch.manual_seed(0)
    again = torch.rand(4)
    assert not torch.equal(found._local_tensors[0], again._local_tensors[0])


@needs_each("torch.initial_seed", "torch.random.initial_seed")
def initial_seeds(name: str) -> None:
    torch.manual_seed(dist.get_rank())
    assert values(_of_random(name)()) == [0, 1, 2, 3]


@needs_each("torch.get_rng_state", "torch.random.get_rng_state")
def states(name: str) -> None:
    assert isinstance(_of_random(name)(), LocalTensor)


@needs_each("torch.set_rng_state", "torch.random.set_rng_state")
def states_are_set(name: str) -> None:
    torch.manual_seed(dist.get_rank())
    state = torch.get_rng_state()
    one = torch.rand(2)
    _of_random(name)(state)
    same(torch.rand(2), *(t.tolist() for t in one._local_tensors.values()))


@needs("torch.nn.init._no_grad_trunc_normal_")
def truncated_normal_draws_again_per_rank() -> None:
    torch.manual_seed(dist.get_rank())
    found = nn.init.trunc_normal_(torch.empty(64), a=-0.5, b=0.5)
    with LocalTensorMode({0, 1, 2, 3}) as mode, mode.disable():
        expected = []
        for r in range(WORLD):
            torch.manual_seed(r)
            expected.append(nn.init.trunc_normal_(torch.empty(64), a=-0.5, b=0.5).tolist())
    same(found, *expected)


# ---------------------------------------------------------------- Dynamo and factories
def _compiled(function: Callable[..., Any], *args: Any) -> Any:
    return torch.compile(function, backend="eager", fullgraph=True)(*args)


@needs("torch._dynamo.variables.torch.get_overridable_functions")
def random_functions_in_a_compiled_frame() -> None:
    torch.manual_seed(dist.get_rank())
    out = _compiled(lambda x: torch.normal(0.0, 1.0, (2,)) + x, torch.zeros(2))
    shards = [t.tolist() for t in out._local_tensors.values()]
    assert len({tuple(s) for s in shards}) == WORLD
    out = _compiled(lambda x: x + torch.signal.windows.hann(2), torch.zeros(2))
    assert isinstance(out, LocalTensor)


@needs("OutputGraph.call_user_compiler")
def draws_that_no_graph_shows() -> None:
    from localtensor_compile import UnsupportedError

    pool = nn.FractionalMaxPool2d(2, output_size=2)
    try:
        _compiled(pool, torch.rand(1, 2, 5, 5))
    except UnsupportedError:
        return
    raise AssertionError("one draw for all ranks")


@needs_each(
    f"{CACHEABLE}[localtensor_compile.world.factories.on_ranks]",
    f"{CACHEABLE}[localtensor_compile.world.factories.as_written]",
    f"{CACHEABLE}[localtensor_compile.world.per_rank_code._split]",
    f"{CACHEABLE}[localtensor_compile.world.per_rank_code._join]",
)
def graphs_with_our_nodes_are_cached(name: str) -> None:
    require_cacheable(name)


@needs("torch.load")
def loaded_on_every_rank() -> None:
    file = io.BytesIO()
    torch.save(plain(2, value=7.0), file)
    file.seek(0)
    loaded = torch.load(file)
    same(loaded, [7.0, 7.0])
    loaded._local_tensors[0].zero_()
    assert loaded._local_tensors[1].tolist() == [7.0, 7.0]


@needs("torch._dynamo.variables.torch_function.dispatch_torch_function")
def factories_in_a_checkpoint() -> None:
    def inner(x: Any) -> Any:
        return x * torch.arange(x.shape[0])

    x = rank_map(lambda r: torch.ones(1 + r)).requires_grad_()
    out = _compiled(lambda x: checkpoint(inner, x, use_reentrant=False), x)
    same(out.detach(), *([float(k) for k in range(1 + r)] for r in range(WORLD)))


# ---------------------------------------------------------------- Inductor


@needs("CompiledFxGraph.__call__")
def kernel_calls_pass_no_function_mode() -> None:
    seen: list[Any] = []
    original = FactoryMode.__torch_function__

    def spy(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(func)
        return original(self, func, *args, **kwargs)

    loss = torch.compile(lambda x: (x @ x).sum(), fullgraph=True)
    x = torch.ones(64, 64, requires_grad=True)
    loss(x).backward()
    out = loss(x)
    with mock.patch.object(FactoryMode, "__torch_function__", spy):
        out.backward()
    assert seen
    assert torch.mm not in seen


# ---------------------------------------------------------------- the stacked layout
@needs_each("Shard._shard_tensor", "_StridedShard._shard_tensor")
def a_stack_is_cut_once_for_all_ranks(name: str) -> None:
    kind = getattr(placement_types, name.partition(".")[0])
    with LocalTensorMode(WORLD, layout="stacked") as mode:
        mesh = init_device_mesh("cpu", (WORLD,))
        placement = kind(0) if kind is Shard else kind(0, split_factor=2)
        x = torch.arange(4.0 * WORLD)
        before = mode.stats()
        cut = placement._shard_tensor(x, mesh, 0)
        ops = before["stacked"] + (1 if kind is Shard else 3)
        assert mode.stats() == {**before, "stacked": ops}
        assert all(t.shape == (4,) for t in cut._local_tensors.values())
        assert isinstance(cut._local_tensors, ShardsOfStack)
