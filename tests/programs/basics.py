"""Pointwise ops, reductions, matrix products, indexing and dtypes on shards of all shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .harness import program


# ---------------------------------------------------------------- pointwise
@program(x="3 4")
def pointwise_even(x):
    return torch.relu(x) * 2 + x.exp()


@program(x="n 4")
def pointwise_uneven_and_empty(x):
    return torch.relu(x) * 2 + x.exp()


@program(x="o 4")
def pointwise_one_row_on_some_ranks(x):
    return torch.tanh(x) - x * x


@program(x="z 4")
def pointwise_empty_everywhere(x):
    return torch.sigmoid(x).sum(1)


@program(x="3 4", ranks=(1, 4, 6))
def pointwise_on_other_ranks(x):
    return x.sin() + 1


@program(x="n k")
def two_uneven_dimensions(x):
    return (x * 2).t().contiguous()


@program(x="n 4, transposed")
def transposed_memory(x):
    return x * 2 + 1


@program(x="n 4, offset")
def memory_in_a_buffer(x):
    return x * 2 + 1


@program(x="n 4", y="n 4", z="4")
def addcmul_and_broadcast(x, y, z):
    return torch.addcmul(x, y, z, value=0.5)


@program(x="n 4", y="n 1")
def broadcast_a_column(x, y):
    return x / (y.abs() + 1)


@program(x="o 4", y="3 4")
def broadcast_on_some_ranks(x, y):
    return x * y + x


@program(x="o 4", y="3 4")
def expand_on_some_ranks(x, y):
    return x.expand_as(y).sin() * y


@program(x="o 4", y="2 3 4")
def broadcast_on_some_ranks_to_more_dimensions(x, y):
    return torch.where(y > 0, x, y)


@program(x="k 4", y="k 4")
def where_and_compare(x, y):
    return torch.where(x > y, x * 2, y), x > y


@program(x="k 4", y="k 4")
def clamp_maximum_lerp(x, y):
    return torch.clamp(x, -0.5, 0.5) + torch.maximum(x, y) + torch.lerp(x, y, 0.3)


@program(x="n 4")
def scalars_of_every_kind(x):
    return 2 * x + 1.5 + x**2 + 1 / (x.abs() + 3)


# ---------------------------------------------------------------- reductions
@program(x="n 4")
def sum_rows(x):
    return x.sum(0)


@program(x="n 4")
def sum_columns_keepdim(x):
    return x.sum(1, keepdim=True) * x


@program(x="k 4")
def sum_to_scalar(x):
    return x.sum(), (x * x).sum().sqrt()


@program(x="k 4")
def mean_over_uneven_rows(x):
    return x.mean(0), x.mean()


@program(x="k 4")
def var_and_std(x):
    return x.var(0), x.std(1, correction=0)


@program(x="k 4")
def amax_amin(x):
    return x.amax(0), x.amin(1)


@program(x="k 4")
def max_with_indices(x):
    values, indices = x.max(0)
    return values, indices


@program(x="k 4")
def argmax_and_argsort(x):
    return x.argmax(1), x.argsort(0)


@program(x="k 4", subclass_formulas=True, rounds=True)
def prod_and_logsumexp(x):
    return x.prod(1), torch.logsumexp(x, 0)


@program(x="k 4")
def norms(x):
    return torch.linalg.vector_norm(x), torch.linalg.vector_norm(x, ord=1, dim=0)


@program(x="k 4, bool")
def any_and_all(x):
    return x.any(0), x.all(), x.sum()


@program(x="k 4")
def cumsum_and_cumprod(x):
    return x.cumsum(0), x.cumprod(1)


# ---------------------------------------------------------------- matrix products
@program(x="n 4", w="4 5")
def matmul_relu(x, w):
    return torch.relu(x @ w)


@program(x="n k", w="k 5")
def matmul_over_uneven_inner(x, w):
    return x @ w


@program(x="2 n 4", y="2 4 k")
def bmm(x, y):
    return torch.bmm(x, y)


@program(x="2 3 n 4", w="4 5")
def matmul_of_four_dimensions(x, w):
    return x @ w


@program(x="k 4", w="6 4", b="6")
def linear(x, w, b):
    return F.linear(x, w, b)


@program(x="k 4", w="4 6", b="6")
def addmm(x, w, b):
    return torch.addmm(b, x, w, beta=0.5, alpha=2)


@program(x="k 4", y="k 5")
def einsum(x, y):
    return torch.einsum("ni,nj->ij", x, y)


@program(x="4", y="k 4")
def dot_and_mv(x, y):
    return y @ x, x @ x


@program(x="k 4", y="3 k")
def outer_and_kron(x, y):
    return torch.outer(x[:, 0], y[:, 0]), torch.kron(x[:1], y[:, :1])


@program(x="4 4")
def inverse_and_determinant(x):
    a = x @ x.t() + torch.eye(4)
    return torch.linalg.inv(a), torch.linalg.det(a)


# ---------------------------------------------------------------- indexing
@program(x="k 4", i="n, i64 <2")
def index_rows(x, i):
    return x[i]


@program(x="k 4", i="6, i64 <2")
def index_select(x, i):
    return torch.index_select(x, 0, i)


@program(x="k 4", i="k 2, i64 <4")
def gather(x, i):
    return torch.gather(x, 1, i)


@program(x="k 4", i="k 4, i64 <4", src="k 4")
def scatter_add(x, i, src):
    return torch.scatter_add(x, 1, i, src)


@program(x="k 4", i="3, i64 <2", v="3 4")
def index_put_accumulate(x, i, v):
    return x.index_put((i,), v, accumulate=True)


@program(x="k 4", m="k 4, bool")
def masked_fill(x, m):
    return x.masked_fill(m, -1.0)


@program(x="k 4")
def topk(x):
    return torch.topk(x, 2, dim=1)


@program(x="k 4")
def sort(x):
    return torch.sort(x, dim=0, descending=True, stable=True)


@program(x="k 4, i64 <3")
def bincount_of_one_hot(x):
    return F.one_hot(x, 3).sum((0, 1))


@program(x="k 4")
def tril_and_diagonal(x):
    return torch.tril(x), torch.diagonal(x)


@program(x="k 4")
def flip_and_roll(x):
    return x.flip(0), x.roll(1, 0)


@program(x="3 4", i="3 4, i64 <4")
def take_along_dim_even(x, i):
    return torch.take_along_dim(x, i, 1) * 2


@program(x="k 4", s="5, f32 nograd")
def searchsorted(x, s):
    return torch.searchsorted(s.sort()[0], x)


# ---------------------------------------------------------------- dtypes
@program(x="n 4, bf16", w="4 5, bf16")
def bfloat16(x, w):
    return torch.relu(x @ w)


@program(x="k 4, f16")
def float16(x):
    return x * 2 + x.abs()


@program(x="n 4", y="n 4, f64")
def type_promotion(x, y):
    return x + y, x * torch.float16.itemsize


@program(x="n 4, i64", y="n 4, i32")
def integers(x, y):
    return x // 3 + y, x % 4, x & y, x << 1


@program(x="n 4, bool", y="n 4, bool")
def booleans(x, y):
    return x & ~y, x ^ y, x.logical_or(y).int()


@program(x="k 4, c64")
def complex_numbers(x):
    return torch.view_as_real(x * x.conj()), x.abs()


@program(x="k 4, c64")
def complex_conjugate_view(x):
    return x.conj(), x.imag


@program(x="k 4")
def casts(x):
    return x.double() * 2, x.to(torch.bfloat16), x.long()


@program(x="k 4, f32 nograd")
def bits_of_floats(x):
    return x.view(torch.int32), x.isnan(), torch.signbit(x)
