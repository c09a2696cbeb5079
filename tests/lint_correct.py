"""Programs that are right on a cluster, and look as if they were not: lint must find nothing.

tests/test_lint_gloo.py runs all of them on real processes, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from localtensor_compile import World

Outputs = dict[str, Any]
CORRECT: dict[str, tuple[Callable[[World], Outputs], int]] = {}


def correct(size: int) -> Callable[[Callable[[World], Outputs]], Callable[[World], Outputs]]:
    """Registers a program with its number of ranks."""

    def register(program: Callable[[World], Outputs]) -> Callable[[World], Outputs]:
        CORRECT[program.__name__] = program, size
        return program

    return register


def _own(rows: int = 4) -> torch.Tensor:
    return torch.full((rows,), float(dist.get_rank() + 1))


# ---------------------------------------------------------------- collectives
@correct(4)
def reduces_and_gathers(world: World) -> Outputs:
    x, y = _own(), torch.empty(16)
    dist.all_reduce(x)
    dist.all_gather_into_tensor(y, x)
    return {"y": y}


@correct(3)
def calls_one_collective_from_two_lines(world: World) -> Outputs:
    x = _own()
    if dist.get_rank() == 0:
        dist.broadcast(x, 0)
    else:
        dist.broadcast(x, src=0)
    return {"x": x}


@correct(3)
def writes_a_log_on_rank_zero(world: World) -> Outputs:
    loss = _own(1)
    dist.all_reduce(loss, op=dist.ReduceOp.MAX)
    lines = []
    if dist.get_rank() == 0:
        lines.append(f"loss {loss.item()}")
    dist.barrier()
    return {"loss": loss, "lines": len(lines)}


@correct(2)
def decides_by_what_all_ranks_know(world: World) -> Outputs:
    x = _own(1)
    for _ in range(10):
        dist.all_reduce(x)
        if x.item() > 20:
            break
    return {"x": x}


@correct(3)
def broadcasts_from_every_rank(world: World) -> Outputs:
    x = _own()
    for root in range(dist.get_world_size()):
        dist.broadcast(x, root)
    return {"x": x}


@correct(3)
def gathers_with_a_list_at_the_root_only(world: World) -> Outputs:
    x = _own()
    found = [torch.empty(4) for _ in range(3)] if dist.get_rank() == 1 else None
    dist.gather(x, found, dst=1)
    return {"x": x if found is None else torch.cat(found)}


@correct(3)
def scatters_with_a_list_at_the_root_only(world: World) -> Outputs:
    x = torch.empty(4)
    given = [torch.full((4,), float(i)) for i in range(3)] if dist.get_rank() == 2 else None
    dist.scatter(x, given, src=2)
    return {"x": x}


@correct(2)
def reduces_without_waiting(world: World) -> Outputs:
    x, y = _own(), 2 * _own()
    works = [dist.all_reduce(t, async_op=True) for t in (x, y)]
    for work in reversed(works):
        work.wait()
    return {"x": x, "y": y}


@correct(3)
def exchanges_uneven_splits(world: World) -> Outputs:
    rank = dist.get_rank()
    sent = [rank + i for i in range(3)]
    counts = torch.empty(3, dtype=torch.int64)
    dist.all_to_all_single(counts, torch.tensor(sent))
    expected = counts.tolist()
    y = torch.empty(sum(expected), 2)
    dist.all_to_all_single(y, torch.full((sum(sent), 2), float(rank)), expected, sent)
    return {"y": y}


@correct(2)
def exchanges_lists(world: World) -> Outputs:
    taken = [torch.empty(3), torch.empty(3)]
    dist.all_to_all(taken, [_own(3), 10 * _own(3)])
    return {"y": torch.cat(taken)}


@correct(2)
def reduce_scatters(world: World) -> Outputs:
    x, parts = torch.empty(2), list(_own().chunk(2))
    dist.reduce_scatter(x, parts)
    y = torch.empty(2)
    dist.reduce_scatter_tensor(y, _own())
    return {"x": x, "y": y}


@correct(3)
def sends_objects_around(world: World) -> Outputs:
    rank = dist.get_rank()
    found: list[Any] = [None] * 3
    dist.all_gather_object(found, {"rank": rank, "name": "x" * rank})
    first = [found[2]["name"]] if rank == 1 else [None]
    dist.broadcast_object_list(first, src=1)
    return {"x": len(first[0])}


@correct(2)
def uses_functional_collectives(world: World) -> Outputs:
    x = funcol.all_reduce(_own(), "sum", dist.group.WORLD)
    y = funcol.all_gather_tensor(x + dist.get_rank(), 0, dist.group.WORLD)
    return {"y": funcol.reduce_scatter_tensor(y, "max", 0, dist.group.WORLD) + 0}


@correct(2)
def broadcasts_into_another_shape(world: World) -> Outputs:
    x = torch.arange(6.0).view(2, 3) if dist.get_rank() == 0 else torch.empty(6)
    dist.broadcast(x, 0)
    return {"x": x.flatten()}


# ---------------------------------------------------------------- groups
@correct(4)
def reduces_in_sub_groups(world: World) -> Outputs:
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    rank, x = dist.get_rank(), _own()
    dist.all_reduce(x, group=groups[rank // 2])
    if rank >= 2:  # only one of the groups
        dist.all_reduce(x, group=groups[1])
    return {"x": x}


@correct(3)
def only_members_use_a_group(world: World) -> Outputs:
    pair = dist.new_group([0, 2])
    x = _own()
    if dist.get_rank() != 1:
        dist.all_reduce(x, group=pair)
    dist.barrier()
    return {"x": x}


@correct(4)
def leaders_talk_between_two_barriers(world: World) -> Outputs:
    rank, x = dist.get_rank(), _own()
    leaders = dist.new_group([0, 2])
    own = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    dist.reduce(x, dst=rank // 2 * 2, group=own)
    if rank % 2 == 0:
        dist.all_reduce(x, group=leaders)
    dist.broadcast(x, src=rank // 2 * 2, group=own)
    return {"x": x}


@correct(4)
def makes_a_mesh(world: World) -> Outputs:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = _own()
    dist.all_reduce(x, group=mesh.get_group("tp"))
    dist.all_reduce(x, group=mesh.get_group("dp"))
    return {"x": x}


@correct(3)
def makes_a_group_by_its_members_alone(world: World) -> Outputs:
    x = _own()
    if dist.get_rank() > 0:
        pair = dist.new_group([1, 2], use_local_synchronization=True)
        dist.all_reduce(x, group=pair)
    return {"x": x}


# ---------------------------------------------------------------- send and receive
@correct(3)
def passes_along_a_chain(world: World) -> Outputs:
    rank, x = dist.get_rank(), _own()
    if rank > 0:
        dist.recv(x, rank - 1)
    if rank < 2:
        dist.send(x + 1, rank + 1)
    return {"x": x}


@correct(4)
def ring_of_even_and_odd(world: World) -> Outputs:
    rank, x, y = dist.get_rank(), _own(), torch.empty(4)
    after, before = (rank + 1) % 4, (rank - 1) % 4
    if rank % 2 == 0:
        dist.send(x, after)
        dist.recv(y, before)
    else:
        dist.recv(y, before)
        dist.send(x, after)
    return {"y": y}


@correct(4)
def ring_in_one_batch(world: World) -> Outputs:
    rank, x, y = dist.get_rank(), _own(), torch.empty(4)
    ops = [
        dist.P2POp(dist.isend, x, (rank + 1) % 4),
        dist.P2POp(dist.irecv, y, (rank - 1) % 4),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return {"y": y}


@correct(2)
def both_send_without_waiting(world: World) -> Outputs:
    other, x, y = 1 - dist.get_rank(), _own(), torch.empty(4)
    work = dist.isend(x, other)
    dist.recv(y, other)
    work.wait()
    return {"y": y}


@correct(3)
def receives_from_any_rank(world: World) -> Outputs:
    x, total = _own(), torch.zeros(4)
    if dist.get_rank() == 0:
        for _ in range(2):
            dist.recv(x)
            total += x
    else:
        dist.send(x, 0)
    return {"total": total}


@correct(2)
def receives_tags_in_another_order(world: World) -> Outputs:
    x, y = _own(), torch.empty(4)
    if dist.get_rank() == 0:
        works = [dist.isend(tag * x, 1, tag=tag) for tag in (1, 2)]
        for work in works:
            work.wait()
    else:
        dist.recv(y, 0, tag=2)
        dist.recv(x, 0, tag=1)
    return {"x": x}


@correct(3)
def sends_within_a_group(world: World) -> Outputs:
    x = _own()
    pair = dist.new_group([0, 2])
    if dist.get_rank() == 0:
        dist.send(x, 2, group=pair)
    elif dist.get_rank() == 2:
        dist.recv(x, group_src=0, group=pair)
    return {"x": x}


@correct(2)
def receives_into_another_shape(world: World) -> Outputs:
    x = torch.arange(6.0)
    if dist.get_rank() == 0:
        dist.send(x, 1)
    else:
        x = torch.empty(2, 3)
        dist.recv(x, 0)
    return {"x": x}


@correct(2)
def sends_after_a_collective(world: World) -> Outputs:
    x = _own()
    if dist.get_rank() == 0:
        dist.all_reduce(x)
        dist.send(x, 1)
    else:
        y = torch.empty(4)
        dist.all_reduce(x)
        dist.recv(y, 0)
    return {"x": x}


@correct(2)
def pipeline_of_two_stages(world: World) -> Outputs:
    rank = dist.get_rank()
    torch.manual_seed(0)
    stages = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    stage, total = stages[rank], torch.zeros(())
    for micro in range(3):
        if rank == 0:
            y = stage(torch.full((2, 4), float(micro)))
            dist.send(y.detach(), 1)
            grad = torch.empty(2, 4)
            dist.recv(grad, 1)
            y.backward(grad)
        else:
            x = torch.empty(2, 4)
            dist.recv(x, 0)
            loss = stage(x.requires_grad_()).sum()
            loss.backward()
            dist.send(x.grad, 0)
            total += loss.detach()
    return {"total": total, "grad": stage.weight.grad}


def _pipeline(kind: type[Any], stages: int) -> Outputs:
    """Trains one step with `stages` stages on each rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(stages)]
    made = [
        PipelineStage(part, rank + i * size, size * stages, torch.device("cpu"))
        for i, part in enumerate(parts)
    ]
    schedule = kind(
        made if stages > 1 else made[0],
        n_microbatches=2 * size,
        loss_fn=lambda output, target: (output - target).pow(2).sum(),
    )
    losses: list[Any] = []
    if rank == 0:
        schedule.step(torch.ones(4 * size, 4))
    elif rank == size - 1:
        schedule.step(target=torch.zeros(4 * size, 4), losses=losses)
    else:
        schedule.step()
    return {"grad": parts[0][0].weight.grad, "losses": len(losses)}


