"""One case is one call of an op with its arguments sharded; how it runs is the same everywhere.

The functions here know neither simulated ranks nor real ones: they are called with a mesh, inside
a simulated world or on a real rank, or without a mesh for the op on plain tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils import _pytree as pytree

from . import ops, shardings

Own = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Names one call: enough for any process to build it."""

    op: str
    sizes: str  # a key of ops.SIZES
    sample: int
    of: int  # how many samples were asked for
    sharding: shardings.Sharding

    def load(self) -> ops.Sample:
        return ops.samples(self.op, self.sizes, self.of)[self.sample]


@dataclass
class Outcome:
    """What a call gave: flat outputs and the gradients of the inputs that need one.

    Values are tensors, numbers and other leaves; of simulated ranks, still one for all of them.
    An error is that of the forward or, if `forward` is there, of the backward.
    """

    forward: list[Any] | None = None
    backward: list[Any] | None = None
    error: BaseException | None = None


def cases_of(op: str, sizes: str, sample_count: int, limit: int) -> list[Case]:
    """The cases of an op; those of one sample stand together."""
    found = []
    for index, sample in enumerate(ops.samples(op, sizes, sample_count)):
        shapes = [tuple(t.shape) for t in sample.tensors]
        for sharding in shardings.shardings(shapes, limit):
            found.append(Case(op, sizes, index, sample_count, sharding))
    return found


def run(
    cases: Sequence[Case],
    mesh: Any,
    backend: str | None,
    *,
    grad: bool = True,
    own: Own = Tensor.clone,
) -> list[Outcome]:
    """Run the cases one by one, or with `backend` all in one compiled function.

    Compiled, an error is raised: it is not known which case is at fault. Eager, it is in the
    case's outcome.

    Args:
        own: makes a tensor of the ranks' own from a plain one, as they would have made it.
    """
    with ops.unseeded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ops of torch say about themselves
        if backend is None:
            return [_eager(case, mesh, grad, own) for case in cases]
        return _compiled(cases, mesh, backend, grad, own)


def _eager(case: Case, mesh: Any, grad: bool, own: Own) -> Outcome:
    outcome = Outcome()
    try:
        call, leaves = _prepared(case, mesh, grad, own)
        outcome.forward = _call(*call)
        outcome.backward = _gradients(*_differentiable(outcome.forward, leaves))
    except Exception as error:
        outcome.error = error
    return outcome


def _compiled(
    cases: Sequence[Case], mesh: Any, backend: str, grad: bool, own: Own
) -> list[Outcome]:
    prepared = [_prepared(case, mesh, grad, own) for case in cases]
    calls = [call for call, _ in prepared]

    def step(calls: list[Any]) -> list[Any]:
        return [_call(*call) for call in calls]

    results = torch.compile(step, backend=backend, fullgraph=True, dynamic=False)(calls)
    # One graph has one backward: all cases' gradients are asked for at once.
    pairs = [_differentiable(f, leaves) for f, (_, leaves) in zip(results, prepared)]
    outputs = [o for found, leaves in pairs if leaves for o in found]
    leaves = [x for _, leaves in pairs for x in leaves]
    grads = iter(_gradients(outputs, leaves) or ())
    return [
        Outcome(forward, [next(grads) for _ in leaves] if leaves else None)
        for forward, (_, leaves) in zip(results, pairs)
    ]


def _call(op: Callable[..., Any], args: Any, kwargs: Any) -> list[Any]:
    """The flat outputs, whole on every rank. Dynamo traces this."""
    return [_whole(x) for x in pytree.tree_leaves(op(*args, **kwargs))]


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _prepared(case: Case, mesh: Any, grad: bool, own: Own) -> tuple[Any, list[Tensor]]:
    """(op, args, kwargs) with fresh tensors, and those of them that need a gradient."""
    sample = case.load()
    tensors = []
    for given, dim in zip(sample.tensors, case.sharding):
        tensor = own(given.detach())
        if mesh is not None:
            tensor = distribute_tensor(tensor, mesh, [Replicate() if dim is None else Shard(dim)])
        tensors.append(tensor.requires_grad_(grad and given.requires_grad))
    args, kwargs = sample.replaced(tensors)
    op = ops.database()[case.op].op
    return (op, args, kwargs), [t for t in tensors if t.requires_grad]


def _differentiable(outputs: list[Any], leaves: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that need a gradient, and the leaves; no leaves if there is no such output."""
    found = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    return found, leaves if found else []


def _gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Any] | None:
    """Of the sum of all outputs, each weighted by draws that depend on its shape only."""
    if not leaves:
        return None
    weights = [_weights(o) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [_whole(g) for g in grads]


def _weights(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tuple(output.shape), generator=generator, dtype=output.dtype)
