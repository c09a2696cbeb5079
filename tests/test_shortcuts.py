"""Elementwise calls that skip torch's dispatcher: the same values, and nobody is left out."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from localtensor_compile import LocalTensor, LocalTensorMode, ShardError
from localtensor_compile.dispatch import shortcuts

RANKS = (0, 1, 2)


def make(seed=0, shape=(2, 3), **options):
    generator = torch.Generator().manual_seed(seed)
    return LocalTensor({r: torch.rand(*shape, generator=generator) + 0.5 for r in RANKS}, **options)


@pytest.fixture
def taken(monkeypatch):
    """The functions that took the short way."""
    calls = []

    def run(func, args):
        result = shortcuts.run_shortcut(func, args)
        if result is not NotImplemented:
            calls.append(func)
        return result

    monkeypatch.setattr("localtensor_compile.world.factories.run_shortcut", run)
    return calls


def arguments(func):
    two = {"add", "sub", "mul", "div", "maximum", "minimum"}
    return (make(1), make(2)) if func.__name__ in two else (make(1),)


@pytest.mark.parametrize(
    "func", sorted(shortcuts.SHORTCUTS, key=str), ids=lambda f: str(f).split(" at ")[0]
)
def test_same_as_the_long_way(func, taken):
    args = arguments(func)
    outside = func(*args)
    with LocalTensorMode(3):
        inside = func(*args)
    assert taken == [func]
    for rank in RANKS:
        expected = func(*(a._local_tensors[rank] for a in args))
        assert torch.equal(inside._local_tensors[rank], expected)
        assert torch.equal(outside._local_tensors[rank], expected)
    assert (inside.shape, inside.dtype) == (outside.shape, outside.dtype)
    assert inside._ranks == outside._ranks == frozenset(RANKS)


@pytest.mark.parametrize("number", [2, 0.5, True])
def test_numbers(number, taken):
    x = make()
    with LocalTensorMode(3):
        result = x * number
    assert taken
    assert all(torch.equal(result._local_tensors[r], x._local_tensors[r] * number) for r in RANKS)


def test_uneven_shards_that_broadcast_differently(taken):
    a = LocalTensor({0: torch.ones(1, 3), 1: torch.ones(4, 3), 2: torch.ones(2, 3)})
    b = LocalTensor({0: torch.ones(5, 3), 1: torch.ones(4, 3), 2: torch.ones(1, 3)})
    with LocalTensorMode(3):
        result = a + b
    assert taken
    assert [result._local_tensors[r].shape[0] for r in RANKS] == [5, 4, 2]


def test_needs_no_grad_or_goes_the_long_way(taken):
    x = make(requires_grad=True)
    with LocalTensorMode(3):
        y = x * x
        assert y.requires_grad and not taken
        with torch.no_grad():
            assert not (x * x).requires_grad
        assert len(taken) == 1
        y.sum().backward()
    assert all(torch.equal(x.grad._local_tensors[r], 2 * x._local_tensors[r]) for r in RANKS)


class SeesOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_op(taken):
    x = make()
    with LocalTensorMode(3), SeesOps() as mode:
        x + x
    assert torch.ops.aten.add.Tensor in mode.ops and not taken


def test_function_modes_below_see_the_function(taken):
    x = make()
    with SeesFunctions() as mode, LocalTensorMode(3):
        x + x
    assert torch.Tensor.add in mode.functions and not taken


def test_transforms(taken):
    x = make()
    with LocalTensorMode(3):
        mapped = torch.vmap(lambda row: row * row)(x)
        gradient = torch.func.grad(lambda t: (t * t).sum())(x)
    assert not taken
    for r in RANKS:
        assert torch.equal(mapped._local_tensors[r], x._local_tensors[r] ** 2)
        assert torch.equal(gradient._local_tensors[r], 2 * x._local_tensors[r])


def test_forward_mode(taken):
    x, tangent = make(), make(1)
    with LocalTensorMode(3), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        out = forward_ad.unpack_dual(dual * dual).tangent
    assert not taken
    for r in RANKS:
        expected = 2 * x._local_tensors[r] * tangent._local_tensors[r]
        torch.testing.assert_close(out._local_tensors[r], expected)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        lambda: torch.autograd.profiler.profile(use_cpu=True),
    ],
    ids=["autocast", "inference", "profiler"],
)
def test_contexts_that_want_every_op(context, taken):
    x = make()
    with LocalTensorMode(3), context():
        y = x + x
    assert not taken
    assert all(torch.equal(y._local_tensors[r], x._local_tensors[r] * 2) for r in RANKS)


def test_other_ranks_are_refused():
    a, b = make(), LocalTensor({0: torch.rand(2, 3)})
    with LocalTensorMode(3), pytest.raises(ShardError, match=r"ranks \[0, 1, 2\] together with"):
        a + b
