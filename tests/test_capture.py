"""lt.capture: the graphs are those that real processes compile, line by line; folded; typed."""

import functools

import pytest
import torch

import localtensor_compile as lt
from localtensor_compile import cli
from localtensor_compile.golden.fold import GroupNames, fold
from localtensor_compile.golden.text import line_text, read, write
from tests import graph_programs as programs
from tests.hash_seeds import printed
from tests.parallel import (
    context_parallel,
    data_parallel,
    dtensor_redistribute,
    expert_parallel,
    tensor_parallel,
)
from tests.parallel.harness import worlds
from tests.parallel.real_graphs import lines_on_this_rank

slow = pytest.mark.slow


# ---------------------------------------------------------------- as real ranks
PROGRAMS = {
    "mlp": (tensor_parallel.mlp, {"hidden": 8}),
    "uneven mlp": (tensor_parallel.mlp, {"hidden": 7}),
    "loss parallel": (tensor_parallel.cross_entropy, {}),
    "replicated parameters": (tensor_parallel.replicated_parameters, {}),
    "transformer": (tensor_parallel.transformer, {}),
    "local mlp": (tensor_parallel.mlp_local, {}),
    "ring attention": (context_parallel.attention, {"form": "ring", "causal": True}),
    "gathered attention": (context_parallel.attention, {"form": "all-gather", "causal": False}),
    "simple fsdp": (data_parallel.simple_fsdp, {}),
    "conjugates": (dtensor_redistribute.conjugates, {}),
}
IN_DEFAULT = ("uneven mlp", "loss parallel", "simple fsdp")


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    "name", [n if n in IN_DEFAULT else pytest.param(n, marks=slow) for n in PROGRAMS]
)
def test_graphs_of_real_ranks(name, world):
    """Forward and backward of each rank, with AOTAutograd's own cut between them."""
    program, bound = PROGRAMS[name]
    same_as_real_ranks(program, world, **bound)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_graphs_of_real_ranks_on_two_mesh_dimensions():
    same_as_real_ranks(tensor_parallel.data_and_tensor, 4, dp=2)


def same_as_real_ranks(program, world, **bound):
    from localtensor_compile.check.gloo import shared_pool

    real = shared_pool().run(lines_on_this_rank, world, program, **bound)
    graphs = lt.capture(functools.partial(program, **bound), world)
    for rank in range(world):
        saved = None
        titles = [t for t in graphs.titles if not t.startswith("joint")]
        assert titles == list(real[rank])
        for title in titles:
            steps = {rank: graphs.steps(title)[rank]}
            is_backward = title.startswith("backward")
            folded = fold(steps, GroupNames(world), saved if is_backward else None)
            saved = folded.names
            assert [line_text(line, (rank,)) for line in folded.lines] == real[rank][title]


def test_mixture_of_experts_is_captured():
    """Real ranks also have torch's assertions on numbers that come from data."""
    program = functools.partial(expert_parallel.mixture_of_experts, local_experts=1)
    text = str(lt.capture(program, 2))
    assert "all_to_all_single(" in text and "u0" in text


# ---------------------------------------------------------------- folded
@pytest.mark.parametrize("name", ["mlp", "offsets", "grid", "uneven"])
def test_text_is_as_long_for_any_number_of_ranks(name):
    small, large = (str(lt.capture(getattr(programs, name), n)) for n in (4, 8))
    assert len(small.splitlines()) == len(large.splitlines())
    if name == "mlp":
        assert small.splitlines()[2:] == large.splitlines()[2:]
    assert write(read(small)) == small and write(read(large)) == large


@pytest.mark.slow
def test_64_ranks_print_as_2():
    small, large = (str(lt.capture(programs.mlp, n)) for n in (2, 64))
    assert small.splitlines()[2:] == large.splitlines()[2:]


