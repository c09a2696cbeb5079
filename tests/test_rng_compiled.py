"""Random numbers in compiled code: the same bits as in eager, forward, backward and afterwards."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import default_partition
from torch.utils.checkpoint import checkpoint

import localtensor_compile as lt
from localtensor_compile.errors import UnsupportedError

from .rng_programs import (
    EVEN,
    FACTORIES,
    OPS,
    SEEDS,
    UNEVEN,
    WORLD,
    Result,
    as_tuple,
    assert_same,
    backward,
    inputs_of,
    per_rank,
    run_local,
    run_plain,
    shard,
)

# Warnings of torch about itself, from compiling an autograd.Function and from importing Inductor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

PROGRAMS = {**OPS, **FACTORIES}
NEEDS_EVEN = {"xavier"}
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)
    torch._dynamo.reset()


def check(program, inputs, backend, seeds=SEEDS, **how):
    wanted = run_plain(program, inputs, seeds)
    got = run_local(program, inputs, seeds, compile_with=backend)
    assert_same(got, wanted, exact=backend != "inductor", **how)


def together(names):
    """One program that runs several: all their draws in one graph."""
    return lambda x: [o for n in names for o in as_tuple(PROGRAMS[n](x))]


# ---------------------------------------------------------------- every program
# Where autograd, checkpointing or unused draws play a part: one by one, gradients bit for bit.
ALONE = {
    "dropout", "dropout twice", "dropout p=1", "native_dropout", "rrelu inplace", "attention",
    "dead draws", "mlp", "checkpoint", "checkpoint reentrant", "two checkpoints",
    "nested checkpoints", "dead in checkpoint", "backward draws", "backward drops",
    "backward draws between", "factory in backward", "factory in checkpoint", "mixed",
}  # fmt: skip
OTHERS = [n for n in PROGRAMS if n not in ALONE]
GROUPS = [OTHERS[i::6] for i in range(6)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ALONE else pytest.mark.slow) for n in PROGRAMS]
)
def test_aot_eager_even(name):
    check(PROGRAMS[name], inputs_of(EVEN), "aot_eager")


@pytest.mark.parametrize("names", GROUPS, ids=range(6))
def test_aot_eager_in_groups(names):
    # Gradients of many outputs are added up in another order.
    check(together(names), inputs_of(EVEN), "aot_eager", exact_grad=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in NEEDS_EVEN])
def test_aot_eager_uneven(name):
    check(PROGRAMS[name], inputs_of(UNEVEN), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_eager_backend(name):
    program, inputs = PROGRAMS[name], inputs_of(EVEN)
    got = run_local(program, inputs, compile_with="eager")
    if "checkpoint" in name:
        # torch's own eager backend draws again in backward, which changes gradients and states.
        program = torch.compile(program, backend="eager")
    assert_same(got, run_plain(program, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in NEEDS_EVEN])
def test_inductor(name, shapes):
    check(PROGRAMS[name], inputs_of(shapes), "inductor")


MANY = [
    "dropout twice", "transposed", "rand of shape", "bernoulli_ tensor", "multinomial", "rrelu",
    "randperm", "dead draws", "backward draws between",
]  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_many_draws_in_one_graph_keep_their_order(backend):
    check(together(MANY), inputs_of(UNEVEN), backend, exact_grad=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_seeds_give_equal_draws(backend):
    inputs = inputs_of(EVEN)
    program = together(["dropout twice", "rand twice", "mlp"])
    check(program, [inputs[0]] * WORLD, backend, seeds=(5, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    # Not dropout in bfloat16: torch's own compiled dropout rounds its scale differently.
    program = together(["normal_", "uniform_", "rand_like", "bernoulli", "randint_like"])
    check(program, inputs_of(UNEVEN, dtype), "aot_eager")


# ---------------------------------------------------------------- where draws happen
class Loud(torch.autograd.Function):
    """Draws in backward: dead, of its own shape, of the gradient, and of a saved tensor."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.rand(6)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        torch.randn(3)
        early = torch.rand(6)
        noise = torch.bernoulli(x)
        scaled = F.dropout(grad) * 2
        torch.rand_like(grad)
        return scaled + early + noise


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_draws_when_backward_runs(backend):
    """Draws between forward and backward come before those of backward."""
    inputs = inputs_of(EVEN)
    results = []
    for compiled in (None, backend):
        outputs = []
        for ranks in range(WORLD) if compiled is None else [None]:
            with lt.LocalTensorMode(WORLD) if compiled else torch.enable_grad():
                torch.manual_seed(SEEDS[ranks] if compiled is None else per_rank(SEEDS))
                x = inputs[ranks].clone() if compiled is None else lt.rank_map(inputs.__getitem__)
                x = x.detach().clone().requires_grad_()
                step = Loud.apply
                if compiled is not None:
                    step = torch.compile(step, backend=compiled, fullgraph=True)
                y = step(x)
                between = torch.rand(3)
                grad = backward([y], x)
                outputs.append(([y.detach(), between], grad, torch.get_rng_state()))
        results.append(outputs)
    alone, [together_] = results
    wanted = [Result(*one) for one in alone]
    got = [
        Result([shard(o, r) for o in together_[0]], shard(together_[1], r), shard(together_[2], r))
        for r in range(WORLD)
    ]
    assert_same(got, wanted, exact=backend != "inductor")


