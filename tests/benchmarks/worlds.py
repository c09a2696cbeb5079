"""Contestants: one world each, with the operands of a model in it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._local_tensor as upstream
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import localtensor_compile as lt

from .models import Loss, Model, module_step, stacked_operands, train_step
from .timing import Timed

STACKED, PER_RANK = "stacked", "per_rank"
OWN, LOOP, BATCHED = "torch's own", "plain loop", "batched by hand"


def mode(ranks: int, layout: str = STACKED) -> lt.LocalTensorMode:
    return lt.LocalTensorMode(ranks, layout=layout)


@contextlib.contextmanager
def process_group(ranks: int) -> Iterator[None]:
    """One simulated process group for all contestants."""
    hook = sys.excepthook
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # each group would put one more "[rank0]:" before each line


Compile = Callable[[Any], Any]
"""What a step's function is put through: nothing, or torch.compile with some backend."""


def eager(fn: Any) -> Any:
    return fn


def compiled(backend: Any) -> Compile:
    """torch.compile of a copy of the function, so that contestants share no cache entries."""

    def compile(fn: Any) -> Any:
        if not isinstance(fn, torch.nn.Module):
            original = fn
            namespace = original.__globals__
            fn = type(original)(original.__code__.replace(), namespace, original.__name__)
        return torch.compile(fn, backend=backend, fullgraph=True)

    return compile


def ours(model: Model, ranks: int, layout: str = STACKED, make: Compile = eager) -> Timed:
    """Forward and backward on LocalTensors, inside a mode."""
    world = mode(ranks, layout)
    stacked = stacked_operands(model, ranks)
    with world:
        operands = [local(world, t) for t in stacked]
        gradient = world.rank_map(lambda rank: torch.ones(()))
    fn = make(model.per_rank)
    return world, lambda: train_step(fn, operands, gradient)


def local(world: lt.LocalTensorMode, stacked: Tensor) -> Any:
    """The LocalTensor whose shard of rank r is stacked[r]."""
    shards = stacked.detach().unbind(0)
    tensor = world.rank_map(lambda rank: shards[rank].clone())
    return tensor.requires_grad_(stacked.requires_grad)


def own(model: Model, ranks: int, make: Compile = eager, inside: bool = True) -> Timed:
    """Forward and backward on torch's LocalTensors; its graph inside its mode is W * W."""
    stacked = stacked_operands(model, ranks)
    operands = [
        upstream.LocalTensor({r: t.detach()[r].clone() for r in range(ranks)}, t.requires_grad)
        for t in stacked
    ]
    gradient = upstream.LocalTensor({r: torch.ones(()) for r in range(ranks)})
    fn = make(model.per_rank)
    context: Any = upstream.LocalTensorMode(ranks) if inside else contextlib.nullcontext()
    return context, lambda: train_step(fn, operands, gradient)


def loop(model: Model, ranks: int, make: Compile = eager) -> Timed:
    """One rank after the other, on plain tensors."""
    stacked = stacked_operands(model, ranks)
    of_rank = [
        [t.detach()[r].clone().requires_grad_(t.requires_grad) for t in stacked]
        for r in range(ranks)
    ]
    fn = make(model.per_rank)

    def step() -> None:
        for operands in of_rank:
            train_step(fn, operands)

    return contextlib.nullcontext(), step


def batched(model: Model, ranks: int, make: Compile = eager) -> Timed:
    """The hand-written program on tensors [W, ...]."""
    operands = stacked_operands(model, ranks)
    gradient = torch.ones(ranks)
    fn = make(model.batched)
    return contextlib.nullcontext(), lambda: train_step(fn, operands, gradient)


def module(
    build: Callable[..., torch.nn.Module],
    ranks: int,
    tokens: int,
    width: int,
    hidden: int,
    layout: str = STACKED,
    make: Compile = eager,
    same_input: bool = True,
) -> Timed:
    """Forward and backward of a sharded module, inside a mode.

    Args:
        build: `tp_mlp` or `fsdp_mlp`.
        same_input: whether all ranks get the same rows.
    """
    world = mode(ranks, layout)
    with world:
        torch.manual_seed(0)
        model = build(ranks, width, hidden)
        parameters = list(model.parameters())
        made = make(Loss(model))
        x = torch.randn(tokens, width)
        if not same_input:
            x = world.rank_map(lambda rank: torch.randn(tokens, width))
    return world, lambda: module_step(made, x, parameters)
