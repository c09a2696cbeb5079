"""Sizes of outputs that become one number while their graph is traced.

AOTAutograd returns each symbolic size of an output wrapper as an output of the graph. It counts
them before it traces the graph. Tracing may find that a symbol has only one possible value: every
rank adds guards of its own, which together may leave one. A size computed from then on is an int,
and AOTAutograd would return fewer outputs than it counted. Here the int is returned.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import SymInt

_counted: contextvars.ContextVar[Sequence[Any] | None] = contextvars.ContextVar(
    "counted", default=None
)


@contextlib.contextmanager
def counted(metas: Sequence[Any]) -> Iterator[None]:
    """Context manager: forward outputs are unwrapped into what `metas` counts."""
    token = _counted.set(metas)
    try:
        yield
    finally:
        _counted.reset(token)


def traced_as_counted(function: Any, metas: Sequence[Any]) -> Any:
    """`function`, which AOTAutograd traces later, with forward outputs as `metas` counts them."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with counted(metas):
            return function(*args)

    return traced


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) in torch's AOTAutograd."""
    import torch._functorch._aot_autograd.graph_capture_wrappers as capture

    original = capture.unwrap_tensor_subclasses

    @functools.wraps(original)
    def unwrap(args: Any, descs: Any, *, append_symints: bool) -> Any:
        values, found = original(args, descs, append_symints=append_symints)
        metas = _counted.get()
        if metas is None or not append_symints or not _are_forward_outputs(descs, metas):
            return values, found
        entries = [e for t, d, m in zip(args, descs, metas) for e in _entries(t, d, m)]
        wanted = [d for d, _ in entries]
        if wanted == found:
            return values, found
        by_desc = dict(zip(found, values))
        return [by_desc.get(d, size) for d, size in entries], wanted

    return [(capture, "unwrap_tensor_subclasses", unwrap)]


def _are_forward_outputs(descs: Sequence[Any], metas: Sequence[Any]) -> bool:
    from torch._functorch._aot_autograd.descriptors import AOTOutput, GradAOTOutput

    return len(descs) == len(metas) and all(
        isinstance(d, AOTOutput) and not isinstance(d, GradAOTOutput) for d in descs
    )


def _entries(t: Any, desc: Any, meta: Any) -> Iterator[tuple[Any, Any]]:
    """What `meta` counts of output `t`: (description, size that `t` has now)."""
    from torch._functorch._aot_autograd import descriptors

    inner = getattr(meta, "attrs", None)
    if inner is None:
        yield desc, None
        return
    for attr, inner_meta in inner.items():
        inner_desc = descriptors.SubclassGetAttrAOTOutput(desc, attr)
        yield from _entries(getattr(t, attr), inner_desc, inner_meta)
    for size, now, describe in (
        (meta.outer_size, t.size(), descriptors.SubclassSizeAOTOutput),
        (meta.outer_stride, t.stride(), descriptors.SubclassStrideAOTOutput),
    ):
        for i, s in enumerate(size):
            if isinstance(s, SymInt) and not s.node.is_nested_int():
                yield describe(desc, i), now[i]
