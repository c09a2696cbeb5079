"""Programs that draw random numbers, and what a process of each rank alone gets from them.

A program is a function of the rank's input tensor. It is run by plain torch in a loop over ranks,
each under its own seed, and on a LocalTensor of all ranks' inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import localtensor_compile as lt

WORLD = 3
SEEDS = (11, 22, 22)
EVEN = ((4, 6),) * WORLD
UNEVEN = ((4, 6), (3, 6), (5, 6))


class Result:
    """Outputs, gradient and final generator state of one rank."""

    def __init__(self, outputs: Sequence[Tensor], grad: Tensor | None, state: Tensor) -> None:
        self.outputs = outputs
        self.grad = grad
        self.state = state


def inputs_of(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """One input per rank, values in (0, 1): valid probabilities, rates and concentrations."""
    made = []
    for rank, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(1000 + rank)
        made.append((torch.rand(shape, generator=generator) * 0.9 + 0.05).to(dtype))
    return made


def run_plain(
    program: Callable[[Tensor], Any], inputs: Sequence[Tensor], seeds: Sequence[int] = SEEDS
) -> list[Result]:
    """Each rank alone, by plain torch under its seed."""
    results = []
    outside = torch.get_rng_state()
    for x, seed in zip(inputs, seeds):
        torch.manual_seed(seed)
        x = x.clone().requires_grad_(x.is_floating_point())
        outputs = as_tuple(program(x))
        grad = backward(outputs, x)
        results.append(Result([o.detach() for o in outputs], grad, torch.get_rng_state()))
    torch.set_rng_state(outside)
    return results


def run_local(
    program: Callable[[Tensor], Any],
    inputs: Sequence[Tensor],
    seeds: Sequence[int] = SEEDS,
    compile_with: str | None = None,
    **options: Any,
) -> list[Result]:
    """All ranks on one LocalTensor; `compile_with` is a torch.compile backend."""
    with lt.LocalTensorMode(len(inputs)):
        torch.manual_seed(per_rank(seeds))
        x = lt.rank_map(lambda r: inputs[r].clone()).requires_grad_(inputs[0].is_floating_point())
        if compile_with is not None:
            torch._dynamo.reset()
            options.setdefault("fullgraph", True)
            program = torch.compile(program, backend=compile_with, **options)
        outputs = as_tuple(program(x))
        grad = backward(outputs, x)
        state = torch.get_rng_state()
    return [
        Result(
            [shard(o.detach(), r) for o in outputs],
            None if grad is None else shard(grad, r),
            shard(state, r),
        )
        for r in range(len(inputs))
    ]


def per_rank(values: Sequence[int]) -> torch.SymInt:
    return torch.SymInt(lt.LocalIntNode(dict(enumerate(values))))


def shard(t: Tensor, rank: int) -> Tensor:
    return t._local_tensors[rank] if isinstance(t, lt.LocalTensor) else t


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def backward(outputs: Sequence[Tensor], x: Tensor) -> Tensor | None:
    losses = [o.square().sum() for o in outputs if o.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    return x.grad


def assert_same(
    got: Sequence[Result], wanted: Sequence[Result], exact: bool = True, exact_grad: bool = True
) -> None:
    """Equal bits per rank; where not `exact`, floating results are close (and states equal)."""
    for rank, (g, w) in enumerate(zip(got, wanted)):
        assert len(g.outputs) == len(w.outputs)
        pairs = [(a, b, exact) for a, b in zip(g.outputs, w.outputs)]
        assert (g.grad is None) == (w.grad is None), f"rank {rank}: gradient"
        if g.grad is not None:
            pairs.append((g.grad, w.grad, exact and exact_grad))
        for i, (a, b, equal) in enumerate(pairs):
            assert a.dtype == b.dtype and a.shape == b.shape, f"rank {rank} result {i}"
            if equal or not a.is_floating_point():
                assert torch.equal(a, b), f"rank {rank} result {i}: {a} != {b}"
            else:
                torch.testing.assert_close(a, b, msg=lambda m: f"rank {rank} result {i}: {m}")
        assert torch.equal(g.state, w.state), f"rank {rank}: generator state"


# ---------------------------------------------------------------- programs
def f_nested_checkpoint(x):
    def inner(t):
        return F.dropout(t.sin(), 0.5)

    def outer(t):
        return F.dropout(checkpoint(inner, t, use_reentrant=False).cos(), 0.3)

    return checkpoint(outer, x, use_reentrant=False)


class NoisyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2 + torch.rand_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 + torch.rand_like(grad)


class DropInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.dropout(x, 0.5)

    @staticmethod
    def backward(ctx, grad):
        torch.rand_like(grad)  # a dead draw
        return F.dropout(grad, 0.5)


def two_checkpoints(x, reentrant=False):
    x = checkpoint(lambda t: F.dropout(t.sin()), x, use_reentrant=reentrant)
    x = checkpoint(lambda t: F.dropout(t.cos()), x, use_reentrant=reentrant)
    return x + torch.rand_like(x)


def dead_draw(x):
    torch.rand_like(x)
    F.dropout(x)
    return x * torch.rand_like(x)


def dead_in_checkpoint(x):
    def region(t):
        torch.rand_like(t)
        return F.dropout(t.sin())

    return checkpoint(region, x, use_reentrant=False) + torch.rand_like(x)


def rrelu_inplace(x):
    return F.rrelu(x - 0.5, training=True, inplace=True)


def attention(x):
    q = x.reshape(1, 1, *x.shape)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.4)


def out_forms(x):
    a = torch.empty_like(x)
    with torch.no_grad():
        torch.bernoulli(x.detach(), out=a)
        b = torch.empty_like(a)
        torch.normal(x.detach(), x.detach(), out=b)
    return x * a + b


def mlp(x):
    w = torch.ones(6, 6, dtype=x.dtype)
    for p in (0.1, 0.2, 0.3):
        x = F.dropout(torch.tanh(x @ w), p)
    return x


# On the input tensor's own shape only: no factories.
OPS: dict[str, Callable[[Tensor], Any]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout twice": lambda x: (F.dropout(x, 0.5), F.dropout(x, 0.5)),
    "dropout inplace": lambda x: F.dropout(x * 1, 0.5, inplace=True),
    "dropout off": lambda x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0),
    "dropout p=1": lambda x: F.dropout(x, 1.0),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(
        x.reshape(1, *x.shape, 1), 0.3, training=True
    ),
    "dropout1d": lambda x: F.dropout1d(x.unsqueeze(0), 0.5),
    "dropout2d": lambda x: F.dropout2d(x.reshape(1, *x.shape, 1), 0.5),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True),
    "transposed": lambda x: F.dropout(x.t(), 0.5),
    "sliced": lambda x: F.dropout(x[:, ::2], 0.5),
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn_like": lambda x: x + torch.randn_like(x.t()).t(),
    "randint_like": lambda x: x * torch.randint_like(x, 7),
    "randint_like low": lambda x: x * torch.randint_like(x, 3, 9, dtype=torch.int64),
    "bernoulli": lambda x: x * torch.bernoulli(x),
    "bernoulli p": lambda x: x * torch.bernoulli(x.detach(), 0.3),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.3),
    "bernoulli_ tensor": lambda x: x * torch.empty_like(x).bernoulli_(x.detach()),
    "normal_": lambda x: x * torch.empty_like(x).normal_(1.0, 2.0),
    "normal_ strided": lambda x: x * torch.empty_like(x).t().normal_().t(),
    "normal_ view": lambda x: x[:, 1:5] * torch.zeros_like(x)[:, 1:5].normal_(),
    "uniform_": lambda x: x * torch.empty_like(x).uniform_(-1, 3),
    "exponential_": lambda x: x * torch.empty_like(x).exponential_(2.0),
    "cauchy_": lambda x: x + torch.empty_like(x).cauchy_().clamp(-2, 2),
    "geometric_": lambda x: x * torch.empty_like(x).geometric_(0.4),
    "log_normal_": lambda x: x * torch.empty_like(x).log_normal_(0.1, 0.2),
    "normal tt": lambda x: x * torch.normal(x.detach(), x.detach()),
    "normal tf": lambda x: x * torch.normal(x.detach(), 0.5),
    "normal ft": lambda x: x * torch.normal(0.5, x.detach()),
    "poisson": lambda x: x * torch.poisson(x.detach() * 9),
    "binomial": lambda x: x * torch.binomial(torch.full_like(x, 9.0), x.detach()),
    "gamma": lambda x: torch._standard_gamma(x * 3),
    "dirichlet": lambda x: x * torch._sample_dirichlet(x.detach() * 3),
    "multinomial": lambda x: (x, torch.multinomial(x.detach(), 3)),
    "multinomial replacement": lambda x: (x, torch.multinomial(x.detach(), 8, replacement=True)),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "rrelu": lambda x: F.rrelu(x - 0.5, training=True),
    "rrelu inplace": rrelu_inplace,
    "attention": attention,
    "out=": out_forms,
    "dead draws": dead_draw,
    "mlp": mlp,
    "kaiming": lambda x: x * torch.nn.init.kaiming_uniform_(torch.empty_like(x)),
    "xavier": lambda x: x * torch.nn.init.xavier_normal_(torch.empty_like(x)),
    "checkpoint": lambda x: checkpoint(lambda t: F.dropout(t.sin()), x, use_reentrant=False),
    "checkpoint reentrant": lambda x: checkpoint(
        lambda t: F.dropout(t.sin()), x, use_reentrant=True
    ),
    "two checkpoints": two_checkpoints,
    "two checkpoints reentrant": lambda x: two_checkpoints(x, True),
    "nested checkpoints": f_nested_checkpoint,
    "dead in checkpoint": dead_in_checkpoint,
    "backward draws": NoisyBackward.apply,
    "backward drops": DropInBackward.apply,
    "backward draws between": lambda x: F.dropout(NoisyBackward.apply(F.dropout(x))),
}


class FactoryInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + torch.rand(x.shape)

    @staticmethod
    def backward(ctx, grad):
        torch.randn(3)
        noise = torch.randn(2, 6)
        return F.dropout(grad) + torch.rand(6) + noise[0]


def factory_in_checkpoint(x):
    return checkpoint(lambda t: (t * torch.rand(6)).sin(), x, use_reentrant=False) + torch.rand(6)


def distributions(x):
    normal = torch.distributions.Normal(x, 1.0, validate_args=False)
    return normal.rsample() + torch.distributions.Uniform(0.0, 2.0, validate_args=False).sample()


def filled(x):
    out = torch.empty(4)
    torch.rand(4, out=out)
    return x, out


# With torch's random factories.
FACTORIES: dict[str, Callable[[Tensor], Any]] = {
    "rand": lambda x: x + torch.rand(6),
    "rand of shape": lambda x: x * torch.rand(x.shape),
    "rand of rows": lambda x: x * torch.rand(x.shape[0], 1),
    "rand twice": lambda x: (x + torch.rand(6), x + torch.rand(6)),
    "rand size=": lambda x: x + torch.rand(size=(1, 6)),
    "rand float64": lambda x: x + torch.rand((1, 6), dtype=torch.float64),
    "rand bfloat16": lambda x: x + torch.rand(33, dtype=torch.bfloat16).sum(),
    "randn scalar": lambda x: x + torch.randn(()),
    "randn": lambda x: x + torch.randn(40)[:6],
    "randn complex": lambda x: (x, torch.randn(3, dtype=torch.complex64)),
    "randint": lambda x: x * torch.randint(5, (6,)),
    "randint low": lambda x: x * torch.randint(2, 5, (x.shape[0], 1)),
    "randint names": lambda x: x * torch.randint(low=2, high=9, size=(6,), dtype=torch.int32),
    "randint high=": lambda x: x * torch.randint(high=9, size=(6,)),
    "randint of rows": lambda x: x * torch.randint(x.shape[0] + 100, (6,)),
    "randperm": lambda x: (x, torch.randperm(12)),
    "randperm of rows": lambda x: x[torch.randperm(x.shape[0])],
    "randperm int32": lambda x: (x, torch.randperm(5, dtype=torch.int32)),
    "normal": lambda x: x + torch.normal(1.0, 2.0, (x.shape[0], 6)),
    "normal names": lambda x: x + torch.normal(mean=1.0, std=2.0, size=(6,)),
    "dead factories": lambda x: (torch.rand(3), torch.randperm(4), x + torch.rand(6))[2],
    "factory in backward": FactoryInBackward.apply,
    "factory in checkpoint": factory_in_checkpoint,
    "mixed": lambda x: F.dropout(x + torch.rand(6)) * torch.randn(x.shape).exponential_(),
}
# torch.compile cannot do them in one graph, with plain tensors neither.
EAGER_ONLY: dict[str, Callable[[Tensor], Any]] = {
    "random_": lambda x: x * torch.empty_like(x).random_(),
    "random_ to": lambda x: x * torch.empty_like(x).random_(9),
    "random_ from": lambda x: x * torch.empty_like(x).random_(2, 9),
    "trunc_normal": lambda x: x * torch.nn.init.trunc_normal_(torch.empty(6)),
    "distributions": distributions,
    "filled": filled,
}
