"""Each name that is replaced while ranks run in threads is needed."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import localtensor_compile as lt
from localtensor_compile.runner import _torch_runner, script_hooks
from localtensor_compile.runner.engine import Engine


def groups_meet(rank):
    assert type(dist.group.WORLD).__name__ == "RunnerGroup"
    x = torch.ones(1)
    dist.all_reduce(x, group=dist.new_group([0, 1]))
    assert x.item() == 2


def meshes_are_each_ranks_own(rank):
    mesh = init_device_mesh("cpu", (2,))
    assert mesh._thread_id == threading.get_ident()


def compiled_code_knows_its_rank(rank):
    found = COMPILED(torch.zeros(1)).item()
    dist.barrier()
    assert found == rank


def every_rank_may_recompile(rank):
    for size in range(2, 7):
        assert MANY(torch.ones(size)).item() == size
    dist.barrier()


def polling_lets_others_run(rank):
    if rank == 0:
        until = time.monotonic() + 1
        while not FLAGS:
            time.sleep(0.01)
            assert time.monotonic() < until
    FLAGS.append(rank)


FLAGS = []


@torch.compile(backend="eager", fullgraph=True)
def COMPILED(x):
    return x + dist.get_rank()


@torch.compile(backend="eager", fullgraph=True, dynamic=False)
def MANY(x):
    return x.sum()


WITNESSES = {
    "torch.distributed.distributed_c10d._new_process_group_helper": groups_meet,
    "DeviceMesh.__init__": meshes_are_each_ranks_own,
    "OutputGraph.init_ambient_guards": compiled_code_knows_its_rank,
    "torch._dynamo.cache_size._has_same_id_matched_objs": every_rank_may_recompile,
    "time.sleep": polling_lets_others_run,
}


def everything():
    return [*_torch_runner._replacements(), *script_hooks.for_all_runs()]


def name_of(owner, name):
    return f"{owner.__name__}.{name}"


def test_every_replacement_has_a_witness():
    names = {name_of(owner, name) for owner, name, _ in everything()}
    refused = {n for n in names if n.startswith(("DeviceMesh.get", "DeviceMesh._sym", "ProcessG"))}
    assert names - refused == WITNESSES.keys()
    assert "ProcessGroup.allreduce" in refused  # tests/test_runner_torch.py sees them refuse


@pytest.mark.parametrize("name", WITNESSES)
def test_needed(name, monkeypatch):
    def run():
        FLAGS.clear()
        with torch._dynamo.config.patch(recompile_limit=6):
            Engine(2, timeout=20).run(WITNESSES[name])

    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")  # a real group would wait for its peers
    run()
    replacements, hooks = _torch_runner._replacements, script_hooks.for_all_runs

    def but_one(original):
        return lambda: (r for r in original() if name_of(*r[:2]) != name)

    with monkeypatch.context() as patch:
        patch.setattr(_torch_runner, "_replacements", but_one(replacements))
        patch.setattr(script_hooks, "for_all_runs", but_one(hooks))
        with pytest.raises(Exception):  # noqa: B017
            run()
    run()


def test_thread_isolation_ends(monkeypatch):
    """Names of groups mean one group per thread while ranks run, and one per process after."""
    Engine(2).run(lambda rank: dist.barrier())
    with lt.LocalTensorMode(2):
        mesh = DeviceMesh("cpu", torch.arange(2))
        x = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        found = []
        thread = threading.Thread(
            target=lambda: found.append(dist.distributed_c10d._resolve_process_group("0"))
        )
        thread.start()
        thread.join()
        assert found == [dist.group.WORLD]
        assert x.full_tensor().reconcile().tolist() == [1.0] * 4
