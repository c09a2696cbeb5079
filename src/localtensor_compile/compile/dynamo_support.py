"""What torch's compiler must learn about per-rank numbers, registered once when we are imported.

None of this concerns a world, so it holds inside and outside LocalTensorMode, and none of it is
reached by programs without per-rank numbers. `unregister()` takes it out again.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt

from ..dispatch import backward
from ..values.bool_node import LocalBoolNode
from ..values.float_node import LocalFloatNode
from ..values.int_node import LocalIntNode
from ..values.rank_node import LocalNode, is_ranked
from ..values.stack import ShardsOfStack, made
from ..values.tensor import LocalTensor
from . import (
    aot_support,
    control_flow,
    number_outputs,
    plain_operands,
    settled_sizes,
    traced_numbers,
    traced_tensors,
    tracing_errors,
    view_replay,
)
from .traced_numbers import rank_constant as rank_constant

_undo: list[Callable[[], None]] = []


def register() -> None:
    """Teach torch's compiler; does nothing the second time."""
    if _undo:
        return
    _defer_to_local_nodes()
    _symbols_for_uneven_sizes()
    for module in (
        backward,
        traced_numbers,
        number_outputs,
        traced_tensors,
        aot_support,
        settled_sizes,
        tracing_errors,
        control_flow,
        view_replay,
    ):
        for owner, name, value in module.replacements():
            _set(owner, name, value)
    _undo.append(plain_operands.register())
    for function, answer in traced_numbers.questions():
        _answer(function, answer)
    for function in (*traced_numbers.NODES, *traced_tensors.NODES):
        _cacheable(function)
    tracing_errors.forget_files()


def unregister() -> None:
    """Undo `register`."""
    while _undo:
        _undo.pop()()
    tracing_errors.forget_files()


def _set(owner: Any, name: Any, value: Any) -> None:
    """owner.name = value, or owner[name] = value of a dict."""
    if isinstance(owner, dict):
        before = owner.get(name)
        owner[name] = value
        _undo.append(lambda: owner.pop(name) if before is None else owner.__setitem__(name, before))
        return
    before = owner.__dict__[name]
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))


def _answer(function: Any, answer: Callable[..., Any]) -> None:
    """Where traced code calls `function`, Dynamo calls answer(variable, tx, *variables)."""
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    torch.compiler.allow_in_graph(function)
    # A table from functions to handlers that torch builds once.
    _set(TorchInGraphFunctionVariable._get_handlers(), function, answer)


def _cacheable(function: Any) -> None:
    """AOTAutograd may cache graphs that call `function`: it depends on its arguments only."""
    import torch._inductor.config as config

    name = f"{function.__module__}.{function.__name__}"
    _set(config.unsafe_marked_cacheable_functions, name, "1")


# ---------------------------------------------------------------- plain symbol `op` per-rank number
# Methods that only call one of these (floordiv, sym_and) need nothing.
_BINARY = (
    "add sub mul int_floordiv mod pow_by_natural int_truediv float_truediv float_pow eq ne lt le "
    "gt ge sym_max sym_min and_ or_ lshift rshift bitwise_and bitwise_or bitwise_xor"
).split()
_LAYOUT = (
    "is_contiguous is_channels_last_contiguous_2d is_channels_last_contiguous_3d "
    "is_channels_last_strides_2d is_channels_last_strides_3d "
    "is_non_overlapping_and_dense_indicator"
).split()


def _lift(node: Any, like: LocalNode) -> LocalNode:
    """A plain SymNode as the per-rank node that has it on every rank."""
    if node.is_int():
        return LocalIntNode._make(dict.fromkeys(like._values, SymInt(node)), True)
    if node.is_float():
        return LocalFloatNode(dict.fromkeys(like._values, SymFloat(node)), True)
    return LocalBoolNode(dict.fromkeys(like._values, SymBool(node)), True)


def _defer_to_local_nodes() -> None:
    """torch's SymNode refuses operands of another class on its right: let those take over."""
    from torch.fx.experimental.sym_node import SymNode

    def binary(original: Any, name: str) -> Any:
        @functools.wraps(original)
        def method(self: Any, other: Any) -> Any:
            if isinstance(other, LocalNode):
                return getattr(_lift(self, other), name)(other)
            return original(self, other)

        return method

    def layout(original: Any, name: str) -> Any:
        @functools.wraps(original)
        def method(self: Any, sizes: Any, strides: Any) -> Any:
            for node in (*sizes, *strides):
                if isinstance(node, LocalNode):
                    return getattr(_lift(self, node), name)(sizes, strides)
            return original(self, sizes, strides)

        return method

    for names, wrap in ((_BINARY, binary), (_LAYOUT, layout)):
        for name in names:
            if name in SymNode.__dict__:
                _set(SymNode, name, wrap(SymNode.__dict__[name], name))


# ---------------------------------------------------------------- sizes of uneven parameters
def _symbols_for_uneven_sizes() -> None:
    """A parameter's sizes are static to Dynamo, which means int(): give the dimensions in which
    ranks differ a symbol of their own. The shards stay static."""
    import torch._dynamo.variables.builder as builder
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    original = builder._automatic_dynamic

    @functools.wraps(original)
    def automatic_dynamic(e: Any, *args: Any, **kwargs: Any) -> Any:
        context = original(e, *args, **kwargs)
        if isinstance(e, LocalTensor):
            for i, size in enumerate(e._size):
                if is_ranked(size) and context.dynamic_sizes[i] is DimDynamic.STATIC:
                    context.dynamic_sizes[i] = DimDynamic.DUCK
            if made.any and hasattr(context, "inner_contexts"):
                if type(e._local_tensors) is ShardsOfStack:
                    _follow_the_shards(context, DimDynamic.STATIC)
                _for_the_other_layout(e, context, DimDynamic.STATIC)
        return context

    _set(builder, "_automatic_dynamic", automatic_dynamic)


def _for_the_other_layout(tensor: LocalTensor, context: Any, static: Any) -> None:
    """The gradient is made fake after the tensor's context, and may have the other layout."""
    inner = context.inner_contexts
    one = next(iter(inner.values()))
    sizes, constraints = one.dynamic_sizes, one.constraint_sizes
    stacked = type(tensor._local_tensors) is ShardsOfStack
    other = dataclasses.replace(
        one,
        dynamic_sizes=sizes[1:] if stacked else [static, *sizes],
        constraint_sizes=constraints[1:] if stacked else [None, *constraints],
        dynamic_strides=None,
        constraint_strides=None,
        view_base_context=None,
        **({"excluded_sizes": None} if hasattr(one, "excluded_sizes") else {}),
    )
    for name in [f"_local_tensor_{r}" for r in tensor._local_tensors] if stacked else ["_stack"]:
        inner.setdefault(name, other)


def _follow_the_shards(context: Any, static: Any) -> None:
    """The number of ranks is no dynamic dimension; the others of a stack are those of its rows."""
    inner = context.inner_contexts["_stack"]
    inner.dynamic_sizes[:] = [static, *context.dynamic_sizes]
    inner.constraint_sizes[:] = [None, *context.constraint_sizes]


register()
