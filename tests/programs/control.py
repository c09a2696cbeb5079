"""Control flow and transforms: checkpoint, autocast, autograd.Function, cond, torch.func."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .harness import program


# ---------------------------------------------------------------- checkpoint
def _block(x, w):
    return torch.tanh(F.gelu(x @ w) @ w.t())


@program(x="k 4", w="4 6")
def checkpoint_not_reentrant(x, w):
    return checkpoint(_block, x, w, use_reentrant=False) * 2


@program(x="k 4", w="4 e")
def checkpoint_uneven_weight(x, w):
    return checkpoint(_block, checkpoint(_block, x, w, use_reentrant=False), w, use_reentrant=False)


@program(x="k 4", w="4 e")
def checkpoint_reentrant(x, w):
    return checkpoint(_block, x, w, use_reentrant=True) * 2


# ---------------------------------------------------------------- autocast
@program(x="k 4", w="4 6")
def autocast(x, w):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ w, (x @ w).softmax(-1)


@program(x="k 4", w="4 e", v="e 3")
def autocast_uneven_with_a_region_off(x, w, v):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ w
        with torch.autocast("cpu", enabled=False):
            z = y.float() * 2
        return z.relu() @ v


# ---------------------------------------------------------------- autograd
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x * factor

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x * grad * ctx.factor, None  # not the true derivative, to see that it is used


@program(x="n 4")
def autograd_function(x):
    return Square.apply(x, 2.0) + 1


class TwoOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        out = x @ y
        ctx.save_for_backward(x, y)
        return out, out.sum(0)

    @staticmethod
    def backward(ctx, grad, grad_sum):
        x, y = ctx.saved_tensors
        grad = grad + grad_sum
        return grad @ y.t(), x.t() @ grad


@program(x="k 4", y="4 e")
def autograd_function_two_outputs(x, y):
    a, b = TwoOutputs.apply(x, y)
    return a * 2, b


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


@program(x="n 4")
def autograd_function_straight_through(x):
    return StraightThrough.apply(x * 3)


@program(x="k 4")
def no_grad_region(x):
    with torch.no_grad():
        scale = x.abs().max(1, keepdim=True)[0]
    return x / scale


@program(x="k 4")
def enable_grad_inside_no_grad(x):
    with torch.no_grad():
        y = x * 2
        with torch.enable_grad():
            z = x * 3
    return y, z


@program(x="k 4, nograd")
def inference_mode_region(x):
    with torch.inference_mode():
        y = x * 2
        z = y.sum(0)
    return y.clone(), z.clone()


@program(x="k 4, nograd", y="k 4")
def input_without_grad(x, y):
    return x * y, x * 2


@program(x="k 4")
def set_grad_enabled(x):
    with torch.set_grad_enabled(False):
        y = x.exp()
    return x * y


@program(x="k 4")
def two_outputs_of_which_one_is_not_used(x):
    return x.sin(), (x * 2).detach().requires_grad_(False), x.cos().sum().detach()


@program(x="k 4")
def detach_and_requires_grad(x):
    return x.detach() * x


@program(x="k 4, nograd", config={"trace_autograd_ops": True})
def gradient_inside(x):
    y = x.detach().requires_grad_()
    (g,) = torch.autograd.grad((y * y * y).sum(), y)
    return g * 2


@program(x="k 4")
def tensor_hook(x):
    y = x * 2
    y.register_hook(lambda g: g * 10)
    return y + 1


# ---------------------------------------------------------------- cond
@program(x="3 4", p="1, bool same")
def cond_on_a_tensor(x, p):
    return torch.cond(p.any(), lambda x: x.sin(), lambda x: x.cos() * 2, (x,))


@program(x="k 4", p="1, bool")
def cond_where_ranks_take_their_own_branch(x, p):
    return torch.cond(p.any(), lambda x: x.sin(), lambda x: x.cos() * 2, (x,))


@program(x="k 4", p="1, bool")
def cond_that_closes_over_a_size(x, p):
    rows = x.shape[0]
    return torch.cond(p.any(), lambda x: x * rows, lambda x: x.view(rows, 4) + 1, (x,))


@program(x="k 4")
def scan(x):
    add = lambda carry, row: (carry + row, carry * row)
    return torch._higher_order_ops.scan(add, torch.zeros_like(x[0]), x, dim=0)


@program(x="k 4, nograd")
def while_loop(x):
    small = lambda n, t: t.abs().sum() < 40
    grow = lambda n, t: (n + 1, t * 2)
    return torch._higher_order_ops.while_loop(small, grow, (torch.zeros_like(x[0, 0]), x))


@program(x="k 4")
def cond_on_a_dimension(x):
    return torch.cond(x.shape[1] > 3, lambda x: x.sin(), lambda x: x.cos() * 2, (x,))


@program(x="k 4")
def python_branch_on_which_ranks_agree(x):
    if x.shape[0] > 1:
        return x * 2
    return x * 3


@program(x="n 4")
def python_loop_over_even_dim(x):
    total = x[:, 0]
    for i in range(1, x.shape[1]):
        total = total * 0.5 + x[:, i]
    return total


# ---------------------------------------------------------------- torch.func
@program(x="k 4", w="4 5")
def func_vmap(x, w):
    return torch.func.vmap(lambda row: torch.tanh(row @ w))(x)


@program(x="4 k", w="k 5")
def func_vmap_over_even_dim(x, w):
    return torch.func.vmap(lambda row: (row @ w).relu())(x)


@program(x="k 4, nograd")
def func_grad(x):
    return torch.func.grad(lambda t: (t.sin() * t).sum())(x)


@program(x="k 4, nograd", w="4 4, nograd")
def func_grad_and_value(x, w):
    return torch.func.grad_and_value(lambda w, x: F.gelu(x @ w).sum(), argnums=(0, 1))(w, x)


@program(x="k 4, nograd", t="k 4, nograd")
def func_jvp(x, t):
    return torch.func.jvp(lambda x: torch.tanh(x) * x, (x,), (t,))


@program(x="k 4, nograd", t="k 4, nograd")
def func_vjp(x, t):
    out, back = torch.func.vjp(lambda x: torch.tanh(x) * x, x)
    return out, back(t)[0]


@program(x="k 4, nograd")
def func_jacobian(x):
    return torch.func.jacrev(lambda x: torch.tanh(x).sum(0))(x)


@program(x="4, nograd")
def func_hessian(x):
    return torch.func.hessian(lambda x: (x**3).sum())(x)


@program(x="k 4, nograd", w="4 4, nograd")
def func_per_sample_gradients(x, w):
    def loss(w, row):
        return torch.tanh(row @ w).sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)


# ---------------------------------------------------------------- nested compile, breaks
@torch.compile(backend="eager", fullgraph=True)
def _inner(x):
    return x.sin() * 2


@program(x="n 4")
def nested_compile(x):
    return _inner(x) + 1


@program(x="k 4", breaks=1, graphs=2)
def graph_break(x):
    y = x * 2
    torch._dynamo.graph_break()
    return y.sin()


@program(x="k 4", breaks=1, graphs=2)
def graph_break_with_sizes_alive(x):
    rows = x.shape[0]
    y = x * 2
    torch._dynamo.graph_break()
    return y.sum() * rows, torch.cat([y, y]).view(2, rows, 4)


@torch._dynamo.disable
def _outside(x, rows):
    return x * rows


@program(x="k 4", breaks=1, graphs=2)
def graph_break_passing_sizes(x):
    return _outside(x.sin(), x.shape[0]) + x.shape[0]


@program(x="k 4")
def keyword_and_default_arguments(x):
    def inner(a, *rest, scale=2.0, **more):
        return a * scale + sum(rest) + more["shift"]

    return inner(x, x, x + 1, shift=0.5)


@program(x="k 4")
def comprehension_and_zip(x):
    parts = [c * i for i, c in enumerate(x.unbind(1))]
    return sum(a * b for a, b in zip(parts, reversed(parts)))
