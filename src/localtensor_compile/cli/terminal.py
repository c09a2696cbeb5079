"""Text and progress on the terminal: coloured with rich where it is installed, plain otherwise.

Results go to standard output, progress to standard error.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from types import TracebackType
from typing import Any, Self, TextIO

from ..check.report import EngineResult

_STYLES = {
    r"\bbit-equal\b": "green",
    r"\bclose\b": "cyan",
    r"\b(WRONG|missing|shape|dtype|error|fails)\b": "bold red",
    r"^PASS\b": "bold green",
    r"^FAIL\b": "bold red",
    r"^[- ]+$": "dim",
}


def width() -> int | None:
    """Columns of the terminal, None where standard output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show(text: str) -> None:
    """Print `text`, with verdicts coloured on a terminal unless NO_COLOR is set."""
    console = _console(sys.stdout)
    if console is None:
        print(text)
        return
    from rich.text import Text

    styled = Text(text)
    for pattern, style in _STYLES.items():
        styled.highlight_regex(f"(?m){pattern}", style)
    console.print(styled, soft_wrap=True)


def _console(file: TextIO) -> Any:
    """rich's console, or None without rich, which is an extra: no colours and no spinner then."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=file, highlight=False)


class StepProgress:
    """Shows what runs and for how long: a spinner on a terminal, else a line per event."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        console = _console(sys.stderr)
        if console is not None and console.is_terminal:
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._live = Progress(
                SpinnerColumn("line"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
                redirect_stdout=False,
            )
            self._stack.enter_context(self._live)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def started(self, what: str) -> None:
        """A step begins."""
        if self._live is not None:
            self._task = self._live.add_task(f"{what} ...")
        else:
            print(f"{what} ...", file=sys.stderr, flush=True)

    def finished(self, what: str, result: str) -> None:
        """A step has ended."""
        self.ended(f"{what}: {result}")

    def ended(self, text: str) -> None:
        """The same, in the caller's words."""
        if self._live is not None:
            self._live.remove_task(self._task)
            self._live.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)


class EngineProgress:
    """Shows the engines of a check as steps."""

    def __init__(self) -> None:
        self._steps = StepProgress()

    def __enter__(self) -> Self:
        self._steps.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._steps.__exit__(exc_type, exc, traceback)

    def started(self, name: str) -> None:
        """An engine begins."""
        self._steps.started(name)

    def finished(self, result: EngineResult) -> None:
        """An engine has ended."""
        verb = "ran" if result.error is None else "failed"
        self._steps.ended(f"{result.name} {verb} in {result.seconds:.1f} s")


class TaskProgress:
    """How many of many tasks are done and what runs: a bar on a terminal, else a line per task."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> TaskProgress:
        console = _console(sys.stderr)
        if console is not None and console.is_terminal:
            from rich import progress

            self._live = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.description}"),
                console=console,
                transient=True,
                redirect_stdout=False,
            )
            self._live.start()
            self._task = self._live.add_task("", total=self._total, completed=self._done)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def at(self, text: str) -> None:
        """What runs now; shown on a terminal only."""
        if self._live is not None:
            self._live.update(self._task, description=text)

    def advance(self, text: str) -> None:
        """A task has ended."""
        self._done += 1
        if self._live is not None:
            self._live.advance(self._task)
            self._live.console.print(text)
        else:
            print(f"{self._done}/{self._total} {text}", file=sys.stderr, flush=True)
