"""Ops on lists of tensors, clipping and optimizers on stacks: the bits of the per-rank layout."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import localtensor_compile as lt

W = 3
# Rows of whole vector registers: sigmoid and a few others round the elements after them otherwise.
SHAPES = ((4, 16), (32,), (2, 1, 16))


def drawn(shape, seed):
    """Between 0 and 1, where every function below is finite."""
    return lt.rank_map(
        lambda r: torch.rand(shape, generator=torch.Generator().manual_seed(100 * seed + r))
    )


def a_list(seed=0):
    return [drawn(shape, seed + i) for i, shape in enumerate(SHAPES)]


def on_every_rank(program, layout):
    """[the shards of each tensor] that `program` returns, and the ops that went per rank."""
    torch.compiler.reset()
    with lt.LocalTensorMode(W, layout=layout) as mode:
        tensors = [t.detach() for t in program()]
        assert all(isinstance(t, lt.LocalTensor) for t in tensors)
        stats = mode.stats()
        assert (stats["stacked"] > 0) is (layout == "stacked")
        return [[s.clone() for s in t._local_tensors.values()] for t in tensors], stats["per_rank"]


def same(program):
    found, went_per_rank = on_every_rank(program, "stacked")
    expected, _ = on_every_rank(program, "per_rank")
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        assert len(mine) == len(theirs) == W
        for one, other in zip(mine, theirs):
            assert one.dtype is other.dtype
            assert one.stride() == other.stride()
            assert torch.equal(one, other)
    assert any(not torch.equal(rows[0], rows[1]) for rows in found)  # the ranks do differ
    return went_per_rank


# ---------------------------------------------------------------- torch._foreach_*
UNARY = (
    "abs acos asin atan ceil cos cosh erf erfc exp expm1 floor frac lgamma log log10 log1p log2 "
    "neg reciprocal round rsqrt sigmoid sign sin sinh sqrt tan tanh trunc"
).split()
BINARY = "add sub mul div maximum minimum clamp_max clamp_min pow".split()
OPERANDS = {
    "list": lambda: (a_list(50),),
    "scalar": lambda: (0.7,),
    "scalars": lambda: ([0.2, 0.5, 0.8],),
}


def foreach(name, *arguments, spread=False, **options):
    tensors = [(t - 0.5) * 5 if spread else t for t in a_list()]
    result = getattr(torch, f"_foreach_{name}")(tensors, *arguments, **options)
    return tensors if name.endswith("_") else result


@pytest.mark.parametrize("in_place", ["", "_"])
@pytest.mark.parametrize("name", UNARY)
def test_function_of_each(name, in_place):
    steps = name in ("ceil", "floor", "round", "sign", "trunc")
    assert same(lambda: foreach(name + in_place, spread=steps)) == {}


@pytest.mark.parametrize("in_place", ["", "_"])
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name, operand, in_place):
    assert same(lambda: foreach(name + in_place, *OPERANDS[operand]())) == {}


@pytest.mark.parametrize("in_place", ["", "_"])
@pytest.mark.parametrize("value", [0.7, [0.2, 0.5, 0.8]], ids=["scalar", "scalars"])
@pytest.mark.parametrize("name", ["addcmul", "addcdiv"])
def test_three_operands(name, value, in_place):
    assert same(lambda: foreach(name + in_place, a_list(50), a_list(60), value)) == {}


FURTHER = {
    "add alpha": lambda: foreach("add", a_list(50), alpha=2),
    "add alpha in place": lambda: foreach("add_", a_list(50), alpha=2),
    "copy": lambda: foreach("copy_", a_list(50)),
    "lerp": lambda: foreach("lerp", a_list(50), 0.3),
    "lerp in place": lambda: foreach("lerp_", a_list(50), 0.3),
    "lerp of a list": lambda: foreach("lerp", a_list(50), a_list(60)),
    "multiply by a tensor": lambda: foreach("mul", drawn((), 9)),
    "divide by a tensor in place": lambda: foreach("div_", drawn((), 9)),
    "norm": lambda: foreach("norm"),
    "norm 1": lambda: foreach("norm", 1),
    "norm infinity": lambda: foreach("norm", float("inf")),
    "max": lambda: foreach("max"),
}


@pytest.mark.parametrize("name", FURTHER)
def test_further(name):
    assert same(FURTHER[name]) == {}


def with_uneven():
    tensors = [drawn((4, 16), 0), lt.rank_map(lambda r: torch.arange(r + 1.0) + r), drawn(32, 1)]
    norms = torch._foreach_norm(tensors)
    torch._foreach_mul_(tensors, 2.0)
    torch._foreach_add_(tensors, tensors)
    return [*tensors, *norms]


def test_list_with_uneven_shards_goes_per_rank():
    assert set(same(with_uneven)) >= {"aten._foreach_mul_.Scalar", "aten._foreach_add_.List"}


# ---------------------------------------------------------------- clipping and optimizers
def parameters():
    found = [nn.Parameter(drawn(shape, i)) for i, shape in enumerate(SHAPES)]
    for i, p in enumerate(found):
        p.grad = drawn(p.shape, 20 + i) - 0.5
    return found


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clip_grad_norm(norm_type, foreach):
    def program():
        found = parameters()
        norm = clip_grad_norm_(found, 0.3, norm_type, foreach=foreach)
        return [norm, *(p.grad for p in found)]

    assert same(program) == {}


def test_clip_grad_value():
    def program():
        found = parameters()
        clip_grad_value_(found, 0.2, foreach=True)
        return [p.grad for p in found]

    assert same(program) == {}


def trained(name, **options):
    """Three steps: the parameters and what the optimizer keeps of them."""
    found = parameters()
    optimizer = getattr(torch.optim, name)(found, lr=0.1, **options)
    for step in range(3):
        for i, p in enumerate(found):
            p.grad = drawn(p.shape, 20 + 10 * step + i) - 0.5
        optimizer.step()
    states = [v for p in found for v in optimizer.state[p].values()]
    return [*found, *(v for v in states if isinstance(v, lt.LocalTensor))]


FOREACH = [
    ("Adadelta", {}),
    ("Adagrad", {}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("Adamax", {}),
    ("ASGD", {}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Rprop", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
]
FUSED = [
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    ("AdamW", {}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("name", "options"), FOREACH, ids=str)
def test_foreach_optimizer(name, options):
    went_per_rank = same(lambda: trained(name, foreach=True, **options))
    # Rprop assigns through a mask.
    assert set(went_per_rank) == ({"aten.index_put_.default"} if name == "Rprop" else set())


@pytest.mark.parametrize(("name", "options"), FUSED, ids=str)
def test_fused_optimizer(name, options):
    """Its kernel takes plain lists: once per rank, into the rows."""
    assert list(same(lambda: trained(name, fused=True, **options))) == [
        f"aten._fused_{name.lower()}_.default"
    ]


@pytest.mark.parametrize("kind", ["foreach", pytest.param("fused", marks=pytest.mark.slow)])
def test_compiled_optimizer(kind):
    def program():
        found = parameters()
        optimizer = torch.optim.AdamW(found, lr=0.1, **{kind: True})
        step = torch.compile(optimizer.step, backend="aot_eager")
        step()
        step()
        return found

    same(program)
