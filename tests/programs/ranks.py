"""Programs that know their rank: rank-dependent ints, and Python code run once per rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

import localtensor_compile as lt

from .harness import program


# ---------------------------------------------------------------- rank-dependent ints
@program(x="6 4", mesh=(3,), per_rank=lambda r, x: x[r * 2 : (r + 1) * 2] * 2)
def slice_by_local_rank(x, mesh):
    r = mesh.get_local_rank()
    return x[r * 2 : (r + 1) * 2] * 2


@program(x="6 4", mesh=(3,), per_rank=lambda r, x: x.narrow(0, r, r + 1).sum(0))
def narrow_by_local_rank(x, mesh):
    r = mesh.get_local_rank("dp")
    return x.narrow(0, r, r + 1).sum(0)


@program(x="3 4", mesh=(3,), per_rank=lambda r, x: x[r] * 2)
def select_by_local_rank(x, mesh):
    return x[mesh.get_local_rank()] * 2


@program(x="3 4", mesh=(3,), per_rank=lambda r, x: x * r + (r + 1))
def scale_by_local_rank(x, mesh):
    r = mesh.get_local_rank()
    return x * r + (r + 1)


@program(x="6 4", world=True, per_rank=lambda r, x: x[r : r + 2] * (r + 1))
def slice_by_process_rank(x):
    r = dist.get_rank()
    return x[r : r + 2] * (r + 1)


@program(x="3 4", mesh=(3,), per_rank=lambda r, x: x * r)
def group_rank(x, mesh):
    return x * dist.get_rank(mesh.get_group())


@program(x="3 4", mesh=(3,), per_rank=lambda r, x: x + r)
def process_group_rank(x, mesh):
    return x + mesh.get_group().rank()


@program(
    x="4 6",
    mesh=(2, 2),
    ranks=(0, 1, 2, 3),
    per_rank=lambda r, x: x[2 * (r // 2) : 2 * (r // 2) + 2, 3 * (r % 2) : 3 * (r % 2) + 3].sin(),
)
def block_of_a_two_dimensional_mesh(x, mesh):
    i, j = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
    return x[2 * i : 2 * i + 2, 3 * j : 3 * j + 3].sin()


@program(
    x="4 6",
    mesh=(2, 2),
    ranks=(0, 1, 2, 3),
    per_rank=lambda r, x: x * (r // 2) + x * 10 * (r % 2),
)
def coordinate_of_a_mesh(x, mesh):
    i, j = mesh.get_coordinate()
    return x * i + x * 10 * j


@program(x="6 4", mesh=(3,), per_rank=lambda r, x: x.split([r + 1, 5 - r])[0] * 2)
def split_by_rank(x, mesh):
    r = mesh.get_local_rank()
    return x.split([r + 1, 5 - r])[0] * 2


@program(x="k 4", mesh=(3,), per_rank=lambda r, x: torch.cat([x.new_zeros(r, 4), x]))
def pad_by_rank(x, mesh):
    return torch.cat([x.new_zeros(mesh.get_local_rank(), 4), x])


@program(x="6 4", mesh=(3,), per_rank=lambda r, x: x.roll(r, 0))
def roll_by_rank(x, mesh):
    return x.roll(mesh.get_local_rank(), 0)


@program(x="3 4", mesh=(3,), per_rank=lambda r, x: (x * 2, r, r * 3 + 1))
def returns_its_rank(x, mesh):
    r = mesh.get_local_rank()
    return x * 2, r, r * 3 + 1


@program(
    i="5, i64 <6",
    w="2 4",
    mesh=(3,),
    per_rank=lambda r, i, w: (
        w[(i - 2 * r).clamp(0, 1)] * ((i >= 2 * r) & (i < 2 * r + 2)).unsqueeze(1)
    ),
)
def vocabulary_parallel_embedding(i, w, mesh):
    first = mesh.get_local_rank() * 2
    inside = (i >= first) & (i < first + 2)
    return w[(i - first).clamp(0, 1)] * inside.unsqueeze(1)


@program(x="3 4", mesh=(3,), per_rank=lambda r, x: x + torch.arange(4 * r, 4 * r + 4))
def positions_by_rank(x, mesh):
    start = mesh.get_local_rank() * 4
    return x + torch.arange(start, start + 4)


@program(x="3 4", mesh=(3,), per_rank=lambda r, x: x * [1.0, 2.0, 3.0][r])
def list_indexed_by_rank(x, mesh):
    factors = torch.tensor([1.0, 2.0, 3.0])
    return x * factors[mesh.get_local_rank()]


@program(x="3 4", mesh=(3,), per_rank=lambda r, x: torch.where(torch.tensor(r == 0), x, 2 * x))
def where_on_rank(x, mesh):
    r = mesh.get_local_rank()
    return torch.where(torch.tensor(r) == 0, x, 2 * x)


@program(x="3 4", mesh=(3,), breaks=1, graphs=2, per_rank=lambda r, x: x.sin() * r + (r + 1))
def graph_break_with_rank_alive(x, mesh):
    r = mesh.get_local_rank()
    y = x.sin()
    torch._dynamo.graph_break()
    return y * r + (r + 1)


# ---------------------------------------------------------------- Python code per rank
@program(x="3 4", world=True, per_rank=lambda r, x: torch.full((2, 4), float(r)) + x[:2])
def rank_map(x):
    return lt.rank_map(lambda r: torch.full((2, 4), float(r))) + x[:2]


@program(x="3 4", world=True, per_rank=lambda r, x: torch.ones(r + 1, 4) @ x.t())
def rank_map_uneven(x):
    return lt.rank_map(lambda r: torch.ones(r + 1, 4)) @ x.t()


@program(x="k 4", world=True, per_rank=lambda r, x: x * (r + 1))
def tensor_map(x):
    return lt.tensor_map(x, lambda r, shard: shard * (r + 1))


@program(x="k 4", world=True, per_rank=lambda r, x: x.sin()[: r + 1] * 2)
def tensor_map_changes_shapes(x):
    return lt.tensor_map(x.sin(), lambda r, shard: shard[: r + 1]) * 2


@program(x="k 4", world=True, per_rank=lambda r, x: x.cos() if r == 1 else x.sin() * 2)
def tensor_map_branches_on_rank(x):
    return lt.tensor_map(x, lambda r, shard: shard.cos() if r == 1 else shard.sin() * 2)


@lt.maybe_run_for_local_tensor
def _larger_half(x):
    return x[: x.shape[0] // 2] if x.shape[0] > 3 else x * 2


@program(
    x="k 4",
    world=True,
    per_rank=lambda r, x: (x.sin()[: x.shape[0] // 2] if x.shape[0] > 3 else x.sin() * 2) + 1,
)
def maybe_run_branches_on_size(x):
    return _larger_half(x.sin()) + 1


@lt.maybe_run_for_local_tensor
def _offset(rank, size):
    return rank * size if rank else 1


@program(x="6 4", mesh=(3,), per_rank=lambda r, x: x[(r * 2 if r else 1) :] * 2)
def maybe_run_returns_an_int(x, mesh):
    start = _offset(mesh.get_local_rank(), 2)
    return x.narrow(0, start, 6 - start) * 2


@program(x="3 4, same nograd", per_rank=lambda r, x: x * 2)
def reconcile(x):
    return x.reconcile() * 2


# One rank's shard is an ordinary tensor, the same on every rank, and unknown to autograd.
@program(x="3 4, same", per_rank=lambda r, x: x.detach().sin() + x)
def shard_by_dict(x):
    return x._local_tensors[1].sin() + x


@program(x="3 4, same", per_rank=lambda r, x: x.detach().sin() + x)
def shard_by_attribute(x):
    return x._local_tensor_1.sin() + x


@program(x="k 4", per_rank=lambda r, x: x * 3)
def ranks_attribute(x):
    return x * len(x._ranks)


@program(x="k 4, nograd", per_rank=lambda r, x: x * 2)
def builds_a_local_tensor(x):
    return lt.LocalTensor({r: x._local_tensors[r] for r in (0, 1, 2)}) * 2
