"""The user's lines that lead to a call, from the running frames or from an exception."""

from __future__ import annotations

import contextlib
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

from ..check.program import is_users
from ..golden.source import Source

_DEPTH = 8


def user_stack() -> tuple[Source, ...]:
    """The lines of the user's code that are running in this thread, the innermost first."""
    found: list[Source] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < _DEPTH:
        if is_users(frame.f_code.co_filename):
            found.append(_source(frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def raised_at(error: BaseException) -> Source | None:
    """The innermost line of the user's code that an exception went through."""
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    lines = [n for _, n in traceback.walk_tb(error.__traceback__)]
    for frame, line in zip(reversed(frames), reversed(lines)):
        if is_users(frame.f_code.co_filename):
            return _source(frame.f_code, line)
    return None


def _source(code: CodeType, line: int) -> Source:
    text = linecache.getline(code.co_filename, line).strip()
    return Source(code.co_filename, line, code.co_name, text)


@contextlib.contextmanager
def noting_return(function: Callable[..., Any]) -> Iterator[list[Source]]:
    """Within it, the line from which `function` returned last is kept in the list.

    Uses sys.settrace for the one frame, so that nothing is noted under a debugger or a coverage
    tool that traces already, nor for a function without Python code.
    """
    found: list[Source] = []
    code = getattr(function, "__code__", None)
    if code is None or sys.gettrace() is not None:
        yield found
        return

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "return":
            found[:] = [_source(code, frame.f_lineno)]
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not code:
            return None
        frame.f_trace_lines = False
        return local

    sys.settrace(trace)
    try:
        yield found
    finally:
        sys.settrace(None)
