"""Random numbers in eager: seeds, states and draws of every rank equal those of a real process."""

import re
import threading

import pytest
import torch
import torch.nn.functional as F

import localtensor_compile as lt
from localtensor_compile.dispatch import generators
from localtensor_compile.dispatch.random_factories import PLAIN_DRAWS, draws_for_plain
from localtensor_compile.dispatch.random_nodes import NODES
from localtensor_compile.dispatch.random_ops import _DRAWS_NOTHING, RandomOp, _traced_form
from localtensor_compile.errors import (
    PlainTensorError,
    RankDivergence,
    UnsupportedError,
    WorldError,
)
from localtensor_compile.values.op_table import handler_of

from .rng_programs import (
    EAGER_ONLY,
    EVEN,
    FACTORIES,
    OPS,
    SEEDS,
    UNEVEN,
    WORLD,
    assert_same,
    inputs_of,
    per_rank,
    run_local,
    run_plain,
    shard,
)

PROGRAMS = {**OPS, **FACTORIES, **EAGER_ONLY}
# Its bound is a Python float made from a size.
NEEDS_EVEN = {"xavier"}


@pytest.fixture(autouse=True)
def process_state_is_kept():
    """No test leaves torch's default generator in another state."""
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def local(inputs):
    return lt.rank_map(lambda r: inputs[r].clone())


def of_seed(seed, draw):
    """`draw()` in a process with this seed."""
    outside = torch.get_rng_state()
    torch.manual_seed(seed)
    result = draw()
    torch.set_rng_state(outside)
    return result


def assert_ranks(tensor, wanted):
    for rank, value in enumerate(wanted):
        assert torch.equal(shard(tensor, rank), value), f"rank {rank}"


# ---------------------------------------------------------------- programs
@pytest.mark.parametrize("seeds", [SEEDS, (5, 5, 5)], ids=["different seeds", "one seed"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_even(name, seeds):
    inputs = inputs_of(EVEN)
    assert_same(run_local(PROGRAMS[name], inputs, seeds), run_plain(PROGRAMS[name], inputs, seeds))


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in NEEDS_EVEN])
def test_uneven(name):
    inputs = inputs_of(UNEVEN)
    assert_same(run_local(PROGRAMS[name], inputs), run_plain(PROGRAMS[name], inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["dropout", "normal_", "uniform_", "rand_like", "bernoulli", "mlp"]
)
def test_other_dtypes(name, dtype):
    inputs = inputs_of(UNEVEN, dtype)
    assert_same(run_local(OPS[name], inputs), run_plain(OPS[name], inputs))


def test_empty_shards_draw_nothing():
    inputs = inputs_of(((0, 6), (4, 6), (0, 6)))
    program = lambda x: F.dropout(x) * torch.rand_like(x)
    assert_same(run_local(program, inputs), run_plain(program, inputs))


def test_large_draws_take_the_vectorized_path():
    inputs = inputs_of(((33, 40), (32, 40), (31, 40)))
    program = lambda x: x * torch.empty_like(x).normal_() + F.dropout(x)
    assert_same(run_local(program, inputs), run_plain(program, inputs))


def test_inference_mode():
    inputs = inputs_of(UNEVEN)

    def program(x):
        with torch.inference_mode():
            return F.alpha_dropout(F.dropout(x), 0.2, training=True) + F.rrelu(x, training=True)

    assert_same(run_local(program, inputs), run_plain(program, inputs))


def test_lstm_dropout():
    torch.manual_seed(0)
    model = torch.nn.LSTM(6, 6, 2, dropout=0.5)
    inputs = inputs_of(EVEN)
    wanted = [of_seed(s, lambda x=x: model(x)[0].detach()) for s, x in zip(SEEDS, inputs)]
    with lt.LocalTensorMode(WORLD):
        lt.replicate(model)
        torch.manual_seed(per_rank(SEEDS))
        assert_ranks(model(local(inputs))[0].detach(), wanted)


def test_nn_modules_initialize_per_rank():
    wanted = [of_seed(s, lambda: torch.nn.Linear(6, 4).weight.detach()) for s in SEEDS]
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank(SEEDS))
        layer = torch.nn.Linear(6, 4)
    assert_ranks(layer.weight.detach(), wanted)


