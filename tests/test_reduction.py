"""Association orders of reductions against real gloo processes, bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from localtensor_compile.check.gloo import shared_pool
from localtensor_compile.collectives import reduction
from localtensor_compile.collectives.reduction import (
    OPS,
    legal,
    memory_order,
    reduce_shards,
    reduce_to_root,
)
from localtensor_compile.errors import CollectiveError

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int8, torch.uint8)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, torch.complex64)
KINDS = (
    "all_reduce",
    "functional all_reduce",
    "all_reduce_coalesced",
    "functional all_reduce_coalesced",
    "all_reduce transposed",
    "reduce to the first",
    "reduce to the last",
    "reduce transposed",
    "reduce_scatter_single",
    "reduce_scatter_single transposed",
    "functional reduce_scatter",
    "functional reduce_scatter_coalesced",
    "reduce_scatter even list",
    "reduce_scatter uneven list",
)


@dataclass(frozen=True)
class Case:
    """`rows` is the number of rows per rank of a [rows * W, 3] tensor."""

    kind: str
    op: str
    dtype: torch.dtype
    rows: int
    special: bool = False
    group: tuple[int, ...] | None = None


# ---------------------------------------------------------------- data, the same in each process
def make_shard(case: Case, rank: int, size: int) -> Tensor:
    """Values of very different magnitude, so that another order of adding gives other bits."""
    generator = torch.Generator().manual_seed(1000 * case.rows + 10 * rank + case.special)
    shape = (case.rows * size, 3)
    if case.dtype is torch.bool:
        return torch.rand(shape, generator=generator) > 0.4
    if not (case.dtype.is_floating_point or case.dtype.is_complex):  # sums and products overflow
        return torch.randint(-(2**62), 2**62, shape, generator=generator).to(case.dtype)
    shape = (*shape, 2)
    exponents = torch.randint(-3, 4, shape, generator=generator)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponents
    if case.special:
        nan, inf = float("nan"), float("inf")
        pool = torch.tensor(
            [nan, inf, -inf, 0.0, -0.0, 6e4, -6e4, 3e38, -3e38, 1e-45, 6e-8], dtype=torch.float64
        )
        pick = torch.randint(0, 2 * len(pool), shape, generator=generator)
        values = torch.where(pick < len(pool), pool[pick % len(pool)], values)
    if case.dtype.is_complex:
        return torch.view_as_complex(values).to(case.dtype)
    return values[..., 0].contiguous().to(case.dtype)


def uneven_rows(size: int, rows: int) -> list[int]:
    """One part per rank, some of them empty, rows * size in all."""
    sizes: list[int] = []
    for k in range(size - 1):
        sizes.append(min(rows * k % (2 * rows + 1), rows * size - sum(sizes)))
    return [*sizes, rows * size - sum(sizes)]


def transposed(t: Tensor) -> Tensor:
    return t.reshape(3, -1).t()


# ---------------------------------------------------------------- on real gloo processes
def real_op(name: str) -> Any:
    if name == "premul_sum":
        return dist._make_nccl_premul_sum(2.0)
    return getattr(dist.ReduceOp, name.upper())


def reduce_scatter_single(output: Tensor, tensor: Tensor, op: Any, group: Any) -> None:
    """Named reduce_scatter_tensor before torch 2.13."""
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(output, tensor, op, group=group)


def real_value(case: Case, rank: int, size: int, group: Any) -> Tensor | list[Tensor]:
    import torch.distributed._functional_collectives as funcol

    x = make_shard(case, rank, size)
    op, kind = real_op(case.op), case.kind
    if kind.endswith("transposed"):
        x = transposed(x)
    if kind.startswith("all_reduce_coalesced"):
        parts = [x[:1].clone(), x[1:].clone()]
        dist.all_reduce_coalesced(parts, op, group=group)
        return parts
    if kind.startswith("all_reduce"):
        dist.all_reduce(x, op, group=group)
        return x
    if kind.startswith("reduce to") or kind == "reduce transposed":
        dist.reduce(x, group_dst=root_of(kind, size), op=op, group=group)
        return x
    if kind == "functional all_reduce":
        return funcol.wait_tensor(funcol.all_reduce(x, case.op, group))
    if kind == "functional all_reduce_coalesced":
        parts = funcol.all_reduce_coalesced([x[:1], x[1:]], case.op, group)
        return [funcol.wait_tensor(t) for t in parts]
    if kind == "functional reduce_scatter":
        return funcol.wait_tensor(funcol.reduce_scatter_tensor(x, case.op, 0, group))
    if kind == "functional reduce_scatter_coalesced":
        parts = funcol.reduce_scatter_tensor_coalesced([x, x.flip(0)], case.op, [0, 0], group)
        return [funcol.wait_tensor(t) for t in parts]
    if kind.startswith("reduce_scatter_single"):
        output = x.new_empty(x.shape[0] // size, *x.shape[1:])
        reduce_scatter_single(output, x, op, group)
        return output
    even = kind == "reduce_scatter even list"
    parts = list(x.split([case.rows] * size if even else uneven_rows(size, case.rows)))
    output = torch.empty_like(parts[rank])
    dist.reduce_scatter(output, parts, op, group=group)
    return output


def root_of(kind: str, size: int) -> int:
    return size - 1 if kind == "reduce to the last" else 0


def run_cases(cases: list[Case]) -> list[Any]:
    me, everyone = dist.get_rank(), tuple(range(dist.get_world_size()))
    groups = {g: dist.new_group(g) for g in {c.group or everyone: None for c in cases}}
    results: list[Any] = []
    for case in cases:
        ranks = case.group or everyone
        if me in ranks:
            results.append(real_value(case, ranks.index(me), len(ranks), groups[ranks]))
        else:
            results.append(None)
    return results


def try_ops(dtypes: list[torch.dtype]) -> dict[tuple[torch.dtype, str, str], str | None]:
    """What each collective raises, or None, for each dtype and op."""
    errors: dict[tuple[torch.dtype, str, str], str | None] = {}
    for dtype, op in itertools.product(dtypes, OPS):
        parts = [torch.ones(2).to(dtype) for _ in range(dist.get_world_size())]
        x, reduce_op = torch.ones(2 * len(parts)).to(dtype), real_op(op)
        calls = {
            "all_reduce": lambda: dist.all_reduce(x, reduce_op),
            "all_reduce_coalesced": lambda: dist.all_reduce_coalesced(parts, reduce_op),
            "reduce": lambda: dist.reduce(x, 0, reduce_op),
            "reduce_scatter": lambda: dist.reduce_scatter(parts[0], parts, reduce_op),
            "reduce_scatter_single": lambda: reduce_scatter_single(parts[0], x, reduce_op, None),
        }
        for name, call in calls.items():
            try:
                call()
                errors[dtype, op, name] = None
            except (RuntimeError, ValueError) as error:
                errors[dtype, op, name] = str(error)
    return errors


# ---------------------------------------------------------------- the same, computed here
def expected(case: Case, size: int) -> list[Any]:
    """What each group rank gets."""
    shards = [make_shard(case, r, size) for r in range(size)]
    kind, op = case.kind, case.op
    if kind in ("reduce to the first", "reduce to the last"):
        return reduce_to_root(shards, op, root_of(kind, size))
    if kind == "all_reduce transposed":
        return [transposed(reduce_shards(shards, op))] * size  # in the order of memory
    if kind == "reduce transposed":
        return [transposed(t) for t in reduce_to_root(shards, op, 0)]
    if kind == "reduce_scatter_single transposed":
        total = transposed(reduce_shards(shards, op, complex_parts=False))
        return list(total.split(total.shape[0] // size))
    if kind.endswith("all_reduce_coalesced"):
        # One reduction of all tensors joined: a chunk does not end where a tensor ends.
        total = reduce_shards(shards, op, complex_parts=not kind.startswith("functional"))
        return [[total[:1], total[1:]]] * size
    if kind in ("all_reduce", "functional all_reduce"):
        return [reduce_shards(shards, op)] * size
    if kind in ("reduce_scatter_single", "functional reduce_scatter"):
        total = reduce_shards(shards, op, complex_parts=kind.startswith("functional"))
        return list(total.split(case.rows))
    if kind == "functional reduce_scatter_coalesced":
        totals = [
            reduce_shards(s, op, complex_parts=False) for s in (shards, [t.flip(0) for t in shards])
        ]
        return [list(parts) for parts in zip(*(t.split(case.rows) for t in totals))]
    even = kind == "reduce_scatter even list"
    rows = [case.rows] * size if even else uneven_rows(size, case.rows)
    columns = zip(*(t.split(rows) for t in shards))
    return [reduce_shards(column, op, complex_parts=False) for column in columns]


def same(actual: Tensor, wanted: Tensor) -> bool:
    """Equal bits, except that NaN is NaN and that gloo writes sums of bools as numbers up to W."""
    if actual.dtype != wanted.dtype or actual.shape != wanted.shape:
        return False
    if actual.dtype is torch.bool:
        return torch.equal(actual, wanted)
    if actual.is_complex():
        actual, wanted = torch.view_as_real(actual), torch.view_as_real(wanted)
    nan = actual.isnan()
    if not torch.equal(nan, wanted.isnan()):
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    zero = torch.zeros((), dtype=actual.dtype)
    return torch.equal(*(torch.where(nan, zero, t).view(bits) for t in (actual, wanted)))


def compare(cases: list[Case], world_size: int, timeout: float = 300.0) -> int:
    """Assert that every rank agrees in every case. Returns the number of tensors compared."""
    results = shared_pool().run(run_cases, world_size, cases, timeout=timeout)
    wrong, count = [], 0
    for i, case in enumerate(cases):
        group = case.group or tuple(range(world_size))
        for member, want in zip(group, expected(case, len(group))):
            got = results[member][i]
            got, want = (got, want) if isinstance(got, list) else ([got], [want])
            assert len(got) == len(want)
            count += len(got)
            if not all(same(a, b) for a, b in zip(got, want)):
                wrong.append((case, member))
    assert not wrong, f"{len(wrong)} of {len(cases)} cases differ, first {wrong[:5]}"
    return count


def matrix(
    rows: tuple[int, ...],
    special: tuple[bool, ...] = (True,),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> list[Case]:
    """Each collective with each op and dtype that gloo has."""
    return [
        Case(kind, op, dtype, n, s)
        for kind, op, dtype, n, s in itertools.product(KINDS, OPS, dtypes, rows, special)
        if legal(op, dtype) is None
    ]


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [2, 3])
def test_equals_gloo(world_size: int) -> None:
    """Every collective, op and dtype; a few elements, NaN, infinities and overflow among them."""
    cases = matrix((5,))
    assert compare(cases, world_size) >= len(cases) * world_size > 750 * world_size


@pytest.mark.gloo
@pytest.mark.parametrize("world_size", [1, 5, 8])
def test_sum_and_min_equal_gloo(world_size: int) -> None:
    cases = [
        Case(kind, op, dtype, rows, special=rows == 2)
        for kind, op, dtype, rows in itertools.product(
            KINDS, ("sum", "min"), (torch.float32, torch.bfloat16), (0, 1, 2)
        )
    ]
    assert compare(cases, world_size) >= len(cases) * world_size


@pytest.mark.gloo
def test_equals_gloo_on_larger_tensors() -> None:
    cases = [Case(kind, "sum", torch.float64, 8000) for kind in KINDS]
    assert reduction.SMALL < 3 * make_shard(cases[0], 0, 3).nbytes  # the way with few copies
    compare(cases, 3)


@pytest.mark.gloo
def test_equals_gloo_above_the_segment_limit() -> None:
    """All-reduce and reduce differ in their chunks, and reduce sends segments once too often."""
    case = Case("reduce to the first", "sum", torch.float32, 180_001)
    assert make_shard(case, 0, 3).nbytes > 2 * 3 * 2**20
    compare([case, Case("all_reduce", "sum", torch.float32, 180_001)], 3)


@pytest.mark.gloo
@pytest.mark.parametrize("group", [(1, 3), (0, 2, 3), (2,)])
def test_equals_gloo_in_sub_groups(group: tuple[int, ...]) -> None:
    cases = [Case(kind, "sum", torch.float32, 5, group=group) for kind in KINDS]
    assert compare(cases, 4) >= len(cases) * len(group)


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("world_size", range(1, 9))
def test_equals_gloo_in_full(world_size: int) -> None:
    cases = matrix((0, 1, 7, 1000))
    assert compare(cases, world_size, 1200.0) >= len(cases) * world_size


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("mib", [1.5, 2.0, 2.6])
def test_equals_gloo_above_the_segment_limit_in_full(
    world_size: int, dtype: torch.dtype, mib: float
) -> None:
    """`mib` MiB per rank: up to more than 2 W segments of 1 MiB."""
    rows = int(mib * 2**20 / 3 / dtype.itemsize)
    compare([Case(k, "sum", dtype, rows) for k in ("all_reduce", "reduce to the last")], world_size)


@pytest.mark.gloo
def test_legal_says_what_gloo_raises() -> None:
    dtypes = [
        *DTYPES,
        torch.complex128,
        torch.int16,
        torch.uint16,
        torch.uint32,
        torch.float8_e4m3fn,
    ]
    errors = shared_pool().run(try_ops, 2, dtypes)
    assert len(errors[0]) == len(dtypes) * len(OPS) * 5
    wrong = [k for k, error in errors[0].items() if (error is None) != (legal(k[1], k[0]) is None)]
    assert not wrong
    assert errors[1].keys() == errors[0].keys()


# ---------------------------------------------------------------- without processes
def plain_shards(size: int, dtype: torch.dtype = torch.float32, rows: int = 4) -> list[Tensor]:
    return [make_shard(Case("all_reduce", "sum", dtype, rows), r, size) for r in range(size)]


def test_orders_differ() -> None:
    """If they did not, the comparisons above would show nothing."""
    shards = plain_shards(4)
    ranks_in_order = ((shards[0] + shards[1]) + shards[2]) + shards[3]
    assert torch.equal(reduce_shards(shards, "sum", order="rank_order"), ranks_in_order)
    assert not torch.equal(reduce_shards(shards, "sum"), ranks_in_order)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("rows", [1, 2, 50])
def test_both_ways_to_follow_the_ring_agree(
    size: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has few ops, for small tensors, the other makes few copies."""
    shards = plain_shards(size, rows=rows)
    few_ops = reduce_shards(shards, "sum")
    monkeypatch.setattr(reduction, "SMALL", 0)
    assert torch.equal(reduce_shards(shards, "sum"), few_ops)


