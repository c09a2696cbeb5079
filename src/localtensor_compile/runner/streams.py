"""stdout and stderr of a rank: prefixed on the terminal, or written to a file, or both."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, TextIO


class RankStream(io.TextIOBase):
    """A text stream that writes to others.

    Args:
        terminal: where lines go, with `prefix` before each, or None.
        file: where the text goes as it is, or None.
        filters: only lines that contain one of these go to the terminal; empty: all.
    """

    def __init__(
        self,
        terminal: TextIO | None,
        prefix: str = "",
        file: TextIO | None = None,
        filters: Sequence[str] = (),
    ) -> None:
        self._terminal, self._prefix, self._file = terminal, prefix, file
        self._filters = tuple(filters)
        self._line = ""

    encoding = "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._file is not None:
            self._file.write(text)
        if self._terminal is not None:
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._show(line + "\n")
        return len(text)

    def _show(self, line: str) -> None:
        if self._terminal is None:
            return
        if not self._filters or any(f in line for f in self._filters):
            self._terminal.write(self._prefix + line)

    def flush(self) -> None:
        for stream in (self._file, self._terminal):
            if stream is not None:
                stream.flush()

    def isatty(self) -> bool:
        return False

    def finish(self) -> None:
        """Write what is left of the last line; close the file."""
        if self._line:
            self._show(self._line + "\n")
            self._line = ""
        self.flush()
        if self._file is not None:
            self._file.close()

    def __getattr__(self, name: str) -> Any:
        if self._terminal is None or name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._terminal, name)
