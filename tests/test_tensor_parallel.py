"""Tensor, sequence and loss parallelism: bit for bit as real gloo processes, compiled whole."""

import functools

import pytest

from localtensor_compile.check.gloo import GlooError
from localtensor_compile.check.runner import check
from tests.parallel import tensor_parallel as tp
from tests.parallel.harness import WORLDS, compiled_on_real_ranks, refused, verify, worlds

pytestmark = [pytest.mark.gloo, pytest.mark.xdist_group("gloo")]


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize("hidden", (12, 10, 2))
def test_mlp(world, hidden):
    verify(tp.mlp, world, hidden=hidden)


@pytest.mark.parametrize("world", worlds(4))
def test_mlp_with_local_tensors_between(world):
    verify(tp.mlp_local, world)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize("length", (12, 7, 1))
def test_sequence_parallel_mlp(world, length):
    # The hook that gathers the input is a frame of its own, as it is for real ranks.
    # Between the two, AOTAutograd wants tangents that are not Partial: it all-reduces where eager
    # reduce-scatters padded chunks, which sums in another order.
    verify(
        tp.mlp_sequence_parallel,
        world,
        length=length,
        graphs=2,
        compiled_reference="gloo" if length % world else "eager",
    )


@pytest.mark.parametrize("world", worlds(3))
def test_transformer(world):
    verify(tp.transformer, world)


TRANSFORMERS = {
    "plain loss": {"loss": False},
    "tied": {"tied": True},
    "rms norm": {"norm": "RMSNorm"},
    "clipped": {"clip": 0.1, "optimizer": "sgd foreach"},
}


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_kinds_of_transformer(world, name):
    verify(tp.transformer, world, **TRANSFORMERS[name])


@pytest.mark.parametrize("world", worlds(2))
def test_checkpointed_transformer(world):
    verify(tp.transformer, world, checkpointed=True, graphs=None)


def test_compiled_checkpoint_is_refused_as_by_real_ranks():
    """torch 2.13: AOTAutograd wants the DeviceMesh that the recomputation needs to be a Tensor."""
    program = functools.partial(tp.transformer, checkpointed=True)
    with pytest.raises(GlooError, match="expected all tensors_saved_with_vc_check to be Tensors"):
        compiled_on_real_ranks(program, 2)
    report = check(program, 2, backends=["aot_eager"])
    assert "expected all tensors_saved_with_vc_check to be Tensors" in report.engines[-1].error


@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize("optimizer", [name for name in tp.OPTIMIZERS if name != "sgd fused"])
def test_optimizer(world, optimizer):
    verify(tp.transformer, world, optimizer=optimizer, graphs=None, clip=0.5)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"weight": True, "ignore_index": 3},
    ),
    ids=str,
)
def test_cross_entropy(world, options):
    verify(tp.cross_entropy, world, **options)


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize("style", ("rowwise", "colwise"))
@pytest.mark.parametrize("output", ("replicate", "sequence", "last"))
def test_embedding(world, style, output):
    verify(tp.embedding, world, style=style, output=output)


@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize("combined", (False, True))
def test_prepare_inputs_and_outputs(world, combined):
    verify(tp.prepare_inputs_and_outputs, world, combined=combined, graphs=3)


@pytest.mark.parametrize("world", worlds(3))
def test_replicated_parameters(world):
    verify(tp.replicated_parameters, world)


@pytest.mark.parametrize("dp", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_data_and_tensor_parallel(dp):
    verify(tp.data_and_tensor, 4, dp=dp)


def test_optimizer_without_sharding_rule():
    refused(
        tp.transformer,
        2,
        "NotImplementedError",
        "aten._fused_sgd_.default does not have a sharding strategy",
        compiled=False,
        optimizer="sgd fused",
    )


REFUSED = {
    "weighted_loss_with_ignored_classes": ("RuntimeError", "index -100 is out of bounds"),
    "wrong_plan": ("TypeError", "ParallelStyle"),
    "unsupported_module": ("NotImplementedError", "ColwiseParallel currently only support"),
    "two_dimensional_mesh": ("ValueError", "same length as `device_mesh.ndim`"),
    "wrong_number_of_layouts": ("ValueError", "same length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_by_real_ranks(name):
    kind, message = REFUSED[name]
    refused(getattr(tp, name), 4, kind, message)
