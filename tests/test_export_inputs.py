"""Exported programs take what the model takes: other sizes, numbers, keywords; what they refuse."""

import io
import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.export import AdditionalInputs, Dim, ShapesCollection

import localtensor_compile as lt
from tests.parallel import exported
from tests.parallel.harness import draw
from tests.test_export import assert_same, of_all, of_rank, refused

WORLD = 3


@pytest.fixture(autouse=True)
def mode():
    with lt.LocalTensorMode(WORLD):
        yield


def even(rows):
    return lt.rank_map(lambda rank: draw(rows, 4, seed=rank))


def uneven(rows, step=2):
    return lt.rank_map(lambda rank: draw(rows + step * rank, 4, seed=rank))


def numbers(first):
    """A number per rank."""
    return lt.rank_map(lambda rank: torch.ones(first + rank)).shape[0]


def loaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with lt.maybe_disable_local_tensor_mode():
        return torch.export.load(buffer).module()


def same_programs(model, given, others=(), dynamic_shapes=None):
    """As the model: what is exported for all ranks and for each, saved and loaded too.

    Args:
        given, others: (args, kwargs), of which `given` is exported.
    """
    args, kwargs = given
    options = {"dynamic_shapes": dynamic_shapes}
    programs = lt.export(model, args, kwargs, **options)
    ranked = torch.export.export(model, args, kwargs, **options)
    flat = (programs.all_ranks.module(), loaded(ranked), loaded(programs.all_ranks))
    own = {rank: loaded(programs.rank(rank)) for rank in range(WORLD)}
    with torch.no_grad():
        for args, kwargs in (given, *others):
            wanted = model(*args, **kwargs)
            assert_same(of_all(ranked.module()(*args, **kwargs)), of_all(wanted))
            for module in flat:
                assert_same(module(*of_all(args), **of_all(kwargs)), of_all(wanted))
            for rank, module in own.items():
                inputs = of_rank((args, kwargs), rank)
                with lt.maybe_disable_local_tensor_mode():
                    found = module(*inputs[0], **inputs[1])
                assert_same(found, of_rank(wanted, rank))
    return programs, ranked


