"""Backward inside a mode.

`torch.autograd.backward` is itself an overridable function, so that torch has taken the function
mode off the stack by the time the engine runs; backward formulas and hooks that call factories
would make plain tensors. The engine's entry point puts the mode back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch.overrides import _get_current_function_mode_stack

from ..state import enabled_local_tensor_mode


def replacements() -> Iterator[tuple[Any, str, Any]]:
    import torch.autograd as autograd
    import torch.autograd.graph as graph

    original = graph._engine_run_backward

    @functools.wraps(original)
    def engine_run_backward(*args: Any, **kwargs: Any) -> Any:
        mode = enabled_local_tensor_mode()
        if mode is None or mode._function_mode in _get_current_function_mode_stack():
            return original(*args, **kwargs)
        with mode._function_mode:
            return original(*args, **kwargs)

    yield graph, "_engine_run_backward", engine_run_backward
    yield autograd, "_engine_run_backward", engine_run_backward
