"""Small programs that run once on LocalTensors and once on plain tensors, rank by rank.

A program is a function with a table of its inputs. `run_local` runs it on LocalTensors (eager or
compiled), `run_plain` once per rank on plain tensors, which is the reference, and `compare` holds
the two against each other: outputs, gradients, inputs and state afterwards, and who shares memory
with whom. Nothing here knows what the programs compute.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo as dynamo
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import localtensor_compile as lt
from localtensor_compile.stacked.layout import can_join, join
from localtensor_compile.values.ranked import pick

# ---------------------------------------------------------------- inputs
SIZES = {
    "n": (3, 2, 0, 5),  # uneven, one rank without rows
    "k": (5, 3, 2, 4),  # uneven
    "o": (1, 3, 1, 2),  # one row on only some ranks
    "e": (2, 4, 6, 2),  # uneven and even numbers
    "m": (4, 3, 6, 5),  # uneven, at least three
    "z": (0, 0, 0, 0),
}
DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "c64": torch.complex64,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Spec:
    """One input. Written as text: `"n 4"` or `"k, i64 <5"` (sizes, then options).

    A size is a number or a letter of SIZES (a size per rank). Options: a dtype; `<5` for integers
    below 5; `nograd`; `nonleaf` (a copy of a leaf that requires grad); `transposed` and `offset`
    (dense memory in another order, or in the middle of a buffer); `same` (equal on all ranks);
    `param` (handed to the program's setup instead of to each call); `positive`.
    """

    dims: tuple[str, ...]
    options: frozenset[str]

    @staticmethod
    def parse(text: str) -> Spec:
        dims, _, options = text.partition(",")
        return Spec(tuple(dims.split()), frozenset(options.split()))

    @property
    def dtype(self) -> torch.dtype:
        return next((DTYPES[o] for o in self.options if o in DTYPES), torch.float32)

    @property
    def grad(self) -> bool:
        differentiable = self.dtype.is_floating_point or self.dtype.is_complex
        return differentiable and "nograd" not in self.options

    def shape(self, rank: int) -> tuple[int, ...]:
        return tuple(SIZES[d][rank % 4] if d in SIZES else int(d) for d in self.dims)

    def make(self, rank: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed * 64 + (0 if "same" in self.options else rank))
        shape = self.shape(rank)
        if "transposed" in self.options:
            shape = shape[::-1]
        if self.dtype is torch.bool:
            values = torch.rand(shape, generator=g) > 0.5
        elif self.dtype.is_floating_point or self.dtype.is_complex:
            values = torch.randn(
                shape, generator=g, dtype=torch.promote_types(self.dtype, torch.float32)
            )
            values = (values.abs() + 0.5 if "positive" in self.options else values).to(self.dtype)
        else:
            high = next((int(o[1:]) for o in self.options if o.startswith("<")), 10)
            values = torch.randint(0, high, shape, generator=g, dtype=self.dtype)
        if "transposed" in self.options:
            return values.mT
        if "offset" in self.options:
            buffer = torch.zeros(values.numel() + 3, dtype=values.dtype)
            buffer[3:] = values.reshape(-1)
            return buffer[3:].view(shape)
        return values


# ---------------------------------------------------------------- programs
@dataclass(frozen=True)
class Program:
    """A function and everything needed to run it on LocalTensors and on plain tensors.

    Attributes:
        fn: called with the inputs (and the DeviceMesh, if `mesh` is given).
        per_rank: the same program for one rank of plain tensors, called with the rank first;
            by default `fn` itself.
        reference: the same program with communication, on one list of plain tensors per input;
            returns one output per rank.
        setup: called with the inputs marked `param`, returns what is called instead of `fn`: an
            nn.Module or an object with a `step` method; `state_of` it is compared too.
        breaks: how many graph breaks the compiled program has; with none it is fullgraph.
        graphs: how many Dynamo graphs there are.
        rounds: AOTAutograd (not LocalTensor) changes the last bits, so that the reference of
            aot_eager is the plain function compiled with aot_eager.
        subclass_formulas: autograd's C++ computes a derivative in another way, with other rounding,
            for every tensor subclass and under every dispatch mode (areAnyTensorSubclassLike), so
            that the reference of eager is plain torch under a dispatch mode that does nothing.
        inductor: False where plain torch.compile with Inductor does not run the program either.
    """

    name: str
    fn: Callable[..., Any]
    specs: dict[str, Spec]
    ranks: tuple[int, ...] = (0, 1, 2)
    mesh: tuple[int, ...] | None = None
    per_rank: Callable[..., Any] | None = None
    reference: Callable[..., Any] | None = None
    setup: Callable[..., Any] | None = None
    world: bool = False
    breaks: int = 0
    graphs: int = 1
    rounds: bool = False
    subclass_formulas: bool = False
    inductor: bool = True
    dynamic: bool | None = None
    mark_dynamic: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)


PROGRAMS: dict[str, Program] = {}


def program(
    fn: Callable[..., Any] | None = None, *, inputs: dict[str, str] | None = None, **options: Any
) -> Any:
    """Decorator that adds a function to PROGRAMS: `@program(x="n 4", world=True)`.

    Keyword arguments that are no attribute of Program are inputs, in the order of the call.
    """
    if fn is None:
        return functools.partial(program, inputs=inputs, **options)
    known = {k: v for k, v in options.items() if k in Program.__dataclass_fields__}
    texts = {k: v for k, v in options.items() if k not in known} | (inputs or {})
    name = known.pop("name", fn.__name__)
    if name in PROGRAMS:
        raise ValueError(f"there are two programs called {name}")
    specs = {k: Spec.parse(v) for k, v in texts.items()}
    PROGRAMS[name] = Program(name=name, fn=fn, specs=specs, **known)
    return fn


# ---------------------------------------------------------------- running
@dataclass
class Call:
    """What one call did on one rank. Tensors are copies of that rank's own values."""

    outputs: list[Any]
    structure: Any
    gradients: dict[str, Tensor | None]
    inputs: dict[str, Tensor]
    sharing: list[tuple[str, ...]]
    state: dict[str, Any]


@dataclass
class Run:
    """The calls of one run: `calls[i][rank]`, and what Dynamo counted."""

    calls: list[dict[int, Call]]
    frames: int = 0
    graphs: int = 0
    breaks: int = 0


CALLS = 2  # the second call has other values of the same shapes, and must not compile anything


def _leaves(p: Program, call: int) -> dict[str, dict[int, Tensor]]:
    seed = zlib.crc32(p.name.encode()) % 10_000
    with lt.maybe_disable_local_tensor_mode():
        return {
            name: {r: _own(spec.make(r, seed + 100 * call + 7 * i)) for r in p.ranks}
            for i, (name, spec) in enumerate(p.specs.items())
        }


def _argument(spec: Spec, leaf: Tensor) -> Tensor:
    return leaf * 1 if "nonleaf" in spec.options else leaf


def _cotangent(name: str, index: int, rank: int, like: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(zlib.crc32(f"{name}{index}{rank}".encode()) % 100_000)
    dtype = torch.promote_types(like.dtype, torch.float32)
    with lt.maybe_disable_local_tensor_mode():
        return torch.randn(like.shape, generator=g, dtype=dtype).to(like.dtype)


class _Inert(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _state_of(target: Any) -> dict[str, Any]:
    if isinstance(target, torch.nn.Module):
        found: dict[str, Any] = dict(target.named_parameters()) | dict(target.named_buffers())
        for name, value in target.named_parameters():
            found[f"{name}.grad"] = value.grad
        return found
    return target.state() if hasattr(target, "state") else {}


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _sharing(arguments: dict[str, Any], outputs: Sequence[Any], rank: int) -> list[tuple[str, ...]]:
    """For each output: the arguments and earlier outputs that it is, and whose memory it uses."""
    found = []
    before: list[tuple[str, Any]] = list(arguments.items())
    for i, out in enumerate(outputs):
        names: list[str] = []
        if isinstance(out, Tensor):
            mine = pick(out, rank)
            for name, other in before:
                if out is other:
                    names.append(f"is {name}")
                elif mine.numel() and _storage(mine) == _storage(pick(other, rank)):
                    names.append(f"views {name}")
            before.append((f"output {i}", out))
        found.append(tuple(names))
    return found


def _copy(value: Any, rank: int) -> Any:
    value = pick(value, rank)
    return value.detach().clone() if isinstance(value, Tensor) else value


def _strided_copy(value: Any, rank: int) -> Any:
    """A copy with the strides of the original, also where it is not dense."""
    value = pick(value, rank)
    if not isinstance(value, Tensor):
        return value
    value = value.detach().resolve_conj().resolve_neg()
    with lt.maybe_disable_local_tensor_mode():
        result = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if 0 in value.stride() and value.numel():  # an expanded tensor cannot be written element-wise
        return value.clone()
    return result.copy_(value)


def _backward(
    p: Program, outputs: dict[int, list[Any]] | list[Any], layout: str = "per_rank"
) -> None:
    """Run autograd from every output that requires grad, with random gradients per rank."""
    if isinstance(outputs, dict):
        pairs = [
            (o, _cotangent(p.name, i, r, o))
            for r, outs in outputs.items()
            for i, o in enumerate(outs)
            if isinstance(o, Tensor) and o.requires_grad
        ]
    else:
        pairs = [
            (
                o,
                _local(
                    {r: _cotangent(p.name, i, r, s) for r, s in o._local_tensors.items()}, layout
                ),
            )
            for i, o in enumerate(outputs)
            if isinstance(o, lt.LocalTensor) and o.requires_grad
        ]
    if pairs:
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])


def run_plain(p: Program, backend: str | None = None) -> Run:
    """The reference: plain tensors, one rank after the other (or hand-written communication)."""
    dynamo.reset()
    compiled = (
        (lambda f: f)
        if backend is None
        else functools.partial(torch.compile, backend=backend, fullgraph=p.breaks == 0)
    )
    per_rank = p.per_rank if p.per_rank is not None else (lambda rank, *args: p.fn(*args))
    targets: dict[int, Any] = {}
    calls = []
    formulas = _Inert() if p.subclass_formulas and backend is None else contextlib.nullcontext()
    with dynamo.config.patch(**p.config), formulas:
        if p.reference is not None:
            together = compiled(p.reference)
        alone = {}
        for call in range(CALLS):
            leaves = _leaves(p, call)
            for name, spec in p.specs.items():
                for r in p.ranks:
                    leaves[name][r].requires_grad_(spec.grad)
            if p.setup is not None and not targets:
                for r in p.ranks:
                    params = [
                        v[r].detach() for n, v in leaves.items() if "param" in p.specs[n].options
                    ]
                    targets[r] = p.setup(*params)
                    alone[r] = compiled(_callable(targets[r]))
            elif not alone:
                for r in p.ranks:
                    alone[r] = compiled(functools.partial(per_rank, r))
            arguments = {
                r: {
                    n: _argument(s, leaves[n][r])
                    for n, s in p.specs.items()
                    if "param" not in s.options
                }
                for r in p.ranks
            }
            if p.reference is not None:
                lists = [[arguments[r][n] for r in p.ranks] for n in arguments[p.ranks[0]]]
                raw = dict(zip(p.ranks, together(*lists), strict=True))
            else:
                raw = {r: alone[r](*arguments[r].values()) for r in p.ranks}
            flat = {r: pytree.tree_flatten(o) for r, o in raw.items()}
            _backward(p, {r: leaves_ for r, (leaves_, _) in flat.items()})
            calls.append(
                {r: _record(p, leaves, arguments[r], *flat[r], targets.get(r), r) for r in p.ranks}
            )
    return Run(calls)


def _own(t: Tensor) -> Tensor:
    """A leaf with memory of its own, laid out like `t` (in the middle of a buffer if `t` is)."""
    if t.storage_offset():
        buffer = torch.zeros(t.storage_offset() + t.numel(), dtype=t.dtype)
        copy = buffer[t.storage_offset() :].view(t.shape)
        return copy.copy_(t.detach())
    return t.detach().clone(memory_format=torch.preserve_format)


def _callable(target: Any) -> Any:
    return (
        target
        if isinstance(target, torch.nn.Module) or not hasattr(target, "step")
        else target.step
    )


def _record(
    p: Program,
    leaves: dict[str, dict[int, Tensor]],
    arguments: dict[str, Any],
    outputs: list[Any],
    structure: Any,
    target: Any,
    rank: int,
) -> Call:
    def leaf(name: str) -> Any:
        return leaves[name][rank]

    return Call(
        outputs=[_strided_copy(o, rank) for o in outputs],
        structure=structure,
        gradients={
            n: None if leaf(n).grad is None else _copy(leaf(n).grad, rank)
            for n, s in p.specs.items()
            if s.grad and "param" not in s.options
        },
        inputs={n: _copy(a, rank) for n, a in arguments.items()},
        sharing=_sharing(arguments, outputs, rank),
        state={k: _copy(v, rank) for k, v in _state_of(target).items()} if target else {},
    )


def _local(shards: dict[int, Tensor], layout: str, requires_grad: bool = False) -> lt.LocalTensor:
    """A LocalTensor; in the stacked layout in one stack where the shards fit into one."""
    made = lt.LocalTensor(shards)
    if layout == "stacked" and can_join(made):
        with lt.maybe_disable_local_tensor_mode():
            made = join(made, "an input")
    return made.requires_grad_(requires_grad)


@contextlib.contextmanager
def _world(p: Program, inside: bool, layout: str) -> Iterator[Any]:
    if not (inside or p.world or p.mesh):
        yield None
        return
    with lt.LocalTensorMode(frozenset(p.ranks), layout=layout):
        names = ("dp", "tp", "pp")[: len(p.mesh or ())]
        yield init_device_mesh("cpu", p.mesh, mesh_dim_names=names) if p.mesh else None


def run_local(
    p: Program, backend: str | None = None, inside: bool = False, layout: str = "per_rank"
) -> Run:
    """On LocalTensors: eager without `backend`, else compiled; `inside` a mode if it needs none."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    calls = []
    with dynamo.config.patch(**p.config), _world(p, inside, layout) as mesh:
        fn, target = p.fn, None
        last = () if mesh is None else (mesh,)
        for call in range(CALLS):
            locals_ = {}
            for name, shards in _leaves(p, call).items():
                locals_[name] = _local(shards, layout, p.specs[name].grad)
            if call == 0:
                if p.setup is not None:
                    target = p.setup(
                        *[v.detach() for n, v in locals_.items() if "param" in p.specs[n].options]
                    )
                    fn = _callable(target)
                if backend is not None:
                    fn = torch.compile(
                        fn, backend=backend, fullgraph=p.breaks == 0, dynamic=p.dynamic
                    )
            arguments = {
                n: _argument(s, locals_[n]) for n, s in p.specs.items() if "param" not in s.options
            }
            for name in p.mark_dynamic:
                dynamo.mark_dynamic(arguments[name], 0)
            flat, structure = pytree.tree_flatten(fn(*arguments.values(), *last))
            _backward(p, flat, layout)
            leaves = {n: {r: _LeafOnRank(t, r) for r in p.ranks} for n, t in locals_.items()}
            calls.append(
                {r: _record(p, leaves, arguments, flat, structure, target, r) for r in p.ranks}
            )
    counters = dynamo.utils.counters
    return Run(
        calls,
        frames=counters["frames"]["ok"],
        graphs=counters["stats"]["unique_graphs"],
        breaks=sum(counters["graph_break"].values()),
    )


class _LeafOnRank:
    """A LocalTensor leaf as one rank sees it: only its gradient is asked for."""

    def __init__(self, tensor: Any, rank: int) -> None:
        self.grad = None if tensor.grad is None else pick(tensor.grad, rank)


# ---------------------------------------------------------------- comparing
def compare(p: Program, got: Run, expected: Run, exact: bool, sharing: bool = True) -> None:
    """Raise AssertionError naming call, rank and value at the first difference.

    `sharing=False` leaves out which values share memory: Inductor returns a view for `x + 0`.
    """
    for i, (mine, theirs) in enumerate(zip(got.calls, expected.calls, strict=True)):
        for r in p.ranks:
            where = f"{p.name}, call {i}, rank {r}"
            _compare_call(p, where, mine[r], theirs[r], exact, sharing)


def _compare_call(
    p: Program, where: str, mine: Call, theirs: Call, exact: bool, sharing: bool
) -> None:
    assert mine.structure == theirs.structure, f"{where}: {mine.structure} {theirs.structure}"
    for j, (a, b) in enumerate(zip(mine.outputs, theirs.outputs, strict=True)):
        _same(p, f"{where}, output {j}", a, b, exact, strides=exact)
    for name in theirs.gradients:
        _same(p, f"{where}, grad of {name}", mine.gradients[name], theirs.gradients[name], exact)
    for name in theirs.inputs:
        _same(p, f"{where}, input {name} afterwards", mine.inputs[name], theirs.inputs[name], exact)
    assert mine.state.keys() == theirs.state.keys(), where
    for name in theirs.state:
        _same(p, f"{where}, state {name}", mine.state[name], theirs.state[name], exact)
    if sharing and p.reference is None:  # communication by hand shares memory as it likes
        assert mine.sharing == theirs.sharing, f"{where}: memory {mine.sharing} {theirs.sharing}"


def _same(p: Program, where: str, a: Any, b: Any, exact: bool, strides: bool = False) -> None:
    if not isinstance(b, Tensor):
        assert type(a) is type(b) and (a == b or (a != a and b != b)), f"{where}: {a!r}, not {b!r}"
        return
    assert isinstance(a, Tensor), f"{where}: {a!r}, not a tensor"
    assert a.dtype == b.dtype and a.shape == b.shape, (
        f"{where}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
    )
    if strides and a.numel():
        relevant = [d for d in range(a.dim()) if a.shape[d] > 1]
        ours, other = [a.stride(d) for d in relevant], [b.stride(d) for d in relevant]
        assert ours == other, f"{where}: strides {a.stride()}, not {b.stride()}"
    if exact:
        equal = torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
        assert equal, f"{where}: {a} is not {b}"
    else:
        tolerance = dict(p.tolerance)
        of_largest = tolerance.pop("of_largest", None)  # in parts of the tensor's largest element
        if of_largest is not None:
            largest = float(b.abs().max()) if b.numel() else 0.0
            tolerance = {"rtol": 0.0, "atol": of_largest * largest}
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m: f"{where}: {m}", **tolerance)
