"""Every collective, reduce op, dtype, group and shape: bit for bit what real gloo processes get."""

import functools

import pytest
import torch

from localtensor_compile import LocalTensorMode
from localtensor_compile.check.gloo import shared_pool
from tests import collective_cases

WORLDS = (1, 2, 3, 4, 5, 8)


@functools.cache
def results(world, quick):
    """(simulated, {rank: real}) of all cases."""
    with LocalTensorMode(world) as mode:
        ours = collective_cases.simulated(world, mode, quick)
    real = shared_pool().run(collective_cases.on_real_rank, world, quick, timeout=600.0)
    return ours, real


def compare(world, quick):
    """(cases that real ranks accept, comparisons made, differences)."""
    ours, real = results(world, quick)
    legal, compared, wrong = 0, 0, []
    for name, simulated in ours.items():
        accepted = False
        for rank, of_rank in real.items():
            expected = of_rank.get(name)
            if expected is None or isinstance(expected, str):
                continue  # not a member, or illegal on gloo
            accepted = True
            if isinstance(simulated, str):
                wrong.append(f"{name}: rank {rank} works, simulated raises {simulated[:200]}")
                break
            if name.startswith("gather ") and rank != first_of_group(name, world, rank):
                continue
            for k, (mine, theirs) in enumerate(zip(simulated, expected, strict=True)):
                compared += 1
                got = mine._local_tensors[rank]
                same = got.shape == theirs.shape and got.dtype == theirs.dtype
                if not same or not equal(got, theirs):
                    wrong.append(f"{name}: output {k} of rank {rank}: {got} instead of {theirs}")
        legal += accepted
    return legal, compared, wrong


def first_of_group(name, world, rank):
    if " mesh a " in name:
        return rank % (world // 2)
    if " mesh b " in name:
        return rank // (world // 2) * (world // 2)
    return 0


def equal(a, b):
    if a.dtype.is_floating_point:
        nan = a.isnan()
        return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan])
    return torch.equal(a, b)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", (2, 4))
def test_bit_equal_with_gloo(world):
    legal, compared, wrong = compare(world, quick=True)
    assert not wrong, "\n".join(wrong[:20])
    assert legal > 200 and compared > 500


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", WORLDS)
def test_bit_equal_with_gloo_everywhere(world):
    legal, compared, wrong = compare(world, quick=False)
    print(f"W={world}: {legal} legal cases, {compared} comparisons")
    assert not wrong, "\n".join(wrong[:20])
    assert legal > 500


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_what_gloo_refuses_is_refused_here():
    """Bitwise ops on floating point numbers and averages of integers; nothing else is left out."""
    ours, real = results(2, quick=True)
    refused = {name for name, out in real[0].items() if isinstance(out, str)}
    # Only NCCL gathers into a tensor of shape (W, ...).
    assert {n for n in refused if not isinstance(ours[n], str)} == {
        n for n in ours if n.startswith("all_gather_into_stacked_tensor")
    }
    others = {n for n in refused if not n.startswith("all_gather_into_stacked_tensor")}
    assert {n.split()[1] for n in others} == {"avg", *collective_cases.BITWISE}
    assert all(ours[n].startswith("CollectiveError: ReduceOp.") for n in others)