def test_requires_grad_of_factories():
    with lt.LocalTensorMode(2):
        assert torch.rand(3, requires_grad=True).requires_grad
        assert not torch.rand(3).requires_grad


# ---------------------------------------------------------------- seeds and states
def test_ranks_start_in_the_state_of_the_process():
    torch.manual_seed(77)
    torch.rand(5)
    before = torch.get_rng_state()
    wanted = torch.rand(3)
    torch.set_rng_state(before)
    with lt.LocalTensorMode(2):
        assert_ranks(torch.rand(3), [wanted, wanted])
    assert torch.equal(torch.get_rng_state(), before), "ranks do not touch the process's generator"


def test_a_mode_entered_again_starts_anew():
    mode = lt.LocalTensorMode(2)
    with mode:
        first = torch.rand(3)
        with mode:
            assert not torch.equal(shard(torch.rand(3), 0), shard(first, 0))
    with mode:
        assert torch.equal(shard(torch.rand(3), 0), shard(first, 0))


def test_nested_modes_start_in_the_outer_ranks_states():
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank(SEEDS))
        torch.rand(2)
        before = torch.get_rng_state()
        with lt.LocalTensorMode({1, 2}):
            inner = torch.rand(3)
        assert_ranks(torch.get_rng_state(), [shard(before, r) for r in range(WORLD)])
        outer = torch.rand(3)
    for r in (1, 2):
        assert torch.equal(shard(inner, r), shard(outer, r))


def test_manual_seed_with_one_int():
    wanted = of_seed(9, lambda: torch.rand(3))
    with lt.LocalTensorMode(2):
        assert torch.manual_seed(9) is torch.default_generator
        assert_ranks(torch.rand(3), [wanted, wanted])
        assert torch.initial_seed() == 9
        torch.random.manual_seed(9)
        assert_ranks(torch.rand(3), [wanted, wanted])


def test_manual_seed_from_the_rank():
    from torch.distributed.device_mesh import init_device_mesh

    with lt.LocalTensorMode(WORLD):
        mesh = init_device_mesh("cpu", (WORLD,))
        torch.manual_seed(mesh.get_local_rank() + 1)
        drawn = torch.rand(3)
        seeds = torch.initial_seed()
    assert_ranks(drawn, [of_seed(r + 1, lambda: torch.rand(3)) for r in range(WORLD)])
    assert seeds.node._local_ints == {0: 1, 1: 2, 2: 3}


def test_manual_seed_with_a_tensor_and_with_a_negative_int():
    with lt.LocalTensorMode(2):
        torch.manual_seed(lt.rank_map(lambda r: torch.tensor(r + 4)))
        assert_ranks(torch.rand(3), [of_seed(r + 4, lambda: torch.rand(3)) for r in range(2)])
        torch.manual_seed(-3)
        assert_ranks(torch.rand(3), [of_seed(-3, lambda: torch.rand(3))] * 2)


def test_seed_without_some_rank():
    with lt.LocalTensorMode({0, 1}):
        part = lt.LocalTensor({0: torch.zeros((), dtype=torch.int64)._local_tensors[0]})
        with pytest.raises(WorldError, match=r"the seed has no value for ranks \[1\]"):
            torch.manual_seed(part)


def test_nondeterministic_seeds_differ_per_rank():
    with lt.LocalTensorMode(2):
        seeds = torch.seed()
        drawn = torch.rand(3)
        assert torch.initial_seed().node._local_ints == seeds.node._local_ints
    for r in range(2):
        seed = seeds.node._local_ints[r]
        assert torch.equal(shard(drawn, r), of_seed(seed, lambda: torch.rand(3)))


def test_states_are_saved_and_restored_per_rank():
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank(SEEDS))
        state = torch.get_rng_state()
        assert isinstance(state, lt.LocalTensor)
        first = torch.rand(3)
        torch.random.set_rng_state(state)
        assert_ranks(torch.rand(3), [shard(first, r) for r in range(WORLD)])
        plain = torch.Generator().manual_seed(1).get_state()
        torch.set_rng_state(plain)
        assert_ranks(torch.rand(3), [of_seed(1, lambda: torch.rand(3))] * WORLD)