# ---------------------------------------------------------------- models
class Two(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


class Keywords(nn.Module):
    def forward(self, x, *, a, b):
        return x + 2 * a + 3 * b


class Anything(nn.Module):
    def forward(self, *tensors, **more):
        return [t.cos() for t in tensors] + [t.sin() for t in more.values()]


class Nested(nn.Module):
    def forward(self, named, listed):
        return named["x"] * named["scale"] + listed[0][0], listed[1]


# ---------------------------------------------------------------- inputs
def test_keywords_in_another_order():
    x, a, b = uneven(3), uneven(3), uneven(3)
    same_programs(Keywords(), ((x,), {"b": b, "a": a}), [((x,), {"a": a, "b": b})])


def test_any_arguments():
    same_programs(Anything(), ((uneven(3), even(2)), {"z": even(5)}))


def test_any_arguments_with_dynamic_rows():
    shapes = {"tensors": ({0: Dim("a")}, {0: Dim("b")})}
    others = [((uneven(5), even(8)), {})]
    same_programs(Anything(), ((uneven(3), even(2)), {}), others, shapes)


def test_nested_inputs():
    def given(more):
        x = uneven(3 + more)
        return ({"x": x, "scale": 3}, [(uneven(3 + more),), even(4)]), {}

    rows = Dim("rows")
    shapes = {"named": {"x": {0: rows}, "scale": None}, "listed": [({0: rows},), None]}
    same_programs(Nested(), given(0))
    same_programs(Nested(), given(0), [given(2)], shapes)


def test_numbers():
    """Numbers that were exported are part of the program."""
    times = Two(lambda x, n: x * n)
    for number, text, other in (
        (2, "it is 3, but 2 was exported", 3),
        (numbers(2), "rank 0: 3, rank 1: 4, rank 2: 5, but rank 0: 2, rank 1: 3", numbers(3)),
    ):
        _, ranked = same_programs(times, ((uneven(3), number), {}))
        for check_guards in (True, False):
            module = ranked.module(check_guards)
            with pytest.raises(lt.ExportError, match=text):
                module(uneven(3), other)


@pytest.mark.parametrize("number", [lambda n: n, numbers])
def test_dynamic_numbers(number):
    model = Two(lambda x, n: (x * n, x.new_zeros(n)))
    shapes = {"x": None, "y": Dim.DYNAMIC}
    same_programs(model, ((uneven(3), number(4)), {}), [((uneven(3), number(9)), {})], shapes)


# ---------------------------------------------------------------- sizes
ROWS = Dim("rows", min=2, max=40)


@pytest.mark.parametrize(
    ("function", "given", "other", "shapes"),
    [
        pytest.param(
            lambda x, y: (x.sum() + y, y[::2] * x),
            lambda: (even(5), even(10)), lambda: (even(7), even(14)),
            lambda: ({0: ROWS}, {0: 2 * ROWS}),
            id="twice as many",
        ),
        pytest.param(
            lambda x, y: x * y[1:],
            lambda: (uneven(5), uneven(6)), lambda: (uneven(7, 3), uneven(8, 3)),
            lambda: ({0: ROWS}, {0: ROWS + 1}),
            id="one more",
        ),
        pytest.param(
            lambda x, y: x[:-1] - x[1:] + y.sum(),
            lambda: (uneven(5), even(2)), lambda: (uneven(4, 1), even(2)),
            lambda: {"x": (Dim.DYNAMIC, Dim.STATIC), "y": None},
            id="dynamic",
        ),
        pytest.param(
            lambda x, y: x.reshape(-1) + y,
            lambda: with_elements(uneven(3)), lambda: with_elements(uneven(4)),
            lambda: {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}},
            id="torch finds a multiple",
        ),
        pytest.param(
            lambda x, y: (torch.cat([x, y[: x.shape[0]]]), x.shape[0] + y.shape[0]),
            lambda: (uneven(3), even(9)), lambda: (uneven(4), even(12)),
            lambda: {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}},
            id="two sizes together",
        ),
    ],
)  # fmt: skip
def test_sizes(function, given, other, shapes):
    same_programs(Two(function), (given(), {}), [(other(), {})], shapes())


def with_elements(x):
    """`x`, and a tensor of as many elements."""
    return x, x.reshape(-1).sin()


def test_collection_of_shapes():
    x, y = uneven(3), even(4)
    shapes = ShapesCollection()
    shapes[x] = (Dim("rows"), None)
    shapes[y] = {0: Dim.AUTO}
    model = Two(lambda x, y: (x * 2, y + 1))
    same_programs(model, ((x, y), {}), [((uneven(5), even(9)), {})], shapes)


def test_decided_by_a_size():
    """Every rank's program refuses sizes for which the model would have taken another branch."""
    model = Two(lambda x, y: x + y if x.shape[0] == y.shape[0] else x[:2] + y[:2])
    shapes = ({0: ROWS}, {0: ROWS})
    programs, _ = same_programs(model, ((even(5), even(5)), {}), dynamic_shapes=shapes)
    with lt.maybe_disable_local_tensor_mode():
        module = programs.rank(1).module()
        assert module(torch.ones(6, 4), torch.ones(6, 4)).shape == (6, 4)
        with pytest.raises(Exception, match=r"Guard failed|Runtime assertion failed"):
            module(torch.ones(6, 4), torch.ones(1, 4))


def test_equal_where_nothing_but_a_branch_says_so():
    model = Two(lambda x, y: (x * 2, y * 2) if x.shape[0] == y.shape[0] else (x * 3, y * 3))
    shapes = ({0: ROWS}, {0: ROWS})
    programs, _ = same_programs(model, ((even(5), even(5)), {}), dynamic_shapes=shapes)
    with lt.maybe_disable_local_tensor_mode():
        module = programs.rank(1).module()
        with pytest.raises(Exception, match=r"Guard failed|Runtime assertion failed"):
            module(torch.ones(6, 4), torch.ones(7, 4))


