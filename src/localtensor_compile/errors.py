"""One exception family. Every message says what was found, on which ranks, and what to do.

Where PyTorch raises a builtin exception for the same mistake, ours is a subclass of that builtin
too, so that code and tests which catch the builtin keep working.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn


class LocalTensorError(RuntimeError):
    """Base class of every error that localtensor_compile raises on purpose."""


class RankDivergence(LocalTensorError, AssertionError):
    """Ranks disagree about something that must be one Python value."""


class ShardError(LocalTensorError, ValueError, AssertionError):
    """The given shards cannot make up one LocalTensor."""


class PlainTensorError(LocalTensorError):
    """Per-rank data would end in a tensor that only one rank can see."""


class CollectiveError(LocalTensorError, ValueError):
    """A collective that would fail, hang or corrupt data on real processes."""


class RunnerDeadlock(CollectiveError):
    """Every rank of a runner waits for another one."""


class RunnerTimeout(LocalTensorError, TimeoutError):
    """A rank of a runner did not let others run in time."""


class WorldError(LocalTensorError):
    """The simulated world is missing, has ended, or does not hold the named ranks."""


class UnsupportedError(LocalTensorError, NotImplementedError):
    """Something that localtensor_compile does not simulate."""


def fail(error: type[LocalTensorError], text: str) -> NoReturn:
    """Raise `error(text)`, also in code that Dynamo traces: it would turn `raise` into a break."""
    raise error(text)


def per_rank_text(values: Mapping[int, Any], limit: int = 8) -> str:
    """`rank 0: a, ranks 1-3: b`: equal values of neighbouring ranks are folded."""
    runs: list[tuple[int, int, str]] = []
    for rank in sorted(values):
        text = str(example_of(values[rank]))
        if runs and runs[-1][2] == text and runs[-1][1] == rank - 1:
            runs[-1] = (runs[-1][0], rank, text)
        else:
            runs.append((rank, rank, text))
    parts = [
        f"rank {lo}: {text}" if lo == hi else f"ranks {lo}-{hi}: {text}" for lo, hi, text in runs
    ]
    if len(parts) > limit:
        parts = [*parts[:limit], f"... and {len(parts) - limit} more"]
    return ", ".join(parts)


def example_of(value: Any) -> Any:
    """`value` with the symbols of a traced dynamic shape replaced by the numbers at hand."""
    if type(value) is tuple:
        return tuple(example_of(v) for v in value)
    hint = getattr(getattr(value, "node", None), "hint", None)
    return value if hint is None else hint
