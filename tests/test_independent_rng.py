"""LocalTensorMode(sharding_independent_rng=True): draws of a DTensor are those of the whole."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import localtensor_compile as lt
from localtensor_compile.check.program import World
from tests.parallel import dtensor_random as programs

pytestmark = pytest.mark.filterwarnings(
    "ignore:DTensor .* may not have complete support:UserWarning"
)
BACKENDS = [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_world_sizes_and_placements(backend):
    first = None
    for placement in (Shard(0), Shard(-1), Replicate()):
        program = functools.partial(programs.independent, placement=placement)
        found = lt.check_sharding_independence(program, backend=backend)
        first = first or found
        assert all(torch.equal(first[name], value) for name, value in found.items())
    assert {"up.weight", "down.weight", "embedding.weight", "result 1"} <= first.keys()


def test_as_one_process_that_holds_the_whole_tensor():
    torch.manual_seed(5)
    expected = [F.dropout(torch.ones(7, 5), 0.4), torch.empty(7, 5).normal_(), torch.rand(3)]
    with lt.LocalTensorMode(3, sharding_independent_rng=True):
        torch.manual_seed(5)
        x = distribute_tensor(torch.ones(7, 5), World(3).mesh(), [Shard(0)])
        found = [F.dropout(x, 0.4).full_tensor(), torch.empty_like(x).normal_().full_tensor()]
        found.append(torch.rand(3))
        for mine, theirs in zip(found, expected):
            assert torch.equal(mine.reconcile(), theirs)


def test_by_default_draws_depend_on_sharding():
    """As on real CPU ranks: what the check must find."""
    found = []
    for world in (2, 3):
        with lt.LocalTensorMode(world):
            x = distribute_tensor(torch.ones(7, 5), World(world).mesh(), [Shard(0)])
            found.append(torch.rand_like(x).full_tensor().reconcile())
    assert not torch.equal(*found)


def per_rank(world):
    return {"x": distribute_tensor(torch.zeros(6), world.mesh(), [Shard(0)]) + world.size}


def test_check_finds_values_that_depend_on_the_world():
    with pytest.raises(lt.CheckFailed, match=r"'x' on 2 ranks is not what it is on 1"):
        lt.check_sharding_independence(per_rank)


def test_check_finds_values_that_differ_between_ranks():
    program = lambda world: {"x": torch.zeros(2) + dist.get_rank()}
    message = r"'x' differs between ranks\. .*needs the same value on every rank"
    with pytest.raises(lt.CheckFailed, match=message):
        lt.check_sharding_independence(program, (2,))


def test_shards_that_dtensor_would_not_make():
    message = (
        r"needs shards as DTensor lays them out: sizes ranks 0-1: \(2,\), but found rank 0: "
        r"\(1,\), rank 1: \(3,\)\. Redistribute to plain Shard, Replicate or Partial"
    )
    with lt.LocalTensorMode(2, sharding_independent_rng=True) as mode:
        local = mode.rank_map(lambda r: torch.ones(1 + 2 * r))
        x = DTensor.from_local(local, World(2).mesh(), [Shard(0)], shape=(4,), stride=(1,))
        with pytest.raises(lt.ShardError, match=message):
            x.normal_()


def test_compiled_code_is_not_shared_with_other_modes():
    step = torch.compile(torch.rand_like, backend="aot_eager")

    def draw(**option):
        with lt.LocalTensorMode(2, **option):
            torch.manual_seed(1)
            x = distribute_tensor(torch.ones(6), World(2).mesh(), [Shard(0)])
            return step(x).full_tensor().reconcile()

    own = draw()
    whole = draw(sharding_independent_rng=True)
    assert torch.equal(own[:3], own[3:])  # each rank's own draw, seeded alike
    assert not torch.equal(whole[:3], whole[3:])
    assert torch.equal(draw(), own)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_ranks_must_be_seeded_alike(backend):
    with lt.LocalTensorMode(2, sharding_independent_rng=True):
        torch.manual_seed(torch.distributed.get_rank())
        x = distribute_tensor(torch.ones(6), World(2).mesh(), [Shard(0)])
        step = World(2, backend=backend).compile(torch.rand_like)
        with pytest.raises(lt.RankDivergence, match="same value on every rank, but the shards"):
            step(x)


def refusal(draw, placements=None, shape=(2,)):
    with lt.LocalTensorMode(4, sharding_independent_rng=True):
        mesh = World(4).mesh(shape if len(shape) > 1 else (4,))
        x = distribute_tensor(torch.full((8, 4), 0.5), mesh, placements or [Shard(0)])
        with pytest.raises(lt.UnsupportedError) as raised:
            draw(x)
    return str(raised.value)


def test_refusals():
    assert "torch.rand_like(p) < p instead of torch.bernoulli(p)" in refusal(torch.bernoulli)
    generator = torch.Generator()
    text = refusal(lambda x: x.normal_(generator=generator))
    assert "DTensor itself ignores the generator of CPU tensors" in text
    strided = [_StridedShard(0, split_factor=2), Shard(0)]
    text = refusal(lambda x: x.normal_(), strided, (2, 2))
    assert "only where each rank holds one block" in text


# ---- every random op that torch has
SAME = {
    "uniform_": lambda x: x.uniform_(),
    "normal_": lambda x: x.normal_(),
    "bernoulli_": lambda x: x.bernoulli_(0.4),
    "cauchy_": lambda x: x.cauchy_(),
    "exponential_": lambda x: x.exponential_(),
    "geometric_": lambda x: x.geometric_(0.3),
    "log_normal_": lambda x: x.log_normal_(),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 3, 10),
    "dropout": F.dropout,
    "dropout1d": F.dropout1d,
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel_softmax": F.gumbel_softmax,
}
NO_RULE_OF_DTENSOR = {
    "random_": lambda x: x.random_(),
    "random_ to": lambda x: x.random_(10),
    "random_ from": lambda x: x.random_(3, 10),
    "bernoulli_ of probabilities": lambda x: x.bernoulli_(x),
    "poisson": torch.poisson,
    "normal of means": lambda x: torch.normal(x, 1.0),
    "binomial": lambda x: torch.binomial(torch.ones_like(x), x),
    "gamma": torch._standard_gamma,
    "dirichlet": torch._sample_dirichlet,
}
NO_RULE_OF_OURS = {
    "bernoulli": torch.bernoulli,
    "multinomial": lambda x: torch.multinomial(x, 2),
}


def drawn(function, world, placement):
    with lt.LocalTensorMode(world, sharding_independent_rng=True):
        torch.manual_seed(3)
        whole = torch.arange(1.0, 31.0).view(6, 5) / 30
        return function(distribute_tensor(whole, World(world).mesh(), [placement])).full_tensor()


@pytest.mark.parametrize("name", SAME)
def test_op(name):
    expected = drawn(SAME[name], 1, Replicate()).reconcile()
    for world, placement in ((2, Shard(0)), (3, Shard(0)), (3, Shard(1)), (4, Shard(0))):
        assert torch.equal(drawn(SAME[name], world, placement).reconcile(), expected)


@pytest.mark.parametrize("name", NO_RULE_OF_DTENSOR)
def test_op_that_dtensor_refuses(name):
    with pytest.raises(NotImplementedError, match="does not have a sharding strategy"):
        drawn(NO_RULE_OF_DTENSOR[name], 2, Shard(0))


@pytest.mark.parametrize("name", NO_RULE_OF_OURS)
def test_op_that_is_refused(name):
    with pytest.raises(lt.UnsupportedError, match="cannot draw independently of sharding"):
        drawn(NO_RULE_OF_OURS[name], 2, Shard(0))


def test_a_draw_into_the_parts_of_a_sum_is_refused():
    def draw(x):
        parts = DTensor.from_local(x.to_local(), x.device_mesh, [Partial()])
        return parts.exponential_()

    with pytest.raises(lt.UnsupportedError, match="what is drawn cannot be the parts of a sum"):
        drawn(draw, 2, Replicate())