def test_decided_by_a_sum_over_ranks():
    """Fewer rows than 11 in all: a rank's own program can tell, since all ranks have as many."""

    def total(x, y):
        gathered = funcol.all_gather_tensor(x, 0, dist.group.WORLD)
        return gathered * 3 if gathered.shape[0] > 10 else gathered + y.sum()

    programs = lt.export(Two(total), (even(5), even(2)), dynamic_shapes=({0: Dim.AUTO}, None))
    with pytest.raises(AssertionError, match="Guard failed"):
        programs.all_ranks.module()(of_all(even(3)), of_all(even(2)))
    assert all("_c10d_functional" in str(programs.rank(rank).graph) for rank in range(WORLD))
    with lt.maybe_disable_local_tensor_mode():
        with pytest.raises(Exception, match=r"Guard failed|Runtime assertion failed"):
            programs.rank(0).module()(torch.ones(3, 4), torch.ones(2, 4))


def test_decided_by_sizes_of_several_ranks():
    """A branch on the global size of a DTensor, of which a rank alone knows its own part."""
    mesh = init_device_mesh("cpu", (WORLD,))
    x = distribute_tensor(draw(10, 2), mesh, [Shard(0)])
    model = Two(lambda x, y: x * 2 if x.shape[0] > 9 else x * 3)
    programs = lt.export(model, (x, even(2)), dynamic_shapes=({0: Dim.AUTO}, None))
    with torch.no_grad():
        found = programs.all_ranks.module()(of_all(x), of_all(even(2)))
    assert_same(found, of_all(x * 2))
    with pytest.raises(lt.ExportError) as caught:
        programs.rank(1)
    text = re.sub(r"s\d+", "s", str(caught.value))
    assert text == (
        "tracing has decided that s + s + s > 9, which rank 1 cannot check with the sizes of its "
        "own inputs: its program could be wrong for other sizes. Export without dynamic_shapes for "
        "these dimensions, or use the program of all ranks."
    )


# ---------------------------------------------------------------- parameters and buffers
class Names(nn.Module):
    """Parameters named like what an exporting module might need for itself."""

    def __init__(self):
        super().__init__()
        self.states = nn.Linear(4, 4)
        self.signature = nn.Parameter(even(4)[0])
        for name in ("values", "rank", "leaves", "in_spec", "out_spec", "_outputs", "module"):
            self.register_buffer(name, even(1))

    def forward(self, x, y):
        x = self.states(x) * self.signature + self.values + self.rank + self.leaves
        return x + self.in_spec + self.out_spec + self._outputs + self.module + y


def test_names():
    same_programs(Names(), ((uneven(3), even(1)), {}))


class Shared(nn.Module):
    def __init__(self, whole, write):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("seen", even(6))
        self.register_buffer("part", self.seen if whole else self.seen[2:])
        self.write = write

    def forward(self, x, y):
        if self.write:
            self.seen.add_(y.sum(0))
        return self.b(self.a(x)) + self.part.sum(0)


def test_tied():
    for whole in (True, False):
        model = Shared(whole, write=False)
        assert len(lt.export(model, (uneven(3), even(1))).rank(1).state_dict) >= 2
        same_programs(model, ((uneven(3), even(1)), {}))
    model = Shared(True, write=True)
    programs = lt.export(model, (uneven(3), even(1)))
    given, module = (uneven(3), even(1)), programs.all_ranks.module()
    with torch.no_grad():
        for _ in range(2):
            assert_same(module(*of_all(given)), of_all(model(*given)))


def test_buffer_in_the_memory_of_another():
    refused(
        lambda: lt.export(Shared(False, write=True), (uneven(3), even(1))),
        "the model writes to seen, which shares memory with part. An exported program has each of "
        "its buffers in memory of its own, and would not see the change. Make one of the other in "
        "forward().",
    )


