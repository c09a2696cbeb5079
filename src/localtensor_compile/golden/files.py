"""Goldens in files and in test sources: compared, explained, accepted with EXPECTTEST_ACCEPT=1."""

from __future__ import annotations

import difflib
import os
import tempfile
from pathlib import Path
from typing import Any

import expecttest

from .._torch import VERSION
from .diff import explanation
from .text import GoldenError, read

ACCEPT = "EXPECTTEST_ACCEPT"


class GoldenMismatch(AssertionError):
    """A graph that is not the golden one."""


def accepting() -> bool:
    """Whether this run writes goldens instead of comparing with them."""
    return bool(os.environ.get(ACCEPT))


def assert_golden(graphs: Any, path: str | os.PathLike[str]) -> None:
    """Compare graphs with a golden file, or write it where EXPECTTEST_ACCEPT=1 is set.

    A version of torch that makes another graph may have a file of its own beside it:
    `NAME.torch-2.14.txt` for NAME.txt. It is written where EXPECTTEST_ACCEPT=torch is set.

    Args:
        graphs: what `capture` returned, or golden text.
        path: the file, by convention under graphs/.

    Raises:
        GoldenMismatch: other graphs, with what changed on which ranks; no such file.
        GoldenError: a file that holds no golden text, or a merge conflict; it is not overwritten.
    """
    actual, shared = str(graphs), Path(path)
    file = _of_this_torch(shared)
    read(actual, "the graph")
    expected = file.read_text() if file.exists() else None
    if expected is not None:
        read(expected, str(file))
    if accepting():
        if file != shared and shared.exists() and shared.read_text() == actual:
            file.unlink(missing_ok=True)
        elif expected != actual:
            _write(file, actual)
        return
    if expected is None:
        raise GoldenMismatch(
            f"there is no golden file {path}. Write it with {ACCEPT}=1, and commit it."
        )
    assert_same(expected, actual, name=str(file))


def _of_this_torch(file: Path) -> Path:
    """The file for this version of torch, where there is one or is to be one."""
    version = ".".join(map(str, VERSION))
    own = file.with_name(f"{file.stem}.torch-{version}{file.suffix}")
    return own if own.exists() or os.environ.get(ACCEPT) == "torch" else file


def assert_expected_inline(graphs: Any, expect: str, skip: int = 0) -> None:
    """Compare graphs with a string literal in the test, which EXPECTTEST_ACCEPT=1 rewrites.

    Args:
        graphs: what `capture` returned, or golden text.
        expect: the literal.
        skip: calls between the literal and this function.

    Raises:
        GoldenMismatch: other graphs, with what changed on which ranks.
        GoldenError: accepting in a pytest-xdist worker, where several would edit one file.
    """
    if accepting() and "PYTEST_XDIST_WORKER" in os.environ:
        raise GoldenError(
            f"{ACCEPT}=1 edits test files, which processes of pytest-xdist cannot do at the same "
            "time. Accept without -n."
        )
    expecttest.assert_expected_inline(
        str(graphs), expect, skip=skip + 1, assert_eq=_assert_eq, debug_id="golden"
    )


def _assert_eq(expect: str, actual: str, *, msg: str = "") -> None:
    assert_same(expect, actual, name="the golden text in the test")


def assert_same(expected: str, actual: str, *, name: str) -> None:
    """Raise GoldenMismatch with an explanation where two golden texts differ."""
    if expected == actual:
        return
    lines = difflib.unified_diff(
        expected.splitlines(), actual.splitlines(), "golden", "now", lineterm="", n=1
    )
    raise GoldenMismatch(
        f"the graph is not that of {name}:\n{_explained(expected, actual, name)}\n\n"
        + "\n".join(lines)
        + f"\n\nIf this is meant, run again with {ACCEPT}=1."
    )


def _explained(expected: str, actual: str, name: str) -> str:
    if not expected.strip():
        return "the golden text is empty."
    return explanation(read(expected, name), read(actual, "the graph"))


def _write(file: Path, text: str) -> None:
    """Whole or not at all: other processes may read it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
