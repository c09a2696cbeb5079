"""`at(rank)`: what another rank's thread is doing, for a debugger's prompt."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from ..errors import WorldError
from .engine import current_engine
from .scheduler import Task, current_rank
from .stacks import Line, line_of, thread_frame, user_frame


class RankView:
    """A rank that runs in a thread, as it stands now.

    `view["name"]` is a local or global variable of the user's innermost function on that rank,
    `view.eval("x.sum()")` an expression there; `view.up(1)` looks at the function that called it.
    """

    def __init__(self, task: Task, depth: int = 0) -> None:
        self.rank = task.rank
        self._task, self._depth = task, depth

    @property
    def frame(self) -> FrameType:
        """The user's frame. Raises WorldError if the rank has ended or not begun."""
        if self.rank == current_rank():
            frame = user_frame(sys._getframe(1))
        else:
            frame = thread_frame(self._task.thread)
        for _ in range(self._depth):
            frame = None if frame is None else user_frame(frame.f_back)
        if frame is None:
            state = "has ended" if self._task.done else "has not begun"
            where = f" {self._depth} functions up" if self._depth else ""
            raise WorldError(f"rank {self.rank} {state}: there is no code of yours{where}.")
        return frame

    @property
    def line(self) -> Line:
        """File, line and function where the rank is."""
        return line_of(self.frame)

    @property
    def locals(self) -> dict[str, Any]:
        """The local variables there."""
        return dict(self.frame.f_locals)

    def eval(self, expression: str) -> Any:
        """The value of an expression there."""
        frame = self.frame
        return eval(expression, frame.f_globals, dict(frame.f_locals))

    def up(self, count: int = 1) -> RankView:
        """The same rank, `count` callers further out."""
        return RankView(self._task, self._depth + count)

    def __getitem__(self, name: str) -> Any:
        frame = self.frame
        if name in frame.f_locals:
            return frame.f_locals[name]
        if name in frame.f_globals:
            return frame.f_globals[name]
        raise KeyError(f"{name!r} is no variable of {frame.f_code.co_name} on rank {self.rank}")

    def __repr__(self) -> str:
        if self._task.done or not self._task.started:
            return f"<rank {self.rank} {'has ended' if self._task.done else 'has not begun'}>"
        wait = self._task.wait
        waits = "" if wait is None else f", waits in {wait.text()}"
        return f"<rank {self.rank} at {self.line} in {self.line.function}{waits}>"


def at(rank: int) -> RankView:
    """Look at a rank of the LocalRunnerMode or `localtensor run` that is active.

    To be called where all ranks stand still: in a rank's own code, or at a breakpoint() there.

    Raises:
        WorldError: no ranks run in threads, or not this one.
    """
    engine = current_engine()
    if engine is None:
        raise WorldError(
            f"at({rank}) looks at a rank that runs in a thread, but none does. Use it inside "
            "LocalRunnerMode, or in a script under `localtensor run`."
        )
    if rank not in engine.scheduler.tasks:
        raise WorldError(f"at({rank}): the ranks are {list(engine.ranks)}.")
    return RankView(engine.scheduler.tasks[rank])
