"""The results of a run: a file with one JSON record per line, to which a killed run comes back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Store:
    """Records by (op, world size). Only those measured with the same plan and torch count.

    Args:
        path: the file; made when the first record is added.
        plan: `Plan.as_json()` of this run.
        version: torch's.
    """

    def __init__(self, path: Path, plan: Record, version: str) -> None:
        self._path, self._plan, self._version = path, plan, version
        self.records: dict[tuple[str, int], Record] = {}
        self._torn = False
        for record in self._read():
            if record.get("plan") == plan and record.get("torch") == version:
                self.records[record["op"], record["world_size"]] = record

    def add(self, record: Record) -> None:
        """Append in one write, so that several runs may share the file."""
        record = {**record, "torch": self._version}
        line = json.dumps(record, separators=(",", ":")) + "\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        file = os.open(self._path, flags, 0o644)
        try:
            # Behind a line that a killed run did not end, a line of its own.
            os.write(file, (("\n" if self._torn else "") + line).encode())
        finally:
            os.close(file)
        self._torn = False
        self.records[record["op"], record["world_size"]] = record

    def _read(self) -> list[Record]:
        if not self._path.exists():
            return []
        text = self._path.read_text()
        self._torn = bool(text) and not text.endswith("\n")
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # a line that a killed run did not end
                continue
        return found