@correct(3)
def trains_a_gpipe_pipeline(world: World) -> Outputs:
    return _pipeline(ScheduleGPipe, 1)


@correct(3)
def trains_a_1f1b_pipeline(world: World) -> Outputs:
    return _pipeline(Schedule1F1B, 1)


@correct(2)
def trains_an_interleaved_pipeline(world: World) -> Outputs:
    return _pipeline(ScheduleInterleaved1F1B, 2)


# ---------------------------------------------------------------- models
@correct(2)
def redistributes_a_dtensor(world: World) -> Outputs:
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.arange(15.0).reshape(5, 3), mesh, [Shard(0)])
    y = x.redistribute(mesh, [Shard(1)]).redistribute(mesh, [Replicate()])
    return {"y": y.to_local(), "sum": x.sum().full_tensor(), "partial": Partial() != Shard(0)}


@correct(2)
def trains_a_tensor_parallel_mlp(world: World) -> Outputs:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    loss = model(torch.ones(3, 6)).sum()
    loss.backward()
    return {"loss": loss.detach(), "grad": model[0].weight.grad.to_local()}


@correct(2)
def trains_with_data_parallelism(world: World) -> Outputs:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 2))
    loss = model(torch.full((3, 4), float(dist.get_rank()))).sum()
    loss.backward()
    return {"loss": loss.detach(), "grad": model.module.weight.grad}


@correct(2)
def trains_with_fully_sharded_data(world: World) -> Outputs:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    loss = model(torch.full((3, 4), float(dist.get_rank()))).sum()
    loss.backward()
    return {"loss": loss.detach(), "grad": model[0].weight.grad.to_local()}
