"""Per-rank numbers in ops on stacks: as operands and as positions, bit for bit as plain torch."""

import pytest
import torch
import torch.distributed as dist

import localtensor_compile as lt
from localtensor_compile.stacked import row_ops

W = 4
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.bool)


def plain(dtype=torch.float32):
    return (torch.arange(24).reshape(4, 6) - 7).to(dtype)


def written(x, view):
    view.add_(1)
    return x


def set_item(x, rank):
    x[rank] = 3
    return x


OPERANDS = {
    "add": lambda x, r: x + r,
    "compare float": lambda x, r: x > r * 0.5,
    "divide": lambda x, r: x / (r + 1),
    "divide number": lambda x, r: (r + 1) / (x + 100),
    "equal": lambda x, r: x == r,
    "fill": lambda x, r: x.fill_(r),
    "floor divide": lambda x, r: x // (r + 1),
    "full like": torch.full_like,
    "in place": lambda x, r: x.add_(r),
    "less": lambda x, r: x < r,
    "masked fill": lambda x, r: x.masked_fill(x > 0, r),
    "masked fill in place": lambda x, r: x.masked_fill_(x > 0, r),
    "multiply": lambda x, r: x * r,
    "multiply float": lambda x, r: x * (r * 0.3),
    "multiply in place": lambda x, r: x.mul_(r),
    "multiply sum": lambda x, r: x.sum() * r,
    "remainder": lambda x, r: x % (r + 1),
    "new full": lambda x, r: x.new_full((2, 2), r),
    "new full of a dtype": lambda x, r: x.new_full((), r + 2, dtype=torch.float16),
    "subtract from": lambda x, r: r - x,
    "where": lambda x, r: torch.where(x > 1, x, r),
    "where float": lambda x, r: torch.where(x > 1, r * 0.5, x),
    "where of broadcast": lambda x, r: torch.where(x[0] > 1, x, r + 1),
    "where of one element": lambda x, r: torch.where(x > 1, x[0, 0], r + 1),
    "where of numbers": lambda x, r: torch.where(x > 1, r, 2.5),
    "where of two numbers": lambda x, r: torch.where(x > 1, r, r + 1),
    "where method": lambda x, r: x.where(x > 1, r),
    "where of bools": lambda x, r: torch.where(x > 1, x > 2, r > 1),
}
POSITIONS = {
    "backwards": lambda x, r: x.narrow(0, 3 - r, 1),
    "chain written": lambda x, r: written(x, x[r].view(2, 3)[1]),
    "columns": lambda x, r: x[:, r : r + 3],
    "narrow": lambda x, r: x.narrow(0, r, 1),
    "narrow copy": lambda x, r: torch.narrow_copy(x, 1, r, 2),
    "narrow copy of any start": lambda x, r: torch.narrow_copy(x, 1, (r * 3) % 4, 2),
    "narrow copy of any chunk": lambda x, r: torch.narrow_copy(x, 1, (r * r) % 3 * 2, 2),
    "narrow written": lambda x, r: written(x, x.narrow(1, r, 2)),
    "select": lambda x, r: x[r],
    "select scatter": lambda x, r: torch.select_scatter(x, x[0] * 2, 0, r),
    "set item": set_item,
    "slice copy": lambda x, r: torch.slice_copy(x, 1, r, r + 2),
    "slice scatter": lambda x, r: torch.slice_scatter(x, x[:, :2] * 2, 1, r, r + 2),
    "strided": lambda x, r: x[r].as_strided((2,), (1,)),
    "strided from the start": lambda x, r: x[r].as_strided((2,), (1,), 1),
    "transposed written": lambda x, r: written(x, x.t()[r : r + 1].t()),
}
# Here torch has a way of its own for a Python number, or the starts lie on no line.
PER_RANK = {
    "any start": (lambda x, r: x.narrow(1, (r * 3) % 4, 2), "aten.slice.Tensor"),
    "different lengths": (lambda x, r: x.narrow(1, 0, r + 1), "aten.slice.Tensor"),
    "power": (lambda x, r: x**r, "aten.pow.Tensor_Scalar"),
    "scaled add": (lambda x, r: torch.add(x, x, alpha=r), "aten.add.Tensor"),
    "different sizes": (lambda x, r: x.as_strided((r + 1,), (1,), 2), "aten.as_strided.default"),
}


def on_ranks(fn, dtype):
    """What each rank gets from plain torch, or None where torch refuses."""
    try:
        return [fn(plain(dtype), r) for r in range(W)]
    except RuntimeError:
        return None


def compare(fn, dtype, per_rank):
    expected = on_ranks(fn, dtype)
    with lt.LocalTensorMode(W, layout="stacked") as mode:
        x = lt.replicate(plain(dtype))
        if expected is None:
            with pytest.raises(RuntimeError):
                fn(x, dist.get_rank())
            return
        found = fn(x, dist.get_rank())
        assert list(mode.stats()["per_rank"]) == per_rank
        for r, want in enumerate(expected):
            assert found.dtype is want.dtype
            torch.testing.assert_close(
                found._local_tensors[r], want, rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERANDS)