def aot_default_partitioner(gm, example_inputs):
    from functorch.compile import make_boxed_func

    return aot_module_simplified(
        gm, example_inputs, fw_compiler=lambda g, _: make_boxed_func(g.forward),
        bw_compiler=lambda g, _: make_boxed_func(g.forward), partition_fn=default_partition,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["dropout", "dead draws", "mlp", "two checkpoints", "backward drops", "rand twice"]
)
def test_default_partitioner(name):
    check(PROGRAMS[name], inputs_of(EVEN), aot_default_partitioner)


def graphs_of(program, inputs, seeds=SEEDS):
    """The forward and backward graphs that AOTAutograd makes."""
    graphs = []

    def keep(gm, _):
        from functorch.compile import make_boxed_func

        graphs.append(gm.graph)
        return make_boxed_func(gm.forward)

    def backend(gm, example_inputs):
        return aot_module_simplified(gm, example_inputs, fw_compiler=keep, bw_compiler=keep)

    run_local(program, inputs, seeds, compile_with=backend)
    return graphs


def random_nodes(graph):
    return [
        n.target for n in graph.nodes if getattr(n.target, "namespace", "") == "localtensor_random"
    ]


def test_one_node_per_draw_for_all_ranks():
    program = lambda x: F.dropout(F.dropout(x)) + torch.rand(6)
    for world in (1, 2, 5):
        forward, back = graphs_of(program, inputs_of(((4, 6),) * world), [3] * world)
        assert len(random_nodes(forward)) == 3
        assert random_nodes(back) == []
        for node in forward.nodes:
            tags = getattr(node.target, "tags", ())
            random = torch.Tag.nondeterministic_seeded in tags
            assert not random or node.target.namespace == "localtensor_random", node


def test_checkpointed_draws_are_saved_not_repeated():
    def program(x):
        return checkpoint(lambda t: F.dropout(t.sin()).cos(), x, use_reentrant=False)

    forward, back = graphs_of(program, inputs_of(EVEN))
    assert len(random_nodes(forward)) == 1
    assert random_nodes(back) == []
    assert any("sin" in str(n.target) or "cos" in str(n.target) for n in back.nodes)


def test_nodes_are_not_captured_into_cuda_graphs():
    (target,) = random_nodes(graphs_of(F.dropout, inputs_of(EVEN))[0])
    assert torch.Tag.cudagraph_unsafe in target.tags


# ---------------------------------------------------------------- calls after the first
def step(x):
    y = F.dropout(x, 0.3) * torch.rand(x.shape)
    return y + torch.empty_like(x).normal_() + torch.rand_like(x)