def test_fork_rng():
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank(SEEDS))
        before = torch.get_rng_state()
        with torch.random.fork_rng():
            torch.rand(3)
        assert_ranks(torch.get_rng_state(), [shard(before, r) for r in range(WORLD)])


def test_rank_map_draws_from_the_ranks_generator():
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank(SEEDS))
        first = lt.rank_map(lambda r: torch.rand(3))
        second = torch.rand(3)
        dropped = lt.tensor_map(second, lambda r, t: F.dropout(t))

    def process():
        return torch.rand(3), (x := torch.rand(3)), F.dropout(x)

    wanted = [of_seed(s, process) for s in SEEDS]
    for i, got in enumerate((first, second, dropped)):
        assert_ranks(got, [w[i] for w in wanted])


def test_rank_map_can_seed_its_rank():
    with lt.LocalTensorMode(2):
        lt.rank_map(lambda r: (torch.manual_seed(r + 4), torch.zeros(1))[1])
        assert_ranks(torch.rand(3), [of_seed(r + 4, lambda: torch.rand(3)) for r in range(2)])


def test_a_disabled_mode_uses_the_process_generator():
    wanted = of_seed(3, lambda: torch.rand(3))
    with lt.LocalTensorMode(2) as mode:
        torch.manual_seed(8)
        with mode.disable():
            torch.manual_seed(3)
            assert torch.equal(torch.rand(3), wanted)
        assert_ranks(torch.rand(3), [of_seed(8, lambda: torch.rand(3))] * 2)


def test_on_rank_restores_the_outer_generator_after_an_error():
    world = generators.RankGenerators(range(2))
    before = torch.get_rng_state()
    with pytest.raises(ValueError), world.on_rank(1):
        torch.rand(3)
        raise ValueError
    assert torch.equal(torch.get_rng_state(), before)
    assert world.diverged()


def test_threads_have_their_own_world():
    found = []
    with lt.LocalTensorMode(2):
        mine = generators.current()
        thread = threading.Thread(target=lambda: found.append(generators.current()))
        thread.start()
        thread.join()
    assert mine is not None
    assert found == [None]


def test_engine_threads_see_the_world_of_the_backward_call():
    # torch copies its thread-local store to the threads of the autograd engine; here by hand.
    from localtensor_compile import _torch

    found = []
    with lt.LocalTensorMode(2):
        mine = generators.current()
        entries = _torch.stashed(generators._TLS_KEY)

        def engine_thread():
            _torch.stash_for_engine_threads(generators._TLS_KEY, entries)
            found.append(generators.current())

        thread = threading.Thread(target=engine_thread)
        thread.start()
        thread.join()
    assert found == [mine]


# ---------------------------------------------------------------- explicit generators
def use_generator(g):
    return lambda x: (
        torch.rand(x.shape, generator=g)
        + torch.bernoulli(x, generator=g)
        + torch.empty_like(x).normal_(generator=g)
        + torch.randperm(x.shape[0], generator=g)[:, None]
    )


@pytest.mark.parametrize("shapes", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_every_rank_replays_an_explicit_generator(shapes):
    inputs = inputs_of(shapes)
    wanted = []
    for x in inputs:
        program = use_generator(torch.Generator().manual_seed(5))
        wanted.append((program(x), program(x)))
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank(SEEDS))
        before = torch.get_rng_state()
        program = use_generator(torch.Generator().manual_seed(5))
        x = local(inputs)
        for i in range(2):
            assert_ranks(program(x), [w[i] for w in wanted])
        assert_ranks(torch.get_rng_state(), [shard(before, r) for r in range(WORLD)])


def test_an_explicit_generator_advances_once():
    g, alone = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    with lt.LocalTensorMode(WORLD):
        torch.rand(4, generator=g)
    torch.rand(4, generator=alone)
    assert torch.equal(g.get_state(), alone.get_state())


def test_the_default_generator_stands_for_each_ranks_own():
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank(SEEDS))
        drawn = torch.rand(3, generator=torch.default_generator)
        drawn = drawn + torch.bernoulli(drawn, generator=torch.default_generator)

    def process():
        x = torch.rand(3)
        return x + torch.bernoulli(x)

    assert_ranks(drawn, [of_seed(s, process) for s in SEEDS])