def test_nan_survives_min_as_in_cpp() -> None:
    """std::min(own, got) is own unless got < own: NaN stays only with the last rank of the ring."""
    one, nan = torch.ones(6), torch.full((6,), float("nan"))
    assert reduce_shards([nan, one, one], "min").isnan().tolist() == [True] * 2 + [False] * 4
    assert (
        reduce_shards([one, nan, one], "max").isnan().tolist()
        == [False] * 2 + [True] * 2 + [False] * 2
    )


def test_integers_wrap() -> None:
    big = torch.tensor([2**63 - 1, 2**62])
    assert reduce_shards([big, big], "sum").tolist() == [-2, -(2**63)]
    bytes_ = torch.tensor([200, 16], dtype=torch.uint8)
    assert reduce_shards([bytes_, bytes_, bytes_], "product").tolist() == [200**3 % 256, 0]


def test_avg_divides_the_sum() -> None:
    shards = plain_shards(3)
    assert torch.equal(reduce_shards(shards, "avg"), reduce_shards(shards, "sum") / 3)


@pytest.mark.parametrize("factor", [0.5, torch.tensor([0.5]), [0.5, 0.5, 0.5]])
def test_premul_sum_multiplies_first(factor: Any) -> None:
    shards = plain_shards(3, torch.bfloat16)
    want = reduce_shards([t * 0.5 for t in shards], "sum")
    assert torch.equal(reduce_shards(shards, "premul_sum", factor=factor), want)


