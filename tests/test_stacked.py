"""The stacked layout as a value: what it holds, shares, saves, counts and refuses."""

import copy
import io
import logging
import pickle

import pytest
import torch
from torch import Tensor

import localtensor_compile as lt
from localtensor_compile.values.stack import ShardsOfStack, StackedRanks
from localtensor_compile.values.tensor import _wrap_stacked

W = 4
RANKS = tuple(range(W))


def stacked(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return _wrap_stacked(torch.randn(W, *shape, generator=generator), RANKS)


def per_rank(size, value):
    with lt.maybe_disable_local_tensor_mode():
        return lt.LocalTensor({r: torch.full((size,), value(r)) for r in RANKS})


def is_stacked(x):
    return type(x._local_tensors) is ShardsOfStack


@pytest.fixture
def mode():
    with lt.LocalTensorMode(W, layout="stacked") as mode:
        yield mode


# ---------------------------------------------------------------- the mode
def test_layouts():
    for layout, ranks, expected in [
        ("per_rank", 64, False),
        ("stacked", 1, True),
        ("auto", 7, False),
        ("auto", 8, True),
    ]:
        with lt.LocalTensorMode(ranks, layout=layout):
            assert is_stacked(torch.zeros(2)) is expected
    assert "layout='stacked'" in repr(lt.LocalTensorMode(2, layout="stacked"))
    assert "layout" not in repr(lt.LocalTensorMode(2))


def test_unknown_layout():
    with pytest.raises(lt.WorldError, match=r"unknown layout 'rows'.*per_rank, stacked, auto"):
        lt.LocalTensorMode(2, layout="rows")


def test_what_the_mode_makes_is_stacked(mode):
    x = lt.rank_map(lambda r: torch.full((2, 3), float(r)))
    made = [
        x,
        torch.ones(2),
        torch.tensor([1.0, 2.0]),
        torch.full((2,), 3.0),
        torch.rand(2),
        lt.replicate(torch.Tensor([1.0])),
        torch.nn.Linear(2, 2).weight,
    ]
    assert all(map(is_stacked, made))
    assert torch.equal(x._local_tensors[2], torch.full((2, 3), 2.0))
    uneven = lt.rank_map(lambda r: torch.zeros(r + 1))
    assert not is_stacked(uneven)


def test_stats(mode):
    x = torch.ones(3)
    before = mode.stats()["stacked"]
    y = x * 2 + x
    stats = mode.stats()
    assert stats["stacked"] == before + 2
    assert stats["per_rank"] == {}
    y[0].item()
    assert mode.stats()["per_rank"] == {"aten._local_scalar_dense.default": 1}
    with lt.LocalTensorMode(W, layout="stacked") as inner:
        assert inner.stats() == {"stacked": 0, "per_rank": {}, "joined": {}, "left": {}}


def test_what_goes_per_rank_is_logged(mode, caplog):
    x = lt.rank_map(lambda r: torch.arange(4.0) * r)
    with caplog.at_level(logging.DEBUG, "localtensor_compile.stacked"):
        out = x.nonzero()
    assert "aten.nonzero.default runs once per rank: what it returns depends on the data" in (
        caplog.text
    )
    assert "aten.nonzero.default: the result stays per rank" in caplog.text
    assert {r: t.shape[0] for r, t in out._local_tensors.items()} == {0: 0, 1: 3, 2: 3, 3: 3}
    assert mode.stats()["left"] == {"aten.nonzero.default": 1}


# ---------------------------------------------------------------- the value
def test_flattening():
    x = stacked(2, 3)
    names, ranks = x.__tensor_flatten__()
    assert names == ["_stack"]
    assert ranks == StackedRanks(RANKS)
    again = lt.LocalTensor.__tensor_unflatten__({"_stack": x._stack}, ranks, None, None)
    assert again._stack is x._stack
    # A guard on the metadata of one layout must not hold for the other.
    assert ranks != RANKS
    assert RANKS != ranks
    assert copy.deepcopy(ranks) == ranks
    assert pickle.loads(pickle.dumps(ranks)) == ranks


def test_the_two_layouts_have_different_cache_keys():
    x = stacked(2)
    assert x._stable_hash_for_caching() != (
        lt.LocalTensor(dict(x._local_tensors))._stable_hash_for_caching()
    )


def test_attributes():
    x = stacked(2, 3)
    assert x.shape == (2, 3)
    assert x.stride() == (3, 1)
    assert x.is_contiguous()
    assert not x.t().is_contiguous()
    assert x._local_tensor_2.shape == (2, 3)
    with pytest.raises(AttributeError, match="holds a tensor per rank, not one stack of them"):
        lt.LocalTensor({0: torch.zeros(1)})._stack  # noqa: B018
    with pytest.raises(AttributeError, match="holds no shard of rank 9"):
        x._local_tensor_9  # noqa: B018
    assert "  3: tensor" in repr(x)


def test_shards_are_views_of_the_stack():
    x = stacked(2)
    x._local_tensors[1].fill_(7)
    assert torch.equal(x._stack[1], torch.full((2,), 7.0))
    shards = x._local_tensors
    assert list(shards) == list(RANKS)
    assert len(shards) == W
    assert 3 in shards
    assert 4 not in shards


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_stay_stacked(how):
    x = stacked(2, 3)
    x.note = "kept"
    if how == "deepcopy":
        y = copy.deepcopy(x)
    elif how == "pickle":
        y = pickle.loads(pickle.dumps(x))
    else:
        file = io.BytesIO()
        torch.save({"x": x}, file)
        file.seek(0)
        y = torch.load(file, weights_only=True)["x"]
    assert is_stacked(y)
    assert torch.equal(y._stack, x._stack)
    assert y._stack.data_ptr() != x._stack.data_ptr()
    assert y.note == "kept"


def test_reconcile(mode):
    same = lt.rank_map(lambda r: torch.tensor([1.0, float("nan")]))
    torch.testing.assert_close(same.reconcile(), torch.Tensor([1, torch.nan]), equal_nan=True)
    differ = lt.rank_map(lambda r: torch.tensor([float(r)]))
    text = r"the shards differ: rank 0: \[0.0\], rank 1: \[1.0\]"
    with pytest.raises(lt.RankDivergence, match=text):
        differ.reconcile()
    compiled = torch.compile(lambda x: x.reconcile() * 2, fullgraph=True, backend="aot_eager")
    assert compiled(lt.rank_map(lambda r: torch.tensor([3.0]))).item() == 6.0
    with pytest.raises(lt.RankDivergence, match=text):
        compiled(differ)


def test_numbers_of_the_ranks(mode):
    x = lt.rank_map(lambda r: torch.tensor([r, 5]))
    first, second = x.tolist()
    assert {r: int(v) for r, v in first.node._values.items()} == {0: 0, 1: 1, 2: 2, 3: 3}
    assert second == 5


# ---------------------------------------------------------------- views and writes
def test_views_share_memory():
    x = stacked(4, 6)
    before = x._stack.clone()
    for view in (x.t(), x[1:3], x.view(24)[::2], x.unsqueeze(1), x.as_strided((2, 2), (6, 1), 7)):
        assert is_stacked(view)
        assert view._stack.untyped_storage().data_ptr() == x._stack.untyped_storage().data_ptr()
        for r in RANKS:
            shard = view._local_tensors[r]
            assert shard.shape == view.shape
            assert shard.stride() == view.stride()
    x.as_strided((2, 2), (6, 1), 7).zero_()
    for r in RANKS:
        expected = before[r].clone()
        expected.as_strided((2, 2), (6, 1), 7).zero_()
        assert torch.equal(x._local_tensors[r], expected)


def test_writes_per_rank_reach_the_stack(mode):
    x = lt.rank_map(lambda r: torch.arange(4.0) + r)
    alias = x.view(2, 2)
    x[x > 4] = -1.0
    for r in RANKS:
        expected = torch.arange(4.0) + r
        expected[expected > 4] = -1.0
        assert torch.equal(x._local_tensors[r], expected)
        assert torch.equal(alias._local_tensors[r], expected.view(2, 2))


def test_metadata_in_place():
    x = stacked(2, 3, 1)
    data = x._stack.clone()
    x.squeeze_()
    assert x.shape == (2, 3)
    x.t_()
    assert x.shape == (3, 2)
    x.unsqueeze_(0)
    assert x.shape == (1, 3, 2)
    x.transpose_(0, -1)
    assert x.shape == (2, 3, 1)
    for r in RANKS:
        expected = data[r].squeeze().t().unsqueeze(0).transpose(0, -1)
        assert torch.equal(x._local_tensors[r], expected)
        assert x._local_tensors[r].stride() == expected.stride()


def test_squeeze_keeps_a_single_rank():
    x = _wrap_stacked(torch.zeros(1, 1, 2), (0,))
    x.squeeze_()
    assert x.shape == (2,)
    assert x._stack.shape == (1, 2)
    assert x.squeeze().shape == (2,)


def test_resize():
    x = stacked(2, 3)
    data = x._stack.clone()
    x.resize_(4)
    for r in RANKS:
        assert torch.equal(x._local_tensors[r], data[r].view(-1)[:4])
    empty = _wrap_stacked(torch.empty(W, 0), RANKS)
    assert empty.resize_(2, 2).shape == (2, 2)
    with pytest.raises(
        lt.UnsupportedError, match=r"resize_ to \(9,\) needs more memory than a shard of shape"
    ):
        x.resize_(9)


def test_out(mode):
    x = lt.rank_map(lambda r: torch.arange(3.0) * r)
    out = torch.empty(3)
    address = out._stack.data_ptr()
    assert torch.add(x, x, out=out) is out
    assert out._stack.data_ptr() == address
    assert torch.equal(out._local_tensors[3], torch.arange(3.0) * 6)
    other = torch.empty(0)
    torch.mm(x.view(3, 1), x.view(1, 3), out=other)
    assert torch.equal(other._local_tensors[2], torch.outer(*[torch.arange(3.0) * 2] * 2))


def numbered():
    return lt.rank_map(lambda r: torch.arange(6.0) + 10 * r)


def indices():
    return torch.empty(0, dtype=torch.int64)


WRITTEN_OUT = {
    "arange": lambda: torch.arange(3, out=torch.empty(0)),
    "bernoulli": lambda: torch.bernoulli(numbered() / 40, out=torch.empty(0)),
    "different sizes": lambda: torch.masked_select(numbered(), numbered() > 3, out=torch.empty(0)),
    "different sizes of indices": lambda: torch.nonzero(numbered(), out=indices()),
    "multinomial": lambda: torch.multinomial(numbered() + 1, 2, out=indices()),
    "nonzero": lambda: torch.nonzero(numbered() + 1, out=indices()),
    "normal": lambda: torch.normal(numbered(), 1.0, out=torch.empty(6)),
    "rand": lambda: torch.rand(3, out=torch.empty(0)),
    "randn of a smaller size": lambda: torch.randn(3, out=torch.empty(5)),
    "randn of the same size": lambda: torch.randn(3, out=torch.empty(3)),
    "randperm": lambda: torch.randperm(4, out=indices()),
    "sort": lambda: torch.sort(numbered().flip(0), out=(torch.empty(0), indices()))[1],
}


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_out_gets_the_size_of_the_result(name):
    found = {}
    for layout in ("stacked", "per_rank"):
        with lt.LocalTensorMode(W, layout=layout):
            torch.manual_seed(lt.rank_map(lambda r: torch.tensor(3 + r)).item())
            out = WRITTEN_OUT[name]()
            assert is_stacked(out) is (layout == "stacked" and "different" not in name)
            found[layout] = {r: t.tolist() for r, t in out._local_tensors.items()}
    assert found["stacked"] == found["per_rank"]
    assert all(found["stacked"].values())


def test_out_that_is_too_small(mode):
    with pytest.raises(
        lt.UnsupportedError,
        match=r"aten.masked_select.out writes shards of different sizes into a tensor of shape "
        r"\(2,\).*Give it an empty tensor, or use LocalTensorMode\(..., layout=.per_rank.\)",
    ):
        torch.masked_select(numbered(), numbered() > 3, out=torch.empty(2))


def test_resize_of_a_part(mode):
    """A part may grow up to the end of its rank's memory, where the next rank's begins."""
    x = numbered()
    part = x[2:4]
    part.resize_(4)
    part.fill_(-1.0)
    for r in RANKS:
        assert x._local_tensors[r].tolist() == [10.0 * r, 10.0 * r + 1, -1, -1, -1, -1]
    with pytest.raises(lt.UnsupportedError, match="the next rank's shard follows it"):
        x[3:].resize_(5)
    with pytest.raises(lt.UnsupportedError, match="the next rank's shard follows it"):
        x.narrow(0, torch.distributed.get_rank(), 2).resize_(4)
    x.narrow(0, torch.distributed.get_rank(), 2).resize_(3).zero_()
    for r in RANKS:
        assert x._local_tensors[r][r : r + 3].tolist() == [0.0] * 3


def test_resize_of_a_single_rank():
    with lt.LocalTensorMode(1, layout="stacked"):
        x = torch.arange(3.0)
        x.resize_(5)
        assert x.shape == x._local_tensors[0].shape == (5,)
        assert x._local_tensors[0][:3].tolist() == [0.0, 1.0, 2.0]


def test_factories_inside_transforms(mode):
    x = lt.rank_map(lambda r: torch.arange(12.0).view(3, 4) * r)
    grad = torch.func.grad(lambda t: (t * torch.full((4,), 3.0)).sum())(x)
    mapped = torch.func.vmap(lambda row: row + torch.arange(4.0))(x)
    for r in RANKS:
        assert torch.equal(grad._local_tensors[r], torch.full((3, 4), 3.0))
        assert torch.equal(
            mapped._local_tensors[r], x._local_tensors[r] + torch.arange(4.0)._stack[0]
        )


# ---------------------------------------------------------------- the two layouts together
def test_shards_that_differ_stay_per_rank_and_come_back(mode):
    x = lt.rank_map(lambda r: torch.arange(float(r + 1)))
    y = x * 2
    assert not is_stacked(y)
    padded = lt.tensor_map(y, lambda r, t: torch.nn.functional.pad(t, (0, W - r)))
    total = padded + torch.ones(W + 1)
    assert is_stacked(total)
    for r in RANKS:
        expected = torch.nn.functional.pad(torch.arange(float(r + 1)) * 2, (0, W - r)) + 1
        assert torch.equal(total._local_tensors[r], expected)


def test_the_memory_of_per_rank_shards_stays_theirs(mode):
    x = per_rank(2, lambda r: 0.0)
    shards = dict(x._local_tensors)
    x += lt.rank_map(lambda r: torch.full((2,), float(r)))
    view = x.view(2)
    view.mul_(torch.full((2,), 2.0))
    for r in RANKS:
        assert torch.equal(shards[r], torch.full((2,), 2.0 * r))


def test_other_ranks_are_refused(mode):
    x = _wrap_stacked(torch.zeros(2, 3), (0, 1))
    with pytest.raises(lt.ShardError, match=r"values of ranks \[0, 1\].*\[0, 1, 2, 3\]"):
        x + torch.zeros(3)


def test_a_plain_target_is_refused(mode):
    with lt.maybe_disable_local_tensor_mode():
        plain = torch.zeros(3)
    with pytest.raises(lt.PlainTensorError, match="into one plain tensor"):
        plain.add_(torch.ones(3))


# ---------------------------------------------------------------- compiled
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_step(mode, backend):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    x = lt.rank_map(lambda r: torch.arange(6.0).view(2, 3) / (r + 1))

    def step(x):
        return model(x).square().sum()

    step(x).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss = torch.compile(step, fullgraph=True, backend=backend)(x)
    loss.backward()
    assert is_stacked(loss)
    for p, grad in zip(model.parameters(), expected):
        assert is_stacked(p.grad)
        torch.testing.assert_close(p.grad._stack, grad._stack, rtol=1e-5, atol=1e-6)


def test_the_number_of_ranks_is_no_dynamic_dimension(mode):
    compiled = []

    def backend(module, inputs):
        compiled.append([tuple(t.shape) for t in inputs if isinstance(t, Tensor)])
        return module.forward

    f = torch.compile(lambda x: (x * 2).sum(0) + x.shape[0], dynamic=True, backend=backend)
    for rows in (W, 7, 9):
        out = f(torch.ones(rows, 3))
        assert torch.equal(out._stack, torch.full((W, 3), 3.0 * rows))
    assert len(compiled) == 1


def test_the_other_layout_recompiles(mode):
    calls = []

    def backend(module, inputs):
        calls.append(1)
        return module.forward

    f = torch.compile(lambda x: x + 1, backend=backend)
    x = torch.ones(2)
    f(x)
    f(x)
    assert len(calls) == 1
    out = f(per_rank(2, float))
    assert len(calls) == 2
    assert torch.equal(out._local_tensors[3], torch.full((2,), 4.0))


def test_a_compiled_view_of_an_input_is_a_view(mode):
    f = torch.compile(lambda x: (x[1:].t(), x * 2), fullgraph=True, backend="aot_eager")
    x = lt.rank_map(lambda r: torch.arange(6.0).view(3, 2) + r)
    view, _ = f(x)
    view.zero_()
    for r in RANKS:
        assert torch.equal(x._local_tensors[r][0], torch.tensor([0.0, 1.0]) + r)
        assert not x._local_tensors[r][1:].any()


def test_a_plain_gradient_of_a_compiled_output(mode):
    x = torch.ones(3, requires_grad=True)
    out = torch.compile(lambda x: x * 2, fullgraph=True, backend="aot_eager")(x)
    with lt.maybe_disable_local_tensor_mode():
        grad = torch.tensor([1.0, 2.0, 3.0])
    out.backward(grad)
    assert torch.equal(x.grad._stack, torch.tensor([2.0, 4.0, 6.0]).expand(W, 3))


def test_a_per_rank_gradient_of_a_stacked_output(mode):
    x = torch.ones(3, requires_grad=True)
    out = torch.compile(lambda x: x * 2, fullgraph=True, backend="aot_eager")(x)
    out.backward(per_rank(3, float))
    assert torch.equal(x.grad._local_tensors[3], torch.full((3,), 6.0))


def test_a_view_that_starts_elsewhere_on_each_rank(mode):
    base = lt.rank_map(lambda r: torch.arange(12.0) + 100 * r)
    rank = torch.distributed.get_rank()
    view = base.narrow(0, rank * 3, 3)
    assert is_stacked(view)
    assert view.__tensor_flatten__()[1] == StackedRanks(RANKS, shift=3)
    assert pickle.loads(pickle.dumps(StackedRanks(RANKS, shift=3))).shift == 3

    _names, ranks = view.__tensor_flatten__()
    again = lt.LocalTensor.__tensor_unflatten__({"_stack": view._stack}, ranks, None, None)
    for x in (view, again, view.view(3, 1).view(3)):
        part = x.as_strided((2,), (1,))
        for r in RANKS:
            expected = (torch.arange(12.0) + 100 * r)[3 * r :][:3]
            assert torch.equal(x._local_tensors[r], expected)
            assert torch.equal(part._local_tensors[r], expected[:2])
        assert x.storage_offset().node._values == {r: 3 * r for r in RANKS}
    copied = copy.deepcopy(view)
    assert torch.equal(copied._local_tensors[2], view._local_tensors[2])
