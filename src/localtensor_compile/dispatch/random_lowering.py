"""Inductor runs localtensor_random nodes in the order of their call numbers.

It schedules nodes without a data dependency in any order, so that two draws could swap. Each draw
is made to depend on the one before it.
"""

from __future__ import annotations

import bisect
import itertools
import sys
from typing import Any

_ops: list[Any] = []


def run_in_call_order(op: Any) -> None:
    """Lower `op(ranks, call, ...)` as an opaque kernel that runs in the order of `call`."""
    _ops.append(op)


def register_if_inductor_is_loaded() -> None:
    """Give Inductor the lowerings of all ops so far, unless it has them or is not imported.

    Called whenever an op is traced: the backend is imported before it traces. Importing Inductor
    here would slow down every program that does not use it.
    """
    if _ops and "torch._inductor.lowering" in sys.modules:
        from torch._inductor import lowering

        while _ops:
            op = _ops.pop()
            lowering.lowerings[op] = _ordered_kernel(op)
            lowering.fallbacks.add(op)


def _ordered_kernel(op: Any) -> Any:
    from torch._inductor import ir
    from torch._inductor.virtualized import V
    from torch.utils import _pytree as pytree

    def lower(ranks: Any, call: int, after: Any, *rest: Any) -> Any:
        # The call order replaces `after`, which would keep a gradient alive for nothing.
        made = len(V.graph.operations)
        out = ir.FallbackKernel.create(op, ranks, call, None, *rest)
        kernel = next(o for o in V.graph.operations[made:] if isinstance(o, ir.FallbackKernel))
        chain = V.graph.__dict__.setdefault("_localtensor_draws", [])
        at = bisect.bisect([number for number, _ in chain], call)
        chain.insert(at, (call, kernel))
        # Operation name -> names of the buffers that it waits for (_inductor/scheduler.py).
        waits_for = V.graph.additional_star_deps
        for first, second in itertools.pairwise(k for _, k in chain[max(at - 1, 0) : at + 2]):
            waits_for[second.get_operation_name()].add(first.get_name())
        return pytree.tree_map_only(ir.IRNode, _wrapped, out)

    return lower


def _wrapped(node: Any) -> Any:
    """As Inductor wraps what a fallback kernel returns; torch 2.11 has no method for it."""
    from torch._inductor import ir

    wrap = getattr(node, "wrap_for_lowering", None)
    return ir.TensorBox.create(node) if wrap is None else wrap()
