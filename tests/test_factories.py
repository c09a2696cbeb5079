"""Factories, per-rank numbers in indexes and plain tensors, and torch.load, in eager."""

import contextlib
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import localtensor_compile as lt
from localtensor_compile import (
    LocalIntNode,
    LocalTensor,
    LocalTensorError,
    LocalTensorMode,
    PlainTensorError,
    RankDivergence,
    UnsupportedError,
)
from localtensor_compile.world import torch_hooks
from localtensor_compile.world.factory_builders import BUILDERS
from localtensor_compile.world.rank_numbers import writes
from localtensor_compile.world.torch_hooks import factories as hooks
from tests.factory_programs import (
    ARRAY,
    GROUPS,
    PLAIN,
    RANK_NUMBER,
    ROWS,
    WORLD,
    expected,
    inputs,
    require_same,
)

PROGRAMS = {f"{g}.{name}": p for g, programs in GROUPS.items() for name, p in programs.items()}
ROW_NUMBER = torch.SymInt(LocalIntNode(ROWS))


@pytest.fixture(autouse=True, scope="module")
def replacements():
    """Those of torch_hooks/factories.py, should the mode not install them itself."""
    with contextlib.ExitStack() as stack:
        if not any(name == "load" for _, name, _ in torch_hooks.all_replacements()):
            for owner, name, replacement in hooks.replacements():
                stack.callback(torch_hooks._replace(owner, name, replacement))
        yield


@pytest.fixture
def world():
    with LocalTensorMode(WORLD) as mode:
        yield mode


@pytest.fixture
def x():
    with lt.maybe_disable_local_tensor_mode():
        return LocalTensor(inputs())


def everywhere(value):
    return dict.fromkeys(range(WORLD), value)


def shards(tensor):
    return {r: t.tolist() for r, t in tensor._local_tensors.items()}


def pointers(tensor):
    return {t.untyped_storage().data_ptr() for t in tensor._local_tensors.values()}


# ---------------------------------------------------------------- each factory
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_plain_torch_on_each_rank(name, x):
    with LocalTensorMode(WORLD):
        result = PROGRAMS[name](ROW_NUMBER, RANK_NUMBER, x)
    require_same(result, expected(PROGRAMS[name]), name)


def test_the_programs_cover_every_factory():
    called = set()

    class Record(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.add(func)
            return func(*args, **(kwargs or {}))

    with Record():
        for program in PROGRAMS.values():
            program(2, 0, inputs()[0])
    uncovered = {f for f in BUILDERS if f not in called and f not in hooks.PYTHON_FACTORIES}
    uncovered -= set(lt.dispatch.random_ops.RANDOM_FACTORIES)  # in test_rng*.py
    uncovered -= {getattr(torch, n) for n in dir(torch) if n.startswith("sparse_")}  # below
    assert uncovered == {torch.Tensor.new}  # below


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.tensor(PLAIN),
        lambda: torch.as_tensor([1.0]),
        lambda: torch.as_tensor(ARRAY),
        lambda: torch.asarray(ARRAY),
        lambda: torch.tensor(RANK_NUMBER),
    ],
)
def test_each_shard_has_memory_of_its_own(make, world):
    made = make()
    assert len(pointers(made)) == WORLD
    assert not pointers(made) & {PLAIN.data_ptr(), torch.from_numpy(ARRAY).data_ptr()}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_tensors_given_to_factories(world, x):
    assert torch.as_tensor(PLAIN) is PLAIN
    assert torch.asarray(PLAIN).data_ptr() == PLAIN.data_ptr()
    assert torch.as_tensor(x) is x
    copy = torch.tensor(PLAIN)
    assert shards(copy) == everywhere(PLAIN.tolist())
    copy = torch.tensor(x)
    assert shards(copy) == shards(x) and not pointers(copy) & pointers(x)
    assert shards(torch.tensor([x[0, 1], x[1, 1]])) == {0: [1, 5], 1: [2, 6], 2: [3, 7]}
    bounds = torch.linspace(x[0, 0], x[0, 2], 3)
    assert shards(bounds) == {0: [0, 1, 2], 1: [1, 2, 3], 2: [2, 3, 4]}
    leaf = torch.ones(2).reconcile().requires_grad_()
    assert not torch.tensor(leaf).requires_grad
    array = torch.asarray(ARRAY, copy=False)
    assert type(array) is torch.Tensor and array.data_ptr() == torch.from_numpy(ARRAY).data_ptr()


