"""The user's line that a node of a graph comes from."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.fx as fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)(?:\n(?!\s*File ")\s*(\S[^\n]*))?')


@dataclass(frozen=True)
class Source:
    """A line of the user's code.

    Attributes:
        file: its path.
        line: the number of the line, from 1.
        function: the name of the function.
        code: the line's text.
    """

    file: str
    line: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


def source_of(node: fx.Node) -> Source | None:
    """The innermost frame outside torch and this package that asked for `node`."""
    trace = node.meta.get("stack_trace")
    return _innermost(trace) if trace else None


@functools.lru_cache(maxsize=4096)
def _innermost(trace: str) -> Source | None:
    found = None
    for file, line, function, code in _FRAME.findall(trace):
        if not file.startswith(_own_folders()) and not file.startswith("<"):
            found = Source(file, int(line), function, code.strip())
    return found


@functools.cache
def _own_folders() -> tuple[str, ...]:
    import contextlib

    package = Path(__file__).parents[1]
    return (
        f"{Path(torch.__file__).parent}/",
        f"{package}/",
        str(Path(contextlib.__file__).parent) + "/contextlib",
    )