def test_operand(name, dtype):
    compare(OPERANDS[name], dtype, [])


@pytest.mark.parametrize("layout", ["stacked", "per_rank"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("name", [n for n in OPERANDS if n.startswith(("where", "new full"))])
def test_choice_and_fill(name, backend, layout):
    """torch itself would ask for one Python number, compiled or not, in both layouts."""
    torch.compiler.reset()
    expected = on_ranks(OPERANDS[name], torch.float32)
    with lt.LocalTensorMode(W, layout=layout):
        x = lt.replicate(plain())

        def fn(x):
            return OPERANDS[name](x, dist.get_rank())

        found = (torch.compile(fn, backend=backend, fullgraph=True) if backend else fn)(x)
        for r, want in enumerate(expected):
            torch.testing.assert_close(found._local_tensors[r], want, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_choice_of_a_traced_size(dynamic):
    """Sizes that differ per rank, also as symbols."""
    torch.compiler.reset()

    def fn(x):
        return torch.where(x > 1, x.shape[0], x)

    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with lt.LocalTensorMode(W):
        for more in (2, 4):
            x = lt.rank_map(lambda r, n=more: torch.arange(float(r + n)))
            for r, found in compiled(x)._local_tensors.items():
                assert torch.equal(found, fn(torch.arange(float(r + more))))


def test_fill_of_a_size_per_rank():
    with lt.LocalTensorMode(W, layout="stacked"):
        rank = dist.get_rank()
        found = lt.replicate(plain()).new_full((rank + 1,), rank)
        for r in range(W):
            assert torch.equal(found._local_tensors[r], torch.full((r + 1,), float(r)))


@pytest.mark.parametrize("name", POSITIONS)
def test_position(name):
    compare(POSITIONS[name], torch.float32, [])


@pytest.mark.parametrize("name", PER_RANK)
def test_what_goes_per_rank_is_counted(name):
    fn, op = PER_RANK[name]
    compare(fn, torch.float32, [op])


GRADIENTS = {
    "any start": lambda x, r: x.narrow(1, (r * 3) % 4, 2) * 2,
    "in place": lambda x, r: (lambda y: (y.narrow(1, r, 2).mul_(3), y * y)[1])(x * 2),
    "in place of a view": lambda x, r: (lambda y: (y[r].view(2, 3)[1].mul_(2), y * y)[1])(x * 2),
    "multiply": lambda x, r: x * r,
    "narrow": lambda x, r: x.narrow(1, r, 2) * 2,
    "select": lambda x, r: x[r] * 3,
    "slice copy": lambda x, r: torch.slice_copy(x, 1, r, r + 2) * 2,
    "slice scatter": lambda x, r: torch.slice_scatter(x, x[:, :2] * 3, 1, r, r + 2) * 2,
}


@pytest.mark.parametrize(
    "backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient(name, backend):
    def loss(x, rank):
        return GRADIENTS[name](x, rank).sin().sum()

    expected = []
    for r in range(W):
        x = plain().requires_grad_()
        loss(x, r).backward()
        expected.append(x.grad)
    torch.compiler.reset()
    with lt.LocalTensorMode(W, layout="stacked"):
        x = lt.replicate(plain()).requires_grad_()

        def step(x):
            return loss(x, dist.get_rank())

        if backend is not None:
            step = torch.compile(step, backend=backend, fullgraph=True)
        step(x).backward()
        for r, want in enumerate(expected):
            torch.testing.assert_close(x.grad._local_tensors[r], want, rtol=1e-6, atol=1e-6)


STARTS = ([0, 2, 4], [4, 0, 2], [1, 4, 0], [3, 2, 1], [2, 2, 2])


@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("dim", [1, 2])
def test_row_ops_and_their_decompositions(dim, starts):
    stack = torch.arange(3 * 6 * 6.0).reshape(3, 6, 6)
    part = [row.narrow(dim - 1, s, 2) for row, s in zip(stack, starts)]
    placed, over = torch.zeros_like(stack), stack.clone()
    for i, (rows, s) in enumerate(zip(part, starts)):
        placed[i].narrow(dim - 1, s, 2).copy_(rows)
        over[i].narrow(dim - 1, s, 2).copy_(-rows)
    narrow = torch.stack(part)
    ops = torch.ops.localtensor
    for op, arguments, want in (
        (ops.stacked_narrow.default, (stack, dim, starts, 2), narrow),
        (ops.stacked_place.default, (narrow, dim, starts, 6), placed),
        (ops.stacked_write.default, (stack, -narrow, dim, starts), over),
    ):
        assert torch.equal(op(*arguments), want)
        assert torch.equal(row_ops.DECOMPOSITIONS[op](*arguments), want)
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
    for values in (starts, [5, 1, 9]):
        given = (values, torch.int32, torch.device("cpu"))
        want = torch.tensor(values, dtype=torch.int32)
        assert torch.equal(ops.stacked_ints.default(*given), want)
        assert torch.equal(row_ops.DECOMPOSITIONS[ops.stacked_ints.default](*given), want)
