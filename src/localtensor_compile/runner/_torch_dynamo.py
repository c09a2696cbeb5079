"""Dynamo with a rank per thread: the private names of torch._dynamo that a runner needs.

Dynamo takes what cannot change in a process (dist.get_rank(), a mesh's coordinates) for constants
and keeps compiled code with the code object, which the ranks share. So code that a rank compiled is
guarded by that rank, recompilations are counted per rank, and a run neither sees what was compiled
before it nor leaves anything behind, as if its ranks were processes that start and end.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config as config
from torch._dynamo import cache_size, convert_frame, guards, output_graph, pgo
from torch._dynamo.source import GlobalStateSource

from .scheduler import current_rank

_Rank = Callable[[], int | None]


@contextlib.contextmanager
def isolated(ranks: int) -> Iterator[None]:
    """Context manager: compiled code belongs to the rank that compiled it."""
    _forget_compiled()
    limit = config.accumulated_recompile_limit * ranks
    try:
        with config.patch(accumulated_recompile_limit=limit):
            yield
    finally:
        _forget_compiled()


def _forget_compiled() -> None:
    if convert_frame.input_codes.seen:
        torch._dynamo.reset()


def process_wide_names() -> list[tuple[Any, str, Callable[[], Any]]]:
    """(owner, attribute, a new process has) of what Dynamo learned of the shapes it met."""
    names = [(pgo, "_CODE_STATE", _nothing), (pgo, "_INIT_CODE_STATE", _nothing)]
    return [n for n in names if hasattr(n[0], n[1])]


def _nothing() -> None:
    return None


def replacements() -> Iterator[tuple[Any, str, Any]]:
    graph = output_graph.OutputGraph
    yield graph, "init_ambient_guards", _with_rank_guard(graph.init_ambient_guards)
    yield (
        cache_size,
        "_has_same_id_matched_objs",
        _of_this_rank(cache_size._has_same_id_matched_objs),
    )


def _with_rank_guard(original: Any) -> Any:
    @functools.wraps(original)
    def init_ambient_guards(self: Any) -> None:
        original(self)
        if current_rank() is not None:
            self.guards.add(GlobalStateSource().make_guard(RANK))

    return init_ambient_guards


def RANK(builder: guards.GuardBuilder, guard: Any) -> None:
    """The guard: this compiled code runs on the rank that it was compiled on, only."""
    rank = current_rank()
    builder.guard_manager.localtensor_rank = rank
    builder.add_python_lambda_leaf_guard_to_root(
        [f"___localtensor_rank() == {rank}"],
        [f"compiled by rank {rank} of a runner"],
        closure_vars={"___localtensor_rank": current_rank},
        is_epilogue=False,
    )


def _of_this_rank(original: Any) -> Any:
    @functools.wraps(original)
    def has_same(frame: Any, entry: Any) -> bool:
        rank = getattr(entry.guard_manager, "localtensor_rank", None) if entry else None
        return rank == current_rank() and original(frame, entry)

    return has_same


def compiling_in_this_thread() -> bool:
    """Whether Dynamo is compiling in this thread, with its lock held."""
    return convert_frame.compile_lock._is_owned()


def untraced(*names: str) -> Any:
    """Class decorator: Dynamo traces neither these methods nor what they call, whoever calls them.

    For what C++ calls: Dynamo would otherwise start a graph there.
    """

    def decorate(cls: Any) -> Any:
        for name in names:
            setattr(cls, name, torch._disable_dynamo(vars(cls)[name]))
        return cls

    return decorate
