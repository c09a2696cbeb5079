"""For every name of torch that is replaced on import: something that goes wrong without it.

A witness raises where it does not find what ranks on their own would have. It runs outside of any
world, unless it makes one. tests/test_compiler_hooks.py runs each with all replacements, and with
all but one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import SymInt, Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._library.opaque_object import MemberType, register_opaque_type
from torch._opaque_base import OpaqueBase
from torch.nn.parallel import DistributedDataParallel

import localtensor_compile
from localtensor_compile import (
    LocalIntNode,
    LocalTensor,
    LocalTensorMode,
    RankDivergence,
    ShardError,
    maybe_run_for_local_tensor,
    rank_map,
)
from localtensor_compile._torch import VERSION
from localtensor_compile.compile import traced_numbers, traced_tensors
from localtensor_compile.values.bool_node import make_bool
from localtensor_compile.values.float_node import make_float
from localtensor_compile.values.rank_node import is_ranked
from tests.parallel.data_parallel import Wide
from tests.witnesses import CACHEABLE, Witnesses, require_cacheable

RANKS = (0, 1)
WITNESSES = Witnesses()
needs, needs_each = WITNESSES.needs, WITNESSES.needs_each
QUESTIONS = "TorchInGraphFunctionVariable._get_handlers()"


def local(make: Callable[[int], Tensor], requires_grad: bool = False) -> LocalTensor:
    return LocalTensor({r: make(r) for r in RANKS}, requires_grad)


def uneven(requires_grad: bool = False) -> LocalTensor:
    """2 rows on rank 0, 3 on rank 1."""
    return local(lambda r: torch.arange(4.0 * (2 + r)).view(2 + r, 4) - r, requires_grad)


def even(requires_grad: bool = False) -> LocalTensor:
    return local(lambda r: torch.arange(3.0) + 10 * r, requires_grad)


def numbers(*values: int) -> SymInt:
    return SymInt(LocalIntNode(dict(enumerate(values))))


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def require(function: Callable[..., Any], *args: Any, backend: str = "aot_eager") -> Any:
    """Compiled, `function` gives each rank what it alone would compute."""
    out = compiled(function, backend)(*args)
    for rank in RANKS:
        alone = [a._local_tensors[rank] if isinstance(a, LocalTensor) else a for a in args]
        same(out, rank, function(*alone))
    return out


def same(found: LocalTensor, rank: int, expected: Tensor) -> None:
    assert isinstance(found, LocalTensor), type(found)
    shard = found._local_tensors[rank]
    assert not isinstance(shard, LocalTensor)
    assert torch.equal(shard, expected), f"rank {rank}: {shard} instead of {expected}"


# ---------------------------------------------------------------- autograd
def _half_used(run: Callable[[Tensor], Any]) -> None:
    """The gradient of an output that is not used is zeros, which autograd's C++ makes."""
    x = uneven(requires_grad=True)
    first, _ = x.split([1, 3], dim=1)
    run(first.sum())
    for rank in RANKS:
        same(x.grad, rank, torch.tensor([1.0, 0, 0, 0]).expand(2 + rank, 4))


@needs("torch.autograd._engine_run_backward")
def zeros_of_autograd() -> None:
    _half_used(lambda out: out.backward())


@needs("torch.autograd.graph._engine_run_backward")
def zeros_of_autograd_while_torch_traces() -> None:
    """As torch.compiler's own tracing of backward calls it."""
    _half_used(
        lambda out: torch.autograd.graph._engine_run_backward(
            (out,), (torch.ones_like(out),), False, False, (), allow_unreachable=True,
            accumulate_grad=True,
        )
    )  # fmt: skip


# ---------------------------------------------------------------- numbers in a compiled frame
@needs("VariableBuilder._wrap")
def number_closed_over() -> None:
    number = numbers(2, 3)
    out = compiled(lambda x: x * number)(even())
    for rank in RANKS:
        same(out, rank, (torch.arange(3.0) + 10 * rank) * (2 + rank))
    number = numbers(2, 5)
    same(compiled(lambda x: x * number)(even()), 1, (torch.arange(3.0) + 10) * 5)


class Ranks(OpaqueBase):
    """What user code may know of its rank; opaque to Dynamo, which calls its methods."""

    def index(self) -> Any:
        return numbers(2, 3)

    def share(self) -> Any:
        return make_float({0: 0.5, 1: 0.25})

    def is_first(self) -> Any:
        return make_bool({0: True, 1: False})