def run_batches(program, batches, seeds, backend, **options):
    """Several calls in a row, plain per rank and compiled; the number of compiled graphs."""
    wanted = []
    for rank, seed in enumerate(seeds):
        torch.manual_seed(seed)
        outputs = [program(batch[rank]) for batch in batches]
        wanted.append(Result(outputs, None, torch.get_rng_state()))
    counter = CompileCounterWithBackend(backend)
    options.setdefault("fullgraph", True)
    with lt.LocalTensorMode(len(seeds)):
        torch.manual_seed(per_rank(seeds))
        compiled = torch.compile(program, backend=counter, **options)
        outputs = [compiled(lt.rank_map(batch.__getitem__)) for batch in batches]
        state = torch.get_rng_state()
    got = [Result([shard(o, r) for o in outputs], None, shard(state, r)) for r in range(len(seeds))]
    assert_same(got, wanted, exact=backend != "inductor")
    return counter.frame_count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [(0, 0, 0), (0, 1, 3)], ids=["even", "uneven"])
def test_dynamic_shapes(backend, spread):
    batches = [inputs_of([(n + s, 6) for s in spread]) for n in (4, 5, 7, 9)]
    assert run_batches(step, batches, SEEDS, backend, dynamic=True) == 1


def test_shapes_that_become_dynamic():
    batches = [inputs_of([(n, 6)] * WORLD) for n in (4, 5, 7, 9)]
    assert run_batches(step, batches, SEEDS, "aot_eager") == 2


def test_dynamic_counts():
    program = lambda x: torch.multinomial(x, x.shape[1] - 1) + torch.randperm(x.shape[0])[:, None]
    batches = [inputs_of([(n, 6)] * WORLD) for n in (4, 5, 7)]
    assert run_batches(program, batches, SEEDS, "aot_eager", dynamic=True) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_function_under_several_seeds(backend):
    inputs = inputs_of(EVEN)
    program = lambda x: F.dropout(x) + torch.rand(6)
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    with lt.LocalTensorMode(WORLD):
        for seeds in ((1, 2, 3), (5, 5, 5), (9, 1, 4)):
            torch.manual_seed(per_rank(seeds))
            got = compiled(lt.rank_map(inputs.__getitem__))
            with torch._dynamo.set_stance("force_eager"):
                torch.manual_seed(per_rank(seeds))
                wanted = compiled(lt.rank_map(inputs.__getitem__))
            for r in range(WORLD):
                torch.testing.assert_close(shard(got, r), shard(wanted, r))
    with lt.LocalTensorMode(WORLD):
        torch.manual_seed(per_rank((9, 1, 4)))
        again = compiled(lt.rank_map(inputs.__getitem__))
    for r in range(WORLD):
        assert torch.equal(shard(got, r), shard(again, r))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_inside_a_mode_and_called_outside(backend):
    inputs = inputs_of(UNEVEN)
    program = lambda x: F.dropout(F.dropout(x))
    compiled = torch.compile(program, backend=backend, fullgraph=True)
    with lt.LocalTensorMode(WORLD):
        compiled(lt.rank_map(inputs.__getitem__))
    torch.manual_seed(4)
    got = compiled(compiled(lt.LocalTensor(dict(enumerate(inputs)))))
    for r, x in enumerate(inputs):
        torch.manual_seed(4)
        torch.testing.assert_close(shard(got, r), program(program(x)))


def test_compiled_and_called_outside_every_mode():
    inputs = inputs_of(EVEN)
    compiled = torch.compile(F.dropout, backend="aot_eager", fullgraph=True)
    torch.manual_seed(4)
    got = compiled(lt.LocalTensor(dict(enumerate(inputs))))
    after = torch.get_rng_state()
    for r, x in enumerate(inputs):
        torch.manual_seed(4)
        assert torch.equal(shard(got, r), F.dropout(x))
        assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_steps(backend):
    def build():
        torch.manual_seed(0)
        layers = (
            torch.nn.Linear(6, 8),
            torch.nn.Dropout(0.3),
            torch.nn.GELU(),
            torch.nn.Linear(8, 6),
        )
        return torch.nn.Sequential(*layers, torch.nn.Dropout(0.2))

    def train(x, seeds, compile_with):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        forward = torch.compile(model, backend=compile_with, fullgraph=True)
        torch.manual_seed(seeds)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = forward(x).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, torch.get_rng_state()

    inputs = inputs_of(EVEN)
    wanted = []
    for x, seed in zip(inputs, SEEDS):
        losses, state = train(x, seed, "eager")
        wanted.append(Result(losses, None, state))
    torch._dynamo.reset()
    with lt.LocalTensorMode(WORLD):
        losses, state = train(lt.rank_map(inputs.__getitem__), per_rank(SEEDS), backend)
    got = [Result([shard(v, r) for v in losses], None, shard(state, r)) for r in range(WORLD)]
    # Compiled dropout multiplies by 1/(1-p) where eager divides: draws equal, losses close.
    assert_same(got, wanted, exact=False)


