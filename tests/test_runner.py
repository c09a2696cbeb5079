"""Ranks as threads: who runs when, what meets what, how it ends."""

import threading

import pytest
import torch
import torch.distributed as dist

import localtensor_compile as lt
from localtensor_compile import CollectiveError, RunnerDeadlock, RunnerTimeout, WorldError
from localtensor_compile.runner.engine import Engine

SEEDS = (None, 0, 1)


def run(fn, ranks=4, **options):
    """{rank: fn(rank)}; nothing is left behind."""
    threads, group = threading.active_count(), dist.is_initialized()
    try:
        return Engine(ranks, **options).run(fn)
    finally:
        assert threading.active_count() == threads
        assert dist.is_initialized() == group


@pytest.mark.parametrize("seed", SEEDS)
def test_each_thread_is_its_rank(seed):
    def fn(rank):
        mine = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        dist.barrier()
        return (*mine, dist.get_rank())

    assert run(fn, seed=seed) == {r: (r, 4, "gloo", r) for r in range(4)}


@pytest.mark.parametrize("seed", SEEDS)
def test_send_and_recv_by_tag_and_group(seed):
    def fn(rank):
        pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        got = [torch.zeros(2) for _ in range(3)]
        if rank % 2 == 0:
            works = [
                dist.isend(torch.full((2,), 10.0), rank + 1, tag=1),
                dist.isend(torch.full((2,), 20.0), rank + 1, tag=2),
                dist.isend(torch.full((2,), 30.0), group=pair, group_dst=1),
            ]
        else:
            works = [
                dist.irecv(got[0], group=pair, group_src=0),
                dist.irecv(got[1], rank - 1, tag=2),
                dist.irecv(got[2], rank - 1, tag=1),
            ]
        for work in works:
            work.wait()
        return [t[0].item() for t in got]

    out = run(fn, seed=seed)
    assert out[1] == out[3] == [30.0, 20.0, 10.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_recv_from_any_source_names_it(seed):
    def fn(rank):
        if rank:
            dist.send(torch.full((1,), float(rank)), 0)
            return None
        found = []
        for _ in range(3):
            x = torch.zeros(1)
            found.append((dist.recv(x), int(x)))
        return found

    found = run(fn, seed=seed)[0]
    assert sorted(found) == [(1, 1), (2, 2), (3, 3)]


def interleaving(seed):
    order = []

    def fn(rank):
        for _ in range(5):
            dist.barrier()
            order.append(rank)

    run(fn, seed=seed)
    return order


def test_same_seed_same_interleaving():
    assert interleaving(7) == interleaving(7)
    assert len({tuple(interleaving(s)) for s in range(5)}) > 1
    assert interleaving(None) == interleaving(None)


def test_deadlock_names_ranks_calls_and_lines():
    def fn(rank):
        x = torch.ones(2)
        if rank < 2:
            dist.recv(x, 1 - rank)
        elif rank == 2:
            dist.all_reduce(x)

    with pytest.raises(RunnerDeadlock) as error:
        run(fn)
    text = str(error.value)
    line = fn.__code__.co_firstlineno
    here = "tests/test_runner.py"
    receives = f"recv from rank 1 of float32 (2,) at {here}:{line + 3}"
    assert f"rank 0 waits in {receives}, for a send of rank 1" in text
    reduces = f"all_reduce(SUM) of float32 (2,) at {here}:{line + 5} (group [0, 1, 2, 3])"
    assert f"rank 2 waits in {reduces}, for ranks 0, 1, 3" in text
    assert "rank 3 has ended" in text
    assert "on real processes this hangs" in text


def test_collectives_that_do_not_fit_are_named():
    def fn(rank):
        x = torch.ones(2)
        if rank == 0:
            dist.all_reduce(x)
        else:
            dist.broadcast(x, 0)

    with pytest.raises(CollectiveError) as error:
        run(fn, 2)
    assert "ranks 0 and 1 meet in different collectives, as call 0 on the group" in str(error.value)
    line = fn.__code__.co_firstlineno
    assert f"rank 1: broadcast(root 0) of float32 (2,) at tests/test_runner.py:{line + 5}" in str(
        error.value
    )


def test_an_error_of_one_rank_is_raised_and_stops_the_others():
    ended = []

    def fn(rank):
        try:
            if rank == 1:
                raise KeyError("mine")
            dist.barrier()
        finally:
            ended.append(rank)

    with pytest.raises(KeyError, match="mine"):
        run(fn, 3)
    assert sorted(ended) == [0, 1] or sorted(ended) == [0, 1, 2]


def test_random_numbers_are_each_ranks_own():
    def fn(rank):
        torch.manual_seed(rank)
        first = torch.rand(1)
        dist.barrier()
        return torch.cat([first, torch.rand(1)])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    out = run(fn, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for rank in range(4):
        torch.manual_seed(rank)
        assert torch.equal(out[rank], torch.rand(2))


def test_local_runner_mode_raises_and_keeps_results():
    with lt.LocalRunnerMode(3, 3, lambda r: dist.get_rank() * 10) as mode:
        assert lt.LocalRunnerMode.current() is mode
    assert mode.results == {0: 0, 1: 10, 2: 20}
    with pytest.raises(ZeroDivisionError), lt.LocalRunnerMode(2, 2, lambda r: 1 // r):
        pass
    with pytest.raises(
        WorldError, match="LocalRunnerMode is not enabled: this call needs a program per rank"
    ):
        lt.LocalRunnerMode.current()


def test_a_rank_that_never_lets_others_run():
    def fn(rank):
        if rank == 0:
            while True:
                pass
        dist.barrier()

    with pytest.raises(RunnerTimeout, match=r"rank 0 has run for .* s without a call that lets"):
        run(fn, 2, timeout=0.3)
