"""DTensor, TP, FSDP and DDP programs in the stacked layout against the per-rank layout, every rank.

Programs that only move data or work element by element agree bit for bit. Those with matrix
products, which the batched kernels round in another way, agree within 1e-6 of a tensor's largest
element; where a deep backward or an optimizer's quotients make that rounding grow, they run in
float64, and agree within 1e-12.
"""

import functools

import pytest
import torch

import localtensor_compile as lt
from localtensor_compile.check.engines import run_simulated
from localtensor_compile.check.program import Program
from tests.parallel import context_parallel as cp
from tests.parallel import data_parallel as dp
from tests.parallel import dtensor_api as api
from tests.parallel import dtensor_checkpoint as checkpoint
from tests.parallel import dtensor_dynamic as dynamic
from tests.parallel import dtensor_plain as plain
from tests.parallel import dtensor_random as drawn
from tests.parallel import dtensor_redistribute as redistribute
from tests.parallel import expert_parallel as ep
from tests.parallel import fsdp
from tests.parallel import tensor_parallel as tp

pytestmark = [
    pytest.mark.filterwarnings("ignore:Slicing a flattened dim:UserWarning"),
    pytest.mark.filterwarnings("ignore:DTensor .* may not have complete support:UserWarning"),
]
slow = pytest.mark.slow
SGD = (("momentum", 0.9), ("foreach", True))


def case(program, world=3, **bound):
    arguments = ",".join(f"{k}={v}" for k, v in bound.items())
    name = f"{program.__module__.rpartition('.')[2]}.{program.__name__}({arguments})-{world}"
    return pytest.param(functools.partial(program, **bound), world, id=name)


def late(*cases):
    """These cases only in `make test-all`."""
    return [pytest.param(*c.values, id=c.id, marks=slow) for c in cases]


@pytest.fixture
def float64():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def run(program, world, backend, layout):
    """What `program` returns on every rank, and how many ops ran once for all ranks."""
    stats = {}

    def counted(simulated):
        outputs = program(simulated)
        stats.update(lt.local_tensor_mode().stats())
        return outputs

    name = getattr(program, "func", program).__name__
    result = run_simulated(
        Program(counted, name), world, backend, 0, torch.device("cpu"), layout=layout
    )
    assert result.error is None, f"{layout}: {result.error}\n{result.traceback}"
    return result, stats["stacked"]


def same(program, world, backend, of_largest):
    """Every output of every rank, within `of_largest` times its largest element; as many graphs."""
    found, on_stacks = run(program, world, backend, "stacked")
    expected, none = run(program, world, backend, "per_rank")
    assert on_stacks > 0
    assert none == 0
    assert (found.graphs, found.graph_breaks) == (expected.graphs, expected.graph_breaks)
    assert found.outputs.keys() == expected.outputs.keys()
    for name, shards in expected.outputs.items():
        assert found.outputs[name].keys() == shards.keys() == set(range(world))
        for rank, want in shards.items():
            close(found.outputs[name][rank], want, of_largest, f"{name} of rank {rank}")


def close(value, want, of_largest, label):
    assert value.dtype is want.dtype, label
    assert value.shape == want.shape, label
    if not of_largest or not want.is_floating_point() or not want.numel():
        assert torch.equal(value, want), f"{label}: {value} instead of {want}"
        return
    off = (value - want).abs().max() / want.abs().max()
    # The second form holds where both are all zeros; a NaN fulfils neither.
    assert off <= of_largest or torch.equal(value, want), f"{label}: off by {off:.1e}"


