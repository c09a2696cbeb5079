"""Which branch or loop of the user's code keeps a line from ranks that did not reach it."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..golden.source import Source


@dataclass(frozen=True)
class Branch:
    """Code that not every rank has to run.

    Attributes:
        line: of its header.
        text: `if rank == 0` (line 3) is true.
        start, end: its first and last line.
        loop: the header of a loop.
    """

    line: int
    text: str
    start: int
    end: int
    loop: str = ""

    def __contains__(self, source: Source) -> bool:
        return self.start <= source.line <= self.end


def branch_of(stack: Sequence[Source], others: Sequence[Source]) -> str:
    """`a.py:12 is reached only where ... is true`, or that it is in a loop, or nothing.

    Args:
        stack: the lines that lead to a call, the innermost first.
        others: where the ranks that do not call are instead.
    """
    for source in stack:
        beside = [o for o in others if o.file == source.file and o.function == source.function]
        apart = [
            branch
            for branch in branches(source)
            if branch.line == source.line or not any(o in branch for o in beside)
        ]
        if apart:
            # Of several, the one that asks for the rank: the others may be true everywhere.
            chosen = next((b for b in apart if "rank" in b.text), apart[0])
            return f"{source} is reached only where {chosen.text}"
    for source in stack:
        for branch in branches(source):
            if branch.loop:
                return f"{source} is in {branch.loop}, which goes on for longer there"
    return ""


def branches(source: Source) -> Iterator[Branch]:
    """The branches around a line, within its function, the innermost first."""
    lines = linecache.getlines(source.file)
    for node in reversed(_around(source.file, "".join(lines), source.line)):
        yield from _parts(node, source.line)


@functools.lru_cache(maxsize=64)
def _parsed(file: str, text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _around(file: str, text: str, line: int) -> list[ast.AST]:
    """The nodes that a line is in, from the outermost, of the innermost function."""
    module = _parsed(file, text)
    found: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            start, end = getattr(child, "lineno", None), getattr(child, "end_lineno", None)
            if start is not None and end is not None and not start <= line <= end:
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.clear()
            if start is not None:
                found.append(child)
            visit(child)

    if module is not None:
        visit(module)
    return found


def _parts(node: ast.AST, line: int) -> Iterator[Branch]:
    if isinstance(node, (ast.If, ast.While)):
        word = "if" if isinstance(node, ast.If) else "while"
        header = f"`{word} {_short(node.test)}` (line {node.lineno})"
        loop = header if isinstance(node, ast.While) else ""
        yield from _body(node, node.body, line, f"{header} is true", loop)
        yield from _body(node, node.orelse, line, f"{header} is false")
    elif isinstance(node, ast.For):
        header = f"`for {_short(node.target)} in {_short(node.iter)}` (line {node.lineno})"
        yield from _body(node, node.body, line, f"{header} goes on", header)
    elif isinstance(node, ast.Try):
        for handler in node.handlers:
            name = _short(handler.type) if handler.type is not None else "anything"
            yield from _body(
                handler, handler.body, line, f"{name} was raised (line {handler.lineno})"
            )
    elif isinstance(node, (ast.BoolOp, ast.IfExp)):
        yield Branch(node.lineno, f"`{_short(node)}` gets so far", line, line)


def _body(
    node: ast.AST, body: Sequence[ast.stmt], line: int, text: str, loop: str = ""
) -> Iterator[Branch]:
    if body:
        start, end = body[0].lineno, body[-1].end_lineno or body[-1].lineno
        if start <= line <= end:
            yield Branch(getattr(node, "lineno", start), text, start, end, loop)


def _short(node: ast.AST, limit: int = 60) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
