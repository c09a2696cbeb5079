"""Collectives as small SPMD programs, run unchanged on simulated ranks and on real processes.

A case is a name and a function of a Case, which hands it data of this rank (one rank's tensor, or
all ranks' as a LocalTensor) and the process group. Real processes import this file.
"""

import contextlib
import itertools
import warnings

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh

from localtensor_compile import rank_map

OPS = {
    "sum": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "band": dist.ReduceOp.BAND,
    "bor": dist.ReduceOp.BOR,
    "bxor": dist.ReduceOp.BXOR,
    "avg": dist.ReduceOp.AVG,
}
DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
)
BITWISE = ("band", "bor", "bxor")


class Case:
    """What a program sees: the group under test, its size, and data of this rank."""

    def __init__(self, group, dtype, op, rows):
        self.group = group
        self.size = dist.get_world_size(group)
        self.dtype = dtype
        self.op = op
        self.rows = rows  # rows per rank; 0 for empty shards

    def data(self, *shape, seed=0):
        def one(rank):
            generator = torch.Generator().manual_seed(1000 * seed + rank)
            if self.dtype.is_floating_point:
                scale = 10.0 ** torch.randint(-2, 3, shape, generator=generator)
                return (torch.randn(shape, generator=generator) * scale).to(self.dtype)
            return torch.randint(-5, 6, shape, generator=generator).to(self.dtype)

        return rank_map(one)

    def empty(self, *shape):
        return rank_map(lambda rank: torch.full(shape, 7, dtype=torch.float64).to(self.dtype))


# ---------------------------------------------------------------- reductions
def all_reduce(c):
    x = c.data(2 * c.rows + 1 if c.rows else 0, 3)
    dist.all_reduce(x, OPS[c.op], c.group)
    return x


def all_reduce_async(c):
    x = c.data(c.rows, 2)
    dist.all_reduce(x, OPS[c.op], c.group, async_op=True).wait()
    return x


def functional_all_reduce(c):
    return funcol.all_reduce(c.data(c.rows, 3), c.op, c.group)


def all_reduce_coalesced(c):
    tensors = [c.data(c.rows, 3), c.data(5, seed=1)]
    dist.all_reduce_coalesced(tensors, OPS[c.op], c.group)
    return tensors


def functional_all_reduce_coalesced(c):
    return funcol.all_reduce_coalesced([c.data(c.rows, 3), c.data(5, seed=1)], c.op, c.group)


def reduce(c):
    x = c.data(c.rows, 3)
    dist.reduce(x, op=OPS[c.op], group=c.group, group_dst=c.size - 1)
    return x


def reduce_scatter_tensor(c):
    out = c.empty(c.rows, 3)
    dist.reduce_scatter_tensor(out, c.data(c.rows * c.size, 3), OPS[c.op], c.group)
    return out


def functional_reduce_scatter(c):
    return funcol.reduce_scatter_tensor(c.data(c.rows * c.size, 3), c.op, 0, c.group)


def functional_reduce_scatter_dim_1(c):
    return funcol.reduce_scatter_tensor(c.data(3, c.rows * c.size), c.op, 1, c.group)


def functional_reduce_scatter_coalesced(c):
    inputs = [c.data(c.rows * c.size, 3), c.data(c.size, seed=1)]
    return funcol.reduce_scatter_tensor_coalesced(inputs, c.op, [0, 0], c.group)


def reduce_scatter(c):
    out = c.empty(c.rows, 3)
    dist.reduce_scatter(out, [c.data(c.rows, 3, seed=k) for k in range(c.size)], OPS[c.op], c.group)
    return out


# ---------------------------------------------------------------- data movement
def broadcast(c):
    x = c.data(c.rows, 3)
    dist.broadcast(x, group=c.group, group_src=c.size - 1)
    return x


def functional_broadcast(c):
    return funcol.broadcast(c.data(c.rows, 3), 0, c.group)


def all_gather(c):
    out = [c.empty(c.rows, 3) for _ in range(c.size)]
    dist.all_gather(out, c.data(c.rows, 3), c.group)
    return out


def all_gather_into_tensor(c):
    out = c.empty(c.rows * c.size, 3)
    dist.all_gather_into_tensor(out, c.data(c.rows, 3), c.group)
    return out


def all_gather_into_stacked_tensor(c):
    out = c.empty(c.size, c.rows, 3)
    dist.all_gather_into_tensor(out, c.data(c.rows, 3), c.group)
    return out


def functional_all_gather(c):
    return funcol.all_gather_tensor(c.data(c.rows, 3), 0, c.group)


def functional_all_gather_dim_1(c):
    return funcol.all_gather_tensor(c.data(3, c.rows), 1, c.group)


def functional_all_gather_coalesced(c):
    return funcol.all_gather_into_tensor_coalesced([c.data(c.rows, 3), c.data(2, seed=1)], c.group)


def all_to_all_single(c):
    out = c.empty(c.rows * c.size, 3)
    dist.all_to_all_single(out, c.data(c.rows * c.size, 3), group=c.group)
    return out


def functional_all_to_all(c):
    x = c.data(c.rows * c.size, 3)
    return funcol.all_to_all_single(x, None, None, c.group)


