"""Programs that go wrong on a cluster, and what happens to them there.

Lines that a finding has to name end in `# !`. What happens is measured: tests/test_lint_gloo.py
runs all of them on real processes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from localtensor_compile import World

Outputs = dict[str, Any]
HANG, CORRUPT, ERROR, FRAGILE = "hang", "corrupt", "error", "fragile"


@dataclass(frozen=True)
class Faulty:
    """A program that goes wrong.

    Attributes:
        kinds: of the findings, in order.
        outcome: what happens on gloo.
        size: number of ranks.
        right: of a program whose values are wrong, what they should be.
    """

    program: Callable[[World], Outputs]
    kinds: tuple[str, ...]
    outcome: str
    size: int
    right: Callable[[int, int], Outputs] | None


FAULTY: dict[str, Faulty] = {}


def faulty(
    *kinds: str,
    outcome: str = HANG,
    size: int = 2,
    right: Callable[[int, int], Outputs] | None = None,
) -> Callable[[Callable[[World], Outputs]], Callable[[World], Outputs]]:
    """Registers a program with what is to be found in it."""

    def register(program: Callable[[World], Outputs]) -> Callable[[World], Outputs]:
        FAULTY[program.__name__] = Faulty(program, kinds, outcome, size, right)
        return program

    return register


def _ones(rows: int = 4) -> Tensor:
    return torch.full((rows,), float(dist.get_rank() + 1))


# ---------------------------------------------------------------- another collective, another order
@faulty("different collectives")
def reduces_against_broadcast(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.all_reduce(x)  # !
    else:
        dist.broadcast(x, 0)  # !
    return {"x": x}


@faulty("different collectives", size=4)
def swaps_two_collectives(world: World) -> Outputs:
    x, y = _ones(), _ones()
    dist.barrier()
    if dist.get_rank() < 3:
        dist.all_reduce(x)  # !
        dist.broadcast(y, 0)
    else:
        dist.broadcast(y, 0)  # !
        dist.all_reduce(x)
    return {"x": x}


@faulty("different collectives")
def reduces_against_barrier(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.barrier()  # !
    dist.all_reduce(x)  # !
    return {"x": x}


@faulty("different collectives")
def gathers_against_scatters(world: World) -> Outputs:
    x, y = _ones(), torch.empty(8)
    if dist.get_rank() == 0:
        dist.all_gather_into_tensor(y, x)  # !
    else:
        dist.reduce_scatter_tensor(x, y)  # !
    return {"x": x}


@faulty("different collectives")
def functional_collectives_differ(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        y = funcol.all_reduce(x, "sum", dist.group.WORLD)  # !
    else:
        y = funcol.all_gather_tensor(x, 0, dist.group.WORLD)  # !
    return {"y": y + 0}  # !


@faulty("different collectives", outcome=FRAGILE)
def gathers_in_two_ways(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.all_gather([torch.empty(4), torch.empty(4)], x)  # !
    else:
        dist.all_gather_into_tensor(torch.empty(8), x)  # !
    return {"x": x}


@faulty("different collectives", outcome=FRAGILE)
def reduces_in_two_ways(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.all_reduce(x)  # !
    else:
        dist.reduce_scatter_tensor(torch.empty(2), x)  # !
    return {"x": x}


@faulty("deadlock", size=2)
def swaps_two_groups(world: World) -> Outputs:
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    x = _ones()
    if dist.get_rank() == 0:
        dist.all_reduce(x, group=first)  # !
        dist.all_reduce(x, group=second)
    else:
        dist.all_reduce(x, group=second)  # !
        dist.all_reduce(x, group=first)
    return {"x": x}


@faulty("deadlock", size=3)
def waits_around_three_groups(world: World) -> Outputs:
    left, right, outer = (dist.new_group(ranks) for ranks in ([0, 1], [1, 2], [0, 2]))
    x = _ones()
    rank = dist.get_rank()
    if rank == 0:
        dist.all_reduce(x, group=left)  # !
        dist.all_reduce(x, group=outer)
    elif rank == 1:
        dist.all_reduce(x, group=right)  # !
        dist.all_reduce(x, group=left)
    else:
        dist.all_reduce(x, group=outer)  # !
        dist.all_reduce(x, group=right)
    return {"x": x}


@faulty("deadlock", size=4)
def columns_before_rows(world: World) -> Outputs:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    rows, columns = mesh.get_group("tp"), mesh.get_group("dp")
    x = _ones()
    if dist.get_rank() in (0, 3):
        dist.all_reduce(x, group=rows)  # !
        dist.all_reduce(x, group=columns)
    else:
        dist.all_reduce(x, group=columns)  # !
        dist.all_reduce(x, group=rows)
    return {"x": x}


# ---------------------------------------------------------------- only some ranks
@faulty("only some ranks", size=4)
def only_rank_zero_reduces(world: World) -> Outputs:
    loss = _ones(1)
    if dist.get_rank() == 0:
        dist.all_reduce(loss)  # !
    return {"loss": loss}  # !


@faulty("only some ranks")
def reduces_for_the_log(world: World) -> Outputs:
    loss, grad = _ones(1), _ones(1)
    if dist.get_rank() == 0:
        dist.all_reduce(loss)  # !
    dist.all_reduce(grad)  # !
    return {"grad": grad}  # !


@faulty("only some ranks")
def short_circuits(world: World) -> Outputs:
    x = _ones()
    rank = dist.get_rank()
    rank == 1 and dist.all_reduce(x)  # !
    return {"x": x}  # !


@faulty("only some ranks")
def barrier_where_the_loss_is_high(world: World) -> Outputs:
    loss = _ones(1).mean()
    if loss > 1.5:
        dist.barrier()  # !
    return {"loss": loss}  # !


@faulty("only some ranks", size=3)
def leaves_early(world: World) -> Outputs:
    x = _ones()
    dist.all_reduce(x)
    if dist.get_rank() == 1:
        return {"x": x}  # !
    dist.broadcast(x, 0)  # !
    return {"x": x}


@faulty("only some ranks")
def skips_a_bad_batch(world: World) -> Outputs:
    x = _ones()
    for step in range(3):
        try:
            if dist.get_rank() == 1 and step == 1:
                raise ValueError("a bad batch")
            dist.all_reduce(x)  # !
        except ValueError:
            continue
    return {"x": x}  # !


@faulty("only some ranks", size=3)
def loops_as_often_as_it_has_data(world: World) -> Outputs:
    x = _ones()
    for _ in range(dist.get_rank() + 1):
        dist.all_reduce(x)  # !
    return {"x": x}  # !


@faulty("only some ranks")
def counts_barriers_differently(world: World) -> Outputs:
    dist.barrier()
    if dist.get_rank() == 0:
        dist.barrier()  # !
    return {"x": torch.ones(1)}  # !


@faulty("only some ranks")
def gathers_objects_on_rank_zero(world: World) -> Outputs:
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        dist.all_gather_object(found, {"loss": 1.0})  # !
    return {"x": torch.ones(1)}  # !


@faulty("only some ranks")
def saves_a_sharded_tensor_on_rank_zero(world: World) -> Outputs:
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Shard(0)])
    if dist.get_rank() == 0:
        torch.clone(weight.full_tensor())  # !
    return {"x": torch.ones(1)}  # !


@faulty("only some ranks")
def redistributes_in_a_branch(world: World) -> Outputs:
    mesh = init_device_mesh("cpu", (2,))
    x = distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Shard(0)])
    if x.to_local().sum() > 10:
        x = x.redistribute(mesh, [Replicate()])  # !
    return {"x": torch.ones(1)}  # !


@faulty("a rank fails", size=3)
def raises_on_one_rank(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 2:
        raise ValueError("no data on this rank")  # !
    dist.all_reduce(x)  # !
    return {"x": x}


# ---------------------------------------------------------------- the same call, other arguments
@faulty("shapes", outcome=ERROR)
def reduces_other_sizes(world: World) -> Outputs:
    x = _ones(1000) if dist.get_rank() == 0 else _ones(500)
    dist.all_reduce(x)  # !
    return {"x": x}


@faulty(
    "shapes",
    outcome=CORRUPT,
    right=lambda rank, size: {"x": 2 * torch.arange(6.0).view(2, 3)},
)
def reduces_a_transposed_tensor(world: World) -> Outputs:
    x = torch.arange(6.0).view(2, 3)
    if dist.get_rank() == 1:
        x = x.t().contiguous()
    dist.all_reduce(x)  # !
    return {"x": x if dist.get_rank() == 0 else x.t()}


@faulty("dtypes", outcome=ERROR)
def reduces_other_dtypes(world: World) -> Outputs:
    x = torch.ones(1000, dtype=torch.float32 if dist.get_rank() == 0 else torch.float64)
    dist.all_reduce(x)  # !
    return {"x": x}


@faulty("dtypes", outcome=CORRUPT, right=lambda rank, size: {"x": torch.full((4,), 2.0)})
def reduces_integers_with_floats(world: World) -> Outputs:
    x = torch.ones(4, dtype=torch.float32 if dist.get_rank() == 0 else torch.int32)
    dist.all_reduce(x)  # !
    return {"x": x.double()}


@faulty("reduce ops", outcome=CORRUPT, right=lambda rank, size: {"x": torch.full((4,), 3.0)})
def sums_against_maximum(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.all_reduce(x, op=dist.ReduceOp.SUM)  # !
    else:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)  # !
    return {"x": x}


@faulty("roots")
def broadcasts_from_itself(world: World) -> Outputs:
    x = _ones()
    dist.broadcast(x, src=dist.get_rank())  # !
    return {"x": x}


@faulty("roots")
def reduces_to_itself(world: World) -> Outputs:
    x = _ones()
    dist.reduce(x, dst=dist.get_rank())  # !
    return {"x": x}


@faulty("roots")
def gathers_to_itself(world: World) -> Outputs:
    x, rank = _ones(), dist.get_rank()
    found = [torch.empty(4) for _ in range(2)]
    dist.gather(x, found, dst=rank)  # !
    return {"x": x}


@faulty("roots")
def scatters_from_itself(world: World) -> Outputs:
    x, rank = torch.empty(4), dist.get_rank()
    dist.scatter(x, [_ones(), _ones()], src=rank)  # !
    return {"x": x}


@faulty("roots")
def broadcasts_objects_from_itself(world: World) -> Outputs:
    found = [{"lr": 0.1}]
    dist.broadcast_object_list(found, src=dist.get_rank())  # !
    return {"x": torch.ones(1)}


@faulty("shapes", outcome=ERROR)
def broadcasts_into_a_small_tensor(world: World) -> Outputs:
    x = _ones(1000) if dist.get_rank() == 0 else _ones(10)
    dist.broadcast(x, 0)  # !
    return {"x": x}


@faulty("shapes", outcome=CORRUPT, right=lambda rank, size: {"x": torch.ones(1000)})
def broadcasts_into_a_large_tensor(world: World) -> Outputs:
    x = torch.ones(10) if dist.get_rank() == 0 else torch.zeros(1000)
    dist.broadcast(x, 0)  # !
    return {"x": x}


@faulty("shapes", outcome=ERROR)
def gathers_uneven_shards(world: World) -> Outputs:
    x = _ones(1000 + 500 * dist.get_rank())
    found = torch.empty(2 * x.numel())
    dist.all_gather_into_tensor(found, x)  # !
    return {"x": x}


@faulty("shapes", outcome=ERROR)
def reduce_scatters_other_sizes(world: World) -> Outputs:
    x = torch.empty(1000 + 500 * dist.get_rank())
    dist.reduce_scatter_tensor(x, torch.ones(2 * x.numel()))  # !
    return {"x": x}


@faulty("shapes", outcome=ERROR, size=3)
def gathers_into_a_short_list(world: World) -> Outputs:
    rank = dist.get_rank()
    found = [torch.empty(1000) for _ in range(3)] if rank == 0 else None
    dist.gather(_ones(2000 if rank == 2 else 1000), found, dst=0)  # !
    return {"x": torch.ones(1)}


@faulty("shapes", outcome=ERROR, size=3)
def scatters_into_a_small_tensor(world: World) -> Outputs:
    rank = dist.get_rank()
    given = [torch.ones(1000) for _ in range(3)] if rank == 0 else None
    dist.scatter(torch.empty(10 if rank == 2 else 1000), given, src=0)  # !
    return {"x": torch.ones(1)}


@faulty("splits", outcome=ERROR)
def expects_other_splits(world: World) -> Outputs:
    rank = dist.get_rank()
    sent = [1, 3] if rank == 0 else [2, 2]
    expected = [1, 2] if rank == 0 else [2, 2]
    y = torch.empty(sum(expected), 1000)
    dist.all_to_all_single(y, torch.ones(4, 1000), expected, sent)  # !
    return {"y": y}


@faulty("splits", outcome=CORRUPT, right=lambda rank, size: {"y": torch.ones(5, 10)})
def expects_more_rows(world: World) -> Outputs:
    expected = [2, 3] if dist.get_rank() == 0 else [3, 2]
    y = torch.zeros(5, 10)
    dist.all_to_all_single(y, torch.ones(4, 10), expected, [2, 2])  # !
    return {"y": y}


@faulty("splits", outcome=ERROR)
def exchanges_other_sizes(world: World) -> Outputs:
    rows = 1000 * (dist.get_rank() + 1)
    taken = [torch.empty(rows) for _ in range(2)]
    dist.all_to_all(taken, [torch.ones(rows) for _ in range(2)])  # !
    return {"x": taken[1]}


# ---------------------------------------------------------------- send and receive
@faulty("send without recv")
def sends_to_nobody(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.send(x, 1)  # !
    return {"x": x}  # !


@faulty("recv without send")
def receives_from_nobody(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 1:
        dist.recv(x, 0)  # !
    return {"x": x}  # !


@faulty("recv without send")
def receives_from_any_once_too_often(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.recv(x)
        dist.recv(x)  # !
    else:
        dist.send(x, 0)
    return {"x": x}  # !


@faulty("recv without send", size=3)
def receives_more_than_is_sent(world: World) -> Outputs:
    x, rank = _ones(), dist.get_rank()
    for _ in range(3 if rank == 2 else 2):
        if rank == 1:
            dist.send(x, 2)
        elif rank == 2:
            dist.recv(x, 1)  # !
    return {"x": x}  # !


@faulty("tags")
def uses_other_tags(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.send(x, 1, tag=7)  # !
    else:
        dist.recv(x, 0, tag=8)  # !
    return {"x": x}


@faulty("deadlock")
def both_send_first(world: World) -> Outputs:
    x, y, other = _ones(), _ones(), 1 - dist.get_rank()
    dist.send(x, other)  # !
    dist.recv(y, other)
    return {"y": y}


@faulty("deadlock")
def both_receive_first(world: World) -> Outputs:
    x, y, other = _ones(), _ones(), 1 - dist.get_rank()
    dist.recv(y, other)  # !
    dist.send(x, other)
    return {"y": y}


@faulty("deadlock", size=3)
def ring_of_receives(world: World) -> Outputs:
    x, y, rank = _ones(), _ones(), dist.get_rank()
    dist.recv(y, (rank - 1) % 3)  # !
    dist.send(x, (rank + 1) % 3)
    return {"y": y}


@faulty("deadlock")
def receives_before_the_collective(world: World) -> Outputs:
    x, y = _ones(), _ones()
    if dist.get_rank() == 0:
        dist.all_reduce(x)  # !
        dist.send(x, 1)
    else:
        dist.recv(y, 0)  # !
        dist.all_reduce(y)
    return {"y": y}


@faulty("shapes", outcome=ERROR)
def receives_into_a_small_tensor(world: World) -> Outputs:
    x = _ones(1000)
    if dist.get_rank() == 0:
        dist.send(x, 1)  # !
    else:
        x = _ones(10)
        dist.recv(x, 0)  # !
    return {"x": x}


@faulty("shapes", outcome=CORRUPT, right=lambda rank, size: {"x": torch.ones(1000)})
def receives_into_a_large_tensor(world: World) -> Outputs:
    if dist.get_rank() == 0:
        x = torch.ones(10)
        dist.send(x, 1)  # !
    else:
        x = torch.zeros(1000)
        dist.recv(x, 0)  # !
    return {"x": x}


@faulty("dtypes", outcome=CORRUPT, right=lambda rank, size: {"x": torch.full((4,), 1.0)})
def receives_another_dtype(world: World) -> Outputs:
    x = torch.ones(4)
    if dist.get_rank() == 0:
        dist.send(x, 1)  # !
    else:
        x = torch.zeros(4, dtype=torch.int32)
        dist.recv(x, 0)  # !
    return {"x": x.float()}


@faulty("send without recv", size=3)
def batches_without_the_last_rank(world: World) -> Outputs:
    x, y, rank = _ones(), _ones(), dist.get_rank()
    ops = []
    if rank < 2:
        ops.append(dist.P2POp(dist.isend, x, rank + 1))
    if rank == 1:
        ops.append(dist.P2POp(dist.irecv, y, 0))
    for work in dist.batch_isend_irecv(ops) if ops else ():  # !
        work.wait()  # !
    return {"y": y}  # !


# ---------------------------------------------------------------- in helpers, without waiting
def _log(loss: Tensor) -> None:
    dist.all_reduce(loss)  # !helper


@faulty("only some ranks")
def logs_through_a_helper(world: World) -> Outputs:
    loss = _ones(1)
    if dist.get_rank() == 1:
        _log(loss)
    return {"loss": loss}  # !


@faulty("only some ranks", outcome=CORRUPT, right=lambda rank, size: {"x": torch.full((4,), 3.0)})
def starts_a_collective_and_forgets_it(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.all_reduce(x, async_op=True)  # !
    return {"x": x}  # !


@faulty("send without recv", outcome=FRAGILE)
def starts_a_send_and_forgets_it(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() == 0:
        dist.isend(x, 1)  # !
    return {"x": torch.ones(1)}  # !


# ---------------------------------------------------------------- training
def _model(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *layers)


@faulty("only some ranks")
def trains_on_uneven_data(world: World) -> Outputs:
    model = DistributedDataParallel(_model())
    for _ in range(2 - dist.get_rank()):
        loss = model(torch.ones(2, 4)).sum()  # !
        loss.backward()
    return {"x": torch.ones(1)}  # !


@faulty("only some ranks")
def skips_the_backward_of_a_bad_loss(world: World) -> Outputs:
    model = DistributedDataParallel(_model())
    loss = model(torch.full((2, 4), float("nan") if dist.get_rank() else 1.0)).sum()
    if loss.isfinite():
        loss.backward()  # !
    return {"x": torch.ones(1)}  # !


@faulty("only some ranks")
def evaluates_on_rank_zero(world: World) -> Outputs:
    model = DistributedDataParallel(_model(nn.BatchNorm1d(4)))
    model(torch.randn(3, 4)).sum().backward()
    model.eval()
    if dist.get_rank() == 0:
        model(torch.ones(2, 4))  # !
    return {"x": torch.ones(1)}  # !


@faulty("only some ranks")
def runs_a_sharded_model_on_one_rank(world: World) -> Outputs:
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(_model(), mesh=mesh)
    if dist.get_rank() == 0:
        model(torch.ones(2, 4))  # !
    return {"x": torch.ones(1)}  # !


@faulty("only some ranks", size=3)
def waits_for_the_checkpoint_on_rank_zero(world: World) -> Outputs:
    state = _model().state_dict()
    if dist.get_rank() == 0:
        io.BytesIO(repr(state).encode()).getvalue()
        dist.barrier()  # !
    return {"x": torch.ones(1)}  # !


@faulty("send without recv")
def splits_into_other_microbatches(world: World) -> Outputs:
    rank = dist.get_rank()
    stage = PipelineStage(_model(), rank, 2, torch.device("cpu"))
    count = 4 if rank == 0 else 2
    schedule = ScheduleGPipe(stage, n_microbatches=count)
    if rank == 0:
        schedule.step(torch.ones(8, 4))  # !
    else:
        schedule.step()
    return {"x": torch.ones(1)}  # !


# ---------------------------------------------------------------- process groups
@faulty("only some ranks", outcome=FRAGILE, size=3)
def only_members_make_the_group(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() < 2:
        pair = dist.new_group([0, 1])  # !
        dist.all_reduce(x, group=pair)
    return {"x": x}  # !


@faulty("groups", size=3)
def ranks_name_other_members(world: World) -> Outputs:
    rank = dist.get_rank()
    group = dist.new_group([0, 1] if rank == 0 else [0, 1, 2])  # !
    x = _ones()
    dist.all_reduce(x, group=group)
    return {"x": x}


@faulty("groups", size=4)
def makes_groups_in_another_order(world: World) -> Outputs:
    rank = dist.get_rank()
    members = [[0, 1], [2, 3]] if rank < 2 else [[2, 3], [0, 1]]
    made = [dist.new_group(m) for m in members]  # !
    x = _ones()
    dist.all_reduce(x, group=made[0])
    return {"x": x}


@faulty("groups", size=3)
def members_make_a_group_before_all_do(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() < 2:
        dist.new_group([0, 1])  # !
    everyone = dist.new_group([0, 1, 2])  # !
    dist.all_reduce(x, group=everyone)
    return {"x": x}


@faulty("only some ranks", size=4)
def half_of_the_ranks_make_a_mesh(world: World) -> Outputs:
    x = _ones()
    if dist.get_rank() % 2 == 0:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))  # !
        dist.all_reduce(x, group=mesh.get_group("tp"))
    return {"x": x}  # !
