"""Golden text: what is written to files under graphs/, and read back to explain a change.

    world of 4 ranks
    group tp: 0-3

    forward
        x: f32[3, 6] = input
        up.weight: f32[{0-2: 3, 3: 2}, 6] = parameter
        # forward: h = F.gelu(self.up(x))
        mm: f32[3, {0-2: 3, 3: 2}] = aten.mm(x, t)
        pad: f32[3, 3] = aten.constant_pad_nd(mm, [0, 1]) @ 3
        all_reduce: f32[3, 6] = all_reduce(mm_1, sum, tp)  # 72 bytes
        return(all_reduce)

Only the lines of the header name the size of the world. `@` says which ranks have a line, if not
all have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import LocalTensorError
from .fold import Family, Folded, Line
from .listing import COLLECTIVE, INPUT, OP, OUTPUT
from .ranges import parse_ranks, rank_set, split_at

INDENT = "    "
_INPUTS = ("input", "parameter", "buffer", "saved", "tangent", "constant")


class GoldenError(LocalTensorError, ValueError):
    """Golden text that cannot be read, or a golden that cannot be compared or written."""


@dataclass(frozen=True)
class Document:
    """Golden text in parts.

    Attributes:
        size: number of ranks.
        groups: names of process groups -> the groups of ranks.
        graphs: title (`forward`, `backward`, ...) -> lines.
    """

    size: int
    groups: Mapping[str, Family]
    graphs: Mapping[str, Folded]


def write(document: Document) -> str:
    """The text of a document; `read` reads it back."""
    out = [f"world of {document.size} ranks"]
    out += [f"group {name}: {_family(groups)}" for name, groups in sorted(document.groups.items())]
    for title, folded in document.graphs.items():
        out += ["", title, *_graph(folded)]
    return "\n".join(out) + "\n"


def _graph(folded: Folded) -> Iterable[str]:
    source = ""
    for line in folded.lines:
        if line.source and line.source != source:
            source = line.source
            yield f"{INDENT}# {source}"
        yield INDENT + line_text(line, folded.ranks)


def line_text(line: Line, ranks: Sequence[int]) -> str:
    """One line of golden text, without its indent.

    Args:
        ranks: all ranks of the world.
    """
    arguments = ", ".join(line.arguments)
    if line.kind == OUTPUT:
        text = f"{line.op}({arguments})"
    elif line.kind == INPUT:
        text = f"{_typed(line)} = {line.op}"
    else:
        text = f"{_typed(line)} = {line.op}({arguments})"
    if len(line.ranks) < len(ranks):
        text += f" @ {rank_set(line.ranks)}"
    return f"{text}  # {line.bytes} bytes" if line.bytes else text


def _typed(line: Line) -> str:
    return f"{line.name}: {line.type}" if line.type else line.name


def _family(groups: Family) -> str:
    return "; ".join(rank_set(ranks) for ranks in sorted(groups))


# ---------------------------------------------------------------- reading
_WORLD = re.compile(r"world of (\d+) ranks")
_GROUP = re.compile(r"group (\S+): (.+)")
_RANKS = re.compile(r"^(.*) @ ([\d,:-]+)$")
_BYTES = re.compile(r"^(.*)  # (.+) bytes$")
_CONFLICT = re.compile(r"^(<{7}|={7}|>{7}|\|{7})( |$)")


def read(text: str, name: str = "the golden text") -> Document:
    """The document of a golden text.

    Args:
        name: what to call it in errors.

    Raises:
        GoldenError: text that `write` does not make, with the line; a merge conflict.
    """
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if _CONFLICT.match(line):
            raise GoldenError(
                f"{name}, line {number}: a merge conflict ({line.split()[0]}). Resolve it, or "
                "take either side and run again with EXPECTTEST_ACCEPT=1."
            )
    head = _WORLD.fullmatch(lines[0]) if lines else None
    if head is None:
        raise GoldenError(
            f"{name}, line 1: expected `world of N ranks`, found {lines[0] if lines else ''!r}. "
            "Run again with EXPECTTEST_ACCEPT=1 to write it anew."
        )
    reader = _Reader(int(head[1]), name)
    for number, line in enumerate(lines[1:], 2):
        reader.add(number, line)
    return reader.document()


class _Reader:
    def __init__(self, size: int, name: str) -> None:
        self.ranks = tuple(range(size))
        self.name = name
        self.groups: dict[str, Family] = {}
        self.graphs: dict[str, list[Line]] = {}
        self.current: list[Line] | None = None
        self.source: str = ""

    def add(self, number: int, line: str) -> None:
        if not line.strip():
            return
        try:
            if line.startswith(INDENT):
                self._body(line[len(INDENT) :])
            elif found := _GROUP.fullmatch(line):
                groups = frozenset(parse_ranks(part.strip()) for part in found[2].split(";"))
                self.groups[found[1]] = groups
            else:
                self.current = self.graphs.setdefault(line.strip(), [])
                self.source = ""
        except (ValueError, IndexError) as error:
            raise GoldenError(
                f"{self.name}, line {number} is no line of golden text: {line.strip()!r}. Run "
                "again with EXPECTTEST_ACCEPT=1 to write it anew."
            ) from error

    def _body(self, text: str) -> None:
        if self.current is None:
            raise ValueError("a line before any graph")
        if text.startswith("# "):
            self.source = text[2:]
            return
        sent, ranks = "", self.ranks
        if found := _BYTES.fullmatch(text):
            text, sent = found[1], found[2]
        if found := _RANKS.fullmatch(text):
            text, ranks = found[1], parse_ranks(found[2])
        self.current.append(_parsed(text, ranks, sent, self.source))

    def document(self) -> Document:
        graphs = {t: Folded(self.ranks, tuple(lines)) for t, lines in self.graphs.items()}
        return Document(len(self.ranks), self.groups, graphs)


def _parsed(text: str, ranks: tuple[int, ...], sent: str, where: str) -> Line:
    left, equals, right = text.partition(" = ")
    if not equals:
        op, arguments = _call(left)
        return Line(OUTPUT, op, "", op, arguments, ranks)
    name, _, kind = left.partition(": ")
    if right in _INPUTS:
        return Line(INPUT, name, kind, right, (), ranks)
    op, arguments = _call(right)
    return Line(
        COLLECTIVE if sent else OP, name, kind, op, arguments, ranks, source=where, bytes=sent
    )


def _call(text: str) -> tuple[str, tuple[str, ...]]:
    """`f(a, [b, c])` -> (`f`, (`a`, `[b, c]`))."""
    op, parenthesis, rest = text.partition("(")
    if not parenthesis or not rest.endswith(")"):
        raise ValueError(text)
    return op, tuple(split_at(rest[:-1], ", "))