def test_text(golden):
    golden.inline(
        lt.capture(programs.uneven, 4),
        """\
world of 4 ranks
group world: 0-3

forward
    x: f32[{0-2: 3, 3: 2}, 2] = input
    # <lambda>: return {"out": world.compile(lambda x: x.sin().full_tensor())(x)}
    sin: f32[{0-2: 3, 3: 2}, 2] = aten.sin(x)
    constant_pad_nd: f32[3, 2] = aten.constant_pad_nd(sin, [0, 0, 0, 1], 0.0) @ 3
    all_gather_into_tensor: f32[12, 2] = all_gather_into_tensor({0-2: sin, 3: constant_pad_nd}, world)  # 24 bytes
    slice: f32[11, 2] = aten.slice.Tensor(all_gather_into_tensor, 0, 0, 11)
    view: f32[11, 2] = aten.view(slice, [11, 2])
    return[0](view)
""",
    )
    golden.inline(
        lt.capture(programs.offsets, 3),
        """\
world of 3 ranks

forward
    x: f32[12, 2] = input
    # <lambda>: cut = world.compile(lambda x: x.redistribute(placements=[Shard(0)]).to_local() * 2)
    split: (f32[4, 2], f32[4, 2], f32[4, 2]) = aten.split.Tensor(x, 4)
    clone: f32[4, 2] = aten.clone(split[{rank}])
    view: f32[4, 2] = aten.view(clone, [4, 2])
    mul: f32[4, 2] = aten.mul.Tensor(view, 2)
    return[0](mul)
""",
    )
    golden.inline(
        lt.capture(programs.grid, 8),
        """\
world of 8 ranks
group dp: 0,4; 1,5; 2,6; 3,7
group tp: 0-3; 4-7

forward
    x: f32[2] = input
    # summed: return funcol.all_reduce(funcol.all_reduce(x, "sum", (mesh, 1)) * 2, "max", (mesh, 0))
    all_reduce: f32[2] = all_reduce(x, sum, tp)  # 8 bytes
    mul: f32[2] = aten.mul.Tensor(all_reduce, 2)
    all_reduce_1: f32[2] = all_reduce(mul, max, dp)  # 8 bytes
    return[0](all_reduce_1)
""",
    )


SCRIPT = """
import sys
import localtensor_compile as lt
from localtensor_compile import cli
from tests import graph_programs as programs
print(lt.capture(programs.mlp, 3))
print(lt.capture(programs.grid, 4))
"""


@pytest.mark.parametrize("seeds", [(1, 2), pytest.param(range(3, 11), marks=slow)])
def test_text_is_the_same_in_every_process(seeds):
    here = f"{lt.capture(programs.mlp, 3)}\n{lt.capture(programs.grid, 4)}\n"
    assert printed(SCRIPT, seeds) == {here}


def test_text_is_the_same_after_other_compilations():
    before = str(lt.capture(programs.mlp, 2))
    torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(3))
    lt.capture(programs.uneven, 3)
    assert str(lt.capture(programs.mlp, 2)) == before


@pytest.mark.parametrize("name", ["mlp", "uneven"])
def test_text_is_the_same_inside_a_mode(name):
    program = getattr(programs, name)
    before = str(lt.capture(program, 3))
    with lt.LocalTensorMode(3):
        assert str(lt.capture(program, 3)) == before


# ---------------------------------------------------------------- typed access
@pytest.fixture(scope="module")
def graphs():
    return lt.capture(programs.mlp, 3, stage=("joint", "forward", "backward"))


def test_collectives(graphs):
    found = graphs.collectives
    assert [(c.graph, c.op, c.group) for c in found] == [
        ("joint", "all_reduce", "world"),
        ("joint", "all_reduce", "world"),
        ("forward", "all_reduce", "world"),
        ("backward", "all_reduce", "world"),
    ]
    assert found[0].groups == {(0, 1, 2)} and found[0].ranks == (0, 1, 2)
    assert found[0].bytes == {0: 72, 1: 72, 2: 72}
    assert found[0].source.startswith("forward: return funcol.all_reduce(")


def test_lines_of_the_users_code(graphs):
    assert graphs.lines("hidden = F.gelu", rank=1)[0] == "mm: f32[3, 4] = aten.mm(x, up)"
    sizes = lt.capture(programs.uneven, 4).lines("sin()")
    assert sizes[0] == "sin: f32[{0-2: 3, 3: 2}, 2] = aten.sin(x)"
    assert lt.capture(programs.uneven, 4).lines("sin()", rank=3)[0] == (
        "sin: f32[2, 2] = aten.sin(x)"
    )


def test_parameters(graphs):
    found = graphs.parameters
    assert list(found) == ["up", "down"]
    assert {r: tuple(t.shape) for r, t in found["up"].items()} == dict.fromkeys(range(3), (6, 4))


