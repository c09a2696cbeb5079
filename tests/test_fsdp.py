"""FSDP2: bit for bit as real gloo processes, on even, uneven and empty shards."""

import pytest
import torch

import localtensor_compile as lt
from tests.parallel import fsdp
from tests.parallel.harness import WORLDS, eager, fill, refused, worlds
from tests.parallel.real_compile import verify_as_real

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]
slow = pytest.mark.slow


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("size", ["EVEN", "UNEVEN"])
def test_steps(world, size):
    eager(fsdp.steps, world, size=size)


@pytest.mark.parametrize(
    ("world", "reshard"), [(3, True), (3, False), (4, 2), pytest.param(2, False, marks=slow)]
)
def test_reshard_after_forward(world, reshard):
    eager(fsdp.steps, world, reshard_after_forward=reshard)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    ("param", "reduce"), [("bfloat16", "float32"), ("bfloat16", None), ("float16", "float16")]
)
def test_mixed_precision(world, param, reduce):
    eager(fsdp.mixed_precision, world, param=param, reduce=reduce)


OPTIMIZERS = [
    ("SGD", (("momentum", 0.9), ("foreach", True))),
    ("SGD", (("momentum", 0.9), ("foreach", False))),
    ("Adam", (("foreach", True),)),
    ("Adam", (("foreach", False),)),
    ("AdamW", (("fused", True),)),
    ("AdamW", (("amsgrad", True),)),
]


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_optimizers(world, optimizer, options):
    eager(fsdp.steps, world, optimizer=optimizer, options=options)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    ("program", "bound"),
    [
        (fsdp.output_dtype, {}),
        (fsdp.accumulation, {}),
        (fsdp.accumulation, {"mixed": True}),
        (fsdp.accumulated_after_reduction, {}),
        (fsdp.prefetch, {}),
        (fsdp.shared_parameters, {}),
        (fsdp.frozen, {}),
        (fsdp.meta_device, {}),
        (fsdp.placement, {}),
        (fsdp.placement, {"dim": -1, "reshard_after_forward": False}),
        (fsdp.ignored, {}),
        (fsdp.divide_factor, {"factor": 5.0}),
        (fsdp.by_hand, {}),
        (fsdp.by_hand, {"async_op": True}),
        (fsdp.forward_method, {}),
        (fsdp.cpu_offload, {}),
        (fsdp.saved_state, {}),
        (fsdp.clipped, {}),
        (fsdp.clipped, {"norm_type": 1.0, "foreach": False}),
        (fsdp.checkpointed, {"wrapper": True}),
        (fsdp.checkpointed, {"wrapper": False}),
        (fsdp.evaluated, {}),
    ],
)
def test_feature(world, program, bound):
    eager(program, world, **bound)


# ---------------------------------------------------------------- two dimensions
@pytest.mark.parametrize("reshard", [True, pytest.param(False, marks=slow)])
def test_hsdp(reshard):
    eager(fsdp.hsdp, 4, reshard_after_forward=reshard)


def test_hsdp_accumulation():
    eager(fsdp.hsdp_accumulation, 4)


@pytest.mark.parametrize(
    ("dim", "hidden"), [(8, 12), (7, 10), pytest.param(5, 6, marks=slow)], ids=str
)
def test_over_tensor_parallel(dim, hidden):
    eager(fsdp.tensor_parallel, 4, dim=dim, hidden=hidden)


# ---------------------------------------------------------------- compiled
@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    ("program", "bound"),
    [
        (fsdp.block_by_block, {}),
        pytest.param(fsdp.block_by_block, {"size": "EVEN"}, marks=slow),
        pytest.param(fsdp.block_by_block, {"reshard_after_forward": False}, marks=slow),
        (fsdp.block_by_block, {"recompute": True}),
        (fsdp.block_by_block_mixed, {}),
        # Dynamo skips FSDP's hooks and compiles the blocks between them.
        (fsdp.whole_model, {}),
    ],
)
def test_compiled(world, program, bound):
    verify_as_real(program, world, graphs=2, **bound)


def test_compiled_hsdp():
    verify_as_real(fsdp.block_by_block, 4, graphs=2, hybrid=True)


@pytest.mark.parametrize(("dim", "hidden"), [(8, 12), pytest.param(7, 10, marks=slow)], ids=str)
def test_compiled_over_tensor_parallel(dim, hidden):
    verify_as_real(fsdp.tensor_parallel_blocks, 4, graphs=2, dim=dim, hidden=hidden)


# ---------------------------------------------------------------- refused as on real ranks
def test_uneven_along_another_dimension_is_refused():
    message = r"FSDP does not support uneven sharding on dim 1: torch.Size\(\[10, 7\]\)"
    refused(fsdp.uneven_placement, 3, "NotImplementedError", message, compiled=False)


def test_fused_sgd_is_refused():
    refused(
        fsdp.steps,
        3,
        "NotImplementedError",
        "_fused_sgd_.default does not have a sharding strategy",
        compiled=False,
        options=(("fused", True),),
    )


def test_infinity_norm_of_an_empty_shard_is_refused():
    message = "cannot compute the infinity norm on an empty tensor"
    refused(fsdp.clipped, 3, "RuntimeError", message, compiled=False, norm_type=float("inf"))


# ---------------------------------------------------------------- memory
def test_unsharded_memory_is_freed_on_every_rank():
    with lt.LocalTensorMode(3) as mode:
        model = fill(fsdp.Net(**fsdp.UNEVEN))
        torch.distributed.fsdp.fully_shard(model)
        model.unshard()
        weight = model.head.weight
        sizes = [t.untyped_storage().size() for t in weight._local_tensors.values()]
        model.reshard()
        freed = [t.untyped_storage().size() for t in weight._local_tensors.values()]
        assert all(sizes) and not any(freed) and len(freed) == len(mode.ranks)
