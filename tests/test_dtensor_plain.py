"""distribute_tensor of plain tensors: each rank gets memory of its own, shared as it was."""

import pytest
import torch
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

from localtensor_compile import LocalTensor, LocalTensorMode, local_tensor_mode
from tests.parallel import dtensor_plain as programs
from tests.parallel.harness import eager, verify, worlds


@pytest.fixture
def mesh():
    with LocalTensorMode(2):
        yield init_device_mesh("cpu", (2,))


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", worlds(3))
def test_model_built_outside_is_trained(world):
    verify(programs.trained, world)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", worlds(2))
def test_writes(world):
    eager(programs.written, world)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_parameters():
    verify(programs.parameters, 4)


def replica(tensor, mesh):
    return distribute_tensor(tensor, mesh, [Replicate()]).to_local()


PLAIN = torch.arange(3.0)


def test_memory_is_shared_as_the_plain_tensors_is(mesh):
    first = replica(PLAIN, mesh)
    assert isinstance(first, LocalTensor)
    second = replica(PLAIN[1:], mesh)
    first.add_(1)
    assert torch.equal(second._local_tensors[1], torch.tensor([2.0, 3.0]))
    assert torch.equal(PLAIN, torch.arange(3.0))


def test_a_new_world_copies_anew(mesh):
    for _ in range(2):
        with LocalTensorMode(2):
            x = replica(PLAIN, init_device_mesh("cpu", (2,)))
            assert torch.equal(x._local_tensors[0], torch.arange(3.0))
            x.add_(1)


def test_what_was_written_to_the_plain_tensor_is_distributed(mesh):
    with torch._C.DisableTorchFunction():
        tensor = PLAIN.clone()
    first = replica(tensor, mesh)
    tensor[0] = torch.nan
    for _ in range(2):
        second = replica(tensor, mesh)
        for found in (first, second):
            assert found._local_tensors[1].isnan().tolist() == [True, False, False]
        second.mul_(2)
    assert second._local_tensors[1].tolist()[1:] == [4.0, 8.0]


def test_meta_tensors(mesh):
    x = distribute_tensor(PLAIN.to("meta"), mesh, [Replicate()])
    assert isinstance(torch.zeros_like(x, device="cpu").to_local(), LocalTensor)


def test_copies_are_kept_no_longer_than_the_plain_tensor(mesh):
    known = local_tensor_mode()._replicas._known
    with torch._C.DisableTorchFunction():
        tensor = PLAIN.clone()
    replica(tensor, mesh)
    assert len(known) == 1
    del tensor
    replica(PLAIN, mesh)
    assert len(known) == 1
