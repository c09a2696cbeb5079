"""Code that runs once per rank in a thread of its own, with object collectives between the threads.

For parts of torch whose Python differs per rank and waits for other ranks (checkpoint planning). A
thread is one rank: factories and tensors are plain, meshes and dist.get_rank answer for that rank.
Tensor collectives are not simulated here.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from ..errors import CollectiveError
from .state import acting


class _Stopped(Exception):
    """Ends the thread of a rank that waits in vain."""


class _Meeting:
    """Where the ranks' threads exchange objects."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        self._changed = threading.Condition()
        self._brought: dict[int, Any] = {}
        self._taken: dict[int, dict[int, Any]] = {}
        self._over = False

    def exchange(self, mine: Any) -> dict[int, Any]:
        """{rank: a copy of what it brought}."""
        with self._changed:
            self._brought[acting.rank] = mine  # type: ignore[index]
            if len(self._brought) == len(self.ranks):
                found = {r: self._brought[r] for r in self.ranks}
                self._taken = {r: copy.deepcopy(found) for r in self.ranks}
                self._brought = {}
                self._changed.notify_all()
            self._changed.wait_for(lambda: acting.rank in self._taken or self._over)
            if acting.rank not in self._taken:
                raise _Stopped
            return self._taken.pop(acting.rank)

    def leave(self) -> None:
        """A rank is done: nobody can meet any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


class _Current(threading.local):
    meeting: _Meeting | None = None


_current = _Current()


def run_in_threads(ranks: Sequence[int], fn: Callable[[int], Any]) -> dict[int, Any]:
    """{rank: fn(rank)}, each in a thread that is that rank.

    Raises:
        Exception: what the first rank to fail raised; the others are stopped.
        CollectiveError: a rank is done while others wait for it.
    """
    meeting = _Meeting(ranks)
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        acting.rank, _current.meeting = rank, meeting
        try:
            results[rank] = fn(rank)
        except _Stopped:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            meeting.leave()

    threads = [threading.Thread(target=run, args=(r,), name=f"rank {r}") for r in meeting.ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if len(results) < len(meeting.ranks):
        raise CollectiveError(
            f"ranks {sorted(set(meeting.ranks) - results.keys())} wait for a collective that the "
            "other ranks do not call. All ranks must call the same collectives in the same order."
        )
    return results


# ---------------------------------------------------------------- object collectives
def _meeting(group: Any) -> _Meeting:
    meeting = _current.meeting
    if meeting is None or (group is not None and group.size() != len(meeting.ranks)):
        raise CollectiveError(
            "an object collective between threads of ranks was called for a part of the ranks. "
            "Use the default group."
        )
    return meeting


def _root(root: int | None, group_root: int | None, meeting: _Meeting) -> int:
    return meeting.ranks[group_root] if group_root is not None else root or 0


def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
    object_list[:] = _meeting(group).exchange(obj).values()


def gather_object(
    obj: Any,
    object_gather_list: list[Any] | None = None,
    dst: int | None = None,
    group: Any = None,
    group_dst: int | None = None,
) -> None:
    meeting = _meeting(group)
    found = meeting.exchange(obj)
    if acting.rank == _root(dst, group_dst, meeting) and object_gather_list is not None:
        object_gather_list[:] = found.values()


def broadcast_object_list(
    object_list: list[Any],
    src: int | None = None,
    group: Any = None,
    device: Any = None,
    group_src: int | None = None,
    weights_only: bool | None = None,
) -> None:
    meeting = _meeting(group)
    object_list[:] = meeting.exchange(object_list)[_root(src, group_src, meeting)]


def scatter_object_list(
    scatter_object_output_list: list[Any],
    scatter_object_input_list: list[Any] | None = None,
    src: int | None = None,
    group: Any = None,
    group_src: int | None = None,
) -> None:
    meeting = _meeting(group)
    sent = meeting.exchange(scatter_object_input_list)[_root(src, group_src, meeting)]
    scatter_object_output_list[0] = sent[meeting.ranks.index(dist.get_rank())]
