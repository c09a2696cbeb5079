"""Whether a program's values depend on how many ranks there are and how tensors are sharded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import RankDivergence
from ..values.tensor import LocalTensor
from ..world.mode import LocalTensorMode
from .program import Program, ProgramFunction, World, as_program
from .report import CheckFailed


def check_sharding_independence(
    program: Program | ProgramFunction,
    world_sizes: Sequence[int] = (1, 2, 3, 4),
    *,
    backend: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Run `program(world)` on simulated worlds of these sizes and compare its full tensors.

    Random numbers are drawn as in LocalTensorMode(n, sharding_independent_rng=True). A DTensor
    among the results is gathered; every other tensor must be the same on all ranks. Values that
    depend on the order of a sum (a loss, a gradient) usually differ in the last bits: return what
    was initialized, or a dropout mask.

    Args:
        program: a function of a World that returns a dict of named tensors.
        world_sizes: numbers of ranks.
        backend: the torch.compile backend of `world.compile`, None for eager.
        seed: of every rank.

    Returns:
        The full tensors of the first world, by name.

    Raises:
        CheckFailed: full tensors that are not equal bit for bit.
    """
    program = as_program(program)
    first: dict[str, Tensor] = {}
    for size in world_sizes:
        torch.compiler.reset()
        with LocalTensorMode(size, sharding_independent_rng=True):
            torch.manual_seed(seed)
            results = program.function(World(size, backend=backend))
            full = {name: _full(name, value) for name, value in results.items()}
        if not first:
            first = full
        for name in first.keys() | full.keys():
            if name not in first or name not in full or not torch.equal(first[name], full[name]):
                raise CheckFailed(
                    f"{program.name}: {name!r} on {size} ranks is not what it is on "
                    f"{world_sizes[0]}. Is it drawn outside of DTensors, where each rank draws "
                    "its own shard, or does it depend on the order of a sum?"
                )
    return first


def _full(name: str, value: Tensor) -> Tensor:
    value = value.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not isinstance(value, LocalTensor):
        return value
    try:
        return value.reconcile()
    except RankDivergence as error:
        raise CheckFailed(f"{name!r} differs between ranks. {error}") from error
