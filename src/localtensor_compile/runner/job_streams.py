"""Where the output of a job's ranks goes, by torchrun's options."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from ..errors import WorldError
from .streams import RankStream

OUT, ERR = 1, 2


@dataclass
class Streams:
    """torchrun's --redirects, --tee, --log-dir and filters.

    Attributes:
        redirects, tee: {rank: OUT | ERR}; None as a rank stands for the others. Redirected output
            goes to a file only, teed output to a file and, with the rank before each line, to the
            terminal.
        log_dir: folder of the files; a temporary one by default.
        shown: ranks whose output reaches the terminal; None: all.
    """

    redirects: dict[int | None, int] = field(default_factory=dict)
    tee: dict[int | None, int] = field(default_factory=dict)
    log_dir: str | None = None
    role: str = "default"
    run_id: str = "none"
    shown: Collection[int] | None = None
    out_filters: Sequence[str] = ()
    err_filters: Sequence[str] = ()
    folder: str | None = None
    _open: list[RankStream] = field(default_factory=list)

    def out(self, rank: int, terminal: TextIO) -> Any:
        """stdout of a rank."""
        return self._stream(rank, terminal, OUT, "stdout.log", self.out_filters)

    def err(self, rank: int, terminal: TextIO) -> Any:
        """stderr of a rank."""
        return self._stream(rank, terminal, ERR, "stderr.log", self.err_filters)

    def _stream(
        self, rank: int, terminal: TextIO, which: int, name: str, filters: Sequence[str]
    ) -> Any:
        tee = bool(_of_rank(self.tee, rank) & which)
        redirect = bool(_of_rank(self.redirects, rank) & which)
        shown = self.shown is None or rank in self.shown
        if not (tee or redirect) and shown and not filters:
            return terminal
        file = self._file(rank, name) if tee or redirect else None
        visible = terminal if shown and (tee or not redirect) else None
        prefix = f"[{self.role}{rank}]:" if tee else ""
        stream = RankStream(visible, prefix, file, filters)
        self._open.append(stream)
        return stream

    def _file(self, rank: int, name: str) -> TextIO:
        if self.folder is None:
            base = self.log_dir or tempfile.mkdtemp(prefix="localtensor_")
            os.makedirs(base, exist_ok=True)
            self.folder = tempfile.mkdtemp(prefix=f"{self.run_id}_", dir=base)
        folder = os.path.join(self.folder, "attempt_0", str(rank))
        os.makedirs(folder, exist_ok=True)
        return open(os.path.join(folder, name), "w", encoding="utf-8")

    def finish(self) -> None:
        """Write what is left and close the files."""
        for stream in self._open:
            stream.finish()
        self._open.clear()


def _of_rank(given: dict[int | None, int], rank: int) -> int:
    return given.get(rank, given.get(None, 0))


def parse_std(text: str) -> dict[int | None, int]:
    """'3' for all ranks, or '0:3,1:1'; 0 none, 1 stdout, 2 stderr, 3 both.

    Raises:
        WorldError: anything else.
    """
    found: dict[int | None, int] = {}
    for part in text.split(","):
        rank, colon, value = part.rpartition(":")
        if value not in ("0", "1", "2", "3") or (colon and not rank.isdigit()):
            raise WorldError(
                f"{text!r} names no streams. Use 0 (none), 1 (stdout), 2 (stderr) or 3 (both) for "
                "all ranks, or pairs such as 0:3,1:1."
            )
        found[int(rank) if colon else None] = int(value)
    return found
