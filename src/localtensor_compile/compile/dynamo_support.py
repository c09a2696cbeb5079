"""What torch's compiler must learn about per-rank numbers, registered once when we are imported.

None of this concerns a world, so it holds inside and outside LocalTensorMode, and none of it is
reached by programs without per-rank numbers. `unregister()` takes it out again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt

from ..values.int_node import (
    LocalBoolNode,
    LocalFloatNode,
    LocalIntNode,
    LocalNode,
    is_ranked,
    make_int,
)
from ..values.tensor import LocalTensor
from . import number_outputs

_undo: list[Callable[[], None]] = []


def register() -> None:
    """Teach torch's compiler; does nothing the second time."""
    if _undo:
        return
    _defer_to_local_nodes()
    _symbols_for_uneven_sizes()
    _per_rank_constants()
    for owner, name, value in number_outputs.replacements():
        _set(owner, name, value)


def unregister() -> None:
    """Undo `register`."""
    while _undo:
        _undo.pop()()


def _set(owner: Any, name: str, value: Any) -> None:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))


# ---------------------------------------------------------------- plain symbol `op` per-rank number
_BINARY = (
    "add sub mul floordiv int_floordiv mod pow pow_by_natural truediv int_truediv float_truediv "
    "float_pow eq ne lt le gt ge sym_max sym_min and_ or_ sym_and sym_or lshift rshift "
    "bitwise_and bitwise_or bitwise_xor"
).split()
_LAYOUT = (
    "is_contiguous is_channels_last_contiguous_2d is_channels_last_contiguous_3d "
    "is_channels_last_strides_2d is_channels_last_strides_3d is_non_overlapping_and_dense "
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
        return context

    _set(builder, "_automatic_dynamic", automatic_dynamic)


# ---------------------------------------------------------------- per-rank ints in a traced frame
@torch._dynamo.allow_in_graph
def rank_constant(ranks: tuple[int, ...], values: tuple[int, ...]) -> Any:
    """A per-rank int that is constant in a traced frame: one node of the Dynamo graph."""
    from .._torch import current_fake_mode

    return make_int(dict(zip(ranks, values)), traced=current_fake_mode() is not None)


def _emit_constant(tx: Any, value: Any) -> Any:
    from torch._dynamo.variables.builder import wrap_fx_proxy

    values = value.node._values
    arguments = (tuple(values), tuple(values.values()))
    proxy = tx.output.create_proxy("call_function", rank_constant, arguments, {})
    return wrap_fx_proxy(tx=tx, proxy=proxy)


def _is_constant(value: Any) -> bool:
    return is_ranked(value) and all(type(v) is int for v in value.node._values.values())


def _per_rank_constants() -> None:
    """Per-rank ints that Dynamo meets: returned by a call it ran, closed over, or passed in."""
    import torch._dynamo.variables.builder as builder
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource

    handlers = builder.SourcelessBuilder._type_handlers
    before = handlers.get(SymInt)
    create = builder.SourcelessBuilder.create

    def sourceless(tx: Any, value: Any) -> Any:
        if _is_constant(value):
            return _emit_constant(tx, value)
        if before is not None:
            return before(tx, value)
        # Without a handler for the type, torch goes on to its general rules.
        handler = handlers.pop(SymInt)
        try:
            return create(tx, value)
        finally:
            handlers[SymInt] = handler

    handlers[SymInt] = sourceless
    _undo.append(
        lambda: handlers.pop(SymInt) if before is None else handlers.__setitem__(SymInt, before)
    )

    original = builder.VariableBuilder._wrap

    @functools.wraps(original)
    def wrap(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_constant(value):
            # By value, not identity: mesh.get_local_rank() makes a new SymInt each time.
            key = AttrSource(AttrSource(self.source, "node"), "_guard_key")
            install_guard(key.make_guard(GuardBuilder.EQUALS_MATCH))
            return _emit_constant(self.tx, value)
        return original(self, value, *args, **kwargs)

    _set(builder.VariableBuilder, "_wrap", wrap)


register()