register_opaque_type(
    Ranks,
    typ="reference",
    members=dict.fromkeys(("index", "share", "is_first"), MemberType.USE_REAL),
)
_ranks = Ranks()


@needs("SourcelessBuilder._type_handlers[SymInt]")
def int_of_a_method() -> None:
    out = compiled(lambda x, ranks: x * ranks.index())(even(), _ranks)
    for rank in RANKS:
        same(out, rank, (torch.arange(3.0) + 10 * rank) * (2 + rank))


@needs("SourcelessBuilder._type_handlers[SymFloat]")
def float_of_a_method() -> None:
    out = compiled(lambda x, ranks: x * ranks.share())(even(), _ranks)
    for rank in RANKS:
        same(out, rank, (torch.arange(3.0) + 10 * rank) * (0.5, 0.25)[rank])


@needs("SourcelessBuilder._type_handlers[SymBool]")
def bool_of_a_method() -> None:
    _, first = compiled(lambda x, ranks: (x * 2, ranks.is_first()))(even(), _ranks)
    assert is_ranked(first) and first.node._values == {0: True, 1: False}


@needs("OutputGraph.call_user_compiler")
def number_returned() -> None:
    _, rows = compiled(lambda x: (x * 2, x.shape[0] + 1))(uneven())
    assert is_ranked(rows) and rows.node._values == {0: 3, 1: 4}


@needs("SymNodeVariable.as_tensor")
def float_returned() -> None:
    _, half = compiled(lambda x: (x * 2, x.shape[0] / 2))(uneven())
    assert is_ranked(half) and half.node._values == {0: 1.0, 1: 1.5}


# ---------------------------------------------------------------- questions of traced code
_RANKED = "localtensor_compile.values.ranked"


@maybe_run_for_local_tensor
def applied(function: Callable[[Any], Any], x: Any) -> Any:
    return function(x)


@needs(f"{QUESTIONS}[{_RANKED}.numbers_on_ranks]")
def function_for_per_rank_code() -> None:
    x = uneven()
    with LocalTensorMode(len(RANKS)):
        out = compiled(lambda x: applied(torch.sin, x) + 1)(x)
    for rank in RANKS:
        same(out, rank, x._local_tensors[rank].sin() + 1)


@needs(f"{QUESTIONS}[{_RANKED}.combined_values]")
def text_of_per_rank_code() -> None:
    x = uneven()
    kind = lambda x: "few" if x.shape[0] < 9 else "many"
    with LocalTensorMode(len(RANKS)):
        out = compiled(lambda x: x * 2 if applied(kind, x) == "few" else x)(x)
    for rank in RANKS:
        same(out, rank, x._local_tensors[rank] * 2)


@maybe_run_for_local_tensor
def as_many_as_rows(x: Tensor) -> list[Tensor]:
    return [x] * x.shape[0]


@needs(f"{QUESTIONS}[localtensor_compile.errors.fail]")
def error_of_per_rank_code() -> None:
    x = uneven()
    message = "sequences of different lengths: rank 0: 2, rank 1: 3"
    with LocalTensorMode(len(RANKS)), pytest.raises(RankDivergence, match=message):
        compiled(lambda x: as_many_as_rows(x)[0])(x)


@needs_each(
    *(
        f"{CACHEABLE}[{f.__module__}.{f.__name__}]"
        for f in (*traced_numbers.NODES, *traced_tensors.NODES)
    )
)
def graphs_with_our_nodes_are_cached(name: str) -> None:
    require_cacheable(name)


# ---------------------------------------------------------------- tensors in a compiled frame
@needs("TensorVariable.var_getattr" if VERSION < (2, 14) else "TensorVariable.tp_getattro_impl")
def shard_in_a_compiled_frame() -> None:
    out = compiled(lambda x: x + (x * 2)._local_tensors[1])(even())
    for rank in RANKS:
        same(out, rank, 3 * torch.arange(3.0) + 10 * rank + 20)


def number_written() -> None:
    def write(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] = dist.get_rank()
        return y

    x = uneven()
    with LocalTensorMode(len(RANKS)):
        out = compiled(write)(x)
    for rank in RANKS:
        same(out[:, 0], rank, torch.full((2 + rank,), float(rank)))


