"""Per-rank numbers as operands of ops on stacks."""

from __future__ import annotations

from typing import Any


def with_numbers(func: Any, ranks: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments with per-rank numbers made part of a stack, or None where that cannot be."""
    return None
