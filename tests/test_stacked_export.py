"""Exporting and capturing with stacked tensors: programs of single ranks, or a clear error."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch.export import Dim
from torch.utils import _pytree as pytree

import localtensor_compile as lt
from localtensor_compile.export.leaves import take_apart
from tests.parallel.exported import MODELS, Function, saved, seeded

W = 3
PER_RANK = r'Build the model and trace it under LocalTensorMode\(\.\.\., layout="per_rank"\)'


def of_all(tree):
    values, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([take_apart(v).of_all for v in values], spec)


def close(found, wanted, of_largest=1e-6):
    found, found_spec = pytree.tree_flatten(found)
    wanted, wanted_spec = pytree.tree_flatten(wanted)
    assert found_spec == wanted_spec
    for a, b in zip(found, wanted):
        if isinstance(b, torch.Tensor):
            assert type(a) is torch.Tensor
            assert a.shape == b.shape
            assert a.dtype is b.dtype
            largest = float(b.abs().max()) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=0, atol=of_largest * largest)
        else:
            assert a == b


def exported(name, layout):
    """lt.export's program of all ranks on the inputs, what each rank's program says, its bytes."""
    with lt.LocalTensorMode(W, layout=layout):
        model, x = MODELS[name]()
        programs = lt.export(model, (x,))
        result = seeded(programs.all_ranks.module(), of_all(x))
        ranks = [programs.rank(r) for r in range(W)]
        sizes = [len(saved(program)) for program in ranks]
        return result, [str(program.graph) for program in ranks], sizes


# These use stacked tensors that are neither parameters, buffers nor inputs: see below.
CLOSING = ("DTensors", "statistics")
WHOLE = [name for name in MODELS if name not in CLOSING]
IN_DEFAULT = ("mlp", "uneven mlp", "made inside", "noisy", "cond")


EVEN = ("DTensors", "broadcast", "mlp", "reduce scatter")


def slow_but(names):
    return [n if n in IN_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", slow_but(WHOLE))
def test_programs_are_those_of_the_per_rank_layout(name):
    """Node by node, with the same results, and with no other rank's memory in a rank's file."""
    result, programs, sizes = exported(name, "stacked")
    expected, expected_programs, expected_sizes = exported(name, "per_rank")
    close(result, expected, 0.0)
    assert programs == expected_programs
    for size, wanted in zip(sizes, expected_sizes):
        assert abs(size - wanted) < 100  # names of files


@pytest.mark.parametrize("name", slow_but(MODELS))
def test_torch_export(name):
    """As the model itself does, which runs on stacks."""
    with lt.LocalTensorMode(W, layout="stacked") as mode:
        model, x = MODELS[name]()
        program = torch.export.export(model, (x,))
        found = of_all(seeded(program.module(), x))
        before = mode.stats()["stacked"]
        close(found, of_all(seeded(model, x)))
        if name in EVEN:
            assert mode.stats()["stacked"] > before


def test_a_tensor_attribute_is_a_constant_of_each_rank():
    """The whole stack, of which the rank's program selects its row."""
    result, programs, _ = exported("statistics", "stacked")
    expected, _, _ = exported("statistics", "per_rank")
    close(result, expected, 0.0)
    for r, program in enumerate(programs):
        assert f"aten.select.int](args = (%c_lifted_tensor_0, 0, {r})" in program


def test_dynamic_shapes():
    with lt.LocalTensorMode(W, layout="stacked"):
        model = Function(lambda x: funcol.all_reduce(x.sin().sum(0), "sum", dist.group.WORLD))
        x = lt.rank_map(lambda r: torch.arange(12.0).view(3, 4) + r)
        shapes = {"x": {0: Dim("rows", min=2, max=64)}}
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        more = lt.rank_map(lambda r: torch.arange(20.0).view(5, 4) * r)
        close(of_all(program.module()(more)), of_all(model(more)))


def test_the_mode_stays_stacked():
    with lt.LocalTensorMode(W, layout="stacked") as mode:
        torch.export.export(Function(lambda x: x + torch.ones(2)), (torch.ones(2),))
        with pytest.raises(ZeroDivisionError):
            torch.export.export(Function(lambda x: x / (1 // 0)), (torch.ones(2),))
        assert mode.stacked
        torch.ones(2)._stack  # noqa: B018


def test_what_closes_over_a_stack_has_no_program_of_a_rank():
    with lt.LocalTensorMode(W, layout="stacked"):
        model, x = MODELS["DTensors"]()
        programs = lt.export(model, (x,))
        wanted = r"localtensor\.stacked_\w+\.default cannot be part of a single rank's program: "
        wanted += rf"it is one op on the stack of all ranks \(layout='stacked'\)\. {PER_RANK}"
        with pytest.raises(lt.ExtractError, match=wanted):
            programs.rank(1)


# ---------------------------------------------------------------- capture
def step(x):
    return funcol.all_reduce(x.sin() * dist.get_rank(), "sum", dist.group.WORLD) * 2


def made(world):
    return {"y": world.compile(step)(world.rank_map(lambda r: torch.ones(2, 3) * r))}


def test_capture_is_per_rank_inside_a_stacked_mode():
    with lt.LocalTensorMode(W, layout="stacked"):
        inside = lt.capture(made, W)
    assert str(inside) == str(lt.capture(made, W))
    assert "stacked" not in str(inside.rank(1)["forward"].graph)


def own_mode(world):
    with lt.LocalTensorMode(W, layout="stacked"):
        return {"y": world.compile(lambda x: x.sin())(torch.ones(2, 3))}


def closing_over_a_stack():
    with lt.LocalTensorMode(W, layout="stacked"):
        weight = torch.ones(2, 3)
    return lambda world: {
        "y": world.compile(lambda x: x * weight)(world.rank_map(lambda r: torch.ones(2, 3)))
    }


@pytest.mark.parametrize(
    ("build", "name"),
    [(lambda: own_mode, "x"), (closing_over_a_stack, "weight")],
    ids=["argument", "closure"],
)
def test_capture_of_stacks_is_refused(build, name):
    """The stack of all ranks is no rank's tensor."""
    graphs = lt.capture(build(), W)
    wanted = rf"{name} holds the shards of all ranks in one tensor \(layout='stacked'\), but "
    wanted += rf"captured graphs are those of single ranks\. {PER_RANK}\."
    for ask in (str, lambda g: g.rank(1), lt.schedule):
        with pytest.raises(lt.ExtractError, match=wanted):
            ask(graphs)


def test_capture_of_stacks_made_inside_is_refused():
    def program(world):
        with lt.LocalTensorMode(W, layout="stacked"):
            return {"y": world.compile(lambda: torch.rand(3) * 2)()}

    wanted = rf"stacked_v1\.default cannot be part of a single rank's program: .*{PER_RANK}"
    with pytest.raises(lt.ExtractError, match=wanted):
        lt.capture(program, W).rank(1)
