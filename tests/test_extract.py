"""The program extracted for a rank is the one that runs: on real processes, bit for bit."""

import functools
import operator

import pytest
import torch
import torch.fx as fx

import localtensor_compile as lt
from localtensor_compile.compile.extract import extract_rank, group_name, group_ranks
from localtensor_compile.compile.fx_graphs import leaves, output_node, placeholders
from localtensor_compile.compile.owners import owners
from tests import graph_programs as programs
from tests.parallel import data_parallel, extracted, tensor_parallel
from tests.parallel.harness import worlds

ops = torch.ops.localtensor


# ---------------------------------------------------------------- on real processes
def same_on_real_ranks(program, world):
    """The joint graph of all ranks, run here, and each rank's own, run there."""
    from localtensor_compile.check.gloo import shared_pool

    graphs = lt.capture(program, world, stage=("joint", "forward"))
    flat = graphs._flat[0]
    title = graphs.titles[0]  # the joint graph, or a forward alone
    modules = {r: graphs.rank(r)[title] for r in range(world)}
    groups = sorted({g for c in graphs.collectives for g in c.groups})
    given, inputs = [], {r: [] for r in range(world)}
    for i, (node, known) in enumerate(zip(placeholders(flat.module), flat.inputs)):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            generator = torch.Generator().manual_seed(i)
            value = (
                torch.randn(value.shape, generator=generator).to(value.dtype)
                if value.is_floating_point()
                else torch.zeros(value.shape, dtype=value.dtype)
            )
        given.append(value)
        for rank in range(world):
            if known.rank in (rank, None) and isinstance(value, torch.Tensor):
                inputs[rank].append(value)
    with lt.LocalTensorMode(world), torch.no_grad():
        torch.manual_seed(0)
        here = list(leaves(fx.Interpreter(flat.module).run(*given)))
    real = shared_pool().run(
        extracted.run_program,
        world,
        {r: extracted.portable(m) for r, m in modules.items()},
        inputs,
        groups,
    )
    for rank in range(world):
        wanted = [
            v
            for v, known in zip(here, flat.outputs)
            if known.rank in (rank, None) and isinstance(v, torch.Tensor)
        ]
        assert len(wanted) == len(real[rank]) > 0
        for a, b in zip(wanted, real[rank]):
            assert torch.equal(a, b)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize("name", extracted.NAMES)
def test_one_collective(name, world):
    same_on_real_ranks(functools.partial(extracted.one_collective, name=name), world)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    ("program", "bound"),
    [
        (programs.mlp, {}),
        (tensor_parallel.mlp, {"hidden": 7}),
        (tensor_parallel.embedding, {}),
        (data_parallel.simple_fsdp, {}),
    ],
)
def test_program(program, bound, world):
    same_on_real_ranks(functools.partial(program, **bound), world)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_two_mesh_dimensions():
    same_on_real_ranks(functools.partial(tensor_parallel.data_and_tensor, dp=2), 4)


# ---------------------------------------------------------------- by hand
def graph_of(*collectives):
    """Two ranks, an input each, and one collective after the other."""
    graph = fx.Graph()
    fake = torch.ones(2)
    shards = [graph.placeholder(f"x{r}") for r in range(2)]
    for node in shards:
        node.meta["val"] = fake
    for op, arguments in collectives:
        node = graph.call_function(op, (shards, *arguments))
        node.meta["val"] = [fake, fake]
        shards = [graph.call_function(operator.getitem, (node, r)) for r in range(2)]
        for item in shards:
            item.meta["val"] = fake
    graph.output(tuple(shards))
    return fx.GraphModule(torch.nn.Module(), graph)


BOTH = {"ranks": (0, 1), "inputs": (0, 1), "outputs": (0, 1)}


def test_names_of_groups():
    assert group_ranks(group_name([0, 3])) == (0, 3)
    with pytest.raises(ValueError, match="'tp' does not name a group by its ranks"):
        group_ranks("tp")


def test_owners_follow_shards():
    module = graph_of((ops.all_reduce.default, ("sum", [0, 1], 2)))
    found = {n.name: sorted(o) for n, o in owners(module, (0, 1), ranks=(0, 1)).items()}
    assert (
        found["x0"] == [0] and found["getitem_1"] == [1] and found["all_reduce_default"] == [0, 1]
    )


def test_collective_of_others_is_left_out():
    module = graph_of((ops.all_reduce.default, ("sum", [1], 1)))
    assert "all_reduce" in str(extract_rank(module, 1, **BOTH).graph)
    alone = extract_rank(module, 0, **BOTH)
    assert "all_reduce" not in str(alone.graph)


@pytest.mark.parametrize(
    ("op", "arguments", "why"),
    [
        (ops.reduce.default, ("sum", 0, [0, 1], 2), "torch has no functional collective for it"),
    ],
)
def test_what_cannot_be_extracted(op, arguments, why):
    with pytest.raises(lt.ExtractError, match=f"cannot be part of a single rank's program: {why}"):
        extract_rank(graph_of((op, arguments)), 0, **BOTH)


def test_values_of_two_ranks_together():
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    for node in (a, b):
        node.meta["val"] = torch.ones(1)
    both = graph.call_function(torch.ops.aten.add.Tensor, (a, b))
    graph.output((both,))
    module = fx.GraphModule(torch.nn.Module(), graph)
    with pytest.raises(lt.ExtractError, match="combines values of rank 0 with those of rank 1"):
        extract_rank(module, 0, ranks=(0, 1), inputs=(0, 1), outputs=(0,))
    assert output_node(module).op == "output"
