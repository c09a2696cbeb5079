"""Sizes as numbers: returned, in arithmetic, in factories, static and dynamic."""

from __future__ import annotations

import torch

from .harness import program


@program(x="k 4")
def size_in_tensor_arithmetic(x):
    return x * x.shape[0] + x.shape[0] - x.size(0) / 2


@program(x="k 4")
def mean_by_hand(x):
    return x.sum(0) / x.shape[0], x.sum() / x.numel()


@program(x="k 4")
def size_arithmetic(x):
    rows = x.shape[0]
    return x.new_zeros(rows * 2 + 1, rows // 2, -(-rows // 2)) + rows % 3


@program(x="k 4")
def returns_a_size(x):
    return x * 2, x.shape[0]


@program(x="k 4")
def returns_only_arithmetic_on_a_size(x):
    return x.shape[0] * 2


@program(x="k 4")
def returns_a_shape(x):
    return x.sin(), x.shape, x.numel()


@program(x="k 4")
def returns_an_even_size(x):
    return x.sin(), x.shape[1] * 2


@program(x="k 4")
def returns_a_comparison_on_which_ranks_agree(x):
    return x.sin(), x.shape[0] > 1


@program(x="k 4")
def returns_a_ratio(x):
    return x.sin(), x.shape[0] / 2


@program(x="k 4", y="n 4")
def max_of_sizes(x, y):
    rows = torch.sym_max(x.shape[0], y.shape[0])
    return x.new_ones(rows, 2) * torch.sym_min(x.shape[0], 3)


@program(x="k 4")
def size_in_a_slice(x):
    return x[: x.shape[0] - 1] * 2, x[x.shape[0] // 2 :]


@program(x="k 4")
def size_as_an_argument(x):
    return torch.full_like(x, 2.0) * x, x.new_full((x.shape[0], 2), 3.0), torch.zeros_like(x)


@program(x="k 4")
def expand_to_a_size(x):
    return x[0].expand(x.shape[0], 4) * x, x[0].expand_as(x)


@program(x="n 4", dynamic=True)
def dynamic_matmul(x):
    return x @ x.t()


@program(x="k 4", w="4 e", dynamic=True)
def dynamic_mlp(x, w):
    return torch.relu(x @ w) @ w.t()


@program(x="k 4", dynamic=True)
def dynamic_size_arithmetic(x):
    rows = x.shape[0]
    return x.new_zeros(rows * 2 + 1) + rows, x[: rows - 1].sum(0) / rows


@program(x="k 4", y="n 4", dynamic=True)
def dynamic_cat(x, y):
    return torch.cat([x, y]).view(-1, 2)


@program(x="k 4", dynamic=True)
def dynamic_returns_sizes(x):
    return x * 2, x.shape[0] * 2, x.shape[1]


@program(x="3 4", dynamic=True)
def dynamic_even(x):
    return x.sum(0) / x.shape[0], x.view(-1)


@program(x="k 4", y="5 4", dynamic=True)
def dynamic_user_size_times_rank_size(x, y):
    return x * (y.shape[0] * x.shape[0]), x.new_zeros(y.shape[0] + x.shape[0])


@program(x="k 4", mark_dynamic=("x",))
def mark_dynamic_rows(x):
    return torch.relu(x).sum(0) * x.shape[0]


@program(x="m 4, nograd", mark_dynamic=("x",))
def mark_dynamic_in_place(x):
    x.mul_(2)
    return x[1:]


# ---------------------------------------------------------------- factories, inside a world
@program(x="k 4", world=True)
def factory_zeros(x):
    return torch.zeros(x.shape[0], 2) + x[:, :2]


@program(x="k 4", world=True)
def factory_arange(x):
    return torch.arange(x.shape[0]).unsqueeze(1) * x, torch.arange(1, x.shape[0] * 2, 2)


@program(x="k 4", world=True)
def factory_full_and_ones(x):
    return torch.full((x.shape[0], 3), 0.5) @ torch.ones(3, 2)


@program(x="k 4", world=True)
def factory_eye_and_tril(x):
    return torch.eye(x.shape[0]) @ x, torch.ones(x.shape[0], x.shape[0]).tril() @ x


@program(x="k 4", world=True)
def factory_tensor_of_sizes(x):
    return torch.tensor([x.shape[0], 2]) + 1, torch.tensor(x.shape[0]) * x


@program(x="k 4", world=True)
def factory_linspace(x):
    return torch.linspace(0, 1, x.shape[0]).unsqueeze(1) * x


@program(x="k 4", world=True)
def factory_in_place(x):
    buffer = torch.zeros(x.shape[0] + 1, 4)
    buffer[1:] = x
    buffer[0] += 1
    return buffer


@program(x="4 4", world=True)
def factory_even(x):
    return x + torch.arange(4) + torch.zeros(4, 4).fill_(2)


@program(x="k 4", world=True)
def factory_causal_mask(x):
    rows = x.shape[0]
    mask = torch.arange(rows)[:, None] >= torch.arange(rows)[None, :]
    scores = (x @ x.t()).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ x


@program(x="k 4", world=True, dynamic=True)
def factory_dynamic(x):
    return torch.zeros(x.shape[0] * 2).sum() + torch.arange(x.shape[0]).float() @ x
