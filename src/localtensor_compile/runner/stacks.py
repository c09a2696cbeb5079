"""The user's place in a stack: neither torch nor this package, nor what they call through."""

from __future__ import annotations

import contextlib
import functools
import os
import runpy
import sys
import threading
from dataclasses import dataclass
from types import FrameType

import torch

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_FILES = frozenset(
    f
    for f in (contextlib.__file__, functools.__file__, threading.__file__, runpy.__file__)
    if f is not None
)


@dataclass(frozen=True)
class Line:
    """A line of the user's code."""

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.relpath(self.file)}:{self.number}" if self.file else "unknown line"


NOWHERE = Line("", 0, "")


def user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that is the user's, from `frame` outwards; None if there is none."""
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def is_users(file: str) -> bool:
    """Whether code of this file is the user's."""
    return not (file.startswith((_PACKAGE, _TORCH, "<frozen")) or file in _FILES)


def user_line() -> Line:
    """The user's line that the calling thread is in."""
    return line_of(user_frame(sys._getframe(1)))


def line_of(frame: FrameType | None) -> Line:
    """A frame's place."""
    if frame is None:
        return NOWHERE
    return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def thread_frame(thread: threading.Thread | None) -> FrameType | None:
    """The user's innermost frame in another thread."""
    if thread is None or thread.ident is None:
        return None
    return user_frame(sys._current_frames().get(thread.ident))


def where_thread_is(thread: threading.Thread | None) -> str:
    """'at a.py:3 in train' for a report."""
    line = line_of(thread_frame(thread))
    return f"at {line} in {line.function}" if line.file else "outside the user's code"
