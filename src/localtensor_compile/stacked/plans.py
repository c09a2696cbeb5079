"""How an op runs on stacks, decided once per overload: the rules and what its schema says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _torch_vmap
from ..dispatch.per_rank import OpPlan
from . import fsdp

aten = torch.ops.aten
_SYM_TYPES = (torch.SymInt, torch.SymFloat, torch.SymBool)

Ranks = tuple[int, ...]
Rule = Callable[[Any, Ranks, tuple[Any, ...], dict[str, Any]], Any]
"""rule(func, ranks, args, kwargs): the result, or NotImplemented where it does not know this call.
The LocalTensors among the arguments are stacked, but for those that the op writes."""

RULES: dict[Any, Rule] = {}

# Their handlers look at the wrapper only, or know stacks themselves.
_AS_THEY_ARE = {
    aten.sym_size.default,
    aten.sym_stride.default,
    aten.sym_storage_offset.default,
    aten.sym_numel.default,
    aten.size.default,
    aten.stride.default,
    aten.dim.default,
}
_NAMESPACES_OF_THEIR_OWN = (
    "_c10d_functional",
    "_c10d_functional_autograd",
    "_dtensor",
    "c10d",
    "cplib",
    "localtensor",
    "localtensor_random",
)
# Tagged as elementwise, but not on operands that are broadcast together.
_NOT_ELEMENTWISE = {"aten::bucketize", "aten::searchsorted", "aten::batch_norm_elemt"}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    """Decorator: the function runs these overloads on stacks."""

    def register(fn: Rule) -> Rule:
        for op in ops:
            RULES[op] = fn
        return fn

    return register


class Plan(OpPlan):
    """What the stacked runner has to know about one OpOverload."""

    __slots__ = ("batches", "decomposition", "direct", "explicit", "fresh", "leave", "outs", "why")

    def __init__(self, func: Any) -> None:
        self.leave = (
            not isinstance(func, torch._ops.OpOverload)
            or func in _AS_THEY_ARE
            or func.namespace in _NAMESPACES_OF_THEIR_OWN
        )
        if self.leave:
            return
        super().__init__(func)
        if self.views and not self.writes and func._can_decompose():
            # to(), reshape(): a view or a copy, as the ops that they consist of find out.
            self.leave = True
            return
        if func.namespace == "fsdp" and str(func) in fsdp.BY_NAME:
            RULES[func] = fsdp.BY_NAME[str(func)]
        tags, schema = func.tags, func._schema
        self.outs = tuple(a.name for a in schema.arguments if a.is_out)
        elementwise = torch.Tag.pointwise in tags and schema.name not in _NOT_ELEMENTWISE
        self.direct = elementwise and not self.views and not self.outs
        self.why = ""
        if torch.Tag.nondeterministic_seeded in tags:
            self.why = "it draws random numbers"
        elif (
            torch.Tag.data_dependent_output in tags
            or torch.Tag.dynamic_output_shape in tags
            or func is aten._local_scalar_dense.default
        ):
            self.why = "what it returns depends on the data"
        self.batches = not self.why and _torch_vmap.has_rule(func) and not self.outs
        self.decomposition = None if self.why or self.writes else _decomposition(func)
        self.explicit = (
            not self.why
            and not self.batches
            and torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeExplicitAutograd"
            )
            and func.namespace == "aten"
            and schema.name.startswith("aten::_foreach_")
        )
        self.fresh = self.single and not self.writes and not self.views


def _decomposition(func: Any) -> Any:
    from torch._decomp import decomposition_table

    return decomposition_table.get(func)


_plans: dict[Any, Plan] = {}


def plan_of(func: Any) -> Any:
    """The plan of an op, made once."""
    plan = _plans.get(func)
    if plan is None:
        plan = _plans[func] = Plan(func)
    return plan