def test_what_follows_a_plain_tensor_stays_plain(world):
    for made in (
        torch.zeros_like(PLAIN),
        torch.full_like(PLAIN, 2.0),
        PLAIN.new_zeros(2),
        PLAIN.new_tensor([1.0]),
        PLAIN.clone(),
        torch.complex(PLAIN, PLAIN),
    ):
        assert type(made) is torch.Tensor


def test_what_cannot_be_overridden_stays_plain(world):
    for made in (
        torch.from_numpy(ARRAY),
        torch.frombuffer(bytearray(b"abcd"), dtype=torch.uint8),
        torch.from_dlpack(ARRAY),
        torch.Tensor([1.0]),
        torch.FloatTensor(2),
    ):
        assert type(made) is torch.Tensor


def test_legacy_new(world, x):
    assert [t.shape for t in x.new(2, 3)._local_tensors.values()] == [(2, 3)] * WORLD
    assert x.new()._local_tensors[1].shape == (0,)
    assert shards(x.new([1.0, 2.0])) == everywhere([1.0, 2.0])
    assert type(PLAIN.new(2)) is torch.Tensor


def test_options(world):
    made = torch.zeros(2, requires_grad=True)
    assert made.requires_grad and made.is_leaf
    assert not any(t.requires_grad for t in made._local_tensors.values())
    (made * 2).sum().backward()
    assert shards(made.grad) == everywhere([2, 2])
    made = torch.tensor([1.0], requires_grad=True, dtype=torch.float64)
    assert made.requires_grad and made.dtype is torch.float64
    target = torch.empty(ROW_NUMBER)
    assert torch.ones(ROW_NUMBER, out=target) is target
    assert shards(target) == {r: [1.0] * n for r, n in ROWS.items()}
    plain = PLAIN.clone()
    assert torch.zeros(4, 4, out=plain) is plain and plain.sum() == 0
    message = r"torch\.zeros would write with the per-rank number rank 0: 2, rank 1: 3, rank 2: 4"
    with pytest.raises(PlainTensorError, match=message):
        torch.zeros(ROW_NUMBER, out=plain)


@pytest.mark.parametrize("outside", [False, True])
def test_default_device(outside):
    with LocalTensorMode(2) as mode:
        if outside:
            torch.set_default_device("meta")
            try:
                made = torch.zeros(2)
            finally:
                torch.set_default_device(None)
        else:
            with torch.device("meta"):
                made = torch.zeros(2)
        assert made.device.type == "meta" and made._ranks == mode.ranks
        assert torch.zeros(2).device.type == "cpu"


def test_a_number_of_other_ranks(world):
    number = torch.SymInt(LocalIntNode({0: 1, 1: 2}))
    with pytest.raises(RankDivergence, match=r"ranks \[0, 1\] is used where rank 2 takes part"):
        torch.zeros(number)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse(world, x):
    made = torch.sparse_coo_tensor([[0]], [1.0], (2,))
    assert type(made) is torch.Tensor and made.layout is torch.sparse_coo
    message = "torch.sparse_coo_tensor would make a sparse tensor per rank.*inside tensor_map"
    with pytest.raises(UnsupportedError, match=message):
        torch.sparse_coo_tensor([[0]], [1.0], (ROW_NUMBER,))
    with pytest.raises(UnsupportedError, match=r"torch\.zeros would make a sparse tensor"):
        torch.zeros(2, layout=torch.sparse_coo)


# ---------------------------------------------------------------- when it does nothing
def test_only_in_the_enabled_innermost_world():
    with LocalTensorMode(4) as outer:
        with LocalTensorMode({1, 2}) as inner:
            assert torch.zeros(2)._ranks == inner.ranks
            with inner.disable():
                assert type(torch.zeros(2)) is torch.Tensor
                assert type(torch.rand(2)) is torch.Tensor
        assert torch.zeros(2)._ranks == outer.ranks
        with outer.disable():
            assert type(torch.tensor(1)) is torch.Tensor
    assert type(torch.zeros(2)) is torch.Tensor


