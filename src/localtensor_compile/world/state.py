"""Which simulated world is active. Holds the stack of modes and nothing else.

The stack belongs to the thread that entered the mode. The autograd engine runs CPU backward in
the thread that called it; other threads see the mode only where a hook hands it to them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mode import LocalTensorMode


class _Stack(threading.local):
    def __init__(self) -> None:
        self.modes: list[LocalTensorMode] = []


_stack = _Stack()


def get_local_tensor_mode_list() -> list[LocalTensorMode]:
    """The modes entered in this thread, outermost first."""
    return _stack.modes


def local_tensor_mode() -> LocalTensorMode | None:
    """The innermost LocalTensorMode, enabled or not, or None."""
    modes = _stack.modes
    return modes[-1] if modes else None


def enabled_local_tensor_mode() -> LocalTensorMode | None:
    """The innermost LocalTensorMode if it is not disabled, or None."""
    mode = local_tensor_mode()
    return None if mode is None or mode._disable else mode


class _Acting(threading.local):
    rank: int | None = None


acting = _Acting()
"""`acting.rank`: the one rank that this thread is, in code that runs in a thread per rank."""
