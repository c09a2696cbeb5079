"""The gradient of a broadcast in which a dimension has size 1 on only some ranks.

Autograd's C++ asks about sizes and then sums the gradient over one list of dimensions for all
ranks. Its questions are answered here so that it sums where any rank must, and the `aten.sum` that
follows learns which ranks sum which dimensions:

    InputMetadata::maybe_reduce (torch/csrc/autograd/input_metadata.cpp), from the last dimension:
        if (guard_or_false(size == 1)) { if (!guard_or_false(size == target)) needs_reduce = true; }
        else if (!(size == target)) fail();
    sum_to (ATen/ExpandUtils.h), from the first dimension:
        if (guard_or_false(shape[i] == 1) && guard_or_true(sizes[i] != 1)) dims.push_back(i);
        tensor.sum(dims, /*keepdim=*/true);
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RankDivergence, UnsupportedError, per_rank_text

Values = Mapping[int, Any]


class _Asked(threading.local):
    """What C++ asked last in this thread."""

    def __init__(self) -> None:
        self.size: Values | None = None  # of a dimension that is 1 on some ranks
        self.ones: list[tuple[Values, Values]] = []  # shape[i], and where it is 1


_asked = _Asked()


def answer_equal(file: str, left: Values, right: Values, flags: Values) -> bool:
    """`guard_or_false(left == right)`, asked in C++ file `file`; `flags` is the truth per rank.

    Raises:
        RankDivergence: a gradient that fits on some ranks only.
    """
    everywhere = all(flags.values())
    in_engine = file.endswith("input_metadata.cpp")
    if not in_engine and not file.endswith("ExpandUtils.h"):
        return everywhere
    if in_engine and _asked.size is not None and _asked.size == left:
        _asked.size = None
        wrong = {r: f"{right[r]} for {left[r]}" for r in flags if left[r] != 1 and not flags[r]}
        if wrong:
            raise RankDivergence(
                "the gradient of a tensor has the wrong size in one dimension on some ranks: "
                f"{per_rank_text(wrong)}. On real processes backward raises there."
            )
        return everywhere
    if everywhere or not any(flags.values()) or any(v != 1 for v in right.values()):
        return everywhere
    if in_engine:
        _asked.size = left
        _asked.ones.clear()
    else:
        _asked.ones.append((left, flags))
    return True


def sum_is_asked_for() -> bool:
    """Whether C++ has just asked for a sum that may differ between ranks (see dims_to_sum)."""
    return bool(_asked.ones)


def dims_to_sum(sizes: Sequence[Any], dims: Sequence[int]) -> dict[int, list[int]] | None:
    """The dimensions that each rank sums, where C++ has just asked for a sum that differs.

    Args:
        sizes: the size of each dimension of the tensor: {rank: size} where ranks differ.
        dims: what C++ sums on some rank, ascending.

    Raises:
        UnsupportedError: it cannot be told which dimension C++ asked about.
    """
    if not _asked.ones:
        return None
    asked = list(_asked.ones)
    _asked.ones.clear()
    fitting = [
        dict(zip(chosen, (flags for _, flags in asked)))
        for chosen in itertools.combinations(dims, len(asked))
        if all(_fits(sizes[d], shape, flags) for d, (shape, flags) in zip(chosen, asked))
    ]
    if not fitting:  # the question was asked for another purpose
        return None
    if len(fitting) > 1:
        raise UnsupportedError(
            "the gradient of a broadcast is summed over other dimensions on some ranks than on "
            f"others (a dimension of sizes {per_rank_text(asked[0][0])} was broadcast where it is "
            "1), and torch does not tell which of several equal dimensions that is. Expand the "
            "tensor before the operation: tensor_map(x, lambda rank, shard: shard.expand(...))."
        )
    return {r: [d for d in dims if d not in fitting[0] or fitting[0][d][r]] for r in asked[0][1]}


def _fits(size: Any, shape: Values, flags: Values) -> bool:
    """Whether a dimension of this size can be the one: it is unchanged where it is not summed."""
    on = size if isinstance(size, Mapping) else dict.fromkeys(flags, size)
    return on.keys() == flags.keys() and all(flags[r] or bool(on[r] == shape[r]) for r in flags)
