"""A number per rank together with plain tensors, outside of LocalTensorMode."""

import operator
import re

import pytest
import torch

import localtensor_compile as lt
from localtensor_compile import LocalIntNode, LocalTensor, RankDivergence


def per_rank(*values):
    return torch.SymInt(LocalIntNode(dict(enumerate(values))))


OPERATORS = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
]
FUNCTIONS = [
    *(torch.add, torch.sub, torch.mul, torch.div, torch.floor_divide, torch.true_divide),
    *(torch.multiply, torch.subtract, torch.divide, torch.Tensor.copy_),
]


@pytest.mark.parametrize("op", [*OPERATORS, *FUNCTIONS], ids=lambda op: op.__name__)
def test_numbers_that_differ_are_refused(op):
    tensor = torch.full((3,), 7.0)
    text = (
        "got a plain tensor and a number that differs between ranks (rank 0: 2, rank 1: 3): its "
        "result would differ too, and a plain tensor holds one value. Call it inside "
        "LocalTensorMode, or make the tensor a LocalTensor first, with replicate(tensor, ranks)."
    )
    with pytest.raises(RankDivergence, match=re.escape(text)):
        op(tensor, per_rank(2, 3))
    assert torch.equal(tensor, torch.full((3,), 7.0))


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_the_number_first(op):
    with pytest.raises(RankDivergence, match="rank 0: 2, rank 1: 3"):
        op(per_rank(2, 3), torch.ones(3))


def test_two_numbers():
    with pytest.raises(RankDivergence, match="differs between ranks"):
        torch.mul(per_rank(2, 3), per_rank(4, 5))


@pytest.mark.parametrize("op", OPERATORS[:5], ids=lambda op: op.__name__)
def test_one_number_on_all_ranks_is_that_number(op):
    tensor = torch.arange(3.0, requires_grad=True)
    result = op(tensor, per_rank(2, 2))
    assert torch.equal(result, op(tensor, 2))
    if op is not operator.floordiv:
        result.sum().backward()
        assert tensor.grad is not None


@pytest.mark.parametrize("op", OPERATORS[:5], ids=lambda op: op.__name__)
def test_local_tensors_take_numbers(op):
    tensor = LocalTensor({r: torch.arange(4.0) + r for r in (0, 1)}, requires_grad=True)
    result = op(tensor, per_rank(2, 3))
    for rank, number in ((0, 2), (1, 3)):
        assert torch.equal(result._local_tensors[rank], op(torch.arange(4.0) + rank, number))


def test_ordinary_symbols_are_left_alone():
    seen = []

    def backend(gm, inputs):
        seen.append(gm)
        return gm

    compiled = torch.compile(lambda x: x * x.shape[0], backend=backend, dynamic=True)
    assert torch.equal(compiled(torch.ones(5)), torch.full((5,), 5.0))
    assert len(seen) == 1


def test_later_ops_are_not_affected():
    with pytest.raises(RankDivergence):
        torch.ones(3) * per_rank(2, 3)
    assert torch.equal(torch.ones(3) * 2 + torch.ones(3), torch.full((3,), 3.0))


def test_inside_the_mode_it_is_a_local_tensor():
    plain = torch.ones(3)
    with lt.LocalTensorMode(2):
        result = plain * per_rank(2, 3)
    assert torch.equal(result._local_tensors[1], torch.full((3,), 3.0))