def test_a_generator_that_ranks_left_in_different_states():
    g = torch.Generator().manual_seed(5)
    inputs = inputs_of(UNEVEN)
    with lt.LocalTensorMode(WORLD) as mode:
        x = local(inputs)
        first = torch.rand(x.shape, generator=g)
        g.manual_seed(5)  # seeding makes the states known again
        second = torch.rand(x.shape, generator=g)
        assert_ranks(second, [shard(first, r) for r in range(WORLD)])
        with mode.disable():
            torch.rand(1, generator=g)
        with pytest.raises(RankDivergence, match="drew different amounts from it") as error:
            torch.rand(x.shape, generator=g)
        assert "a torch.Generator passed as generator=" in str(error.value)
        assert "Seed it again" in str(error.value)


# ---------------------------------------------------------------- outside every mode
def test_outside_a_mode_the_process_generator_is_replayed():
    inputs = inputs_of(EVEN)
    x = lt.LocalTensor(dict(enumerate(inputs)))
    torch.manual_seed(4)
    got = F.dropout(F.dropout(x))
    after = torch.get_rng_state()
    for r, one in enumerate(inputs):
        torch.manual_seed(4)
        assert torch.equal(shard(got, r), F.dropout(F.dropout(one)))
        assert torch.equal(torch.get_rng_state(), after)


def test_outside_a_mode_uneven_ranks_go_on_from_their_own_states():
    inputs = inputs_of(UNEVEN)
    x = lt.LocalTensor(dict(enumerate(inputs)))
    torch.manual_seed(4)
    got = [F.dropout(x), torch.native_dropout(x, 0.5, True)[0], torch.rand_like(x)]
    for r, one in enumerate(inputs):
        torch.manual_seed(4)
        wanted = [F.dropout(one), torch.native_dropout(one, 0.5, True)[0], torch.rand_like(one)]
        for a, b in zip(got, wanted):
            assert torch.equal(shard(a, r), b)
    torch.manual_seed(4)
    F.dropout(x)
    torch.rand(1)
    with pytest.raises(RankDivergence, match="torch's default generator stands for"):
        F.dropout(x)
    torch.manual_seed(4)
    assert torch.equal(shard(F.dropout(x), 1), shard(got[0], 1))


def test_ranks_outside_the_world():
    x = lt.LocalTensor({r: torch.ones(2) for r in range(3)})
    with (
        lt.LocalTensorMode(2),
        pytest.raises(
            WorldError, match=r"random numbers for ranks \[2\] were asked for in a world"
        ),
    ):
        F.dropout(x)


# ---------------------------------------------------------------- plain tensors
def test_a_draw_into_a_plain_tensor_while_ranks_agree():
    plain = torch.zeros(4)
    with lt.LocalTensorMode(2):
        torch.manual_seed(6)
        plain.normal_()
        like = torch.rand_like(plain)
        after = torch.rand(2)

    def process():
        return torch.zeros(4).normal_(), torch.rand(4), torch.rand(2)

    wanted = of_seed(6, process)
    assert torch.equal(plain, wanted[0])
    assert torch.equal(like, wanted[1])
    assert_ranks(after, [wanted[2]] * 2)


@pytest.mark.parametrize(
    "draw",
    [
        lambda t: t.normal_(),
        F.dropout,
        torch.rand_like,
        torch.bernoulli,
        lambda t: torch.normal(t, t),
        lambda t: F.scaled_dot_product_attention(t, t, t, dropout_p=0.5),
        lambda t: F.rrelu(t, training=True),
    ],
)
def test_a_draw_into_a_plain_tensor_while_ranks_differ(draw):
    plain = torch.ones(2, 2) / 2
    with lt.LocalTensorMode(2):
        torch.manual_seed(per_rank((1, 2)))
        with pytest.raises(PlainTensorError, match="for a plain tensor, but the ranks' generators"):
            draw(plain)
        F.dropout(plain, training=False)
        F.dropout(plain, 0.0)
        torch.rand_like(lt.replicate(plain))


