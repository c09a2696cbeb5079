"""localtensor::* collectives as tensor math, just before Inductor.

Inductor gets ordinary pointwise, cat and slice ops, which fuse with what stands around them, in
place of opaque kernels. Reductions are left folds in rank order: a compiled program is compared
with tolerances, while aot_eager runs the ops themselves, in the mode's order.

The FX graph cache does not look at the decomposition table, so that the table must be complete
before anything compiles: `register()` runs when the package is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..collectives import ops, stacked_ops
from ..collectives.ops import OPS, chunks, settings
from ..collectives.reduction import reduce_shards
from ..stacked import row_ops

Shards = Sequence[Tensor]


def _left_fold(kernel: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    @functools.wraps(kernel)
    def decomposition(*args: Any) -> list[Tensor]:
        before, settings.order = settings.order, "rank_order"
        try:
            return kernel(*args)
        finally:
            settings.order = before

    return decomposition


def reduce_scatter(shards: Shards, op: str, groups: Sequence[int], group_size: int) -> list[Tensor]:
    """Each rank's slice is reduced by itself, so that no rank computes the whole."""
    out: list[Any] = [None] * len(shards)
    for group in chunks(groups, group_size):
        for k, i in enumerate(group):
            rows = shards[i].shape[0] // group_size
            slices = [shards[j].narrow(0, k * rows, rows) for j in group]
            out[i] = reduce_shards(slices, op, order="rank_order")
    return [t.clone() if o is None else o for o, t in zip(out, shards)]


_DECOMPOSITIONS: dict[Any, Any] = {
    OPS.all_reduce.default: _left_fold(ops.all_reduce),
    OPS.reduce.default: _left_fold(ops.reduce),
    OPS.reduce_scatter.default: reduce_scatter,
    OPS.reduce_scatter_list.default: _left_fold(ops.reduce_scatter_list),
    OPS.all_gather.default: ops.all_gather,
    OPS.all_gather_list.default: ops.all_gather_list,
    OPS.broadcast.default: ops.broadcast,
    OPS.all_to_all_single.default: ops.all_to_all_single,
    OPS.all_to_all_list.default: ops.all_to_all_list,
    OPS.shard_dim_alltoall.default: ops.shard_dim_alltoall,
}


def register() -> None:
    """Put the decompositions into Inductor's table."""
    from torch._inductor.decomposition import decompositions

    own = {**_DECOMPOSITIONS, **row_ops.DECOMPOSITIONS, **stacked_ops.DECOMPOSITIONS}
    for op, decomposition in own.items():
        decompositions.setdefault(op, decomposition)


register()