def functional_all_to_all_uneven(c):
    """Rank k of the group sends k + j rows to rank j."""
    me = dist.get_rank(c.group)
    splits = [me + j for j in range(c.size)] if c.rows else [0] * c.size
    x = rank_map(lambda r: torch.zeros(0, 3).to(c.dtype))
    x = torch.cat([x, c.data(3 * c.size * c.size, 3)])[: sum(splits)]
    return funcol.all_to_all_single(x, splits, splits, c.group)


def gather(c):
    """Into the first rank of the group; the others' lists are not used."""
    out = [c.empty(c.rows, 3) for _ in range(c.size)]
    root = dist.get_global_rank(c.group, 0)
    x = c.data(c.rows, 3)
    if isinstance(x, torch.Tensor) and type(x) is torch.Tensor and dist.get_rank() != root:
        dist.gather(x, None, dst=root, group=c.group)
    else:
        dist.gather(x, out, dst=root, group=c.group)
    return out


def scatter(c):
    out = c.empty(c.rows, 3)
    inputs = [c.data(c.rows, 3, seed=k) for k in range(c.size)]
    root = dist.get_global_rank(c.group, c.size - 1)
    if type(out) is torch.Tensor and dist.get_rank() != root:
        dist.scatter(out, None, src=root, group=c.group)
    else:
        dist.scatter(out, inputs, src=root, group=c.group)
    return out


def barrier(c):
    dist.barrier(c.group)
    return c.data(2)


def objects(c):
    gathered = [None] * c.size
    dist.all_gather_object(gathered, {"x": c.data(2), "text": "same"}, c.group)
    sent = [c.data(2, seed=1), "same"]
    dist.broadcast_object_list(sent, group=c.group, group_src=c.size - 1)
    return [*(g["x"] for g in gathered), sent[0]]


REDUCING = (
    all_reduce,
    all_reduce_async,
    functional_all_reduce,
    all_reduce_coalesced,
    functional_all_reduce_coalesced,
    reduce,
    reduce_scatter_tensor,
    functional_reduce_scatter,
    functional_reduce_scatter_dim_1,
    functional_reduce_scatter_coalesced,
    reduce_scatter,
)
MOVING = (
    broadcast,
    functional_broadcast,
    all_gather,
    all_gather_into_tensor,
    all_gather_into_stacked_tensor,
    functional_all_gather,
    functional_all_gather_dim_1,
    functional_all_gather_coalesced,
    all_to_all_single,
    functional_all_to_all,
    functional_all_to_all_uneven,
    gather,
    scatter,
    barrier,
    objects,
)
NEEDS_EVERY_RANK = (objects,)


def groups():
    """{name: process group of this rank}, made in one order on all ranks."""
    world = dist.get_world_size()
    made = {"world": dist.group.WORLD}
    if world > 2:
        made["subgroup"] = dist.new_group([r for r in range(world) if r != 1])
    if world in (4, 8):
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
        made["mesh a"], made["mesh b"] = mesh.get_group("a"), mesh.get_group("b")
    return made


def cases(world, quick=False):
    """(name, function, group name, dtype, op, rows) of every case."""
    group_names = ["world"]
    if world > 2:
        group_names.append("subgroup")
    if world in (4, 8):
        group_names += ["mesh a", "mesh b"]
    dtypes = (torch.float32, torch.bfloat16, torch.int64) if quick else DTYPES
    for group, dtype, rows in itertools.product(group_names, dtypes, (2, 3, 0)):
        if quick and rows == 3:
            continue
        for fn in REDUCING:
            for op in OPS:
                yield f"{fn.__name__} {op} {dtype} {group} {rows}", fn, group, dtype, op, rows
        for fn in MOVING:
            if group == "subgroup" and fn in NEEDS_EVERY_RANK:
                continue
            yield f"{fn.__name__} {dtype} {group} {rows}", fn, group, dtype, "sum", rows


def member(name, world):
    """Whether this real rank is in the group."""
    return name != "subgroup" or dist.get_rank() != 1


def run_one(fn, group, dtype, op, rows):
    """The tensors of a case as a list, or the name of the exception's type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = fn(Case(group, dtype, op, rows))
            out = out if isinstance(out, (list, tuple)) else [out]
            return [t.wait() if hasattr(t, "wait") else t for t in out]
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def on_real_rank(quick):
    """Every case on this process: {name: list of tensors, or the text of an exception}."""
    made = groups()
    world = dist.get_world_size()
    results = {}
    for name, fn, group, dtype, op, rows in cases(world, quick):
        if member(group, world):
            results[name] = run_one(fn, made[group], dtype, op, rows)
    return results


def simulated(world, mode, quick):
    """The same for all ranks at once: {name: list of LocalTensors, or the text}."""
    made = groups()
    results = {}
    for name, fn, group, dtype, op, rows in cases(world, quick):
        members = contextlib.nullcontext()
        if group == "subgroup":
            # Functional collectives are called by members only: so is the whole case.
            members = type(mode)(mode.ranks - {1})
        with members:
            results[name] = run_one(fn, made[group], dtype, op, rows)
    return results
