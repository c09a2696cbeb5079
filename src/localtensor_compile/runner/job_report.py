"""What is printed when a rank of a job failed: torchrun's summary."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Failure:
    """How a rank failed; rank None: all of them together (a deadlock)."""

    rank: int | None
    code: int
    text: str
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%d_%H:%M:%S"))


def summary(target: str, failure: Failure) -> str:
    """The lines that torchrun's users look for: who failed first, with which exit code, why."""
    rule = "=" * 60
    who = "all ranks" if failure.rank is None else f"{failure.rank} (local_rank: {failure.rank})"
    text = failure.text.replace("\n", "\n              ")
    lines = [
        rule,
        f"{target} FAILED",
        "-" * 60,
        "Root Cause (first observed failure):",
        "[0]:",
        f"  time      : {failure.when}",
        f"  host      : {socket.gethostname()}",
        f"  rank      : {who}",
        f"  exitcode  : {failure.code} (pid: {os.getpid()})",
        f"  traceback : {text}",
        rule,
    ]
    return "\n".join(lines)