if VERSION >= (2, 14):  # which shows `x[i] = v` to no torch function mode
    needs("TensorVariable.mp_ass_subscript_impl")(number_written)


# ---------------------------------------------------------------- AOTAutograd
@needs("torch._functorch._aot_autograd.runtime_wrappers.gen_alias_from_base")
def conjugate_view_of_an_input() -> None:
    require(lambda x: x.conj(), local(lambda r: torch.tensor([1.0 + 2j, r + 3j])))


@needs("FakifiedOutWrapper.post_compile")
def graph_split_at_buckets() -> None:
    with LocalTensorMode(2):
        module = Wide()
        x = rank_map(lambda r: torch.ones(1, 7) * r)
        split = torch.compile(DistributedDataParallel(module, bucket_cap_mb=1), backend="aot_eager")
        out, expected = split(x), module(x)
    for rank in RANKS:
        same(out, rank, expected._local_tensors[rank])


@needs("torch._functorch._aot_autograd.collect_metadata_analysis.transform_subclass")
def empty_shard_of_a_view_as_output() -> None:
    """A view of nothing has other strides than what it is a view of."""
    x = local(lambda r: torch.arange(24.0).view(2, 3, 4), requires_grad=True)
    out = compiled(lambda x, n: (x * 2).narrow(1, 0, n))(x, numbers(2, 0))
    out.sum().backward()
    for rank, rows in zip(RANKS, (2, 0)):
        same(out, rank, (torch.arange(24.0) * 2).view(2, 3, 4)[:, :rows])


@needs("torch._functorch.aot_autograd.run_functionalized_fw_and_collect_metadata")
def gradient_of_a_mutated_input() -> None:
    def step(x: Tensor) -> Tensor:
        x.mul_(2)
        return x * x

    leaf = uneven(requires_grad=True)
    x = leaf * 1
    compiled(step)(x)
    (x * x).sum().backward()
    for rank in RANKS:
        same(leaf.grad, rank, 8 * leaf.detach()._local_tensors[rank])


def _reports_strides(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    """As Inductor tells AOTAutograd, for the backward graph, which strides it chose."""
    context = torch._guards.TracingContext.try_get()
    for node in gm.graph.output_node().args[0]:
        context.output_strides.append(tuple(node.meta["val"].stride()))
    return make_boxed_func(gm.forward)


def _has_strides(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), inputs):
        assert given.stride() == node.meta["val"].stride(), node
    return make_boxed_func(gm.forward)


@needs("torch._functorch._aot_autograd.graph_capture.aot_dispatch_subclass")
def tensors_saved_beside_a_mutated_input() -> None:
    def step(x: Tensor) -> Tensor:
        x.mul_(3)
        return x.sin().t()

    leaf = uneven(requires_grad=True)
    backend = aot_autograd(
        fw_compiler=_reports_strides, bw_compiler=_has_strides, keep_inference_input_mutations=True
    )
    torch.compile(step, backend=backend, fullgraph=True)(leaf * 1).sum().backward()
    for rank in RANKS:
        alone = leaf._local_tensors[rank].detach().requires_grad_()
        step(alone * 1).sum().backward()
        same(leaf.grad, rank, alone.grad)


def _sign_by_column(x: Tensor) -> Tensor:
    """Asks for the number of columns: traced, their symbol gets one value."""
    return torch.cat([torch.where(x[:, i : i + 1] > 0, 1.0, -1.0) for i in range(x.shape[1])], 1)


@needs("torch._functorch._aot_autograd.graph_capture_wrappers.unwrap_tensor_subclasses")
def size_that_becomes_a_number_while_it_is_traced() -> None:
    x = local(lambda r: torch.arange(1.0, 7.0).view(2, 3) - 7 * r, requires_grad=True)
    backend = aot_autograd(
        fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward),
        decompositions={torch.ops.aten.sign.default: _sign_by_column},
    )
    step = lambda x: (x * x, x.sign())
    square, sign = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)(x)
    square.sum().backward()
    for rank in RANKS:
        alone = x.detach()._local_tensors[rank]
        same(square, rank, alone * alone)
        same(sign, rank, torch.full((2, 3), 1.0 - 2 * rank))
        same(x.grad, rank, 2 * alone)