def test_draws_for_plain():
    local_tensor = lt.LocalTensor({0: torch.ones(2)})
    assert draws_for_plain(torch.rand, (3,), {})
    assert draws_for_plain(F.dropout, (torch.ones(2),), {})
    assert not draws_for_plain(F.dropout, (torch.ones(2), 0.5, False), {})
    assert not draws_for_plain(F.dropout, (torch.ones(2),), {"p": 0.0})
    assert not draws_for_plain(F.dropout, (local_tensor,), {})
    assert not draws_for_plain(torch.add, (torch.ones(2),), {})
    assert torch.Tensor.uniform_ in PLAIN_DRAWS


def test_out_of_a_factory_must_be_a_local_tensor():
    plain = torch.empty(3)
    with (
        lt.LocalTensorMode(2),
        pytest.raises(PlainTensorError, match="draws for every rank, but out= is one plain tensor"),
    ):
        torch.rand(3, out=plain)


def test_out_is_resized_on_every_rank():
    with lt.LocalTensorMode(2):
        torch.manual_seed(per_rank((1, 2)))
        out = torch.empty(0)
        torch.rand(3, out=out)
    assert out.shape == (3,)
    assert_ranks(out, [of_seed(s, lambda: torch.rand(3)) for s in (1, 2)])


# ---------------------------------------------------------------- what cannot be drawn per rank
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_inside_vmap(randomness):
    with lt.LocalTensorMode(2):
        x = torch.ones(3, 2)
        with pytest.raises(UnsupportedError, match=r"inside torch\.vmap.*cannot draw per rank"):
            torch.vmap(F.dropout, randomness=randomness)(x)


@pytest.mark.parametrize("name", ["rand_like", "bernoulli", "normal_", "poisson", "multinomial"])
def test_other_draws_inside_vmap(name):
    inputs = [torch.stack([x, x * 0.5]) for x in inputs_of(EVEN)]
    program = torch.vmap(lambda x: OPS[name](x), randomness="different")
    assert_same(run_local(program, inputs), run_plain(program, inputs))


def test_in_place_draws_inside_vmap_with_one_randomness_for_all():
    with lt.LocalTensorMode(2):
        x = torch.ones(3, 2)
        with pytest.raises(UnsupportedError, match=r"normal_ inside torch\.vmap"):
            torch.vmap(lambda t: torch.empty_like(t).normal_(), randomness="same")(x)


@pytest.mark.parametrize(
    "draw", [torch.rand, torch.randn, torch.randperm], ids=lambda f: f.__name__
)
def test_factories_inside_vmap(draw):
    """A factory has no mapped tensor, so nothing tells of how many examples it would draw for."""
    with lt.LocalTensorMode(2):
        x = torch.ones(3, 6)
        text = (
            f"torch.{draw.__name__} inside torch.vmap(randomness='different') cannot draw per rank"
        )
        with pytest.raises(UnsupportedError, match=re.escape(text)):
            torch.vmap(lambda t: t + draw(6), randomness="different")(x)


@pytest.mark.parametrize("draw", [F.gumbel_softmax, torch.nn.init.kaiming_uniform_])
def test_python_functions_that_draw_inside_vmap(draw):
    with lt.LocalTensorMode(2):
        x = torch.ones(3, 4, 2)
        with pytest.raises(UnsupportedError, match=r"inside torch\.vmap.*cannot draw per rank"):
            torch.vmap(lambda t: draw(t.clone()), randomness="same")(x)


DRAWING_INSIDE = {
    "svd_lowrank": lambda x: torch.svd_lowrank(x, 2)[1],
    "pca_lowrank": lambda x: torch.pca_lowrank(x, 2)[1],
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x[None], 2, output_size=2),
}


@pytest.mark.parametrize("name", DRAWING_INSIDE)
def test_python_functions_that_draw(name):
    program, inputs = DRAWING_INSIDE[name], [torch.arange(30.0).reshape(6, 5).sin()] * 2
    assert_same(run_local(program, inputs), run_plain(program, inputs))


