"""LocalTensorMode(n, sharding_independent_rng=True): a DTensor's draw is that of the whole tensor.

Real CPU ranks draw into their own shards, so that what a DTensor holds after `normal_` or dropout
depends on its placements and on the number of ranks. With this option every rank draws the global
tensor from its generator and keeps its shard, as one process that holds the whole tensor would: a
parallelized model can be compared with the unsharded one, dropout and initialization included.
Ranks must be seeded alike.

DTensor has a place for this: its tracker of random state, asked to surround each random op.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.tensor._random as tensor_random
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from ..dispatch.whole_draws import Whole, drawing, no_rule
from ..errors import UnsupportedError
from .factories import FactoryMode
from .mesh import coordinates
from .state import enabled_local_tensor_mode


class IndependentFactoryMode(FactoryMode):
    """A type of its own: Dynamo does not run code here that it compiled for other draws."""


class _Tracker:
    """Stands for DTensor's OffsetBasedRNGTracker."""

    distribute_region_enabled = True

    @contextlib.contextmanager
    def _distribute_region(self, spec: Any, generator: Any = None) -> Iterator[None]:
        mode = enabled_local_tensor_mode()
        if mode is None or not mode.sharding_independent_rng:
            yield
            return
        if generator is not None:
            raise UnsupportedError(
                "a draw of a DTensor with generator= inside "
                "LocalTensorMode(..., sharding_independent_rng=True). DTensor itself ignores the "
                "generator of CPU tensors: leave it out and use torch.manual_seed."
            )
        with drawing(whole_of(spec, mode._sorted_ranks)):
            yield


def whole_of(spec: Any, ranks: tuple[int, ...]) -> Whole:
    """The global tensor of a DTensorSpec, and each rank's piece of it.

    Raises:
        UnsupportedError: pieces that are no blocks.
    """
    strided = [str(p) for p in spec.placements if isinstance(p, _StridedShard)]
    if strided:
        raise UnsupportedError(
            f"a draw of a DTensor with placement {strided[0]} does not depend on its sharding "
            "only where each rank holds one block. Draw before the tensor is sharded that way."
        )
    where = coordinates(spec.mesh, ranks) or []
    pieces = {}
    for r in ranks:
        pieces[r] = [(0, size) for size in spec.shape]
        for d, placement in enumerate(spec.placements):
            if placement.is_shard():
                offset, size = pieces[r][placement.dim]
                piece = _chunk(size, spec.mesh.size(d), where[d][r])
                pieces[r][placement.dim] = (offset + piece[0], piece[1])
    return Whole(tuple(spec.shape), pieces)


def _chunk(size: Any, count: int, index: int) -> tuple[Any, Any]:
    """Offset and size of a chunk, as torch.chunk cuts; chunks that are missing are empty."""
    length = (size + count - 1) // count
    start = torch.sym_min(length * index, size)
    return start, torch.sym_min(length, size - start)


def _draw_in_place(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """DTensor's handler of an in-place draw that its tracker does not surround."""
    tensor = args[0]
    mode = enabled_local_tensor_mode()
    if mode is None or not mode.sharding_independent_rng:
        op(tensor._local_tensor, *args[1:], **kwargs)
        return tensor
    if any(placement.is_partial() for placement in tensor.placements):
        raise UnsupportedError(
            f"{op} on a DTensor with placements {tensor.placements}: what is drawn cannot be the "
            "parts of a sum. Redistribute to Shard or Replicate first."
        )
    with drawing(whole_of(tensor._spec, mode._sorted_ranks)):
        op(tensor._local_tensor, *args[1:], **kwargs)
    return tensor


def _refuse(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise no_rule(op)


_IN_PLACE = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("cauchy_", "exponential_", "geometric_", "log_normal_")
)
# The random ops that DTensor has a rule for, but does not surround with its tracker.
_HANDLERS = dict.fromkeys(_IN_PLACE, _draw_in_place) | {
    torch.ops.aten.multinomial.default: _refuse,
}


@contextlib.contextmanager
def tracking() -> Iterator[None]:
    """Context manager: every random op of DTensor draws the whole tensor, or is refused."""
    dispatcher: Any = DTensor._op_dispatcher
    tracker, handlers = tensor_random._rng_tracker, dispatcher._custom_op_handlers
    tensor_random._rng_tracker = _Tracker()
    dispatcher._custom_op_handlers = {**_HANDLERS, **handlers}
    try:
        yield
    finally:
        tensor_random._rng_tracker, dispatcher._custom_op_handlers = tracker, handlers