# ---------------------------------------------------------------- graph breaks
def test_draws_around_a_graph_break():
    def program(x):
        x = F.dropout(x)
        torch._dynamo.graph_break()
        return F.dropout(x + torch.rand_like(x))

    batches = [inputs_of(EVEN)]
    assert run_batches(program, batches, SEEDS, "aot_eager", fullgraph=False) == 2


def test_seeds_and_states_inside_a_compiled_function():
    def program(x):
        x = F.dropout(x)
        torch.manual_seed(7)
        x = x + torch.rand_like(x)
        state = torch.get_rng_state()
        y = F.dropout(x)
        torch.set_rng_state(state)
        with torch.random.fork_rng():
            y = y + F.dropout(x)
        return y + F.dropout(x)

    batches = [inputs_of(EVEN)]
    assert run_batches(program, batches, SEEDS, "aot_eager", fullgraph=False) > 1


# ---------------------------------------------------------------- rank_map inside
@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_map_and_tensor_map_draw_for_their_rank(backend):
    def program(x):
        x = lt.tensor_map(x, lambda r, t: F.dropout(t * torch.normal(0.0, 1.0, (6,)), 0.5))
        noise = lt.rank_map(lambda r: torch.rand(6) + torch.zeros(6).uniform_())
        return x * torch.rand(6) + noise + torch.rand_like(x)

    inputs = inputs_of(EVEN)
    eager = run_local(program, inputs)
    compiled = run_local(program, inputs, compile_with=backend)
    assert_same(compiled, eager, exact=backend != "inductor")
    assert not torch.equal(eager[0].state, eager[1].state)


# ---------------------------------------------------------------- other contexts
def test_autocast():
    def program(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.bernoulli(x.detach()) * (x @ x.t()).float().sum()

    check(program, inputs_of(EVEN), "aot_eager")


def test_inference_mode():
    program = lambda x: (
        F.alpha_dropout(F.dropout(x), 0.2, training=True) + F.rrelu(x, training=True)
    )
    inputs = inputs_of(EVEN)
    with torch.inference_mode():
        assert run_batches(program, [inputs], SEEDS, "aot_eager") == 1


@pytest.mark.slow
def test_transformer_layer():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)
    inputs = [x[None] for x in inputs_of(EVEN)]
    wanted = run_plain(layer, inputs)
    with lt.LocalTensorMode(WORLD):
        lt.replicate(layer)
    got = run_local(layer, inputs, compile_with="aot_eager")
    assert_same(got, wanted, exact=False)


def test_vmap():
    inputs = inputs_of(EVEN)
    program = torch.vmap(lambda t: t * torch.rand_like(t), randomness="different")
    assert run_batches(program, [inputs], SEEDS, "aot_eager") == 1


# ---------------------------------------------------------------- caches
@pytest.mark.parametrize(
    "cache", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["cache", "no cache"]
)
def test_fx_graph_cache(cache):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    program = lambda x: torch.empty_like(x).normal_() + F.dropout(x.detach())
    inputs = inputs_of(EVEN)
    with fresh_cache(), config.patch(fx_graph_cache=cache, fx_graph_remote_cache=False):
        for call in range(2):
            counters.clear()
            check(program, inputs, "inductor")
            hits = counters["inductor"]["fxgraph_cache_hit"]
            assert (hits > 0) == (cache and call == 1)