# ---------------------------------------------------------------- bit for bit
MOVES = [
    case(api.chunk_lists, 4),
    case(api.factories, 4),
    case(api.flattened, 4),
    case(api.from_group),
    case(api.from_local),
    case(api.from_local_checked),
    case(api.from_local_uneven),
    case(api.grad_placements),
    case(api.in_place),
    case(api.mapped),
    case(api.masked, to="columns"),
    case(api.masked, to="replicate"),
    case(api.masked, to="rows"),
    case(api.masked, to="tokens"),
    case(api.module),
    case(api.other_dtypes),
    case(api.overlapped),
    case(api.scalars),
    case(api.sources),
    case(api.submeshes, 4),
    case(api.views),
    case(checkpoint.broadcast),
    case(checkpoint.state_dicts, full=True),
    *late(case(checkpoint.state_dicts), case(checkpoint.state_dicts, offload=True)),
    case(cp.rank_in_ring),
    case(dp.start_from_rank_zero),
    case(dp.other_sizes_per_group, 4),
    case(drawn.dropout),
    case(drawn.drawn),
    case(drawn.reseeded),
    case(drawn.seeded_per_rank),
    case(plain.parameters, 4),
    case(plain.trained),
    case(plain.written, 2),
    case(redistribute.conjugates),
    case(redistribute.one_dim, shape=(6, 9)),
    case(redistribute.one_dim, shape=(7, 4)),
    case(redistribute.more_dims, 4, mesh_shape=(2, 2), shape=(4, 6), every=12),
    case(redistribute.more_dims, 4, mesh_shape=(2, 2), shape=(5, 3), every=14),
    *late(
        case(redistribute.one_dim, 4, shape=(6, 2)),
        case(redistribute.one_dim, 8, shape=(16, 8)),
        case(redistribute.more_dims, 4, mesh_shape=(2, 2), shape=(4, 6)),
        case(redistribute.more_dims, 4, mesh_shape=(2, 2), shape=(5, 3)),
        case(redistribute.more_dims, 6, mesh_shape=(2, 3), shape=(7, 4), every=3),
        case(redistribute.more_dims, 8, mesh_shape=(2, 2, 2), shape=(8, 8), every=40),
        case(redistribute.more_dims, 8, mesh_shape=(2, 2, 2), shape=(9, 5), every=40),
    ),
    *late(
        case(redistribute.strided, 4, mesh_shape=(2, 2), shape=(8, 4)),
        case(redistribute.strided, 4, mesh_shape=(2, 2), shape=(7, 5)),
    ),
    case(tp.cross_entropy),
    case(tp.cross_entropy, weight=True, ignore_index=3),
    case(tp.embedding, style="rowwise", output="replicate"),
    case(tp.embedding, style="colwise", output="sequence"),
    case(tp.embedding, style="rowwise", output="last"),
]


@pytest.mark.parametrize(("program", "world"), MOVES)
def test_bit_for_bit(program, world):
    same(program, world, None, 0.0)


MOVES_COMPILED = [
    case(api.masked, to="rows"),
    case(redistribute.strided_alone, 4),
    case(tp.cross_entropy),
    *late(
        case(api.from_group),
        case(api.from_local),
        case(api.from_local_uneven),
        case(api.grad_placements),
        case(api.in_place),
        case(api.mapped),
        case(api.masked, to="columns"),
        case(api.masked, to="replicate"),
        case(api.masked, to="tokens"),
        case(api.other_dtypes),
        case(api.overlapped),
        case(api.submeshes, 4),
        case(api.views),
        case(drawn.dropout),
        case(drawn.drawn),
        case(drawn.seeded_per_rank),
        case(plain.parameters, 4),
        case(plain.trained),
        case(redistribute.conjugates),
        case(redistribute.one_dim, shape=(6, 9)),
        case(redistribute.one_dim, shape=(7, 4)),
        case(redistribute.more_dims, 4, mesh_shape=(2, 2), shape=(4, 6), every=14),
        case(redistribute.more_dims, 4, mesh_shape=(2, 2), shape=(5, 3), every=14),
        case(tp.cross_entropy, weight=True, ignore_index=3),
        case(tp.embedding, style="rowwise", output="sequence"),
    ),
]


@pytest.mark.parametrize(("program", "world"), MOVES_COMPILED)
def test_bit_for_bit_compiled(program, world):
    same(program, world, "aot_eager", 0.0)


# ---------------------------------------------------------------- matrix products
PRODUCTS = [
    case(cp.attention, form="all-gather"),
    case(cp.attention, form="ring"),
    case(dp.over_tensor_parallel, 4, hidden=12),
    case(dynamic.sizes, 2, rows=(8, 12, 20), dynamic=None, mark=False),
    case(dynamic.sizes, 2, rows=(7, 9, 11), dynamic=True, mark=False),
    case(drawn.initialized),
    case(ep.mixture_of_experts, local_experts=2),
    case(ep.mixture_of_experts, uneven=True, tokens=3),
    case(fsdp.placement),
    case(tp.data_and_tensor, 4),
    case(tp.mlp, hidden=12),
    case(tp.mlp, hidden=10),
    case(tp.mlp, hidden=2),
    case(tp.mlp_local, 4),
    case(tp.mlp_sequence_parallel, length=12),
    case(tp.mlp_sequence_parallel, length=7),
    case(tp.mlp_sequence_parallel, length=1),
    case(tp.prepare_inputs_and_outputs, 2),
    case(tp.replicated_parameters),
]


@pytest.mark.parametrize(("program", "world"), PRODUCTS)
def test_products(program, world):
    same(program, world, None, 1e-6)


PRODUCTS_COMPILED = [
    case(tp.mlp, hidden=12),
    *late(
        case(tp.mlp, hidden=2),
        case(cp.attention, form="all-gather"),
        case(cp.attention, form="ring"),
        case(drawn.initialized),
        case(dynamic.sizes, 2, rows=(8, 12, 20), dynamic=None, mark=False),
        case(dynamic.sizes, 2, rows=(7, 9, 11), dynamic=True, mark=False),
        case(ep.mixture_of_experts, local_experts=2),
        case(ep.mixture_of_experts, uneven=True, tokens=3),
        case(tp.data_and_tensor, 4),
        case(tp.mlp, hidden=10),
        case(tp.mlp_local, 4),
        case(tp.mlp_sequence_parallel, length=12),
        case(tp.mlp_sequence_parallel, length=7),
        case(tp.mlp_sequence_parallel, length=1),
        case(tp.prepare_inputs_and_outputs, 2),
        case(tp.replicated_parameters),
    ),
]


