"""What changed between two golden texts, said in terms of ops and ranks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .fold import Folded, Line
from .listing import INPUT, OUTPUT
from .ranges import at_rank, rank_set
from .text import Document, line_text

_NAME = re.compile(r"[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        graph: `forward`, ...; empty for the world.
        kind: `added`, `removed`, `moved`, `changed` or `world`.
        op: the op, or what else it is about.
        ranks: those that it concerns.
        text: the sentence.
    """

    graph: str
    kind: str
    op: str
    ranks: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def explain(old: Document, new: Document) -> list[Change]:
    """The differences from `old` to `new`, in order; empty where only names differ, or nothing."""
    changes = list(_worlds(old, new))
    for title in dict.fromkeys((*old.graphs, *new.graphs)):
        before, after = old.graphs.get(title), new.graphs.get(title)
        if before is None or after is None:
            kind = "added" if before is None else "removed"
            there = after if before is None else before
            ranks = there.ranks if there is not None else ()
            changes.append(Change(title, kind, "graph", ranks, f"{title}: the graph was {kind}"))
        else:
            changes += _Comparison(title, before, after).changes()
    return changes


def explanation(old: Document, new: Document) -> str:
    """`explain` as text, one line per change."""
    changes = explain(old, new)
    if not changes:
        return "only names or comments changed: every rank runs the same ops on the same values."
    return "\n".join(map(str, changes))


def _worlds(old: Document, new: Document) -> Iterable[Change]:
    ranks = tuple(range(new.size))
    if old.size != new.size:
        text = f"the world has {new.size} ranks instead of {old.size}"
        yield Change("", "world", "world", ranks, text)
        return
    for name in sorted(old.groups.keys() | new.groups.keys()):
        before, after = old.groups.get(name), new.groups.get(name)
        if before != after:
            gone, come = (before or frozenset()) - (after or frozenset()), after or frozenset()
            concerned = {r for g in (*gone, *(come - (before or frozenset()))) for r in g}
            now = "is gone" if after is None else "is now " + _groups_text(after)
            was = "is new" if before is None else now
            text = f"group {name} {was}" + (f" (was {_groups_text(before)})" if before else "")
            yield Change("", "world", f"group {name}", tuple(sorted(concerned)), text)


def _groups_text(groups: Iterable[tuple[int, ...]]) -> str:
    return "; ".join(rank_set(g) for g in sorted(groups))