def test_inputs_that_are_written():
    def scale(x, y):
        x.mul_(y.sum())
        return x[1:]

    programs = lt.export(Two(scale), (uneven(3), even(2)))
    ranked = torch.export.export(Two(scale), (uneven(3), even(2))).module()
    x, y = uneven(3), even(2)
    wanted, here, parts = x.clone(), x.clone(), of_all(x.clone())
    scale(wanted, y)
    ranked(here, y)
    programs.all_ranks.module()(parts, of_all(y))
    assert_same(of_all(here), of_all(wanted))
    assert_same(parts, of_all(wanted))
    with lt.maybe_disable_local_tensor_mode():
        for rank in range(WORLD):
            part = of_rank(x, rank).clone()
            programs.rank(rank).module()(part, of_rank(y, rank))
            assert_same(part, of_rank(wanted, rank))


def test_no_gradients():
    """Neither for shards nor for what all ranks share: half of them would train half a model."""
    with lt.maybe_disable_local_tensor_mode():
        shared = nn.Linear(4, 4)
    own = nn.Linear(4, 4)
    model = Two(lambda x, y: (own(shared(x)), shared.weight * 2, y))
    model.shared, model.own = shared, own
    with lt.maybe_disable_local_tensor_mode():
        y = torch.ones(2, requires_grad=True)
    x = uneven(3)
    programs, ranked = same_programs(model, ((x, y), {}))
    with lt.maybe_disable_local_tensor_mode():
        *found, _ = programs.rank(1).module()(of_rank(x, 1), y)
        of_shards, *of_all_ranks = programs.all_ranks.module()(of_all(x), y)
    of_ranks = ranked.module()(x, y)
    for tensor in (*found, *of_shards, of_all_ranks[0], *of_ranks):
        assert not tensor.requires_grad
    assert y.requires_grad and shared.weight.requires_grad and shared.weight.grad is None


# ---------------------------------------------------------------- what is refused
def test_dynamic_shapes_of_other_inputs():
    model, x = Two(lambda x, y: x + y), even(3)
    for shapes in ({"x": None}, {"x": None, "z": None}, (None,), (None,) * 3):
        with pytest.raises(lt.ExportError, match=r"dynamic_shapes has .* for inputs named x, y\."):
            lt.export(model, (x, x), dynamic_shapes=shapes)


def test_additional_inputs():
    shapes = AdditionalInputs()
    shapes.add((even(4), even(4)))
    refused(
        lambda: lt.export(Two(torch.add), (even(3), even(3)), dynamic_shapes=shapes),
        "AdditionalInputs cannot say which sizes of LocalTensors differ. Give dynamic_shapes "
        "Dim.DYNAMIC for these dimensions.",
    )


# ---------------------------------------------------------------- strict
def test_strict_leaves_compiled_code_alone():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    model, x = Two(torch.add), even(3)
    step = torch.compile(model, backend=backend, fullgraph=True)
    step(x, x)
    for rows in (3, 4, 5):
        torch.export.export(model, (even(rows), even(rows)), strict=True)
    step(x, x)
    assert len(compiled) == 1


def test_strict_runs_nothing():
    """Dynamo only looks: the model runs as often as without."""

    def runs(strict):
        seen = []
        model = Two(lambda x, y: seen.append(1) or x + y)
        lt.export(model, (even(3), even(3)), strict=strict)
        return len(seen)

    assert runs(strict=True) == runs(strict=False)


def test_lists_of_numbers_in_a_world_of_one_rank():
    """The only rank's numbers are everybody's, whatever their dtype."""
    with lt.LocalTensorMode(1):
        x = lt.rank_map(lambda rank: torch.ones(3))
        model = exported.Function(lambda x: x + len(x.tolist()))
        found = torch.export.export(model, (x,)).module()(x)
        assert [t.tolist() for t in found._local_tensors.values()] == [[4.0] * 3]
