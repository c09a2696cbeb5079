"""x.data: the shards of another LocalTensor, in both layouts."""

import pytest
import torch

import localtensor_compile as lt

W = 2


@pytest.fixture(params=["per_rank", "stacked"])
def mode(request):
    with lt.LocalTensorMode(W, layout=request.param) as mode:
        yield mode


def ranked(*shape, start=0.0):
    return lt.rank_map(lambda r: torch.full(shape, start + r))


def values(x):
    return [t.flatten()[0].item() for t in x._local_tensors.values()]


def test_the_shards_are_those_of_the_value(mode):
    x, y = ranked(2), ranked(2, start=10.0)
    x.data = y
    assert values(x) == [10.0, 11.0]
    y.add_(1)
    assert values(x) == [11.0, 12.0]
    x.mul_(2)
    assert values(y) == [22.0, 24.0]


def test_a_parameter_of_another_size(mode):
    p = torch.nn.Parameter(torch.zeros(3))
    p.data = ranked(4, 5, start=1.0)
    assert p.shape == (4, 5)
    assert all(t.shape == (4, 5) for t in p._local_tensors.values())
    assert p.requires_grad and p.is_leaf
    (p * 2).sum().backward()
    assert all(torch.equal(t, torch.full((4, 5), 2.0)) for t in p.grad._local_tensors.values())
    p.data = lt.rank_map(lambda r: torch.full((r + 1,), 7.0))
    assert [tuple(t.shape) for t in p._local_tensors.values()] == [(1,), (2,)]


def test_reading_shares_memory_and_has_no_history(mode):
    p = torch.nn.Parameter(torch.zeros(3))
    assert not p.data.requires_grad
    p.data.fill_(5.0)
    assert values(p) == [5.0, 5.0]


def test_without_a_mode(mode):
    x, y = ranked(2), ranked(2, start=10.0)
    with lt.maybe_disable_local_tensor_mode():
        x.data = y
    assert values(x) == [10.0, 11.0]


def test_modules_change_their_dtype(mode):
    module = torch.nn.Linear(2, 2)
    expected = [t.double() for t in module.weight._local_tensors.values()]
    module.double()
    found = module.weight._local_tensors.values()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    module.half()
    assert all(t.dtype == torch.half for t in module.weight._local_tensors.values())
    assert module(torch.ones(1, 2).half()).dtype == torch.half


def test_a_plain_value_is_refused(mode):
    with lt.maybe_disable_local_tensor_mode():
        plain = torch.zeros(3)
    x = ranked(3)
    with pytest.raises(lt.PlainTensorError, match=r"data = ... of a LocalTensor got a plain tens"):
        x.data = plain
    with pytest.raises(lt.PlainTensorError, match="would put the values of several ranks into one"):
        plain.data = x
    x.data = lt.replicate(plain)
    assert values(x) == [0.0, 0.0]


def test_other_ranks_are_refused(mode):
    x = ranked(3)
    with lt.maybe_disable_local_tensor_mode():
        other = lt.LocalTensor({0: torch.zeros(3)})
    with pytest.raises(lt.ShardError, match=r"of ranks \[0, 1\] got one of ranks \[0\]"):
        x.data = other