def test_premul_sum_takes_a_factor_per_rank() -> None:
    shards = [torch.ones(3), torch.ones(3)]
    assert reduce_shards(shards, "premul_sum", factor=[2, 3.0]).tolist() == [5.0] * 3


def test_reduce_in_rank_order_leaves_other_ranks_alone() -> None:
    shards = plain_shards(3)
    result = reduce_to_root(shards, "avg", 1, order="rank_order")
    assert torch.equal(result[1], reduce_shards(shards, "avg", order="rank_order"))
    assert torch.equal(result[0], shards[0]) and torch.equal(result[2], shards[2])
    assert result[0].data_ptr() != shards[0].data_ptr()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.complex64])
def test_results_are_new_and_contiguous(size: int, dtype: torch.dtype) -> None:
    shards = [t.t() for t in plain_shards(size, dtype)]
    before = [t.clone() for t in shards]
    results = [
        reduce_shards(shards, "sum"),
        reduce_shards(shards, "sum", order="rank_order"),
        *reduce_to_root(shards, "sum", 0),
    ]
    for result in results:
        assert result.is_contiguous() and result.shape == shards[0].shape
        result.zero_()
    assert all(torch.equal(a, b) for a, b in zip(shards, before))


@pytest.mark.parametrize("op", ["sum", "min", "avg"])
@pytest.mark.parametrize("small", [True, False])
def test_works_on_fake_tensors_and_traced(
    op: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not small:
        monkeypatch.setattr(reduction, "SMALL", 0)
    shards = plain_shards(4)
    want = [reduce_shards(shards, op), *reduce_to_root(shards, op, 2)]

    def both(*parts: Tensor) -> list[Tensor]:
        return [reduce_shards(parts, op), *reduce_to_root(parts, op, 2)]

    with FakeTensorMode() as mode:
        fakes = both(*(mode.from_tensor(t) for t in shards))
    assert [(t.shape, t.dtype, t.stride()) for t in fakes] == [
        (t.shape, t.dtype, t.stride()) for t in want
    ]
    graph = make_fx(both, tracing_mode="fake")(*shards)
    assert all(torch.equal(a, b) for a, b in zip(graph(*shards), want))


@pytest.mark.parametrize("size", [2, 8, 32])
def test_the_number_of_ops_is_linear_in_the_ranks(size: int) -> None:
    graph = make_fx(lambda *parts: reduce_shards(parts, "sum"))(*plain_shards(size, rows=1))
    assert len(graph.graph.nodes) <= 4 * size + 6


# ---------------------------------------------------------------- memory order
@pytest.mark.parametrize(
    "t",
    [
        torch.arange(6.0),
        torch.arange(6.0).view(2, 3),
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(24.0)[4:16].view(3, 1, 4).transpose(0, 2),
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.zeros(3, 0).t(),
    ],
)
def test_memory_order(t: Tensor) -> None:
    flat = memory_order(t)
    assert flat.data_ptr() == t.data_ptr()
    assert flat.shape == (t.numel(),) and flat.is_contiguous()


@pytest.mark.parametrize("t", [torch.zeros(4, 4)[:, ::2], torch.zeros(4).expand(3, 4)])
def test_memory_order_refuses_gaps_and_overlaps(t: Tensor) -> None:
    with pytest.raises(CollectiveError, match=r"strides .* has gaps or overlaps .*contiguous\(\)"):
        memory_order(t)


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("op", "dtype", "text"),
    [
        ("mean", torch.float32, r"no reduce op 'mean'; the reduce ops are sum, "),
        ("sum", torch.int16, r"gloo cannot reduce torch\.int16\. Convert the tensor"),
        ("band", torch.float32, r"ReduceOp\.BAND needs integers or bool, not torch\.float32"),
        ("avg", torch.int64, r"ReduceOp\.AVG gives fractions, which torch\.int64 cannot hold"),
        ("max", torch.complex64, r"ReduceOp\.MAX is not defined on torch\.complex64"),
        ("premul_sum", torch.int64, r"PREMUL_SUM needs floating point numbers, not torch\.int64"),
    ],
)
def test_refuses_what_gloo_refuses(op: str, dtype: torch.dtype, text: str) -> None:
    shards = [torch.ones(2).to(dtype)] * 2
    with pytest.raises(CollectiveError, match=text):
        reduce_shards(shards, op, factor=2 if op == "premul_sum" else None)
    with pytest.raises(CollectiveError, match=text):
        reduce_to_root(shards, op, 0, factor=2 if op == "premul_sum" else None)


