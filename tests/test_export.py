"""lt.export: programs of plain tensors, of all ranks and of each, that run on real processes."""

import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._dynamo.exc import Unsupported, UserError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

import localtensor_compile as lt
from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.export.leaves import take_apart
from tests.parallel import dynamic_rows, exported
from tests.parallel.exported import MODELS, run_saved, saved, seeded
from tests.parallel.harness import draw
from tests.test_zoo import ZOO

CALLS = 2
# A DTensor's global size is that of all shards: see test_sizes_that_other_ranks_have.
EXPORTED_ZOO = tuple(name for name in ZOO if name != "dynamic_resharding")
ZOO_IN_DEFAULT = ("tp_mlp_uneven", "embedding_with_empty_shards")


def of_rank(tree, rank):
    values, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([take_apart(v).of_rank(rank) for v in values], spec)


def of_all(tree):
    values, spec = pytree.tree_flatten(tree)
    return pytree.tree_unflatten([take_apart(v).of_all for v in values], spec)


def assert_same(found, wanted):
    found, found_spec = pytree.tree_flatten(found)
    wanted, wanted_spec = pytree.tree_flatten(wanted)
    assert found_spec == wanted_spec
    for a, b in zip(found, wanted):
        if isinstance(b, torch.Tensor):
            assert type(a) is torch.Tensor and a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b


def same_everywhere(build, world, **options):
    """Simulated, as one program of all ranks, and as each rank's own on real processes."""
    with lt.LocalTensorMode(world):
        model, x = build()
        programs = lt.export(model, (x,), **options)
        files = {rank: saved(programs.rank(rank)) for rank in range(world)}
        module = programs.all_ranks.module()
        wanted = []
        for _ in range(CALLS):
            found = seeded(module, of_all(x))
            wanted.append(seeded(model, x))
            assert_same(found, of_all(wanted[-1]))
        state = of_all(dict(model.state_dict()))
    inputs = {rank: (of_rank(x, rank),) for rank in range(world)}
    real = shared_pool().run(run_saved, world, files, inputs, CALLS)
    for rank in range(world):
        found, held = real[rank]
        assert_same(found, of_rank(wanted, rank))
        for name, parts in state.items():
            part = parts[rank] if isinstance(parts, tuple) else parts
            assert torch.equal(held[name], part), name
    return programs


def marked(worlds):
    return [w if w == 3 else pytest.param(w, marks=pytest.mark.slow) for w in worlds]


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("world", marked((2, 3, 4)))
@pytest.mark.parametrize("name", MODELS)
def test_on_real_processes(name, world):
    same_everywhere(MODELS[name], world)


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_two_mesh_dimensions():
    same_everywhere(exported.two_dimensions, 4)


# ---------------------------------------------------------------- dynamic shapes
def other_rows(more):
    """Shards of other sizes than those that are exported, uneven by `more` rows per rank."""
    return lt.rank_map(lambda rank: draw(9 + more * rank, 4, seed=rank))


DYNAMIC = {
    "even, by position": (exported.even_rows, 0, lambda: ({0: Dim("rows")},)),
    "even, by name": (exported.even_rows, 0, lambda: {"x": {0: Dim("rows", min=2, max=64)}}),
    "uneven": (exported.uneven_rows, 3, lambda: {"x": {0: Dim("rows", min=2)}}),
    "automatic": (exported.uneven_rows, 3, lambda: {"x": {0: Dim.AUTO}}),
    "as a sequence": (exported.even_rows, 0, lambda: {"x": [Dim("rows"), None]}),
}


def summed(x):
    rows = funcol.all_reduce(x.sin().sum(0), "sum", dist.group.WORLD)
    return x * rows, x.sum(0) / x.shape[0]


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes(name):
    rows, more, shapes = DYNAMIC[name]
    with lt.LocalTensorMode(3):
        model, x = exported.Function(summed), rows()
        programs = lt.export(model, (x,), dynamic_shapes=shapes())
        under_the_mode = torch.export.export(model, (x,), dynamic_shapes=shapes()).module()
        files = {rank: saved(programs.rank(rank)) for rank in range(3)}
        other = other_rows(more)
        wanted = seeded(model, other)
        assert_same(seeded(programs.all_ranks.module(), of_all(other)), of_all(wanted))
        assert_same(of_all(seeded(under_the_mode, other)), of_all(wanted))
    inputs = {rank: (of_rank(other, rank),) for rank in range(3)}
    real = shared_pool().run(run_saved, 3, files, inputs, 1)
    for rank in range(3):
        assert_same(real[rank][0][0], of_rank(wanted, rank))


