"""Random ops in the stacked layout: the bits of the per-rank layout, in one node when traced."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

import localtensor_compile as lt

W = 3


def inputs():
    return lt.rank_map(
        lambda r: torch.randn(4, 6, generator=torch.Generator().manual_seed(r))
    ).requires_grad_()


def dropout(x):
    return F.dropout(x, 0.5) + F.dropout(x, 0.5)


def checkpointed(x):
    return checkpoint(lambda y: F.dropout(y.sin(), 0.3).cos(), x, use_reentrant=False) * torch.rand(
        4, 6
    )


def in_place(x):
    y = x.detach().clone().t().normal_(1.0, 2.0)
    y.uniform_(-1, 1, generator=None)
    return x * y.t().bernoulli_(0.5) + torch.empty(4, 6).exponential_()


def like(x):
    a = torch.rand_like(x.t()).t()
    return x * a + torch.randn_like(x) + torch.randint_like(x, 5) + torch.bernoulli(x.sigmoid())


def factories(x):
    return x * torch.rand(4, 6) + torch.randn(6) + torch.randint(0, 9, (4, 1)) + torch.randperm(6)


def drawn_from_tensors(x):
    p = x.detach().abs()
    return x * torch.normal(x.detach(), 0.5) + torch.multinomial(p, 6) + torch.poisson(p)


def a_dead_draw(x):
    torch.rand(3)
    return x * torch.rand(6)


def rrelu(x):
    return F.rrelu(x, training=True)


def drawn_out(x):
    out = torch.empty(4, 6)
    torch.bernoulli(x.detach().sigmoid(), out=out)
    return x * out


def initialised(x):
    w = torch.nn.init.trunc_normal_(torch.empty(4, 6))
    return x * torch.nn.init.kaiming_uniform_(w.clone()) + w


PROGRAMS = [
    dropout,
    checkpointed,
    in_place,
    like,
    factories,
    drawn_from_tensors,
    a_dead_draw,
    rrelu,
    drawn_out,
    initialised,
]


def run(program, layout, backend=None):
    """Values, gradients and the next draw of every rank, seeded apart."""
    torch._dynamo.reset()
    with lt.LocalTensorMode(W, layout=layout):
        fn = program if backend is None else torch.compile(program, backend=backend, fullgraph=True)
        x = inputs()
        seed_apart()
        y = fn(x)
        y.sum().backward()
        after = torch.rand(2)
        return [
            [t._local_tensors[r].detach().clone() for t in (y, x.grad, after)] for r in range(W)
        ]


def seed_apart():
    torch.manual_seed(lt.rank_map(lambda r: torch.tensor(7 + 5 * r)).item())


def same(got, expected, exact=True):
    for mine, theirs in zip(got, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.stride() == b.stride()
            if exact:
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b)
    assert not torch.equal(got[0][2], got[1][2])  # the ranks do draw apart


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_eager(program):
    same(run(program, "stacked"), run(program, "per_rank"))


# Dynamo does not trace trunc_normal_, of plain tensors neither.
TRACED = [p for p in PROGRAMS if p is not initialised]


@pytest.mark.parametrize("program", TRACED, ids=lambda p: p.__name__)
def test_aot_eager(program):
    same(run(program, "stacked", "aot_eager"), run(program, "per_rank", "aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize("program", TRACED, ids=lambda p: p.__name__)
def test_inductor(program):
    """With every draw's bits: what Inductor fuses around them may round."""
    got, expected = run(program, "stacked", "inductor"), run(program, "per_rank", "aot_eager")
    same(got, expected, exact=False)


# ---------------------------------------------------------------- graphs
def draws_of(program, world_size):
    """How many nodes the graphs of forward and backward have, and how many of them draw."""
    found = []

    def keep(module, _):
        found.append([str(n.target) for n in module.graph.nodes])
        return make_boxed_func(module)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with lt.LocalTensorMode(world_size, layout="stacked"):
        x = lt.rank_map(lambda r: torch.ones(4, 6)).requires_grad_()
        torch.compile(program, backend=backend, fullgraph=True)(x).sum().backward()
    return [(len(names), sum("localtensor_random" in n for n in names)) for names in found]


@pytest.mark.parametrize(
    ("program", "draws"),
    [(dropout, 2), (checkpointed, 2), (like, 4), (factories, 4), (a_dead_draw, 2)],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_one_node_for_all_ranks(program, draws):
    """Forward and backward are as long for 9 ranks as for 2, and backward draws nothing."""
    few, many = draws_of(program, 2), draws_of(program, 9)
    assert few == many
    assert few[0][1] == draws
    assert [n for _, n in few[1:]] == [0] * len(few[1:])


def test_traced_draws_are_not_counted_as_per_rank():
    torch._dynamo.reset()
    with lt.LocalTensorMode(W, layout="stacked") as mode:
        x = torch.ones(4, 6)
        torch.compile(dropout, backend="aot_eager")(x)
        assert mode.stats()["per_rank"] == {}
        F.dropout(x, 0.5)
        assert mode.stats()["per_rank"] == {"aten.bernoulli_.float": 1}
