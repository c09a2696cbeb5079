"""Views that a compiled function is given, replayed on fake tensors.

torch makes the fake of a subclass's view by replaying the view on the fake of its base, and checks
that strides are those of the real one. Of a dimension of size 1 they may not be: the kernel of
`view` computes its stride from its neighbours, the fake of `view` to the same shape keeps it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import SymInt

from ..values.rank_node import is_ranked
from ..values.tensor import LocalTensor


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) in torch's meta conversion."""
    from torch._subclasses import meta_utils

    replay = getattr(meta_utils, "_CustomViewFunc", None)
    if replay is None:  # not in every supported version
        return []
    original = replay.apply

    @functools.wraps(original)
    def apply(
        self: Any,
        description: Any,
        base: Any,
        symint_visitor_fn: Any = None,
        tensor_visitor_fn: Any = None,
    ) -> Any:
        if isinstance(base, LocalTensor) and symint_visitor_fn is not None:
            symint_visitor_fn = _but_ranked(symint_visitor_fn)
        fake = original(self, description, base, symint_visitor_fn, tensor_visitor_fn)
        sizes = [n for n in description.shape if not is_ranked(n)]
        if not isinstance(fake, LocalTensor) or 1 not in sizes:
            return fake
        strides = _as_kernels_do(fake.shape, fake.stride(), description.stride)
        if strides is None:
            return fake
        return fake.as_strided(fake.shape, strides, fake.storage_offset())

    return [(replay, "apply", apply)]


def _but_ranked(visit: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`visit` makes symbols of the sizes that a view was made with; not one for all ranks."""
    return lambda size: size if is_ranked(size) else visit(size)


def _as_kernels_do(sizes: Any, strides: Any, real: Any) -> list[Any] | None:
    """`strides` with those of size 1 as in `real`, made of their neighbours; None if they are."""
    result = list(strides)
    changed = False
    for i in reversed(range(len(result) - 1)):
        neighbour = result[i + 1] * sizes[i + 1]
        if is_ranked(real[i]) or is_ranked(result[i]) or is_ranked(neighbour):
            continue
        if _hint(result[i]) != real[i] and _hint(neighbour) == real[i]:
            result[i], changed = neighbour, True
    return result if changed else None


def _hint(number: Any) -> Any:
    return number.node.hint if isinstance(number, SymInt) else number
