"""Random programs with random interleavings, where any call of any rank may fail.

No hang, no thread and no replaced name is left, and the same seed gives the same outcome.
"""

from __future__ import annotations

import copy
import random
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from localtensor_compile.runner.engine import Engine

WORLD = 3


class Injected(Exception):
    pass


def program_of(seed):
    """fn(rank) that makes the same calls on all ranks, and the events that ranks saw."""
    draw = random.Random(seed)
    steps = [draw.choice(STEPS) for _ in range(draw.randint(3, 8))]
    failing = draw.random() < 0.6
    victim, when = draw.randrange(WORLD), draw.randrange(len(steps))
    kind = draw.choice(("raise", "end", "skip", "catch"))
    events = []

    def fn(rank):
        x = torch.arange(4.0) + rank
        for number, step in enumerate(steps):
            if failing and rank == victim and number == when:
                if kind == "raise":
                    raise Injected(number)
                if kind == "end":
                    return x
                if kind == "skip":
                    continue
                try:
                    raise Injected(number)
                except Injected:
                    events.append((rank, "caught"))
            x = step(rank, x)
            events.append((rank, number, x.sum().item()))
        return x

    return fn, events


def all_reduce(rank, x):
    dist.all_reduce(x)
    return x / WORLD


def broadcast(rank, x):
    dist.broadcast(x, 1)
    return x + rank


def ring(rank, x):
    got = torch.empty_like(x)
    works = [dist.isend(x, (rank + 1) % WORLD), dist.irecv(got, (rank - 1) % WORLD)]
    for work in works:
        work.wait()
    return got


def any_source(rank, x):
    if rank:
        dist.send(x, 0, tag=5)
        return x
    got = torch.empty_like(x)
    for _ in range(WORLD - 1):
        source = dist.recv(got, tag=5)
        x = x + got * source
    return x


def objects(rank, x):
    found = [None] * WORLD
    dist.all_gather_object(found, rank)
    return x + sum(found)


def pair(rank, x):
    group = dist.new_group([0, 2])
    if rank != 1:
        work = dist.all_reduce(x, group=group, async_op=True)
        while not work.is_completed():
            pass
        work.wait()
    return x


def barrier(rank, x):
    dist.barrier()
    return x + torch.rand(1)


STEPS = (all_reduce, broadcast, ring, any_source, objects, pair, barrier)
NAMES = [
    (c10d, "_new_process_group_helper"),
    (c10d, "_pg_map"),
    (c10d, "_group_count"),
    (c10d._world, "_default_pg"),
    (DeviceMesh, "__init__"),
    (DeviceMesh, "get_coordinate"),
    (dist.ProcessGroup, "allreduce"),
    (dist.Backend, "_plugins"),
    (dist.Backend, "backend_list"),
    (sys, "excepthook"),
    (time, "sleep"),
]


def held_names():
    held = [getattr(owner, name) for owner, name in NAMES]
    return [copy.copy(x) if isinstance(x, (dict, list)) else x for x in held]


def outcome(seed):
    """What a run with this seed gave: results or the error, and the order of events."""
    fn, events = program_of(seed)
    torch.manual_seed(seed)
    before, threads = held_names(), set(threading.enumerate())
    engine = Engine(WORLD, seed=seed, timeout=20)
    engine.scheduler.patience = 0.0
    try:
        result = {r: x.tolist() for r, x in engine.run(fn).items()}
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    assert set(threading.enumerate()) <= threads
    assert not dist.is_initialized()
    assert held_names() == before
    torch_now = torch.rand(1)
    torch.manual_seed(seed)
    assert torch.equal(torch_now, torch.rand(1))
    return result, events


def check(seeds):
    kinds = set()
    for seed in seeds:
        first = outcome(seed)
        assert first == outcome(seed), seed
        result = first[0]
        kinds.add(result.partition(":")[0] if isinstance(result, str) else "results")
    return kinds


def test_random_runs():
    kinds = check(range(60))
    assert {"results", "Injected", "RunnerDeadlock", "CollectiveError"} <= kinds


@pytest.mark.slow
def test_a_thousand_random_runs():
    check(range(1000, 1500))  # each twice
