"""Random state functions of torch, per rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import rng


def replacements() -> Iterator[tuple[Any, str, Any]]:
    yield from rng.replacements()