def test_dynamic_dtensor():
    with lt.LocalTensorMode(3):
        mesh = init_device_mesh("cpu", (3,))
        model = exported.Function(lambda x: (x.cos() * 2).redistribute(placements=[Shard(1)]))
        x = distribute_tensor(draw(6, 6, seed=1), mesh, [Shard(0)])
        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", min=2)},))
        other = distribute_tensor(draw(12, 6, seed=2), mesh, [Shard(0)])
        found, wanted = program.module()(other), model(other)
        assert found.placements == wanted.placements and found.shape == wanted.shape == (12, 6)
        assert_same(of_all(found), of_all(wanted))


@pytest.mark.parametrize("placement", [Shard(1), Replicate()])
def test_dynamic_rows_of_an_uneven_dtensor(placement):
    """Its ranks' rows are numbers of their own; a rank alone does not know how many others have."""
    with lt.LocalTensorMode(3):
        mesh = init_device_mesh("cpu", (3,))
        model = exported.Function(lambda x: (x.cos() * 2).redistribute(placements=[placement]))
        x = distribute_tensor(draw(10, 6, seed=1), mesh, [Shard(0)])
        shapes = ({0: Dim("rows", min=1)},)
        module = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
        for rows in (8, 13):
            other = distribute_tensor(draw(rows, 6, seed=2), mesh, [Shard(0)])
            found, wanted = module(other), model(other)
            assert found.placements == wanted.placements and found.shape == (rows, 6)
            assert_same(of_all(found), of_all(wanted))
        with pytest.raises(lt.ExtractError, match="it is a size that only another rank has"):
            lt.export(model, (x,), dynamic_shapes=shapes).rank(0)


def test_row_that_torch_takes_for_one():
    with lt.LocalTensorMode(3):
        mesh = init_device_mesh("cpu", (3,))
        model = exported.Function(lambda x: x.redistribute(placements=[Shard(1)]))
        x = distribute_tensor(draw(7, 6, seed=1), mesh, [Shard(0)])
        with pytest.raises(UserError, match="You marked rows_rank2"):
            lt.export(model, (x,), dynamic_shapes=({0: Dim("rows")},))


def test_sizes_that_other_ranks_have():
    """Where a rank needs them, it has no program of its own."""
    with lt.LocalTensorMode(3):
        world = exported.ExportingWorld(3)
        with pytest.raises(lt.ExtractError, match="it is a size that only another rank has"):
            dynamic_rows.resharded(world)


# ---------------------------------------------------------------- torch.export inside a mode
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name, strict):
    with lt.LocalTensorMode(3):
        model, x = MODELS[name]()
        program = torch.export.export(model, (x,), strict=strict)
        assert isinstance(program, torch.export.ExportedProgram)
        # Another one, since the two would write to the same buffers.
        decomposed = torch.export.export(model, (x,), strict=strict).run_decompositions()
        wanted = [of_all(seeded(model, x)) for _ in range(CALLS)]
        for each in (program, decomposed):
            module = each.module()
            for result in wanted:
                assert_same(of_all(seeded(module, x)), result)


def test_other_worlds_and_none():
    """An exported program belongs to its ranks, not to the mode that it was made in."""
    with lt.LocalTensorMode(3):
        model, x = MODELS["uneven mlp"]()
        wanted = of_all(seeded(model, x))
        module = torch.export.export(model, (x,)).module()
    assert_same(of_all(seeded(module, x)), wanted)
    with lt.LocalTensorMode(3):
        assert_same(of_all(seeded(module, x)), wanted)


def test_results_are_the_models():
    with lt.LocalTensorMode(3):
        model, x = exported.dtensors()
        sums, product, doubled, columns = torch.export.export(model, (x,)).module()(x)
        assert isinstance(sums, lt.LocalTensor)
        assert isinstance(product, DTensor) and product.placements == (Replicate(),)
        assert columns.placements == (Shard(1),)
        assert doubled.device_mesh == x.device_mesh and doubled.shape == x.shape
        assert not doubled.requires_grad