def test_graphs_of_all_ranks(graphs):
    assert "all_reduce" in str(graphs.all_ranks().graph)
    assert graphs.titles == ("joint", "forward", "backward")
    assert list(graphs.rank(2)) == ["joint", "forward", "backward"]
    assert "all_reduce" in str(graphs.dynamo().graph)


def test_what_inductor_compiles():
    found = lt.capture(programs.grid, 2, stage="post_grad")
    assert len(list(found.post_grad().graph.nodes)) > 2
    with pytest.raises(lt.CaptureError, match="there is no post_grad backward graph: capture it"):
        found.post_grad(backward=True)
    assert found.titles == ("forward",) and list(found.rank(1)) == ["forward"]
    assert "forward" not in str(found)  # which was not asked for


def test_stages_are_the_same_beside_what_inductor_compiles():
    graphs = lt.capture(programs.mlp, 2, stage=("forward", "backward", "post_grad"))
    assert str(graphs) == str(lt.capture(programs.mlp, 2))
    assert list(graphs.lowered) == ["post_grad forward", "post_grad backward"]


def test_programs_that_compile_something_else_each_time():
    runs = iter((1, 2))

    def program(world):
        return {"x": [world.compile(lambda x: x + 1)(torch.ones(n)) for n in range(next(runs))]}

    with pytest.raises(lt.CaptureError, match="compiled 1 graphs, and 2 when it ran again with In"):
        lt.capture(program, 2, stage="post_grad")


# ---------------------------------------------------------------- errors
def nothing(world):
    return {"x": torch.ones(1)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: lt.capture(programs.mlp, 2, stage="backwards"),
            "stage='backwards': the stages of",
        ),
        (lambda: lt.capture(nothing, 2), r"nothing compiled nothing: there is no graph to capture"),
        (lambda: lt.capture(programs.grid, 2).rank(2), "no rank 2 in a world of 2 ranks"),
    ],
)
def test_errors(call, message):
    with pytest.raises(lt.CaptureError, match=message):
        call()


# ---------------------------------------------------------------- command line
def command(capsys, *arguments):
    code = cli.main(["graph", *arguments])
    return code, capsys.readouterr()


FILE = programs.__file__


def test_command_prints(capsys):
    code, out = command(capsys, f"{FILE}:uneven", "--nproc-per-node", "4")
    assert code == 0 and out.out == str(lt.capture(programs.uneven, 4))
    _, of_rank = command(capsys, f"{FILE}:uneven", "--nproc-per-node", "4", "--rank", "3")
    assert "constant_pad_nd: f32[3, 2] = aten.constant_pad_nd(sin, [0, 0, 0, 1], 0.0)\n" in (
        of_rank.out
    )
    _, of_rank = command(capsys, f"{FILE}:uneven", "--nproc-per-node", "4", "--rank", "0")
    assert "constant_pad_nd" not in of_rank.out and "x: f32[3, 2] = input" in of_rank.out


def test_command_tables_collectives(capsys):
    _, out = command(capsys, f"{FILE}:grid", "--nproc-per-node", "8", "--collectives")
    lines = [line.split()[:5] for line in out.out.splitlines()]
    assert ["forward", "all_reduce", "tp", "0-7", "8"] in lines
    assert ["forward", "all_reduce", "dp", "0-7", "8"] in lines


def test_command_compares(capsys, tmp_path):
    golden = tmp_path / "mlp.txt"
    golden.write_text(str(lt.capture(programs.mlp, 2)).replace("aten.gelu(", "aten.relu("))
    code, out = command(capsys, f"{FILE}:mlp", "--diff", str(golden))
    assert code == 1 and "forward, ranks 0-1: aten.gelu(mm) was added" in out.out
    code, out = command(capsys, f"{FILE}:mlp", "--diff", f"{FILE}:mlp")
    assert code == 0 and out.out == "no difference\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{FILE}:mlp", "--rank", "2"], "there is no rank 2 in a world of 2 ranks"),
        ([f"{FILE}:mlp", "--diff", "nothing.txt"], "no such file: nothing.txt. Name a golden"),
        ([f"{FILE}:mlp", "--stage", "all"], "the stages of a graph are"),
        ([f"{FILE}:nowhere"], "there is none"),
    ],
)
def test_command_errors(capsys, arguments, message):
    code, out = command(capsys, *arguments)
    assert code == 2 and message in out.err