IN_A_NEW_PROCESS = """
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
from tests.rng_programs import EVEN, assert_same, inputs_of, run_local, run_plain
program = lambda x: F.dropout(x * 2) + torch.empty_like(x).normal_() + F.dropout(x)
inputs = inputs_of(EVEN)
assert_same(run_local(program, inputs, compile_with="inductor"), run_plain(program, inputs), False)
print("HITS", counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_autograd_cache_in_a_second_process(tmp_path):
    import os

    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", IN_A_NEW_PROCESS],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        hits.append(int(run.stdout.split("HITS")[1]))
    assert hits == [0, 1]


# ---------------------------------------------------------------- errors
def error_of(program, x, **options):
    with pytest.raises(Exception) as caught:
        torch.compile(program, backend="aot_eager", fullgraph=True, **options)(x)
    return str(caught.value)


@pytest.mark.parametrize(
    "program",
    [
        lambda x, plain: x + F.dropout(plain),
        lambda x, plain: x + torch.rand_like(plain),
        lambda x, plain: x + plain.clone().normal_(),
        lambda x, plain: x + torch.bernoulli(plain),
        lambda x, plain: x + torch.normal(plain, plain),
    ],
)
def test_a_draw_for_a_plain_tensor(program):
    plain = torch.ones(6) / 2
    with lt.LocalTensorMode(2):
        x = torch.ones(6)
        text = error_of(lambda x: program(x, plain), x)
    assert "would draw random numbers for a plain tensor inside a compiled or traced" in text


def test_a_plain_random_node_in_a_graph():
    from localtensor_compile.world.random_checks import check_graph

    graph = torch.fx.Graph()
    node = graph.call_function(torch.rand, (3,))
    node.stack_trace = '  File "train.py", line 7, in step\n    x = torch.rand(3)\n        ^^^^^'
    graph.output(node)
    module = torch.fx.GraphModule({}, graph)
    with pytest.raises(lt.PlainTensorError, match="call rand once for all ranks") as error:
        check_graph(module)
    assert 'File "train.py", line 7, in step: x = torch.rand(3)' in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pin_memory": True}, "got pin_memory=True inside a compiled or traced function"),
        ({"layout": torch.sparse_coo}, "got layout=torch.sparse_coo inside a compiled or traced"),
        ({"generator": torch.Generator()}, "torch.compile does not support generators there"),
    ],
)
def test_options_of_factories_while_tracing(options, text):
    from torch.fx.experimental.proxy_tensor import make_fx

    from localtensor_compile.dispatch.random_factories import random_factory

    with pytest.raises(UnsupportedError, match=text):
        make_fx(lambda: random_factory(torch.rand, range(2), (3,), options)._local_tensors[0])()


def test_an_explicit_generator_on_a_local_tensor_while_tracing():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = lt.LocalTensor({0: torch.ones(2)})
    g = torch.Generator()
    with pytest.raises(UnsupportedError, match=r"torch\.compile does not support generators"):
        make_fx(lambda: torch.bernoulli(x, generator=g)._local_tensors[0])()


def test_a_bound_in_a_tensor_while_tracing():
    with lt.LocalTensorMode(2):
        x = torch.ones(6)
        high = torch.tensor(5)
        text = error_of(lambda x: torch.ops.aten.randint_like.Tensor(x, high), x)
    assert "takes its bound from a tensor" in text


def test_make_fx_draws_per_rank_when_the_graph_runs():
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = inputs_of(EVEN)

    def program(*shards):
        x = lt.LocalTensor(dict(enumerate(shards)))
        return list(torch.native_dropout(x, 0.5, True)[0]._local_tensors.values())

    graph = make_fx(program)(*inputs)
    with lt.LocalTensorMode(WORLD) as mode:
        torch.manual_seed(per_rank(SEEDS))
        with mode.disable():
            got = graph(*inputs)
    for x, seed, value in zip(inputs, SEEDS, got):
        torch.manual_seed(seed)
        assert torch.equal(value, torch.native_dropout(x, 0.5, True)[0])
