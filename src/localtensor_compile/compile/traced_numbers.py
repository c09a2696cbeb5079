"""Per-rank numbers in a frame that Dynamo traces: where they come from, and taking them apart.

A number that is the same int (float, bool) on its rank whenever the compiled code runs is a
constant of the frame, guarded by value, and one node of the graph. Numbers made of traced sizes
are ordinary graph values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt

from .._torch import VERSION
from ..errors import fail
from ..values.bool_node import make_bool
from ..values.float_node import make_float
from ..values.int_node import make_int
from ..values.rank_node import is_ranked, value_on_rank
from ..values.ranked import combined_values, numbers_on_ranks

_TYPES = (SymInt, SymFloat, SymBool)
_CONSTANTS = (int, float, bool)
MAKERS: dict[type, Callable[..., Any]] = {
    SymInt: make_int,
    SymFloat: make_float,
    SymBool: make_bool,
    int: make_int,
    float: make_float,
    bool: make_bool,
}


# ---------------------------------------------------------------- nodes of the Dynamo graph
@torch._dynamo.allow_in_graph
def rank_constant(ranks: tuple[int, ...], values: tuple[Any, ...]) -> Any:
    """A per-rank number that is constant in a traced frame."""
    from .._torch import current_fake_mode

    traced = current_fake_mode() is not None
    return MAKERS[type(values[0])](dict(zip(ranks, values)), traced=traced)


@torch._dynamo.allow_in_graph
def rank_value(number: Any, rank: int) -> Any:
    """What `rank` has of a per-rank number."""
    return value_on_rank(number, rank)


@torch._dynamo.allow_in_graph
def rank_number(ranks: tuple[int, ...], what: str, *values: Any) -> Any:
    """The per-rank number that has these values."""
    return combined_values(ranks, what, *values)


NODES = (rank_constant, rank_value, rank_number)


def _node(tx: Any, function: Any, *args: Any) -> Any:
    from torch._dynamo.variables.builder import wrap_fx_proxy

    return wrap_fx_proxy(tx, tx.output.create_proxy("call_function", function, args, {}))


def is_constant(value: Any) -> bool:
    """Whether `value` is a per-rank number that holds plain numbers."""
    return is_ranked(value) and all(type(v) in _CONSTANTS for v in value.node._values.values())


def _constant(tx: Any, value: Any) -> Any:
    from torch._dynamo.variables.builder import wrap_fx_proxy

    values = value.node._values
    arguments = (tuple(values), tuple(values.values()))
    # In the outermost graph: branches of torch.cond may share it.
    root = tx.output.root_tracer
    proxy = root.create_proxy("call_function", rank_constant, arguments, {})
    return wrap_fx_proxy(tx, proxy)


# ---------------------------------------------------------------- what traced code may ask
def _traced_numbers_on_ranks(_: Any, tx: Any, value: Any, ranks: Any) -> Any:
    """numbers_on_ranks: known while tracing, so that each rank's code can branch on it."""
    from torch._dynamo.variables.base import VariableTracker

    number = getattr(value.realize(), "sym_num", None)
    if not is_ranked(number):
        return VariableTracker.build(tx, None)
    ranks = ranks.as_python_constant()
    found = numbers_on_ranks(number, ranks) or ()
    if is_constant(number):
        return VariableTracker.build(tx, found)
    parts = [
        VariableTracker.build(tx, part)
        if type(part) in _CONSTANTS
        else _node(tx, rank_value, value.as_proxy(), rank)
        for rank, part in zip(ranks, found)
    ]
    from torch._dynamo.variables import TupleVariable

    return TupleVariable(parts)


def _traced_combined_values(_: Any, tx: Any, ranks: Any, what: Any, *values: Any) -> Any:
    """combined_values: a constant where all ranks have constants."""
    from torch._dynamo.variables.base import VariableTracker

    given = [v.realize() for v in values]
    ranks, what = ranks.as_python_constant(), what.as_python_constant()
    if not all(v.is_python_constant() for v in given):
        return _node(tx, rank_number, ranks, what, *(v.as_proxy() for v in given))
    result = combined_values(ranks, what, *(v.as_python_constant() for v in given))
    return _constant(tx, result) if is_ranked(result) else VariableTracker.build(tx, result)


def _traced_fail(_: Any, tx: Any, error: Any, text: Any) -> Any:
    """fail: ends the compilation with the error itself."""
    fail(error.as_python_constant(), text.as_python_constant())


def questions() -> list[tuple[Any, Any]]:
    """(function, what Dynamo does where traced code calls it)."""
    return [
        (numbers_on_ranks, _traced_numbers_on_ranks),
        (combined_values, _traced_combined_values),
        (fail, _traced_fail),
    ]


# ---------------------------------------------------------------- where numbers come from
def _sourceless(original: Any, kind: type, handlers: Any) -> Any:
    """A number that a call returned which Dynamo ran while it traced."""
    import torch._dynamo.variables.builder as builder

    def build(tx: Any, value: Any) -> Any:
        if is_constant(value):
            return _constant(tx, value)
        if original is not None:
            return original(tx, value)
        # Without a handler for the type, torch goes on to its general rules.
        handler = handlers.pop(kind)
        try:
            return builder.SourcelessBuilder.create(tx, value)
        finally:
            handlers[kind] = handler

    return build


def _constant_by_call() -> tuple[Any, str, Any]:
    """torch before 2.13 takes what mesh.get_local_rank() and the like return for a constant."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables import ConstantVariable

    create = ConstantVariable.create

    @functools.wraps(create)
    def create_constant(value: Any, **kwargs: Any) -> Any:
        if is_constant(value):
            return _constant(InstructionTranslator.current_tx(), value)
        return create(value, **kwargs)

    return ConstantVariable, "create", staticmethod(create_constant)


def replacements() -> list[tuple[Any, Any, Any]]:
    """(owner, name, replacement) in torch's Dynamo."""
    import torch._dynamo.variables.builder as builder
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource

    handlers = builder.SourcelessBuilder._type_handlers
    original = builder.VariableBuilder._wrap

    @functools.wraps(original)
    def wrap(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        """A number that is closed over or passed in."""
        if is_constant(value):
            # By value, not identity: mesh.get_local_rank() makes a new SymInt each time.
            key = AttrSource(AttrSource(self.source, "node"), "_guard_key")
            install_guard(key.make_guard(GuardBuilder.EQUALS_MATCH))
            return _constant(self.tx, value)
        return original(self, value, *args, **kwargs)

    found: list[tuple[Any, Any, Any]] = []
    if VERSION < (2, 13):
        found.append(_constant_by_call())
    return [
        *found,
        (builder.VariableBuilder, "_wrap", wrap),
        *[(handlers, t, _sourceless(handlers.get(t), t, handlers)) for t in _TYPES],
    ]
