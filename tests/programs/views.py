"""Views, aliases, in-place ops: what shares memory with what must be as in plain torch."""

from __future__ import annotations

import torch

from .harness import program


# ---------------------------------------------------------------- taking apart and joining
@program(x="k 4")
def slices(x):
    return x[1:] * 2, x[:, 1:3] + 1, x[::2] - 1


@program(x="k 6")
def narrow_and_select(x):
    return x.narrow(0, 1, 1) * 2, x.select(1, 2) + 1, x[0] - 1


@program(x="k 6")
def split_along_even_dim(x):
    a, b, c = x.split(2, dim=1)
    return a * b + c


@program(x="e 4")
def split_uneven_dim_in_two(x):
    half = x.shape[0] // 2
    a, b = x.split([half, half])
    return a * 2 + b


@program(x="e 4")
def chunk_uneven_dim_in_two(x):
    a, b = x.chunk(2)
    return a - b


@program(x="k 4", y="n 4")
def cat_along_uneven_dim(x, y):
    return torch.cat([x, y, x]) * 2


@program(x="k 4", y="k 3")
def cat_along_even_dim(x, y):
    return torch.cat([x, y], 1).sum(0)


@program(x="n 4", y="n 4")
def stack(x, y):
    return torch.stack([x, y * 2], 1)


@program(x="k 4")
def unbind_even_dim(x):
    a, b, c, d = x.unbind(1)
    return a * b - c * d


@program(x="k 4")
def pad_rows(x):
    return torch.nn.functional.pad(x, (1, 2, 0, 3), value=0.5)


@program(x="n 4")
def unsqueeze_expand(x):
    return x.unsqueeze(1).expand(-1, 3, -1) * 2


@program(x="n 4")
def repeat_and_repeat_interleave(x):
    return x.repeat(2, 1), x.repeat_interleave(2, dim=0)


@program(x="n 6")
def reshape_with_minus_one(x):
    return x.reshape(-1, 3) * 2, x.view(-1, 2, 3).transpose(1, 2)


@program(x="n 4")
def flatten_all(x):
    return x.flatten() * 2, x.reshape(-1)


@program(x="k 2 6")
def reshape_to_own_sizes(x):
    return x.view(x.shape[0], 12) + x.reshape(x.size(0), -1)


@program(x="k 8")
def as_heads_and_back(x):
    h = x.view(x.shape[0], 2, 4).transpose(0, 1)
    return (h * 2).transpose(0, 1).reshape(x.shape)


@program(x="2 k 4")
def permute_and_movedim(x):
    return x.permute(2, 0, 1) * 2, x.movedim(0, 2)


@program(x="e 4")
def unflatten_uneven_dim(x):
    return x.unflatten(0, (2, -1)).sum(0)


# ---------------------------------------------------------------- outputs that are inputs
@program(x="n 4")
def returns_its_input(x):
    return x, x * 2


@program(x="n 4")
def returns_one_tensor_twice(x):
    y = x * 2
    return y, y


@program(x="k 4")
def returns_a_view_of_its_input(x):
    return x[1:], x.t()


@program(x="k 4, offset")
def returns_a_view_of_a_view(x):
    return x.view(-1)[2:], x[0]


@program(x="k 4")
def returns_views_of_an_intermediate(x):
    y = x * 2
    return y[1:], y.t(), y


@program(x="k 4")
def returns_a_detached_alias(x):
    return x.detach(), (x * 2).detach()


@program(x="n 4")
def returns_nested_structures(x):
    return {"a": x * 2, "b": [x + 1, (x - 1, None, "text", 3)]}


# ---------------------------------------------------------------- in place
@program(x="n 4, nograd")
def inplace_on_input(x):
    x.mul_(2).add_(1)
    return x.sum(1)


@program(x="n 4, nonleaf")
def inplace_on_input_that_requires_grad(x):
    x.mul_(2)
    return x * x


@program(x="n 4, nograd")
def inplace_returned(x):
    return x.add_(1)


@program(x="k 4, nograd")
def inplace_on_view_of_input(x):
    x[1:].mul_(3)
    x[:, 0].zero_()
    return x + 1


@program(x="k 4, nonleaf")
def inplace_on_view_of_input_with_grad(x):
    x[1:].mul_(3)
    return x.sin()


@program(x="k 4, nograd offset", y="4")
def setitem_rows(x, y):
    x[0] = y
    x[1:, 2] = 5.0
    return x * y


@program(x="k 4")
def inplace_on_intermediate(x):
    y = x * 2
    y += 1
    y[0] = 0
    y.t().mul_(2)
    return y


@program(x="k 4", m="k 4, bool")
def inplace_masked_fill(x, m):
    y = x.clone()
    y.masked_fill_(m, 0.0)
    y[m] = 1.0
    return y


@program(x="k 4", i="k 2, i64 <4")
def inplace_scatter(x, i):
    y = x * 1
    y.scatter_(1, i, 2.0)
    return y * x


@program(x="k 4, nograd", y="k 4, nograd")
def copy_and_fill(x, y):
    x.copy_(y * 2)
    y.fill_(3)
    return x + y


@program(x="k 4, nograd", y="k 4, nograd")
def writes_with_out(x, y):
    torch.add(x, 1, out=y)
    return y * 2


@program(x="k 4, nograd", y="k 4, nograd")
def inplace_foreach(x, y):
    torch._foreach_mul_([x, y], 2.0)
    torch._foreach_add_([x, y], [y, x])
    return torch._foreach_norm([x, y])


@program(x="k 4, nograd")
def metadata_in_place(x):
    y = x.clone()
    y.unsqueeze_(0)
    y.transpose_(0, 1)
    y.squeeze_(1)
    return y * 2


@program(x="k 4, nonleaf")
def detach_in_place_mutation(x):
    x.detach().mul_(2)
    return x * 3


@program(x="k 4, nograd")
def copies_into_new_memory(x):
    y = torch.zeros_like(x)
    y.copy_(x)
    return y, y[0]


@program(x="k 4, nograd", y="k 4, nograd")
def swaps_two_inputs(x, y):
    t = x.clone()
    x.copy_(y)
    y.copy_(t)


@program(x="k 4, nograd")
def index_put_in_place(x):
    i = torch.argmax(x, 1, keepdim=True)
    x.scatter_(1, i, 0.0)
    return i
