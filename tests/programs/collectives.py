"""Functional and in-place collectives against the same communication written out by hand.

The reference sees one list of plain tensors per input, the tensors of all ranks, and autograd
runs through it: the gradients of a collective are those of the sum over ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from .harness import program

WORLD3 = {"mesh": (3,)}
WORLD4 = {"mesh": (2, 2), "ranks": (0, 1, 2, 3)}


# ---------------------------------------------------------------- communication by hand
def ring_sum(tensors: Sequence[Tensor]) -> Tensor:
    """gloo's ring all-reduce: chunk c is summed from rank c-1 downwards."""
    size = len(tensors)
    flat = [t.reshape(-1) for t in tensors]
    count = flat[0].numel()
    if not count:
        return tensors[0] * 1
    # gloo cuts small data into 2*size segments of whole elements, two to a chunk.
    width = flat[0].element_size()
    segment_bytes = -(-count * width // (2 * size))
    per_segment = -(-segment_bytes // width)
    parts = []
    for c in range(size):
        part = slice(c * 2 * per_segment, (c + 1) * 2 * per_segment)
        order = [flat[(c - 1 - i) % size][part] for i in range(size)]
        parts.append(functools.reduce(lambda total, t: t + total, order))
    return torch.cat(parts).view(tensors[0].shape)


def by_hand(sum_or_not: Sequence[Tensor]) -> list[Tensor]:
    return [ring_sum(sum_or_not)] * len(sum_or_not)


class Sum(torch.autograd.Function):
    """One list of equal sums; its gradient is the sum of the gradients, in the same order."""

    @staticmethod
    def forward(ctx, *tensors):
        total = ring_sum(tensors)
        return tuple(total.clone() for _ in tensors)

    @staticmethod
    def backward(ctx, *grads):
        total = ring_sum(grads)
        return tuple(total for _ in grads)


def all_sum(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return Sum.apply(*tensors)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        joined = torch.cat(tensors)
        return tuple(joined.clone() for _ in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return ring_sum(grads).chunk(len(grads))


class Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        return tuple(t.clone() for t in ring_sum(tensors).chunk(len(tensors)))

    @staticmethod
    def backward(ctx, *grads):
        joined = torch.cat(grads)
        return tuple(joined for _ in grads)


def per_group(fn, groups, tensors):
    """Apply `fn` to the tensors of each group of ranks."""
    out = [None] * len(tensors)
    for group in groups:
        for r, t in zip(group, fn(*[tensors[r] for r in group]), strict=True):
            out[r] = t
    return out


ROWS, COLUMNS = ((0, 1), (2, 3)), ((0, 2), (1, 3))  # groups along the last and the first mesh dim


# ---------------------------------------------------------------- on the world
@program(x="3 4", **WORLD3, reference=lambda xs: [y * 2 for y in Sum.apply(*xs)])
def all_reduce(x, mesh):
    return funcol.all_reduce(x, "sum", mesh) * 2


@program(
    x="5 4",
    w="4 6",
    v="6 4",
    **WORLD3,
    reference=lambda xs, ws, vs: list(
        Sum.apply(*[F.gelu(x @ w) @ v for x, w, v in zip(xs, ws, vs)])
    ),
)
def tensor_parallel_mlp(x, w, v, mesh):
    return funcol.all_reduce(F.gelu(x @ w) @ v, "sum", (mesh, 0))


@program(
    x="5 4",
    w="4 k",
    v="k 4",
    **WORLD3,
    reference=lambda xs, ws, vs: list(
        Sum.apply(*[F.gelu(x @ w) @ v for x, w, v in zip(xs, ws, vs)])
    ),
)
def tensor_parallel_mlp_uneven(x, w, v, mesh):
    return funcol.all_reduce(F.gelu(x @ w) @ v, "sum", (mesh, 0))


@program(x="2 4, nograd", **WORLD3, reference=lambda xs: [torch.stack(xs).amax(0)] * 3)
def all_reduce_max(x, mesh):
    return funcol.all_reduce(x, "max", mesh)


@program(x="2 4, nograd", **WORLD3, reference=lambda xs: [ring_sum(xs) / 3] * 3)
def all_reduce_avg(x, mesh):
    return funcol.all_reduce(x, "avg", mesh)


@program(x="2 4, i64 <9", **WORLD3, reference=lambda xs: [sum(xs)] * 3)
def all_reduce_integers(x, mesh):
    return funcol.all_reduce(x, "sum", mesh)


@program(x="2 4, bool", **WORLD3, reference=lambda xs: [xs[0] | xs[1] | xs[2]] * 3)
def all_reduce_bor(x, mesh):
    return (
        funcol.all_reduce(x, "bor", mesh)
        if x.dtype != torch.bool
        else funcol.all_reduce(x.int(), "bor", mesh).bool()
    )


@program(x="0 4", **WORLD3, reference=lambda xs: [y + 1 for y in Sum.apply(*xs)])
def all_reduce_empty(x, mesh):
    return funcol.all_reduce(x, "sum", mesh) + 1


@program(x="3 4", **WORLD3, reference=lambda xs: [y.sin() for y in Gather.apply(*xs)])
def all_gather(x, mesh):
    return funcol.all_gather_tensor(x, 0, mesh).sin()


@program(
    x="3 4",
    **WORLD3,
    reference=lambda xs: [
        torch.cat(y.chunk(3), 1) * 2 for y in Gather.apply(*[x.contiguous() for x in xs])
    ],
)
def all_gather_along_dim_1(x, mesh):
    return funcol.all_gather_tensor(x, 1, mesh) * 2


@program(
    x="3 4", **WORLD3, reference=lambda xs: [y * (i + 1) for i, y in enumerate(Gather.apply(*xs))]
)
def all_gather_autograd_form(x, mesh):
    return funcol.all_gather_tensor_autograd(x, 0, mesh) * (mesh.get_local_rank() + 1)


@program(x="6 4", **WORLD3, reference=lambda xs: [y * 2 for y in Scatter.apply(*xs)])
def reduce_scatter(x, mesh):
    return funcol.reduce_scatter_tensor(x, "sum", 0, mesh) * 2


@program(
    x="2 6",
    **WORLD3,
    reference=lambda xs: [y.exp() for y in Scatter.apply(*[torch.cat(x.chunk(3, 1)) for x in xs])],
)
def reduce_scatter_along_dim_1(x, mesh):
    return funcol.reduce_scatter_tensor(x, "sum", 1, mesh).exp()


@program(
    x="2 4",
    w="4 6",
    v="6 4",
    **WORLD3,
    reference=lambda xs, ws, vs: list(
        Scatter.apply(*[F.gelu(x @ w) @ v for x, w, v in zip(Gather.apply(*xs), ws, vs)])
    ),
)
def sequence_parallel_mlp(x, w, v, mesh):
    full = funcol.all_gather_tensor(x, 0, mesh)
    return funcol.reduce_scatter_tensor(F.gelu(full @ w) @ v, "sum", 0, mesh)


@program(
    x="6 4",
    **WORLD3,
    reference=lambda xs: [torch.cat([x[2 * r : 2 * r + 2] for x in xs]) * 2 for r in range(3)],
)
def all_to_all(x, mesh):
    return funcol.all_to_all_single(x, None, None, mesh) * 2


def _sent(i, j):
    """Rows that rank i sends to rank j."""
    return (i + 2 * j) % 3 + 1


SPLITS = [[_sent(i, j) for j in range(3)] for i in range(3)]


@program(
    x="6 4",
    **WORLD3,
    reference=lambda xs: [
        torch.cat([x.split(SPLITS[i])[r] for i, x in enumerate(xs)]).sin() for r in range(3)
    ],
)
def all_to_all_uneven_splits(x, mesh):
    r = mesh.get_local_rank()
    sends = [(r + 2 * j) % 3 + 1 for j in range(3)]
    receives = [(i + 2 * r) % 3 + 1 for i in range(3)]
    return funcol.all_to_all_single_autograd(x, receives, sends, mesh).sin()


@program(
    x="6 4",
    **WORLD3,
    reference=lambda xs: [torch.cat([x.split([1, 2, 3])[r] for x in xs]) for r in range(3)],
)
def all_to_all_same_splits_everywhere(x, mesh):
    r = mesh.get_local_rank()
    return funcol.all_to_all_single(x, [r + 1, r + 1, r + 1], [1, 2, 3], mesh)


@program(x="3 4, nograd", **WORLD3, reference=lambda xs: [xs[1] * 2] * 3)
def broadcast(x, mesh):
    return funcol.broadcast(x, 1, mesh) * 2


# ---------------------------------------------------------------- on parts of the world
@program(
    x="3 4",
    **WORLD4,
    reference=lambda xs: per_group(Sum.apply, ROWS, [x * 2 for x in xs]),
)
def all_reduce_over_last_mesh_dim(x, mesh):
    return funcol.all_reduce(x * 2, "sum", (mesh, 1))


@program(
    x="3 4",
    **WORLD4,
    reference=lambda xs: per_group(Sum.apply, COLUMNS, [x.sin() for x in xs]),
)
def all_reduce_over_first_mesh_dim(x, mesh):
    return funcol.all_reduce(x.sin(), "sum", (mesh, 0))


@program(
    x="3 4",
    **WORLD4,
    reference=lambda xs: per_group(Gather.apply, COLUMNS, per_group(Sum.apply, ROWS, xs)),
)
def one_collective_per_mesh_dim(x, mesh):
    y = funcol.all_reduce(x, "sum", mesh["tp"])
    return funcol.all_gather_tensor(y, 0, mesh["dp"])


@program(
    x="4 4",
    **WORLD4,
    reference=lambda xs: per_group(Scatter.apply, COLUMNS, [x * x for x in xs]),
)
def reduce_scatter_over_first_mesh_dim(x, mesh):
    return funcol.reduce_scatter_tensor(x * x, "sum", 0, mesh.get_group("dp"))


@program(
    x="4 4, nograd",
    **WORLD4,
    reference=lambda xs: per_group(
        lambda a, b: [torch.cat([a[:2], b[:2]]), torch.cat([a[2:], b[2:]])], ROWS, xs
    ),
)
def all_to_all_over_last_mesh_dim(x, mesh):
    return funcol.all_to_all_single(x, None, None, (mesh, 1))


# ---------------------------------------------------------------- in place, as Dynamo remaps it
@program(x="3 4, nograd", **WORLD3, reference=lambda xs: [ring_sum([x * 2 for x in xs]) + 1] * 3)
def dist_all_reduce(x, mesh):
    y = x * 2
    dist.all_reduce(y)
    return y + 1


@program(x="3 4, nograd", **WORLD3, reference=lambda xs: [torch.stack(xs).amin(0)] * 3)
def dist_all_reduce_min_with_group(x, mesh):
    y = x.clone()
    dist.all_reduce(y, op=dist.ReduceOp.MIN, group=mesh.get_group())
    return y


@program(x="3 4, nograd", **WORLD3, reference=lambda xs: [torch.cat(xs)] * 3)
def dist_all_gather_into_tensor(x, mesh):
    out = x.new_empty(9, 4)
    dist.all_gather_into_tensor(out, x)
    return out


@program(x="3 4, nograd", **WORLD3, reference=lambda xs: [[x * 2 for x in xs]] * 3)
def dist_all_gather_list(x, mesh):
    outs = [torch.empty_like(x) for _ in range(3)]
    dist.all_gather(outs, x)
    return [o * 2 for o in outs]


@program(x="6 4, nograd", **WORLD3, reference=lambda xs: [c * 2 for c in ring_sum(xs).chunk(3)])
def dist_reduce_scatter_tensor(x, mesh):
    out = x.new_empty(2, 4)
    dist.reduce_scatter_tensor(out, x)
    return out * 2


@program(
    x="6 4, nograd",
    **WORLD3,
    reference=lambda xs: [torch.cat([x[2 * r : 2 * r + 2] for x in xs]) for r in range(3)],
)
def dist_all_to_all_single(x, mesh):
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


# ---------------------------------------------------------------- inside larger programs
def _vocabulary_loss(xs, ws, targets):
    """Cross entropy of logits that are sharded by vocabulary, 3 ranks with 4 words each."""
    logits = [x @ w for x, w in zip(xs, ws)]
    top = torch.stack([t.detach().amax(1) for t in logits]).amax(0)
    sums = Sum.apply(*[(t - top.unsqueeze(1)).exp().sum(1) for t in logits])
    picked = []
    for r, (t, i) in enumerate(zip(logits, targets)):
        inside = (i >= 4 * r) & (i < 4 * r + 4)
        own = t.gather(1, (i - 4 * r).clamp(0, 3).unsqueeze(1)).squeeze(1)
        picked.append(own * inside)
    picked = Sum.apply(*picked)
    return [(s.log() + top - p).mean() for s, p in zip(sums, picked)]


@program(x="5 6, same", w="6 4", i="5, i64 <12 same", **WORLD3, reference=_vocabulary_loss)
def vocabulary_parallel_loss(x, w, i, mesh):
    logits = x @ w
    top = funcol.all_reduce(logits.detach().amax(1), "max", mesh)
    total = funcol.all_reduce((logits - top.unsqueeze(1)).exp().sum(1), "sum", mesh)
    first = mesh.get_local_rank() * 4
    inside = (i >= first) & (i < first + 4)
    own = logits.gather(1, (i - first).clamp(0, 3).unsqueeze(1)).squeeze(1)
    picked = funcol.all_reduce(own * inside, "sum", mesh)
    return (total.log() + top - picked).mean()


@program(
    x="k 4",
    w="4 5",
    **WORLD3,
    reference=lambda xs, ws: [
        s / n
        for s, n in zip(
            Sum.apply(*[(x @ w).sum(0) for x, w in zip(xs, ws)]),
            [sum(x.shape[0] for x in xs)] * 3,
        )
    ],
)
def global_mean_of_uneven_batches(x, w, mesh):
    rows = funcol.all_reduce(x.new_full((), x.shape[0]), "sum", mesh)
    return funcol.all_reduce((x @ w).sum(0), "sum", mesh) / rows


@program(
    x="n 4",
    **WORLD3,
    reference=lambda xs: [
        torch.cat([y[:3], y[3:5]]) * 2
        for y in Gather.apply(*[F.pad(x, (0, 0, 0, 3 - x.shape[0])) for x in xs])
    ],
)
def gather_uneven_by_padding(x, mesh):
    padded = F.pad(x, (0, 0, 0, 3 - x.shape[0]))
    a, b, _ = funcol.all_gather_tensor(padded, 0, mesh).chunk(3)
    return torch.cat([a, b[:2]]) * 2


@program(x="3 4", **WORLD3, reference=lambda xs: [x.sin() * 2 for x in xs])
def collective_whose_result_is_not_used(x, mesh):
    funcol.all_reduce(x, "sum", mesh)
    return x.sin() * 2


@program(x="3 4", **WORLD3, reference=lambda xs: list(Sum.apply(*Sum.apply(*Sum.apply(*xs)))))
def three_collectives_in_a_row(x, mesh):
    for _ in range(3):
        x = funcol.all_reduce(x, "sum", mesh)
    return x
