"""Compiled graphs run without function modes.

What Inductor's generated code calls has been decided when it was compiled: the mode, which torch
would ask about every kernel call and buffer, has nothing to wrap there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch


def replacements() -> Iterator[tuple[Any, str, Any]]:
    from torch._inductor.output_code import CompiledFxGraph

    original = CompiledFxGraph.__call__

    @functools.wraps(original)
    def call(self: Any, inputs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return original(self, inputs)

    yield CompiledFxGraph, "__call__", call