def test_nothing_stays_after_an_error(world):
    before = _get_current_function_mode_stack()
    for bad in (lambda: torch.zeros(-1), lambda: torch.tensor(object()), lambda: PLAIN[7]):
        with pytest.raises((RuntimeError, IndexError)):
            bad()
    assert _get_current_function_mode_stack() == before
    assert isinstance(torch.zeros(1), LocalTensor)


def test_inside_ops_and_transforms(world, x):
    @torch.library.custom_op("localtensor_test::plus_one", mutates_args=())
    def plus_one(t: torch.Tensor) -> torch.Tensor:
        one = torch.ones(1)
        assert type(one) is torch.Tensor
        return t + one

    assert shards(plus_one(x)) == shards(x + 1)
    grad = torch.func.grad(lambda t: (t * torch.full((4,), 3.0)).sum())(x)
    assert shards(grad) == shards(torch.full_like(x, 3.0))
    mapped = torch.func.vmap(lambda row: row + torch.arange(4.0))(x)
    assert shards(mapped) == shards(x + torch.arange(4.0))


def test_functions_in_python_that_call_factories(world):
    weight = nn.Parameter(torch.arange(15.0).reshape(5, 3))
    bags = world.rank_map(lambda r: torch.full((ROWS[r], 2), r))
    result = F.embedding_bag(bags, weight)
    for r, n in ROWS.items():
        want = F.embedding_bag(bags._local_tensors[r], weight._local_tensors[r].detach())
        assert want.shape == (n, 3) and torch.equal(result._local_tensors[r], want)


# ---------------------------------------------------------------- modules, backward
def test_modules(world):
    layer = nn.Linear(4, ROW_NUMBER, bias=False, dtype=torch.float64)
    assert isinstance(layer.weight, LocalTensor) and isinstance(layer.weight, nn.Parameter)
    assert [t.shape for t in layer.weight._local_tensors.values()] == [(2, 4), (3, 4), (4, 4)]
    layer.to(torch.float32)
    assert isinstance(layer.weight, LocalTensor) and layer.weight.dtype is torch.float32
    nn.init.eye_(layer.weight)
    assert torch.equal(layer.weight._local_tensors[0], torch.eye(2, 4)._local_tensors[0])
    assert isinstance(nn.BatchNorm1d(3).running_mean, LocalTensor)
    assert isinstance(nn.ParameterList([torch.zeros(2)])[0], LocalTensor)


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.arange(4.0) + torch.ones(x.shape[0], 4)


@pytest.mark.parametrize("how", ["method", "backward", "grad"])
def test_factories_in_backward(how, world, x):
    x.requires_grad_()
    loss = Scaled.apply(x).sum()
    if how == "grad":
        (grad,) = torch.autograd.grad(loss, x)
    else:
        loss.backward() if how == "method" else torch.autograd.backward(loss)
        grad = x.grad
    assert shards(grad) == {r: [[1, 2, 3, 4]] * n for r, n in ROWS.items()}


def test_gradient_of_a_plain_tensor_is_per_rank(world):
    weight = PLAIN.clone().requires_grad_()
    (weight[RANK_NUMBER] * 2).sum().backward()
    for r in range(WORLD):
        want = torch.zeros_like(PLAIN)
        want[r] = 2
        assert torch.equal(weight.grad._local_tensors[r], want)


@pytest.mark.parametrize("which", ["first", "second"])
def test_backward_of_one_part_of_a_split(which, x):
    with LocalTensorMode(WORLD):
        x.requires_grad_()
        parts = x.split([RANK_NUMBER + 1, ROW_NUMBER - RANK_NUMBER - 1])
        (parts[0] if which == "first" else parts[1]).sum().backward()
    for r, n in ROWS.items():
        want = torch.zeros(n, 4)
        want[: r + 1] = which == "first"
        want[r + 1 :] = which == "second"
        assert torch.equal(x.grad._local_tensors[r], want)