class _Comparison:
    """Two versions of one graph."""

    def __init__(self, title: str, old: Folded, new: Folded) -> None:
        self.title, self.old, self.new = title, old, new
        self.old_names = {line.name: i for i, line in enumerate(old.lines) if line.kind != OUTPUT}
        self.new_names = {line.name: i for i, line in enumerate(new.lines) if line.kind != OUTPUT}

    def changes(self) -> list[Change]:
        if _positions(self.old, self.old_names) == _positions(self.new, self.new_names):
            return []
        pairs, gone, come = self._align()
        moved = self._moved(gone, come)
        found = [(j, self._say_moved(i, j)) for i, j in moved]
        gone = [i for i in gone if i not in dict(moved)]
        come = [j for j in come if j not in {b for _, b in moved}]
        altered = self._altered(gone, come, pairs)
        same = dict(pairs) | dict(moved) | dict(altered)
        found += [(j, self._say_changed(i, j, same)) for i, j in altered]
        gone = [i for i in gone if i not in dict(altered)]
        come = [j for j in come if j not in {b for _, b in altered}]
        found += [(j, self._say("added", self.new.lines[j])) for j in come]
        places = _places(gone, pairs)
        found += [(places[i], self._say("removed", self.old.lines[i])) for i in gone]
        for i, j in [*pairs, *moved]:
            other = self._rewired(i, j, same)
            if other is not None:
                found.append((j, other))
        # What was added, removed or moved explains what else is different.
        weight = {"removed": 0, "added": 0, "moved": 0, "changed": 1}
        return [c for _, c in sorted(found, key=lambda f: (weight[f[1].kind], f[0]))]

    # ---- which line is which
    def _align(self) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        old = [_key(line, self.old_names) for line in self.old.lines]
        new = [_key(line, self.new_names) for line in self.new.lines]
        pairs: list[tuple[int, int]] = []
        gone: list[int] = []
        come: list[int] = []
        matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
        for tag, i, i_end, j, j_end in matcher.get_opcodes():
            if tag == "equal":
                pairs += zip(range(i, i_end), range(j, j_end))
            else:
                gone += range(i, i_end)
                come += range(j, j_end)
        return pairs, gone, come

    def _moved(self, gone: Sequence[int], come: Sequence[int]) -> list[tuple[int, int]]:
        left = list(come)
        found = []
        for i in gone:
            key = _key(self.old.lines[i], self.old_names)
            for j in left:
                if _key(self.new.lines[j], self.new_names) == key:
                    found.append((i, j))
                    left.remove(j)
                    break
        return found

    def _altered(
        self, gone: Sequence[int], come: Sequence[int], pairs: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Lines of one op between the same neighbours."""
        left = list(come)
        found = []
        for i in gone:
            line = self.old.lines[i]
            low = max((b for a, b in pairs if a < i), default=-1)
            high = min((b for a, b in pairs if a > i), default=len(self.new.lines))
            for j in left:
                other = self.new.lines[j]
                inputs = line.kind == INPUT
                if low < j < high and line.kind == other.kind and line.op == other.op:
                    if inputs and line.name != other.name:
                        continue
                    found.append((i, j))
                    left.remove(j)
                    break
        return found

    # ---- sentences
    def _say(self, kind: str, line: Line) -> Change:
        text = f"{self._head(line.ranks)}: {_shown(line)} was {kind}{_where(line)}"
        return Change(self.title, kind, line.op, line.ranks, text)

    def _say_moved(self, i: int, j: int) -> Change:
        line = self.new.lines[j]
        before, after = self._neighbour(self.old, i), self._neighbour(self.new, j)
        text = (
            f"{self._head(line.ranks)}: {_shown(line)} was moved: it came after {before}, now "
            f"after {after}{_where(line)}"
        )
        return Change(self.title, "moved", line.op, line.ranks, text)

    def _neighbour(self, graph: Folded, index: int) -> str:
        previous = [line for line in graph.lines[:index] if line.kind not in (INPUT, OUTPUT)]
        return previous[-1].name if previous else "the inputs"

    def _say_changed(self, i: int, j: int, same: Mapping[int, int]) -> Change:
        before, after = self.old.lines[i], self.new.lines[j]
        ranks = self._ranks_that_differ(before, after, same)
        old, new = _shown(before), _shown(after)
        if (old, before.ranks) == (new, after.ranks):
            old, new = before.type, after.type
        if before.ranks != after.ranks:
            old, new = (
                f"{t} @ {rank_set(r)}" for t, r in ((old, before.ranks), (new, after.ranks))
            )
        text = f"{self._head(ranks)}: {old} became {new}{_where(after)}"
        return Change(self.title, "changed", after.op, ranks, text)

    def _rewired(self, i: int, j: int, same: Mapping[int, int]) -> Change | None:
        """A line that is as before, but takes other values."""
        before, after = self.old.lines[i], self.new.lines[j]
        if self._resolved(before, same) == _operands(after, self.new_names):
            return None
        if before.arguments == after.arguments:
            return None  # they have another value of the same name: its own line says why
        ranks = self._ranks_that_differ(before, after, same)
        text = f"{self._head(ranks)}: {_shown(before)} became {_shown(after)}{_where(after)}"
        return Change(self.title, "changed", after.op, ranks, text)

    def _resolved(self, line: Line, same: Mapping[int, int]) -> tuple[str, ...]:
        """The arguments of an old line in terms of new lines."""
        positions = {n: same.get(i, f"gone {n}") for n, i in self.old_names.items()}
        return _operands(line, positions)

    def _ranks_that_differ(
        self, before: Line, after: Line, same: Mapping[int, int]
    ) -> tuple[int, ...]:
        """Of one line in two versions."""
        old = (before.type, *self._resolved(before, same))
        new = (after.type, *_operands(after, self.new_names))
        everyone = tuple(sorted({*before.ranks, *after.ranks}))
        found = [
            rank
            for rank in everyone
            if (rank in before.ranks) != (rank in after.ranks)
            or [at_rank(t, rank) for t in old] != [at_rank(t, rank) for t in new]
        ]
        return tuple(found) or everyone

    def _head(self, ranks: Sequence[int]) -> str:
        return f"{self.title}, rank{'s' if len(ranks) > 1 else ''} {rank_set(ranks)}"


def _operands(line: Line, positions: Mapping[str, int | str]) -> tuple[str, ...]:
    """The arguments with names replaced by what they stand for."""

    def stands_for(found: re.Match[str]) -> str:
        return f"%{positions[found[0]]}" if found[0] in positions else found[0]

    return tuple(_NAME.sub(stands_for, a) for a in line.arguments)


def _key(line: Line, names: Mapping[str, int]) -> tuple[object, ...]:
    """What a line is, whatever its values are called."""
    arguments = _operands(line, dict.fromkeys(names, ""))
    label = line.name if line.kind == INPUT else ""
    return line.kind, line.op, label, line.type, arguments, line.ranks


def _positions(graph: Folded, names: Mapping[str, int]) -> list[tuple[object, ...]]:
    return [
        (line.kind, line.op, line.type, _operands(line, names), line.ranks) for line in graph.lines
    ]


def _places(gone: Sequence[int], pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Where in the new graph a line that is gone would be."""
    return {i: max((b for a, b in pairs if a < i), default=-1) for i in gone}


def _shown(line: Line) -> str:
    text = line_text(line, line.ranks).partition("  # ")[0]
    left, equals, right = text.partition(" = ")
    if line.kind == INPUT:
        return f"{line.op} {left}"
    return right if equals else text


def _where(line: Line) -> str:
    return f"  [{line.source}]" if line.source else ""
