"""The programs of all ranks on top of each other: one line per step, with what differs marked.

Ranks run one program, so their lists of steps are mostly the same; some ranks have a step that
others lack, as padding. Lists are aligned by op and source line, one kind of list after the other.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .listing import COLLECTIVE, INPUT, OUTPUT, GroupRef, Ref, Step, TensorType, Word
from .ranges import varying_text

Family = frozenset[tuple[int, ...]]


class GroupNames:
    """Names for the process groups that ranks are in: those of mesh dimensions, else `group0`, ...

    Args:
        size: number of ranks.
        known: families of groups that have a name, in order of preference.
    """

    def __init__(self, size: int, known: Mapping[str, Family] | None = None) -> None:
        self._names: dict[Family, str] = {}
        for name, family in (known or {}).items():
            self._names.setdefault(family, name)
        self._names.setdefault(frozenset({tuple(range(size))}), "world")
        self.used: dict[str, Family] = {}

    def text(self, groups: Mapping[int, tuple[int, ...]]) -> str:
        """The name of the groups that one collective has, per rank where ranks do not agree."""
        members = [r for group in set(groups.values()) for r in group]
        if len(members) == len(set(members)):
            return self._name(frozenset(groups.values()))
        return varying_text({rank: self._name(frozenset({g})) for rank, g in groups.items()})

    def _name(self, family: Family) -> str:
        if family not in self._names:
            whole = [n for f, n in self._names.items() if family < f]
            taken = set(self._names.values())
            free = next(n for i in range(len(taken) + 1) if (n := f"group{i}") not in taken)
            self._names[family] = whole[0] if whole else free
        name = self._names[family]
        self.used[name] = self.used.get(name, frozenset()) | family
        return name


@dataclass(frozen=True)
class Line:
    """One line of the folded text.

    Attributes:
        kind: INPUT, OP, COLLECTIVE or OUTPUT.
        name: what other lines call its result.
        type: `f32[128, {0-2: 43, 3: 42}]`; empty for a result that is no tensor.
        op: `aten.mm`, or what an input is, or the name of an output.
        arguments: their texts.
        ranks: the ranks that have it.
        source: `function: code` of the user's line.
        bytes: what a collective takes from each rank, empty for other steps.
        steps: rank -> index into that rank's list.
    """

    kind: str
    name: str
    type: str
    op: str
    arguments: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str = ""
    bytes: str = ""
    steps: Mapping[int, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Folded:
    """The lines of one graph of all ranks.

    Attributes:
        ranks: all of them.
        lines: in order.
        names: (rank, name in that rank's traced graph) -> name of the line.
    """

    ranks: tuple[int, ...]
    lines: tuple[Line, ...]
    names: Mapping[tuple[int, str], str] = field(default_factory=dict, compare=False)


def fold(
    programs: Mapping[int, Sequence[Step]],
    groups: GroupNames,
    saved: Mapping[tuple[int, str], str] | None = None,
) -> Folded:
    """One list of lines for all ranks.

    Args:
        programs: rank -> its steps.
        groups: names process groups.
        saved: names that an earlier graph gave to what this one gets from it, as `Folded.names`.
    """
    known = saved or {}
    programs = {
        rank: [_called(step, known.get((rank, step.name))) for step in steps]
        for rank, steps in programs.items()
    }
    columns = align(programs)
    names = _names(columns, programs)
    named = list(zip(columns, names))
    of_step = {(rank, index): name for column, name in named for rank, index in column.items()}
    lines = [_line(column, name, programs, of_step, groups) for column, name in named]
    of_node = {(rank, programs[rank][i].name): name for (rank, i), name in of_step.items()}
    for (rank, i), name in of_step.items():
        for part, item in programs[rank][i].parts:
            of_node[rank, part] = name if item is None else f"{name}.{item}"
    return Folded(tuple(sorted(programs)), tuple(lines), of_node)


# ---------------------------------------------------------------- alignment
Column = dict[int, int]  # rank -> step


def align(programs: Mapping[int, Sequence[Step]]) -> list[Column]:
    """The steps of all ranks as columns, of which each has at most one step of a rank."""
    kinds: dict[tuple[Hashable, ...], list[int]] = {}
    for rank in sorted(programs):
        kinds.setdefault(tuple(map(_key, programs[rank])), []).append(rank)
    # The longest list has the fewest gaps, and the others find their places in it.
    ordered = sorted(kinds.items(), key=lambda kind: -len(kind[0]))
    columns: list[Column] = []
    keys: list[Hashable] = []
    for own, ranks in ordered:
        new_columns: list[Column] = []
        new_keys: list[Hashable] = []
        matcher = difflib.SequenceMatcher(None, keys, own, autojunk=False)
        for tag, i, i_end, j, j_end in matcher.get_opcodes():
            if tag == "equal":
                for column, k in zip(columns[i:i_end], range(j, j_end)):
                    new_columns.append(column | dict.fromkeys(ranks, k))
            else:
                new_columns += columns[i:i_end]
                new_columns += [dict.fromkeys(ranks, k) for k in range(j, j_end)]
            new_keys += keys[i:i_end]
            if tag != "equal":
                new_keys += own[j:j_end]
        columns, keys = new_columns, new_keys
    return columns


def _key(step: Step) -> Hashable:
    where = None if step.source is None else (step.source.function, step.source.code)
    return step.kind, step.op, step.label if step.kind in (INPUT, OUTPUT) else where


# ---------------------------------------------------------------- names
def _called(step: Step, name: str | None) -> Step:
    """An input that comes from an earlier graph has the name that it has there."""
    return step if name is None or step.kind is not INPUT else replace(step, label=name)


def _names(columns: Sequence[Column], programs: Mapping[int, Sequence[Step]]) -> list[str]:
    firsts = [programs[rank][i] for rank, i in (next(iter(c.items())) for c in columns)]
    taken = {step.label for step in firsts if step.kind is INPUT}
    counts: dict[str, int] = {}
    given: dict[str, int] = {}
    names = []
    for step in firsts:
        if step.kind is INPUT:
            given[step.label] = given.get(step.label, 0) + 1
            count = given[step.label]
            names.append(step.label if count == 1 else f"{step.label}#{count}")
            continue
        base = step.op.removeprefix("aten.").partition(".")[0].replace("::", ".")
        count = counts.get(base, 0)
        while (name := base if count == 0 else f"{base}_{count}") in taken:
            count += 1
        counts[base] = count + 1
        taken.add(name)
        names.append(name)
    return names


# ---------------------------------------------------------------- text
def _line(
    column: Column,
    name: str,
    programs: Mapping[int, Sequence[Step]],
    of_step: Mapping[tuple[int, int], str],
    groups: GroupNames,
) -> Line:
    steps = {rank: programs[rank][index] for rank, index in sorted(column.items())}
    first = next(iter(steps.values()))

    def texts(values: Mapping[int, Any]) -> str:
        return _text(values, lambda rank, ref: of_step[rank, ref.step], groups)

    arguments = _each({r: s.arguments for r, s in steps.items()}, texts)
    keywords = []
    for i, (keyword, _) in enumerate(first.keywords):
        values = {r: s.keywords[i][1] for r, s in steps.items()}
        keywords.append(f"{keyword}={texts(values)}")
    sent = ""
    if first.kind is COLLECTIVE:
        unknown = {r: "?" if s.sent is None else str(s.sent) for r, s in steps.items()}
        sent = varying_text(unknown)
    return Line(
        kind=first.kind,
        name=name,
        type=_type_text({r: s.type for r, s in steps.items()}),
        op=first.op,
        arguments=(*arguments, *keywords),
        ranks=tuple(steps),
        source="" if first.source is None else f"{first.source.function}: {first.source.code}",
        bytes=sent,
        steps=dict(column),
    )


def _each(values: Mapping[int, Any], texts: Callable[[Mapping[int, Any]], str]) -> list[str]:
    """The text of each item of sequences that are as long on every rank, else of the whole."""
    lengths = {len(v) for v in values.values()}
    if len(lengths) > 1:
        return [texts(values)]
    return [texts({r: v[i] for r, v in values.items()}) for i in range(lengths.pop())]


def _text(values: Mapping[int, Any], name: Callable[[int, Ref], str], groups: GroupNames) -> str:
    if all(isinstance(v, GroupRef) for v in values.values()):
        return groups.text({r: v.ranks for r, v in values.items()})
    if all(isinstance(v, tuple) for v in values.values()):
        lengths = {len(v) for v in values.values()}
        if len(lengths) == 1:
            items = [
                _text({r: v[i] for r, v in values.items()}, name, groups)
                for i in range(lengths.pop())
            ]
            return f"[{', '.join(items)}]"
    return varying_text({r: _plain(r, v, name) for r, v in values.items()})


def _plain(rank: int, value: Any, name: Callable[[int, Ref], str]) -> str:
    if isinstance(value, Ref):
        return name(rank, value) + ("" if value.item is None else f"[{value.item}]")
    if isinstance(value, Word):
        return value.text
    if isinstance(value, tuple):
        return f"[{', '.join(_plain(rank, v, name) for v in value)}]"
    return repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)


def _type_text(types: Mapping[int, Any]) -> str:
    first = next(iter(types.values()))
    if all(t is None for t in types.values()):
        return ""
    if all(isinstance(t, tuple) and len(t) == len(first) for t in types.values()):
        parts = [_type_text({r: t[i] for r, t in types.items()}) for i in range(len(first))]
        return f"({', '.join(parts)})"
    tensors = all(isinstance(t, TensorType) for t in types.values())
    if tensors and len({(t.dtype, len(t.shape)) for t in types.values()}) == 1:
        sizes = [
            varying_text({r: str(t.shape[d]) for r, t in types.items()})
            for d in range(len(first.shape))
        ]
        return f"{first.dtype}[{', '.join(sizes)}]"
    return varying_text({r: _one_type(t) for r, t in types.items()})


def _one_type(value: Any) -> str:
    if isinstance(value, TensorType):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_one_type, value))})"
    return str(value or "none")