def test_legal_of_premul_sum() -> None:
    assert (
        legal("premul_sum", torch.float32)
        == "gloo has no ReduceOp.PREMUL_SUM; it exists on NCCL only"
    )


@pytest.mark.parametrize(
    ("shards", "options", "text"),
    [
        ([], {}, "the shard of at least one rank"),
        ([torch.ones(2)], {"order": "tree"}, r"unknown reduction order 'tree'\. Use gloo or rank_"),
        (
            [torch.ones(2), torch.ones(1)],
            {},
            r"one shape and dtype .* rank 0: torch\.float32 \(2,\), rank 1: torch\.float32 \(1,\)",
        ),
        (
            [torch.ones(2), torch.ones(2).double()],
            {},
            r"one shape and dtype .* rank 1: torch\.float64 \(2,\)",
        ),
        ([torch.ones(2)], {"factor": 2.0}, "a factor belongs to premul_sum, not to sum"),
    ],
)
def test_refuses_wrong_arguments(shards: list[Tensor], options: Any, text: str) -> None:
    with pytest.raises(CollectiveError, match=text):
        reduce_shards(shards, "sum", **options)


@pytest.mark.parametrize("factor", [None, [1.0], [1.0, None]])
def test_premul_sum_without_its_factors(factor: Any) -> None:
    with pytest.raises(
        CollectiveError, match="premul_sum over 2 ranks needs one factor, or one per"
    ):
        reduce_shards([torch.ones(2)] * 2, "premul_sum", factor=factor)