@needs("AOTDispatchAutograd.process_runtime_tangent")
def plain_gradient() -> None:
    x = even(requires_grad=True)
    compiled(lambda x: x.sin())(x).backward(torch.full((3,), 2.0))
    for rank in RANKS:
        same(x.grad, rank, 2 * x.detach()._local_tensors[rank].cos())


# ---------------------------------------------------------------- errors and lines
@needs("torch._dynamo.convert_frame._compile")
def error_of_ours() -> None:
    with pytest.raises(ShardError, match=r"values of ranks \[0, 1\] together"):
        compiled(torch.add)(even(), LocalTensor({0: torch.ones(3), 2: torch.ones(3)}))


@needs("torch._dynamo.guards.uninteresting_files")
def lines_of_the_user_only() -> None:
    traces = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        traces.extend(n.stack_trace for n in gm.graph.nodes if n.op == "call_function")
        return gm

    with LocalTensorMode(len(RANKS)):
        x = rank_map(lambda r: torch.ones(3 + r))
        step = lambda x: maybe_run_for_local_tensor(torch.sin)(x)
        torch.compile(step, backend=backend, fullgraph=True)(x)
    package = str(Path(localtensor_compile.__file__).parent)
    assert traces and not [t for t in traces if package in t], traces


# ---------------------------------------------------------------- control flow
@needs("CondOp.__call__")
def ranks_take_their_own_branch() -> None:
    chosen = local(lambda r: torch.tensor(r == 0))
    require(lambda p, x: torch.cond(p, torch.sin, torch.cos, (x,)), chosen, uneven())


@needs("WhileLoopOp.__call__")
def ranks_loop_as_often_as_they_need() -> None:
    def halved(x: Tensor) -> Tensor:
        loop = torch._higher_order_ops.while_loop
        return loop(lambda t: t.sum() > 4, lambda t: (t / 2,), (x,))[0]

    require(halved, uneven())


if VERSION < (2, 14):
    needs("torch._dynamo.variables.higher_order_ops.get_tensor_storages")(
        ranks_loop_as_often_as_they_need
    )


@needs("ScanOp.__call__")
def scan_of_ranks() -> None:
    def scanned(x: Tensor) -> Tensor:
        add = lambda carry, row: (carry + row, carry * row)
        return torch._higher_order_ops.scan(add, torch.zeros_like(x[0]), x, dim=0)[1]

    require(scanned, uneven())


@needs("AssociativeScanOp.__call__")
def associative_scan_of_ranks() -> None:
    """The operator itself: torch calls it for CUDA and XPU, on CPU it is Python on sizes."""
    from torch._higher_order_ops.associative_scan import associative_scan_op

    require(lambda x: associative_scan_op(lambda a, b: (a + b,), (x,), ())[0], uneven())


@needs("MapImpl.__call__")
def map_of_ranks() -> None:
    row = lambda row: row.sin() * 2
    require(lambda x: torch._higher_order_ops.map(row, x), uneven())


@needs("FlexAttentionHOP.__call__")
def attention_of_ranks() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    x = local(lambda r: torch.randn(1, 1, 16 * (1 + r), 16))
    require(lambda x: flex_attention(x, x, x), x)


# ---------------------------------------------------------------- views and parameters
@needs("_CustomViewFunc.apply")
def view_whose_size_1_has_another_stride() -> None:
    x = torch.as_strided(local(lambda r: torch.ones(9) * r), (1, 8), (9, 1))
    view = x.view_as(x)
    assert (x.stride(), view.stride()) == ((9, 1), (8, 1))
    require(lambda t: t * 3, view)


@needs("torch._dynamo.variables.builder._automatic_dynamic")
def uneven_parameter() -> None:
    linear = nn.Linear(4, 1, bias=False)
    linear.weight = nn.Parameter(uneven())
    with torch._dynamo.config.patch(log_compilation_metrics=True):  # as by default
        out = compiled(linear)(local(lambda r: torch.ones(1, 4)))
    for rank in RANKS:
        same(out.detach(), rank, linear.weight.detach()._local_tensors[rank].sum(1)[None])


@needs("Tensor._wrapped_number")
def number_and_a_plain_tensor() -> None:
    with pytest.raises(RankDivergence, match="got a plain tensor and a number that differs"):
        torch.ones(3) * numbers(2, 3)