def test_plain_model_of_all_ranks():
    """Ranks come from the mode where no value has them."""
    with lt.LocalTensorMode(2):
        model = exported.Function(lambda x: x * (dist.get_rank() + 1))
        found = torch.export.export(model, (torch.ones(2),)).module()(torch.ones(2))
    assert [t.tolist() for t in of_all(found)] == [[1.0, 1.0], [2.0, 2.0]]


def test_outside_a_mode_it_is_torchs():
    program = torch.export.export(exported.Function(torch.sin), (torch.ones(2),))
    assert type(program) is torch.export.ExportedProgram


def test_shared_and_own_memory():
    """Parameters are the model's own, buffers are as they were."""
    with lt.LocalTensorMode(3):
        model, x = exported.statistics()
        module = torch.export.export(model, (x,)).module()
        first = of_all(seeded(module, x))
        assert [int(t[0]) for t in of_all(model.seen)] == [0, 0, 0]
        seeded(model, x)
        with torch.no_grad():
            model.norm.weight.mul_(2)
        later = of_all(seeded(module, x))
    assert torch.equal(later["normed"][0], first["normed"][0] * 2)


def test_strict_is_dynamos_word():
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    with lt.LocalTensorMode(2):
        model = exported.Function(broken)
        x = exported.even_rows()
        assert torch.export.export(model, (x,), strict=False)
        with pytest.raises(Unsupported, match="graph_break"):
            torch.export.export(model, (x,), strict=True)


# ---------------------------------------------------------------- what does not fit
def refused(call, text):
    with pytest.raises(lt.ExportError) as caught:
        call()
    assert str(caught.value) == text


@pytest.fixture
def module():
    with lt.LocalTensorMode(3):
        model = exported.Function(lambda x: x * 2)
        return torch.export.export(model, (exported.uneven_rows(),)).module()


def test_other_sizes(module):
    x = lt.LocalTensor({r: torch.ones(3 + 2 * r, 5 if r == 1 else 4) for r in range(3)})
    refused(
        lambda: module(x),
        "input x does not fit: it is rank 0: float32[3, 4], rank 1: float32[5, 5], rank 2: "
        "float32[7, 4], but rank 0: float32[3, 4], rank 1: float32[5, 4], rank 2: float32[7, 4] "
        "was exported. Give every rank the sizes that were exported, the same number wherever a "
        "name is the same, or export again with dynamic_shapes.",
    )


def test_other_dtype(module):
    x = lt.LocalTensor({r: torch.ones(3 + 2 * r, 4, dtype=torch.int64) for r in range(3)})
    with pytest.raises(lt.ExportError, match=r"^input x does not fit: it is rank 0: int64\[3, 4\]"):
        module(x)


def test_missing_rank(module):
    x = lt.LocalTensor({r: torch.ones(3 + 2 * r, 4) for r in range(2)})
    refused(
        lambda: module(x),
        "input x is one of ranks 0-1, but one of ranks 0-2 was exported. Every exported rank needs "
        "its shard, and no other rank has a program.",
    )


def test_plain_for_ranked(module):
    with lt.maybe_disable_local_tensor_mode():
        x = torch.ones(3, 4)
    refused(
        lambda: module(x),
        "input x is a value that all ranks share, but one of ranks 0-2 was exported. Every "
        "exported rank needs its shard, and no other rank has a program.",
    )


def test_other_structure(module):
    x = lt.LocalTensor({r: torch.ones(3 + 2 * r, 4) for r in range(3)})
    with pytest.raises(
        lt.ExportError, match=r"^the inputs have the structure .* was exported\. Call"
    ):
        module(x=x)


def test_dynamic_size_that_differs():
    with lt.LocalTensorMode(2):
        shapes = {"x": {0: Dim("rows", min=2, max=64)}}
        model = exported.Function(lambda x: x * 2)
        module = torch.export.export(model, (exported.even_rows(),), dynamic_shapes=shapes).module()
        with pytest.raises(lt.ExportError) as caught:
            module(other_rows(1))
        with pytest.raises(lt.ExportError, match="does not fit"):
            module(lt.rank_map(lambda rank: torch.ones(65, 4)))
    text = str(caught.value)
    assert text.startswith("input x does not fit: it is rank 0: float32[9, 4], rank 1: float32[10,")
    assert re.search(r"float32\[(s\d+), 4\] with 2 <= \1 <= 64 was exported\.", text)