@pytest.mark.parametrize(("program", "world"), PRODUCTS_COMPILED)
def test_products_compiled(program, world):
    same(program, world, "aot_eager", 1e-6)


# ---------------------------------------------------------------- training, in float64
TRAINED = [
    case(dp.ddp),
    case(dp.simple_fsdp),
    case(dp.static_graph),
    case(dp.unused),
    case(fsdp.by_hand, async_op=True),
    case(fsdp.clipped),
    case(fsdp.shared_parameters),
    case(fsdp.steps, 4, size="EVEN"),
    case(fsdp.steps, 4, size="UNEVEN"),
    case(fsdp.steps, optimizer="SGD", options=SGD),
    case(fsdp.steps, optimizer="AdamW", options=(("fused", True),)),
    case(fsdp.tensor_parallel, 4, dim=8, hidden=12),
    case(fsdp.tensor_parallel, 4, dim=7, hidden=10),
    case(tp.transformer, 3),
    *late(
        case(dp.simple_fsdp, 4, mode="hybrid", size=8),
        case(fsdp.accumulation),
        case(fsdp.hsdp, 4),
        case(dp.accumulation, gradient_as_bucket_view=True),
        case(dp.replicated),
        case(dp.ddp, model="Wide", bucket_cap_mb=1),
        case(dp.hook, name="halved"),
        case(dp.replicated_by_ddp),
        case(fsdp.accumulated_after_reduction),
        case(fsdp.checkpointed, wrapper=True),
        case(fsdp.clipped, norm_type=1.0, foreach=False),
        case(fsdp.cpu_offload),
        case(fsdp.divide_factor, factor=5.0),
        case(fsdp.evaluated),
        case(fsdp.frozen),
        case(fsdp.forward_method),
        case(fsdp.hsdp_accumulation, 4),
        case(fsdp.ignored),
        case(fsdp.meta_device),
        case(fsdp.placement, dim=-1, reshard_after_forward=False),
        case(fsdp.prefetch),
        case(fsdp.saved_state),
        case(fsdp.steps, 2, size="EVEN", reshard_after_forward=False),
        case(fsdp.steps, 4, reshard_after_forward=2),
        case(fsdp.steps, optimizer="Adam", options=(("foreach", False),)),
        case(fsdp.steps, optimizer="AdamW", options=(("amsgrad", True),)),
        case(tp.transformer, 2, checkpointed=True),
        case(tp.transformer, 4, tied=True),
        case(tp.transformer, norm="RMSNorm"),
        *(
            case(tp.transformer, 2, optimizer=o, clip=0.5)
            for o in tp.OPTIMIZERS
            if o != "sgd fused"
        ),
    ),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("program", "world"), TRAINED)
def test_trained(program, world):
    same(program, world, None, 1e-12)


TRAINED_COMPILED = [
    case(fsdp.block_by_block),
    *late(
        case(dp.ddp_compiled, outside=False),
        case(dp.ddp_compiled),
        case(dp.ddp_compiled, 2, model="Wide"),
        case(dp.replicated, compiled=True),
        case(dp.simple_fsdp),
        case(dp.simple_fsdp, recompute=True),
        case(dp.simple_fsdp, 4, mode="hybrid", size=8),
        case(fsdp.block_by_block, size="EVEN"),
        case(fsdp.block_by_block, recompute=True),
        case(fsdp.block_by_block, 4, hybrid=True),
        case(fsdp.tensor_parallel_blocks, 4, dim=8, hidden=12),
        case(fsdp.tensor_parallel_blocks, 4, dim=7, hidden=10),
        case(fsdp.whole_model),
        case(tp.transformer),
        case(tp.transformer, 2, norm="RMSNorm", tied=True),
    ),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("program", "world"), TRAINED_COMPILED)
def test_trained_compiled(program, world):
    same(program, world, "aot_eager", 1e-12)


# ---------------------------------------------------------------- the comparison itself
def test_a_wrong_rank_is_seen():
    """One element of one rank, wrong by a little more than is allowed."""

    def wrong(world):
        x = world.rank_map(lambda rank: torch.arange(1.0, 5.0) + rank)
        if lt.local_tensor_mode().stacked:
            x._local_tensors[2][0] += 2e-5
        return {"x": x * 1}

    same(wrong, 3, None, 1e-5)
    with pytest.raises(AssertionError, match=r"x of rank 2: off by 3\.\de-06"):
        same(wrong, 3, None, 1e-6)
    with pytest.raises(AssertionError, match="x of rank 2"):
        same(wrong, 3, None, 0.0)
