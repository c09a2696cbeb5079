"""Which parameters DistributedDataParallel takes, and which of them share a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._torch import bucket_assignment
from ..collectives.groups import groups_of
from ..errors import LocalTensorError, PlainTensorError, UnsupportedError, per_rank_text
from ..values.tensor import LocalTensor
from .state import enabled_local_tensor_mode


def check_parameters(params: Sequence[Tensor]) -> None:
    """Raise PlainTensorError where a parameter has no shard per rank."""
    for index, param in enumerate(params):
        if not isinstance(param, LocalTensor):
            raise PlainTensorError(
                f"DistributedDataParallel got a parameter (index {index}, shape "
                f"{tuple(param.shape)}) that is a plain {type(param).__name__}: ranks could not "
                "hold different gradients. Build the module inside LocalTensorMode, or convert it "
                "with localtensor_compile.replicate(module) first."
            )


def verify_across_ranks(group: Any, params: Sequence[Tensor]) -> None:
    """Raise as real ranks do where a parameter's shape differs within a group.

    Raises:
        LocalTensorError: sizes or strides differ from those of the group's first rank.
    """
    mode = enabled_local_tensor_mode()
    check_parameters(params)
    for members in groups_of(group, mode._sorted_ranks).ranks:  # type: ignore[union-attr]
        for index, param in enumerate(params):
            shards = param._local_tensors
            layouts = {r: (tuple(shards[r].shape), shards[r].stride()) for r in members}
            if len(set(layouts.values())) > 1:
                raise LocalTensorError(
                    f"params[{index}] appears not to match sizes and strides of the same param in "
                    f"process {members[0]}: {per_rank_text(layouts)}. DistributedDataParallel "
                    "needs the same module on every rank."
                )


def assign_buckets(
    params: Sequence[Tensor],
    size_limits: Sequence[int],
    expect_sparse: Sequence[bool],
    indices: Sequence[int] = (),
) -> tuple[list[list[int]], list[int]]:
    """torch's assignment of parameters to buckets, which must be the same on every rank.

    Raises:
        UnsupportedError: parameters of other sizes on some ranks lead to other buckets there.
    """
    check_parameters(params)
    found: dict[int, Any] = {}
    for rank in params[0]._local_tensors:
        shards = [p._local_tensors[rank] for p in params]
        found[rank] = bucket_assignment(
            shards, list(size_limits), list(expect_sparse), list(indices)
        )
    first = next(iter(found.values()))
    if any(f != first for f in found.values()):
        raise UnsupportedError(
            "DistributedDataParallel would put parameters into other buckets on some ranks: "
            f"{per_rank_text({r: str(f[0]) for r, f in found.items()})}. Their sizes differ "
            "between ranks; give bucket_cap_mb a value that holds all of them."
        )
    return first
