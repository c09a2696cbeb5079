"""localtensor_random::* custom ops: one opaque graph node per random op, for all ranks.

A plain aten random node would draw once from torch's default generator. These nodes draw for every
rank from that rank's generator when they run. Nothing may merge, drop, repeat or reorder them:
each has a call number (equal draws stay two draws), is kept when its result is unused, is never
recomputed in backward, and Inductor runs them in call order (random_lowering.py).

In-place ops become functional ones that fill fresh memory of the same sizes and strides: CPU
kernels draw in another order for other strides.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from .._torch import (
    in_traced_backward,
    is_tangent,
    keep_when_dead,
    trace_identity,
    traced_graph,
)
from ..values.ranked import per_rank_values
from . import random_lowering
from .draws import Draw

aten = torch.ops.aten
NAMESPACE = "localtensor_random"
# Inductor's FX graph cache knows an op by its name alone: count up when a kernel, an argument or
# the lowering changes.
VERSION = "v1"

library = torch.library.Library(NAMESPACE, "DEF")

_TAGS = (
    torch.Tag.cudagraph_unsafe,  # a captured graph would replay one draw
    torch.Tag.needs_exact_strides,
    torch.Tag.nondeterministic_seeded,
    torch.Tag.pt2_compliant_tag,
)

# Types of aten arguments -> types of ours. Numbers may differ per rank: a list with one value for
# all ranks or one per rank, empty for None. Tensors: one per rank, empty for None.
_TYPES = {
    "Tensor": "Tensor[]",
    "Optional[Tensor]": "Tensor[]",
    "int": "SymInt[]",
    "SymInt": "SymInt[]",
    "Optional[int]": "SymInt[]",
    "float": "float[]",
    "Optional[float]": "float[]",
    "number": "float[]",
    "bool": "bool",
    "Optional[bool]": "bool?",
}
_FILL = ("SymInt[] sizes", "SymInt[] strides", "ScalarType dtype", "Device device")


class Node:
    """One localtensor_random op, with a tensor per rank in and out (see StackedNode).

    Args:
        name: of the op, without the version.
        func: what it runs per rank: an aten overload, or a function (memory, *, generator).
        arguments: the schema arguments of `func` that the op takes too.
        fills: whether `func` writes its first argument, which is not among `arguments`.
        outputs: for an op that returns more than tensors, which of its results are tensors.
    """

    kinds = _TYPES
    suffix = VERSION

    def __init__(
        self,
        name: str,
        func: Any,
        arguments: Sequence[Any],
        fills: bool,
        outputs: tuple[int, ...] | None = None,
    ) -> None:
        self.func = func
        self.draw = Draw(func)
        self.arguments = list(arguments)
        self.types = [self.kinds[str(a.type)] for a in arguments]
        self.fills = fills
        self.outputs = outputs
        declared = ["int[] ranks", "int call", "Tensor? after", *(_FILL if fills else ())]
        # Positional names of our own: generated code breaks on an argument called "from".
        declared += [f"{t} arg{i}" for i, t in enumerate(self.types)]
        name = f"{name}_{self.suffix}"
        library.define(f"{name}({', '.join(declared)}) -> Tensor[]", tags=_TAGS)
        library.impl(name, self._kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", self._fake, lib=library)
        self.op = getattr(getattr(torch.ops, NAMESPACE), name).default
        keep_when_dead(self.op)
        random_lowering.run_in_call_order(self.op)

    @classmethod
    def of(cls, func: Any, outputs: tuple[int, ...] | None = None) -> Self:
        """The node of an aten overload."""
        schema = func._schema
        arguments = [a for a in schema.arguments if "Generator" not in str(a.type)]
        fills = bool(arguments[0].is_write)
        base = schema.name.partition("::")[2].strip("_")
        overload = schema.overload_name.strip("_")
        parts = [base, "fill" if fills else "", overload]
        return cls("_".join(p for p in parts if p), func, arguments[fills:], fills, outputs)

    # ---- recording
    def emit(self, ranks: Sequence[int], values: Sequence[Any]) -> list[list[Any]]:
        """Call the op on the values of `arguments`. For each output the tensors of all ranks."""
        return self._call(ranks, self._columns(ranks, values))

    def emit_fill(
        self,
        ranks: Sequence[int],
        sizes: Sequence[Sequence[Any]],
        strides: Sequence[Sequence[Any]] | None,
        dtype: torch.dtype,
        device: torch.device,
        values: Sequence[Any] = (),
    ) -> list[Any]:
        """The same for fresh memory, with sizes and strides of each rank (None: contiguous)."""
        flat_sizes = [s for size in sizes for s in size]
        flat_strides = [] if strides is None else [s for stride in strides for s in stride]
        memory = [flat_sizes, flat_strides, dtype, device]
        return self._call(ranks, memory + self._columns(ranks, values))[0]

    def _call(self, ranks: Sequence[int], rest: Sequence[Any]) -> list[Any]:
        random_lowering.register_if_inductor_is_loaded()
        with _kept_in_place(self.op):
            flat = self.op(list(ranks), _call_number(), None, *rest)
        return self._outputs(ranks, flat)

    def _outputs(self, ranks: Sequence[int], flat: Sequence[Tensor]) -> list[Any]:
        outputs = len(flat) // len(ranks)
        return [flat[i::outputs] for i in range(outputs)]

    def _columns(self, ranks: Sequence[int], values: Sequence[Any]) -> list[Any]:
        columns: list[Any] = []
        for kind, value in zip(self.types, values):
            if not kind.endswith("[]"):
                columns.append(value)
            elif value is None:
                columns.append([])
            elif (of_rank := per_rank_values(value)) is not None:
                columns.append([of_rank[r] for r in ranks])
            else:
                columns.append([value] * len(ranks) if kind == "Tensor[]" else [value])
        return columns

    # ---- running
    def _kernel(self, ranks: Sequence[int], call: int, after: Any, *rest: Any) -> list[Tensor]:
        # Generated code may call us with a function mode on: what is made here is plain.
        with torch._C.DisableTorchFunction():
            of_ranks = self._rank_arguments(len(ranks), rest)
            device = next(v for v in of_ranks[0] if isinstance(v, Tensor)).device
            out: list[Tensor] = []
            with self.draw.turns(ranks, device) as turns:
                for r, (args, kwargs) in zip(ranks, map(self._named, of_ranks)):
                    result = self.draw.call(*args, **kwargs, **{self.draw.keyword: turns[r]})
                    out += self._tensors(result)
            return out

    def _fake(self, ranks: Sequence[int], call: int, after: Any, *rest: Any) -> list[Tensor]:
        random_lowering.register_if_inductor_is_loaded()
        out: list[Tensor] = []
        for values in self._rank_arguments(len(ranks), rest):
            if self.fills:
                out.append(values[0])
            else:
                args, kwargs = self._named(values)
                out += self._tensors(self.func(*args, **kwargs))
        return out

    def _rank_arguments(self, world_size: int, rest: Sequence[Any]) -> list[list[Any]]:
        """The arguments of `func` for each rank, fresh memory first where it fills."""
        memory: list[list[Any]] = [[] for _ in range(world_size)]
        if self.fills:
            sizes, strides, dtype, device, *rest = rest
            memory = [[t] for t in _memory(world_size, sizes, strides, dtype, device)]
        return [
            memory[i] + [_of_rank(kind, column, i) for kind, column in zip(self.types, rest)]
            for i in range(world_size)
        ]

    def _named(self, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        start = int(self.fills)
        named = {a.name: v for a, v in zip(self.arguments, values[start:]) if a.kwarg_only}
        return values[: len(values) - len(named)], named

    def _tensors(self, result: Any) -> list[Tensor]:
        if isinstance(result, Tensor):
            return [result]
        if self.outputs is None:
            return list(result)
        like = result[0]
        return [like.new_empty(0) if result[i] is None else result[i] for i in self.outputs]

    # ---- one rank's own program
    def plain_calls(
        self, index: int, world_size: int, rest: Sequence[Any]
    ) -> list[tuple[Any, list[Any], dict[str, Any]]]:
        """[(op, args, kwargs), ...]: the functional ops with which one rank alone would draw.

        The second, if there is one, takes the result of the first as its first argument.

        Args:
            index: of the rank among those of the node.
            rest: the node's arguments after `after`, which may be FX nodes.

        Raises:
            NotImplementedError: no functional op draws so.
        """
        calls: list[tuple[Any, list[Any], dict[str, Any]]] = []
        op = self.func
        if self.fills:
            sizes, strides, dtype, device, *rest = rest
            part = slice(index * len(sizes) // world_size, (index + 1) * len(sizes) // world_size)
            like = {"dtype": dtype, "device": device}
            if self is RANDPERM:
                return [(aten.randperm.default, list(sizes[part]), like)]
            if strides:
                memory = [list(sizes[part]), list(strides[part])]
                calls.append((aten.empty_strided.default, memory, like))
            else:
                calls.append((aten.empty.memory_format, [list(sizes[part])], like))
            op = _functional(self.func)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for argument, kind, column in zip(self.arguments, self.types, rest):
            value = _of_rank(kind, column, index)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return [*calls, (op, args, kwargs)]


def _functional(fill: Any) -> Any:
    """`aten.uniform` for `aten.uniform_`, with the same arguments."""
    name = fill._schema.name.partition("::")[2].removesuffix("_")
    wanted = [a.name for a in fill._schema.arguments]
    for packet in (getattr(aten, name, None), getattr(aten, f"{name}_functional", None)):
        for overload in packet.overloads() if packet is not None else ():
            op = getattr(packet, overload)
            if [a.name for a in op._schema.arguments] == wanted:
                return op
    raise NotImplementedError(f"{fill} has no functional form")


def _of_rank(kind: str, column: Any, i: int) -> Any:
    if not kind.endswith("[]"):
        return column
    if not column:
        return None
    return column[i] if len(column) > 1 else column[0]


def _memory(
    world_size: int,
    sizes: Sequence[Any],
    strides: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:
    ndim = len(sizes) // world_size
    made = []
    for i in range(world_size):
        part = slice(i * ndim, (i + 1) * ndim)
        if strides:
            made.append(torch.empty_strided(sizes[part], strides[part], dtype=dtype, device=device))
        else:
            made.append(torch.empty(sizes[part], dtype=dtype, device=device))
    return made


# ---- call numbers
_counters: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()


def _call_number() -> int:
    """1, 2, ... within one compilation, so that cache keys do not depend on what came before."""
    trace = trace_identity()
    if trace is None:
        return 0
    counter = _counters.get(trace)
    if counter is None:
        counter = _counters[trace] = itertools.count(1)
    return next(counter)


# ---- forward and backward
class _PinnedMeta(dict[str, Any]):
    """FX node meta in which some tags cannot be changed any more.

    AOTAutograd and checkpointing tag nodes after the op that made them has returned; as they tag
    them, backward would draw again what forward drew.
    """

    pins: dict[str, Any] = {"recompute": CheckpointPolicy.MUST_SAVE}

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, self.pins.get(key, value))


class _DrawMeta(_PinnedMeta):
    pins = {**_PinnedMeta.pins, "partitioner_tag": "must_be_in_forward"}


@contextlib.contextmanager
def _kept_in_place(op: Any) -> Iterator[None]:
    """Tell AOTAutograd's partitioner to draw in the half of the graph where the program draws."""
    graph = traced_graph()
    if graph is None:
        yield
        return
    before = len(graph.nodes)
    yield
    made = list(itertools.islice(reversed(graph.nodes), len(graph.nodes) - before))
    if in_traced_backward():
        # A draw that depends on no gradient would move to forward, or be dropped, or run when its
        # result is first needed: it waits for a gradient.
        tangent = next((n for n in graph.nodes if is_tangent(n)), None)
        for node in made:
            if node.target is op and tangent is not None:
                node.update_arg(_AFTER, tangent)
        return
    for node in made:
        meta = _DrawMeta(node.meta) if node.target is op else _PinnedMeta(node.meta)
        for key in ("partitioner_tag", "recompute"):
            meta[key] = meta.get(key)
        if "ac_graph_id" not in meta and "recompute" not in node.meta:
            del meta["recompute"]
        node.meta = meta


