"""DDP, replicate and SimpleFSDP: bit for bit as real gloo processes, and as much of it compiled."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import localtensor_compile as lt
from tests.parallel import data_parallel
from tests.parallel.harness import WORLDS, eager, fill, refused, verify, worlds
from tests.parallel.real_compile import verify_as_real

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]
slow = pytest.mark.slow


@pytest.mark.parametrize("world", WORLDS)
def test_ddp(world):
    eager(data_parallel.ddp, world)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    ("program", "bound"),
    [
        (data_parallel.ddp, {"model": "Wide"}),
        (data_parallel.ddp, {"model": "Wide", "bucket_cap_mb": 1}),
        (data_parallel.ddp, {"model": "Wide", "gradient_as_bucket_view": True}),
        (data_parallel.ddp, {"model": "Wide", "batched_grad_copy": True, "optimizer": "AdamW"}),
        (data_parallel.start_from_rank_zero, {}),
        (data_parallel.batch_norm, {}),
        (data_parallel.batch_norm, {"broadcast": False}),
        (data_parallel.accumulation, {}),
        (data_parallel.accumulation, {"gradient_as_bucket_view": True}),
        (data_parallel.unused, {}),
        (data_parallel.unused, {"gradient_as_bucket_view": True}),
        (data_parallel.static_graph, {}),
        (data_parallel.static_graph, {"gradient_as_bucket_view": True}),
        (data_parallel.replicated, {}),
        (data_parallel.replicated_by_ddp, {}),
    ],
)
def test_feature(world, program, bound):
    eager(program, world, **bound)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    "name",
    ["allreduce_hook", "fp16_compress_hook", "halved", "wrapped", "ALLREDUCE", "FP16_COMPRESS"],
)
def test_communication_hook(world, name):
    eager(data_parallel.hook, world, name=name)


def test_communication_hook_with_bucket_views():
    eager(data_parallel.hook, 3, name="halved", gradient_as_bucket_view=True)


@pytest.mark.parametrize("hidden", [12, 10])
def test_over_tensor_parallel(hidden):
    eager(data_parallel.over_tensor_parallel, 4, hidden=hidden)


def test_sizes_that_differ_between_groups():
    eager(data_parallel.other_sizes_per_group, 4)


# ---------------------------------------------------------------- compiled
@pytest.mark.parametrize("world", worlds(3))
def test_compiled_inside_ddp(world):
    verify_as_real(data_parallel.ddp_compiled, world, graphs=1, outside=False)


@pytest.mark.parametrize("world", worlds(3))
def test_compiled_around_ddp(world):
    """torch breaks three times, at the reducer and its own context manager."""
    verify_as_real(data_parallel.ddp_compiled, world, graphs=1, graph_breaks=3)


def test_compiled_around_buckets():
    """DDPOptimizer splits Dynamo's one graph at the buckets, as on real ranks."""
    verify_as_real(data_parallel.ddp_compiled, 2, graphs=1, graph_breaks=3, model="Wide")


@pytest.mark.parametrize("world", worlds(3))
def test_compiled_replicate(world):
    verify_as_real(data_parallel.replicated, world, graphs=2, compiled=True)


@pytest.mark.parametrize("world", worlds(3))
def test_simple_fsdp(world):
    verify(data_parallel.simple_fsdp, world)


@pytest.mark.parametrize(
    ("world", "bound"),
    [
        (4, {"mode": "hybrid"}),
        pytest.param(3, {"mode": "replicate"}, marks=slow),
        pytest.param(4, {"size": 12}, marks=slow),
        pytest.param(3, {"half": True}, marks=slow),
        pytest.param(3, {"recompute": True}, marks=slow),
        pytest.param(4, {"mode": "hybrid", "half": True, "recompute": True}, marks=slow),
    ],
)
def test_simple_fsdp_variant(world, bound):
    verify(data_parallel.simple_fsdp, world, **bound)


# ---------------------------------------------------------------- refused
def test_unused_parameters_are_refused_as_on_real_ranks():
    message = "Expected to have finished reduction in the prior iteration before starting a new one"
    refused(data_parallel.unused_undetected, 3, "Error", message, compiled=False)


def test_bfloat16_hook_is_refused_as_on_real_ranks():
    refused(
        data_parallel.hook,
        3,
        "TypeError",
        "BF16 all reduce communication hook required",
        compiled=False,
        name="bf16_compress_hook",
    )


def wrapped(**options):
    return DistributedDataParallel(fill(nn.Linear(3, 2)), **options)


def test_join_is_refused():
    with lt.LocalTensorMode(2):
        module = wrapped()
        with pytest.raises(lt.UnsupportedError) as caught, module.join():
            pass
    assert str(caught.value) == (
        "DistributedDataParallel.join (ranks with different numbers of batches) is not simulated: "
        "all simulated ranks run one program. Give every rank as many batches."
    )


def test_plain_parameters_are_refused():
    module = nn.Linear(3, 2)
    with lt.LocalTensorMode(2), pytest.raises(lt.PlainTensorError) as caught:
        DistributedDataParallel(module)
    assert str(caught.value) == (
        "DistributedDataParallel got a parameter (index 0, shape (2, 3)) that is a plain "
        "Parameter: ranks could not hold different gradients. Build the module inside "
        "LocalTensorMode, or convert it with localtensor_compile.replicate(module) first."
    )


def test_parameters_of_other_shapes_are_refused():
    with lt.LocalTensorMode(3):
        module = nn.Linear(3, 2)
        module.bias = nn.Parameter(lt.rank_map(lambda rank: torch.zeros(2 + rank // 2)))
        with pytest.raises(lt.LocalTensorError) as caught:
            DistributedDataParallel(module)
    assert str(caught.value) == (
        "params[1] appears not to match sizes and strides of the same param in process 0: ranks "
        "0-1: ((2,), (1,)), rank 2: ((3,), (1,)). DistributedDataParallel needs the same module "
        "on every rank."
    )


def test_sparse_gradients_are_refused():
    with lt.LocalTensorMode(2), pytest.raises(lt.UnsupportedError) as caught:
        DistributedDataParallel(nn.Embedding(4, 2, sparse=True))
    assert str(caught.value) == (
        "DistributedDataParallel with sparse gradients is not simulated. Use "
        "Embedding(..., sparse=False)."
    )


def test_second_hook_is_refused():
    with lt.LocalTensorMode(2):
        module = wrapped()
        module.register_comm_hook(None, data_parallel.halved)
        with pytest.raises(lt.LocalTensorError, match="can only be called once"):
            module.register_comm_hook(None, data_parallel.halved)


def test_late_static_graph_is_refused():
    with lt.LocalTensorMode(2):
        module = wrapped()
        module(torch.ones(1, 3)).sum().backward()
        with pytest.raises(lt.LocalTensorError, match="before training loop starts"):
            module._set_static_graph()


def test_what_the_reducer_lacks_is_named():
    with lt.LocalTensorMode(2):
        module = wrapped()
        with pytest.raises(lt.UnsupportedError, match=r"Reducer\._reset_state is not simulated"):
            module._update_process_group(module.process_group)
        with pytest.raises(lt.UnsupportedError, match="logging data is not simulated"):
            module._get_ddp_logging_data()


def test_torch_is_itself_outside_the_mode():
    reducer = torch.distributed.Reducer
    with lt.LocalTensorMode(2):
        wrapped()
        assert torch.distributed.Reducer is not reducer
    assert torch.distributed.Reducer is reducer