# ---------------------------------------------------------------- per-rank numbers
def test_index_with_a_tensor_of_one_int(world, x):
    index = torch.tensor(RANK_NUMBER)
    assert shards(x[index]) == {r: t[r].tolist() for r, t in inputs().items()}
    assert shards(x[0, index]) == {r: t[0, r].item() for r, t in inputs().items()}
    assert shards(PLAIN[index]) == {r: PLAIN[r].tolist() for r in range(WORLD)}
    x[index] = 1.0
    for r, want in inputs().items():
        want[r] = 1
        assert torch.equal(x._local_tensors[r], want)
    masked = x[torch.tensor(True)]
    assert masked.shape[0] == 1 and masked.dim() == 3
    masked = PLAIN[[True, False, True, False], RANK_NUMBER]
    assert shards(masked) == {r: PLAIN[[0, 2], r].tolist() for r in range(WORLD)}


def test_results_never_share_memory_with_a_plain_tensor(world):
    before = PLAIN.clone()
    for part in (
        PLAIN[RANK_NUMBER],
        PLAIN[RANK_NUMBER:],
        PLAIN.split([RANK_NUMBER, 4 - RANK_NUMBER])[1],
        PLAIN.narrow(0, RANK_NUMBER, 1),
        PLAIN.select(0, RANK_NUMBER),
    ):
        part.zero_()
    assert torch.equal(PLAIN, before)


def test_writes_into_a_plain_tensor(world):
    message = (
        r"would write with the per-rank number rank 0: 0, rank 1: 1, rank 2: 2 into a plain tensor "
        r"of shape \(4, 4\).*localtensor_compile.replicate"
    )
    plain = PLAIN.clone()
    for write in (
        lambda: plain.add_(RANK_NUMBER),
        lambda: plain.__setitem__(RANK_NUMBER, 1.0),
        lambda: plain.__setitem__(0, RANK_NUMBER),
        lambda: torch.mul(plain, RANK_NUMBER, out=plain),
        lambda: plain.__imul__(RANK_NUMBER),
        lambda: nn.init.constant_(plain, RANK_NUMBER),
    ):
        with pytest.raises(PlainTensorError, match=message):
            write()
    assert torch.equal(plain, PLAIN)


def test_which_functions_write():
    assert writes(torch.Tensor.add_, {}) and writes(torch.add, {"out": PLAIN})
    assert writes(F.relu, {"inplace": True}) and writes(torch.Tensor.__ior__, {})
    assert not writes(torch.Tensor.__invert__, {}) and not writes(torch.Tensor.__add__, {})
    assert not writes(torch.add, {"out": None}) and not writes(torch.Tensor.__index__, {})


def test_split_lengths_that_do_not_add_up(world, x):
    message = "add up to the length of dimension 1 on every rank.*rank 2: 2 \\+ 3 of 4"
    lengths = torch.SymInt(LocalIntNode({0: 3, 1: 3, 2: 2}))
    third = torch.SymInt(LocalIntNode({0: 1, 1: 1, 2: 3}))
    with pytest.raises(LocalTensorError, match=message):
        x.split([lengths, third], dim=1)
    with pytest.raises(LocalTensorError, match=r"must not be negative.*rank 0: -1 \+ 3 of 2"):
        x.split([RANK_NUMBER - 1, 3], dim=0)
    with pytest.raises(
        RankDivergence, match="sequences of different lengths: rank 0: 2, ranks 1-2: 1"
    ):
        x.split(RANK_NUMBER * 2 + 1)


def test_functions_that_want_one_number(world, x):
    message = "one Python int is needed, but the ranks have different values: rank 0: 0, rank 1: 1"
    for call in (
        lambda: x.sum(RANK_NUMBER),
        lambda: x.nan_to_num(RANK_NUMBER),
        lambda: x.unbind(RANK_NUMBER),
        lambda: PLAIN.sum(RANK_NUMBER),
        lambda: range(RANK_NUMBER),
    ):
        with pytest.raises(RankDivergence, match=message):
            call()
    message = (
        r"torch.Tensor.type does not take a number that differs between ranks: rank 0: 0.*"
        r"Run it once per rank with rank_map"
    )
    with pytest.raises(UnsupportedError, match=message):
        x.type(RANK_NUMBER)