def test_bad_arguments():
    with lt.LocalTensorMode(2):
        model, x = exported.Function(torch.sin), exported.even_rows()
        refused(
            lambda: lt.export(model, [x]),
            "args is a list, but must be a tuple of the inputs.",
        )
        with pytest.raises(lt.ExportError, match="preserve_module_call_signature is not supported"):
            torch.export.export(model, (x,), preserve_module_call_signature=("function",))
        with pytest.raises(lt.ExportError, match=r"dynamic_shapes has .* inputs named a"):
            lt.export(Named(), ({"a": x},), dynamic_shapes={"x": ({0: Dim.AUTO},)})
        with pytest.raises(lt.ExportError, match=r"dynamic_shapes has .* sequence of 1 inputs"):
            lt.export(Named(), ([x],), dynamic_shapes={"x": (None, None)})
        with lt.maybe_disable_local_tensor_mode():
            other = lt.LocalTensor({0: torch.ones(2)})
        refused(
            lambda: lt.export(Named(), ([x, other],)),
            "the model and its inputs are of different ranks: [0, 1] and [0]. Every tensor needs a "
            "shard of every rank.",
        )
        programs = lt.export(model, (x,))
        refused(lambda: programs.rank(2), "there is no program of rank 2, only of [0, 1].")
        assert repr(programs) == "RankPrograms(ranks=[0, 1])"
    with pytest.raises(lt.ExportError, match="hold nothing that ranks have a part of"):
        lt.export(model, (torch.ones(2),))


class Named(torch.nn.Module):
    def forward(self, x):
        return pytree.tree_map(torch.sin, x)


def test_buffer_of_other_ranks():
    class Replaces(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", plain())

        def forward(self, x):
            self.seen = x.sum(0)
            return x * 2

    with lt.LocalTensorMode(2):
        refused(
            lambda: lt.export(Replaces(), (exported.even_rows(),)),
            "the model puts a tensor of ranks [0, 1] in the place of seen, which is one of ranks "
            "[]. Keep it of the same ranks, so that every rank's program has it.",
        )


def plain():
    with lt.maybe_disable_local_tensor_mode():
        return torch.zeros(4)


def test_cond_of_uneven_shards():
    with lt.LocalTensorMode(3):
        model, x = exported.Function(exported.branching), exported.uneven_rows()
        with pytest.raises(lt.ExportError, match=r"torch.cond on shards of different sizes"):
            lt.export(model, (x,))


# ---------------------------------------------------------------- groups on real ranks
def test_groups_need_a_process_group():
    with lt.LocalTensorMode(2):
        program = lt.export(exported.Function(summed), (exported.even_rows(),)).rank(0)
        local = lt.export(exported.Function(torch.sin), (exported.even_rows(),)).rank(0)
    assert lt.connect(local) is local
    with pytest.raises(lt.WorldError) as caught:
        lt.connect(program)
    assert str(caught.value) == (
        "the program has collectives of ranks [0, 1], but there is no process group. Call "
        "torch.distributed.init_process_group() first."
    )


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_program_of_another_rank():
    with lt.LocalTensorMode(3):
        program = lt.export(exported.Function(summed), (exported.even_rows(),)).rank(0)
    texts = shared_pool().run(exported.connect_error, 2, saved(program))
    assert texts[1] == (
        "the program has a collective of ranks [0, 1, 2], but this is rank 1 of 2. Run the program "
        "of rank r on rank r, with as many ranks as were simulated."
    )


# ---------------------------------------------------------------- lowered, saved, compiled
def test_decompositions():
    with lt.LocalTensorMode(3):
        model, x = MODELS["uneven mlp"]()
        programs = lt.export(model, (x,))
        wanted = seeded(model, x)
        found = seeded(programs.all_ranks.run_decompositions().module(), of_all(x))
        assert_same(found, of_all(wanted))
        decomposed = programs.rank(1).run_decompositions()
    targets = {str(n.target) for n in decomposed.graph.nodes if n.op == "call_function"}
    assert "_c10d_functional.all_reduce.default" in targets
    assert "aten.linear.default" not in targets


FRESH = """
import sys, torch
{imports}
program = torch.export.load(sys.argv[1])
given, wanted = torch.load(sys.argv[2])
found = program.module()(given)
assert all(torch.equal(a, b) for a, b in zip(found, wanted)), (found, wanted)
assert ("localtensor_compile" in sys.modules) is {ours}
print("equal")
"""


@pytest.mark.parametrize("ours", [False, True])
def test_fresh_process(ours, tmp_path):
    """A rank's program needs torch alone, that of all ranks the ops of this package."""
    function = summed if ours else (lambda x: (x.sin() @ x.t(), x + 1))
    with lt.LocalTensorMode(3):
        model, x = exported.Function(function), exported.even_rows()
        programs = lt.export(model, (x,))
        program = programs.all_ranks if ours else programs.rank(1)
        wanted = seeded(model, x)
    pick = of_all if ours else (lambda tree: of_rank(tree, 1))
    torch.export.save(program, tmp_path / "program.pt2")
    outputs = pytree.tree_leaves(pick(wanted[0] if ours else wanted))
    torch.save((pick(x), outputs), tmp_path / "values.pt")
    code = FRESH.format(imports="import localtensor_compile" if ours else "", ours=ours)
    if ours:  # the product alone: one tensor per rank
        code = code.replace("module()(given)", "module()(given)[0]")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "program.pt2"), str(tmp_path / "values.pt")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("of_torch", [False, True])
