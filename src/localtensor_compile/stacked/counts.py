"""What ran stacked and what went per rank, in numbers: nothing leaves the stacked layout silently.

Counts belong to the thread. `LocalTensorMode.stats()` shows those since the mode was entered, and
TORCH_LOGS=+localtensor_compile.stacked logs each op that goes per rank.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Any

log = logging.getLogger("localtensor_compile.stacked")


class _Counts(threading.local):
    def __init__(self) -> None:
        self.stacked = 0
        self.per_rank: Counter[str] = Counter()
        self.joined: Counter[str] = Counter()
        self.left: Counter[str] = Counter()


counts = _Counts()


def went_per_rank(name: str, why: str) -> None:
    """An op on stacked operands runs once per rank."""
    counts.per_rank[name] += 1
    log.debug("%s runs once per rank: %s", name, why)


def joined(name: str) -> None:
    """Per-rank shards were copied into a stack, for or after this op."""
    counts.joined[name] += 1
    log.debug("%s: shards are joined to a stack", name)


def left(name: str) -> None:
    """The result of this op on stacked operands stays per rank."""
    counts.left[name] += 1
    log.debug("%s: the result stays per rank", name)


def snapshot() -> dict[str, Any]:
    """Counts so far."""
    return {
        "stacked": counts.stacked,
        "per_rank": Counter(counts.per_rank),
        "joined": Counter(counts.joined),
        "left": Counter(counts.left),
    }


def since(before: dict[str, Any]) -> dict[str, Any]:
    """Counts since a snapshot, as LocalTensorMode.stats() gives them."""
    now = snapshot()
    return {k: v - before[k] if k == "stacked" else dict(v - before[k]) for k, v in now.items()}
