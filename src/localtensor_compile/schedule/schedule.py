"""Schedule: who calls what of torch.distributed, in order, on all ranks."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from ..check.text import table
from ..errors import LocalTensorError
from ..golden.fold import Family, align
from ..golden.listing import COLLECTIVE, Step
from ..golden.ranges import rank_set, varying_text
from ..golden.source import Source
from .calls import GROUP, RAISED, Call, RankRecord
from .findings import Finding
from .linting import findings
from .wording import arguments, tensor_text


class ScheduleError(LocalTensorError, ValueError):
    """A program whose schedule cannot be recorded, or a rank or group that there is not."""


class Schedule:
    """The calls of torch.distributed that each rank makes.

    `print(schedule)` shows them folded: a line per call, with the ranks that make it and what
    differs between them.

    Attributes:
        world_size: number of ranks.
        records: rank -> what it did.
    """

    def __init__(self, world_size: int, records: Mapping[int, RankRecord]) -> None:
        self.world_size = world_size
        self.records = dict(records)

    def rank(self, rank: int) -> tuple[Call, ...]:
        """The calls of one rank, in order.

        Raises:
            ScheduleError: no such rank.
        """
        if rank not in self.records:
            raise ScheduleError(f"there is no rank {rank} in a world of {self.world_size} ranks.")
        return self.records[rank].calls

    @property
    def groups(self) -> dict[str, Family]:
        """Label of process groups -> the groups of ranks that have it."""
        found: dict[str, set[tuple[int, ...]]] = {}
        for record in self.records.values():
            for call in record.calls:
                found.setdefault(str(call.group), set()).add(call.group.ranks)
        return {label: frozenset(families) for label, families in found.items()}

    def on(self, group: str) -> dict[int, tuple[Call, ...]]:
        """Rank -> its calls on the groups of that label (`world`, a mesh dimension, `group1`).

        Raises:
            ScheduleError: no such label.
        """
        if group not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise ScheduleError(f"no call is on a group {group!r}; the groups are {known}.")
        return {
            rank: tuple(c for c in record.calls if str(c.group) == group)
            for rank, record in self.records.items()
        }

    @functools.cached_property
    def findings(self) -> list[Finding]:
        """What would hang or go wrong on a cluster."""
        return findings(self.records)

    # ---- text
    def __str__(self) -> str:
        out = [f"world of {self.world_size} ranks"]
        for label, families in sorted(self.groups.items()):
            out.append(f"group {label}: {'; '.join(map(rank_set, sorted(families)))}")
        lines = [["ranks", "line", "group", "bytes", "call"]]
        lines += [self._line(column) for column in self._columns()]
        out += ["", *(table(lines) if len(lines) > 1 else ["no calls"])]
        for rank, record in self.records.items():
            if record.end == RAISED:
                out.append(f"rank {rank} raised {record.error}{_at(record.source)}")
        return "\n".join(out) + "\n"

    def _columns(self) -> list[dict[int, int]]:
        """Per line: rank -> number of its call."""
        return align(
            {
                rank: [
                    Step(COLLECTIVE, c.op, (), (), None, "", source=c.source) for c in record.calls
                ]
                for rank, record in self.records.items()
            }
        )

    def _line(self, column: Mapping[int, int]) -> list[str]:
        calls = {rank: self.records[rank].calls[n] for rank, n in sorted(column.items())}
        first = next(iter(calls.values()))
        group = varying_text({r: str(c.group) for r, c in calls.items()})
        given = varying_text(
            {r: "?" if c.bytes is None else str(c.bytes) for r, c in calls.items()}
        )
        where = varying_text({r: c.where for r, c in calls.items()})
        return [rank_set(calls), where, group, given, f"{first.op}({_arguments(calls)})"]

    # ---- JSON
    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "world_size": self.world_size,
            "ranks": {
                str(rank): {
                    "calls": [_call_dict(c) for c in record.calls],
                    "end": record.end,
                    "error": record.error,
                }
                for rank, record in self.records.items()
            },
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def _arguments(calls: Mapping[int, Call]) -> str:
    """The arguments of a call of several ranks, each with what differs between them."""
    parts = {rank: list(arguments(call)) for rank, call in calls.items()}
    words = {tuple(word for word, _ in p) for p in parts.values()}
    if len(words) > 1:
        return varying_text({r: ", ".join(map("".join, p)) for r, p in parts.items()})
    texts = []
    for i, word in enumerate(words.pop()):
        texts.append(word + varying_text({r: p[i][1] for r, p in parts.items()}))
    return ", ".join(texts)


def _at(source: Source | None) -> str:
    return "" if source is None else f" at {source}"


def _call_dict(call: Call) -> dict[str, Any]:
    return {
        "op": call.op,
        "group": str(call.group),
        "group_ranks": list(call.group.ranks),
        "number_on_group": call.sequence,
        "tensors": [tensor_text(t) for t in call.given],
        "outputs": [tensor_text(t) for t in call.taken],
        "bytes": call.bytes,
        "reduce_op": call.reduce_op,
        "root": call.root,
        "peer": call.peer,
        "tag": call.tag,
        "splits": None if call.splits is None else [list(s) for s in call.splits],
        "makes_group": call.kind == GROUP,
        "file": None if call.source is None else call.source.file,
        "line": None if call.source is None else call.source.line,
        "code": None if call.source is None else call.source.code,
    }