def test_compiled_ahead_of_time(of_torch, tmp_path):
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    with lt.LocalTensorMode(3):
        model, x = MODELS["uneven mlp"]()
        wanted = seeded(model, x)
        if of_torch:
            program = torch.export.export(model, (x,)).plain()
        else:
            program = lt.export(model, (x,)).all_ranks
    package = aoti_compile_and_package(program, package_path=str(tmp_path / "all.pt2"))
    with torch.no_grad():
        found = aoti_load_package(package)(of_all(x))
    torch.testing.assert_close(found, of_all(wanted))


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
def test_compiled_ahead_of_time_on_real_processes():
    with lt.LocalTensorMode(2):
        model, x = exported.tp_mlp(7)
        programs = lt.export(model, (x,))
        wanted = seeded(model, x)
        files = {rank: saved(programs.rank(rank)) for rank in range(2)}
    inputs = {rank: (of_rank(x, rank),) for rank in range(2)}
    real = shared_pool().run(exported.run_compiled, 2, files, inputs)
    for rank in range(2):
        torch.testing.assert_close(real[rank], of_rank(wanted, rank))


# ---------------------------------------------------------------- the zoo
ZOO_IN_FRESH = """
import sys, torch, localtensor_compile
from torch.utils import _pytree as pytree
for program, (given, wanted) in zip(sys.argv[2:], torch.load(sys.argv[1])):
    module = torch.export.load(program).module()
    torch.manual_seed(5)
    with torch.no_grad():
        found = module(*given[0], **given[1])
    found = [x for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
print("equal")
"""


@pytest.mark.gloo
@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize(
    "name",
    [n if n in ZOO_IN_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in EXPORTED_ZOO],
)
def test_zoo(name, tmp_path):
    """Exported, saved, loaded in a fresh process and on real ranks: equal on every rank."""
    program, size, arguments = ZOO[name]
    with lt.LocalTensorMode(size):
        world = exported.ExportingWorld(size)
        program(world, **arguments)
    values, files = [], []
    for i, each in enumerate(world.exported):
        tensors = pytree.tree_leaves(of_all(each.returned))
        tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
        values.append((of_all(each.given), tensors))
        files.append(str(tmp_path / f"program{i}.pt2"))
        (tmp_path / f"program{i}.pt2").write_bytes(each.all_ranks)
    torch.save(values, tmp_path / "values.pt")
    done = subprocess.run(
        [sys.executable, "-c", ZOO_IN_FRESH, str(tmp_path / "values.pt"), *files],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout == "equal\n", done.stderr
    inputs = [{rank: of_rank(e.given, rank) for rank in range(size)} for e in world.exported]
    programs = [e.ranks for e in world.exported]
    real = shared_pool().run(exported.run_each_saved, size, programs, inputs)
    for rank in range(size):
        for found, each in zip(real[rank], world.exported):
            assert_same(found, of_rank(each.returned, rank))
