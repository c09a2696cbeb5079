"""What tracing has decided about sizes, for each rank's program to check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from .leaves import ExportError

Condition = Callable[[Sequence[Any]], Any]
"""Inputs by number -> whether it holds, which is symbolic while these are traced."""


def is_symbolic(size: Any) -> bool:
    """Whether a traced size is not one number."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def conditions(values: Mapping[int, Any], rank: int) -> list[Condition]:
    """On the sizes of one rank's inputs: what is the same, and what was decided by comparing them.

    Args:
        values: the rank's inputs by number, as they were traced.
        rank: whose they are.

    Raises:
        ExportError: a condition that one rank cannot check.
    """
    sizes = list(_symbolic_sizes(values))
    if not sizes:
        return []
    symbols = _symbols(sizes)
    made = [
        _same(place, expression, symbols)
        for place, expression in sizes
        if expression.free_symbols <= set(symbols)
    ]
    own = {s for _, expression in sizes for s in expression.free_symbols}
    for decided in _decided(values):
        if not decided.free_symbols & own:
            continue  # about other ranks' sizes, or none at all
        if not decided.free_symbols <= set(symbols):
            raise ExportError(
                f"tracing has decided that {decided}, which rank {rank} cannot check with the "
                "sizes of its own inputs: its program could be wrong for other sizes. Export "
                "without dynamic_shapes for these dimensions, or use the program of all ranks."
            )
        made.append(_holds(decided, symbols))
    return made


Place = tuple[int, int]


def _symbolic_sizes(values: Mapping[int, Any]) -> Iterator[tuple[Place, Any]]:
    for i, value in values.items():
        for d, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if is_symbolic(size):
                yield (i, d), size.node.expr


def _symbols(sizes: Sequence[tuple[Place, Any]]) -> dict[Any, tuple[Place, int, int]]:
    """Symbol -> (place, factor, rest): the size there is factor * symbol + rest."""
    found: dict[Any, tuple[Place, int, int]] = {}
    # The symbol itself, where an input has it, rather than a multiple.
    for place, expression in sorted(sizes, key=lambda size: not size[1].is_Symbol):
        if len(expression.free_symbols) == 1:
            (symbol,) = expression.free_symbols
            if expression.is_polynomial(symbol) and sympy.degree(expression, symbol) == 1:
                factor, rest = sympy.Poly(expression, symbol).all_coeffs()
                found.setdefault(symbol, (place, int(factor), int(rest)))
    return found


def _value(expression: Any, symbols: Mapping[Any, Any], inputs: Sequence[Any]) -> Any:
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    known = {}
    for symbol in expression.free_symbols:
        (i, d), factor, rest = symbols[symbol]
        size = inputs[i].shape[d]
        known[symbol] = size if (factor, rest) == (1, 0) else (size - rest) // factor
    return sympy_interp(PythonReferenceAnalysis, known, expression)


def _same(place: Place, expression: Any, symbols: Mapping[Any, Any]) -> Condition:
    i, d = place
    return lambda inputs: inputs[i].shape[d] == _value(expression, symbols, inputs)


def _holds(decided: Any, symbols: Mapping[Any, Any]) -> Condition:
    return lambda inputs: _value(decided, symbols, inputs)


def _decided(values: Mapping[int, Any]) -> list[Any]:
    """The guards of the trace that made these values."""
    size = next(
        s
        for v in values.values()
        if isinstance(v, Tensor)
        for s in v.shape
        if isinstance(s, torch.SymInt)
    )
    env = size.node.shape_env
    found = {env.simplify(guard.expr) for guard in env.guards}
    return sorted((e for e in found if not e.is_Boolean or e.free_symbols), key=str)