_AFTER = 2


# ---- the ops
def _randperm(memory: Tensor, *, generator: Any) -> Tensor:
    return torch.randperm(memory.numel(), generator=generator, out=memory)


RANDPERM = Node("randperm", _randperm, (), fills=True)

_FILLS_AND_FUNCTIONS = (
    aten.bernoulli.Tensor,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.bernoulli_.Tensor,
    aten.bernoulli_.float,
    aten.binomial.default,
    aten.cauchy_.default,
    aten.exponential_.default,
    aten.geometric_.default,
    aten.log_normal_.default,
    aten.multinomial.default,
    aten.native_dropout.default,
    aten.normal.Tensor_Tensor,
    aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    aten.normal_.default,
    aten.poisson.default,
    aten.random_.default,
    getattr(aten.random_, "from"),
    aten.random_.to,
    aten.rrelu_with_noise_functional.default,
    aten.uniform_.default,
    aten._fused_dropout.default,
    aten._sample_dirichlet.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._standard_gamma.default,
)
# CUDA attention. Tensors: output, logsumexp, philox seed and offset, debug mask.
_ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)

NODES: dict[Any, Node] = {
    **{func: Node.of(func) for func in _FILLS_AND_FUNCTIONS},
    **{func: Node.of(func, outputs=(0, 1, 6, 7, 8)) for func in _ATTENTION},
}


def node_of(op: Any) -> Node:
    """The Node of an op of this namespace in a graph."""
    return next(node for node in (*NODES.values(), RANDPERM) if node.op is op)
