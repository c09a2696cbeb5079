"""Which function runs an aten op, a collective or a random op on all ranks.

`LocalTensor.__torch_dispatch__` stands below the code that knows how to run ops, so that code
registers itself here. The choice is made once per OpOverload and cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UnsupportedError

Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
"""handler(func, args, kwargs) -> result; args hold a LocalTensor or a per-rank number."""


class _OnStacks:
    run: Callable[[Handler, Any, tuple[Any, ...], dict[str, Any]], Any]
    """run(handler, func, args, kwargs): an op on stacked LocalTensors, whose handler runs it per
    rank. Set by the package stacked."""


on_stacks = _OnStacks()

_by_op: dict[Any, Handler] = {}
_by_namespace: dict[str, Callable[[Any], Handler]] = {}
_rules: list[Callable[[Any], Handler | None]] = []
_chosen: dict[Any, Handler] = {}


def implements(*ops: Any) -> Callable[[Handler], Handler]:
    """Decorator: the function runs these OpOverloads."""

    def register(handler: Handler) -> Handler:
        for op in ops:
            _by_op[op] = handler
            _chosen.pop(op, None)
        return handler

    return register


def implements_namespace(
    *names: str,
) -> Callable[[Callable[[Any], Handler]], Callable[[Any], Handler]]:
    """Decorator: the function takes an OpOverload of these namespaces and returns its handler."""

    def register(choose: Callable[[Any], Handler]) -> Callable[[Any], Handler]:
        for name in names:
            _by_namespace[name] = choose
        return choose

    return register


def add_rule(rule: Callable[[Any], Handler | None]) -> None:
    """`rule(op)` returns the handler of an op it knows, or None. Last added, first asked."""
    _rules.insert(0, rule)


def handler_of(func: Any) -> Handler:
    """The handler of `func`, remembered for the next call."""
    handler = _chosen.get(func)
    if handler is None:
        handler = _chosen[func] = _choose(func)
    return handler


def _choose(func: Any) -> Handler:
    if func in _by_op:
        return _by_op[func]
    namespace = getattr(func, "namespace", "")
    if namespace in _by_namespace:
        return _by_namespace[namespace](func)
    for rule in _rules:
        handler = rule(func)
        if handler is not None:
            return handler
    raise UnsupportedError(f"no rule tells how to run {func} once per rank.")