@pytest.mark.parametrize("name", DRAWING_INSIDE)
def test_python_functions_that_draw_are_refused_in_compiled_code(name):
    torch._dynamo.reset()
    with lt.LocalTensorMode(2):
        x = torch.ones(6, 5)
        text = rf"would call torch\.(nn\.functional\.)?{name}, which draws random numbers inside"
        with pytest.raises(UnsupportedError, match=text):
            torch.compile(DRAWING_INSIDE[name], backend="aot_eager", fullgraph=True)(x)


def test_recurrent_kernels_with_a_shared_dropout_state():
    x = lt.LocalTensor({0: torch.ones(1, 1, 1)})
    op = torch.ops.aten._cudnn_rnn.default
    args = [x, [x], 1, None, x, None, 2, 1, 0, 1, False, 0.5, True, False, [], None]
    with pytest.raises(UnsupportedError, match="a state that the whole process shares"):
        handler_of(op)(op, tuple(args), {})


def random_overloads():
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::"):
            base, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(torch.ops.aten, base), overload or "default")
            if torch.Tag.nondeterministic_seeded in op.tags:
                yield op


def test_every_random_op_of_torch_is_known():
    """In eager each has a handler; in a graph each has a form, or raises UnsupportedError."""
    forms, refused = [], []
    for op in random_overloads():
        if op._schema.name in _DRAWS_NOTHING:
            continue
        assert isinstance(handler_of(op), RandomOp), op
        try:
            _traced_form(op)
            forms.append(op)
        except UnsupportedError as error:
            assert "compiled or traced function" in str(error)
            refused.append(op._schema.name.removeprefix("aten::"))
    assert len(forms) > 100
    assert set(NODES) <= set(forms)
    # Kernels of other devices, recurrent ones, factories without a LocalTensor, bounds in tensors.
    allowed = """
        _cudnn_attention_forward _cudnn_init_dropout_state _cudnn_rnn _efficient_attention_forward
        _flash_attention_forward _lstm_mps _scaled_dot_product_attention_math_for_mps
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_fused_attention_overrideable _triton_scaled_dot_attention miopen_rnn
        normal rand randint randint_like randn randperm
    """
    assert set(refused) <= set(allowed.split()), set(refused) - set(allowed.split())


# ---------------------------------------------------------------- CUDA
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@cuda
def test_cuda_states_per_rank():
    with lt.LocalTensorMode(2):
        torch.manual_seed(per_rank((1, 2)))
        state = torch.cuda.get_rng_state()
        drawn = torch.rand(5, device="cuda")
        torch.cuda.set_rng_state(state)
        again = torch.rand(5, device="cuda")
        torch.cuda.manual_seed_all(per_rank((1, 2)))
        third = torch.rand(5, device="cuda")
    for r, seed in enumerate((1, 2)):
        wanted = torch.rand(5, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        for got in (drawn, again, third):
            assert torch.equal(shard(got, r), wanted)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("name", ["dropout", "normal_", "rand_like", "multinomial", "attention"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_cuda_programs(name, backend):
    inputs = [x.cuda() for x in inputs_of(EVEN)]
    wanted, states = [], []
    for x, seed in zip(inputs, SEEDS):
        torch.manual_seed(seed)
        out = OPS[name](x)
        wanted.append(out[-1] if isinstance(out, tuple) else out)
        states.append(torch.cuda.get_rng_state())
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank(SEEDS))
        program = OPS[name]
        if backend is not None:
            torch._dynamo.reset()
            program = torch.compile(program, backend=backend, fullgraph=True)
        out = program(local(inputs))
        got, state = out[-1] if isinstance(out, tuple) else out, torch.cuda.get_rng_state()
    for r in range(WORLD):
        torch.testing.assert_close(shard(got, r), wanted[r])
        assert torch.equal(shard(state, r), states[r])


@pytest.mark.parametrize("name", DRAWING_INSIDE)
def test_python_functions_that_draw_on_an_older_torch(name, monkeypatch):
    """Without a way past torch's check for function modes they would draw once for all ranks."""
    monkeypatch.setattr("localtensor_compile.world.factories.redispatch", None)
    with lt.LocalTensorMode(2):
        x = torch.ones(6, 5)
        with pytest.raises(UnsupportedError, match=f"{name} may draw random numbers, which this"):
            DRAWING_INSIDE[name](x)