def test_draws_for_plain_tensors(world):
    torch.manual_seed(torch.SymInt(LocalIntNode({0: 1, 1: 2, 2: 3})))
    with pytest.raises(PlainTensorError, match="dropout would draw random numbers for a plain"):
        F.dropout(PLAIN, 0.5)
    assert F.dropout(PLAIN, 0.5, training=False) is PLAIN
    torch.manual_seed(7)
    drawn = torch.bernoulli(torch.full_like(PLAIN, 0.5))
    want = torch.bernoulli(torch.full_like(PLAIN, 0.5), generator=torch.Generator().manual_seed(7))
    assert torch.equal(drawn, want)


# ---------------------------------------------------------------- torch.load
def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_load(world):
    with world.disable():
        base = torch.arange(6.0)
        layer = nn.Linear(2, 2)
        layer.tied = layer.weight
        kept = LocalTensor({0: torch.ones(1), 1: torch.zeros(1)})
        value = {
            "base": base,
            "view": base[2:4],
            "parameter": nn.Parameter(torch.ones(1), requires_grad=False),
            "layer": layer,
            "local": kept,
            "list": [torch.ones(2, requires_grad=True), 3],
        }
    loaded = torch.load(saved(value), weights_only=False)
    assert len(pointers(loaded["base"])) == WORLD
    loaded["base"].add_(torch.tensor(RANK_NUMBER))
    assert shards(loaded["view"]) == {0: [2, 3], 1: [3, 4], 2: [4, 5]}
    parameter = loaded["parameter"]
    assert isinstance(parameter, nn.Parameter) and not parameter.requires_grad
    assert shards(parameter) == everywhere([1.0])
    weight = loaded["layer"].weight
    assert isinstance(weight, LocalTensor) and isinstance(weight, nn.Parameter)
    assert loaded["layer"].tied is weight
    assert shards(weight) == everywhere(layer.weight.tolist())
    assert loaded["local"]._ranks == {0, 1}
    assert loaded["list"][0].requires_grad and loaded["list"][1] == 3
    with world.disable():
        assert type(torch.load(saved(base))) is torch.Tensor


def test_load_weights_only_and_load_state_dict(world):
    with world.disable():
        plain = nn.Linear(3, 2)
    layer = nn.Linear(3, 2)
    layer.load_state_dict(torch.load(saved(plain.state_dict())))
    assert shards(layer.weight) == everywhere(plain.weight.tolist())


# ---------------------------------------------------------------- optimizers
def start(rank):
    return torch.arange(12.0).reshape(3, 4) * 0.1 + rank


def gradient(step, rank):
    return torch.arange(12.0).reshape(3, 4) * 0.3 - rank + step


def steps(make, parameter, gradients):
    optimizer = make([parameter])
    for grad in gradients:
        parameter.grad = grad
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    make = OPTIMIZERS[name]
    with LocalTensorMode(WORLD) as mode:
        parameter = nn.Parameter(mode.rank_map(start))
        gradients = [mode.rank_map(lambda r: gradient(s, r)) for s in range(3)]
        result, state = steps(make, parameter, gradients)
        for name, value in state.items():
            per_rank = isinstance(value, torch.Tensor) and value.dim() > 0
            assert isinstance(value, LocalTensor) == per_rank, name
        # A plain parameter is trained as outside, also in a world.
        plain, state = steps(make, nn.Parameter(PLAIN.new_ones(3, 4)), [PLAIN[:3] - 4.0] * 3)
        assert type(plain) is torch.Tensor
        assert not any(isinstance(value, LocalTensor) for value in state.values())
    for r in range(WORLD):
        gradients = [gradient(s, r) for s in range(3)]
        want, _ = steps(make, nn.Parameter(start(r)), gradients)
        assert torch.equal(result._local_tensors[r], want)
    want, _ = steps(make, nn.Parameter(torch.ones(3, 4)), [PLAIN[:3] - 4.0] * 3)
    assert torch.equal(plain, want)
