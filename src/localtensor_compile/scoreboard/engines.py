"""Runs cases on plain tensors, on simulated ranks and on real gloo ranks, eager or compiled."""

from __future__ import annotations

import atexit
import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..check.gloo import GlooError, GlooPool
from ..values.ranked import per_rank_values
from ..world.mode import LocalTensorMode, replicate
from ..world.torch_hooks.dtensor import forget_sharding
from . import cases as running
from . import ops
from .cases import Case, Outcome

# Seconds for one case on real ranks, of which compiling takes most, and for the first start.
_PATIENCE = {None: 8.0, "aot_eager": 60.0, "inductor": 240.0}
_LOADING = 300.0
_SEED = 1
_BROKEN = re.compile(r"gloo/transport|Connection (reset|closed) by peer")
_ONLY = " (only on rank "
HANGS = "the ranks wait for each other: not all of them call the same collectives"


@dataclass
class Result:
    """What a case gave on one rank: plain values, or the text of an error.

    `forward` beside an error means that the backward failed.
    """

    forward: list[Any] | None = None
    backward: list[Any] | None = None
    error: str | None = None


Results = dict[int, Result]  # by rank


def plain(cases: Sequence[Case], backend: str | None = None, seed: int = _SEED) -> list[Result]:
    """The unsharded op. Compiled, the cases are compiled together, and one error is that of all."""
    found = _together(cases, None, backend, seed)
    return [Result(o.forward, o.backward, describe(o.error)) for o in found]


def simulated(
    cases: Sequence[Case], world_size: int, backend: str | None, *, grad: bool = True
) -> list[Results]:
    """On simulated ranks. Compiled, the cases are compiled together."""
    for case in cases:
        case.load()  # samples are cached, and torch's functions for them want no mode around them
    with LocalTensorMode(world_size):
        mesh = init_device_mesh("cpu", (world_size,))
        found = _together(cases, mesh, backend, _SEED, grad=grad, own=replicate)
        return [_per_rank(outcome, range(world_size)) for outcome in found]


def real(
    cases: Sequence[Case], world_size: int, backend: str | None, *, together: bool = False
) -> list[Results]:
    """On real gloo ranks; what each rank raises, or that they wait for each other, is a result.

    Args:
        together: try all cases in one go, which is fast unless a rank fails where others do not.
    """
    pool = _pool()
    patience = _PATIENCE.get(backend, _PATIENCE["inductor"])
    if together and len(cases) > 1:
        with contextlib.suppress(GlooError):
            limit = patience + 0.5 * len(cases)
            by_rank = pool.run(_on_real_rank, world_size, list(cases), None, timeout=limit)
            found = [{r: results[i] for r, results in by_rank.items()} for i in range(len(cases))]
            # A rank that raised alone has left the others in a collective, and what they
            # received since may belong to a later case.
            if all(len({r.error for r in case.values()}) == 1 for case in found):
                return found
    alone = []
    for case in cases:
        try:
            by_rank = pool.run(_on_real_rank, world_size, [case], backend, timeout=patience)
            alone.append({rank: results[0] for rank, results in by_rank.items()})
        except GlooError as error:
            late = HANGS if backend is None else f"not done in {patience:g} s"
            failed = Result(error=_gloo_text(error, world_size, late))
            alone.append(dict.fromkeys(range(world_size), failed))
    return alone


@functools.cache
def _pool() -> GlooPool:
    """Processes that know the op database before the first case."""
    pool = GlooPool(start_timeout=_LOADING, preload=(ops.DATABASE,))
    atexit.register(pool.close)
    return pool


def _on_real_rank(cases: list[Case], backend: str | None) -> list[Result]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    found = [_per_rank(o, [rank])[rank] for o in _together(cases, mesh, backend, _SEED)]
    if len(found) == 1 and found[0].error is not None:
        # The other ranks may wait for this one: they are not left to the end of all patience.
        raise RaisedOnRank(found[0].error)
    return found


class RaisedOnRank(Exception):
    """What `describe` makes of an error, on its way from a real rank."""


def _together(
    cases: Sequence[Case],
    mesh: Any,
    backend: str | None,
    seed: int,
    *,
    grad: bool = True,
    own: Callable[[Tensor], Tensor] = Tensor.clone,
) -> list[Outcome]:
    torch.manual_seed(seed)
    if backend is None:
        return running.run(cases, mesh, None, grad=grad, own=own)
    with _fresh_compiler() as counters:
        try:
            found = running.run(cases, mesh, backend, grad=grad, own=own)
        except Exception as error:
            return [Outcome(error=error) for _ in cases]
        if not counters["stats"]["unique_graphs"]:
            nothing = NothingCompiled("Dynamo captured no graph: the call runs no tensor op")
            return [Outcome(error=nothing) for _ in cases]
        return found


class NothingCompiled(Exception):
    """torch.compile ran the function, but there was nothing in it to compile."""


@contextlib.contextmanager
def _fresh_compiler() -> Iterator[Any]:
    """No compiled code from before, none left behind, and none from caches on the disk.

    What DTensor remembers of an eager run is forgotten: it can hide a failure of tracing.
    """
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    forget_sharding()
    counters.clear()
    try:
        # The caches' keys know neither this package's version nor its sources.
        with inductor.patch(force_disable_caches=True, compile_threads=1):
            yield counters
    finally:
        torch.compiler.reset()


def _per_rank(outcome: Outcome, ranks: Sequence[int]) -> Results:
    error = describe(outcome.error)
    return {
        rank: Result(_on_rank(outcome.forward, rank), _on_rank(outcome.backward, rank), error)
        for rank in ranks
    }


def _on_rank(values: list[Any] | None, rank: int) -> list[Any] | None:
    if values is None:
        return None
    found = []
    for value in values:
        shards = per_rank_values(value)
        shard = value if shards is None else shards[rank]
        found.append(shard.detach() if isinstance(shard, Tensor) else shard)
    return found


# ---------------------------------------------------------------- texts of errors
def describe(error: BaseException | None) -> str | None:
    """`Type: first line` of what went wrong at the bottom of a compiler's wrappers."""
    if error is None:
        return None
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, BaseException):
        return describe(inner)
    line = _first_line(str(error))
    if len(line) < 4 and error.__cause__ is not None:  # the text of a KeyError, passed on
        line = f"{line} (from {describe(error.__cause__)})"
    return f"{type(error).__name__}: {line}"


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Dynamo runs ops on fake tensors and puts the op's own error behind its description.
    behind = re.search(r"got (\w+\(.*)", text)
    line = behind.group(1) if behind and "fake tensors" in text else lines[0] if lines else ""
    return re.sub(r"0x[0-9a-f]+", "0x", line)[:240]


def is_divided(results: Results) -> bool:
    """Whether real ranks came to different ends, so that some waited for others."""
    return any(
        r.error is not None and (r.error == HANGS or _ONLY in r.error) for r in results.values()
    )


def _gloo_text(error: GlooError, world_size: int, late: str) -> str:
    texts: dict[str, list[int]] = {}
    for rank, raised in sorted(error.raised.items()):
        text = raised.strip().rpartition("\n")[2].partition(f"{RaisedOnRank.__name__}: ")[2]
        if _BROKEN.search(text):  # names ports, which are others each time
            text = "a collective broke off: the ranks call different ones, or with different sizes"
        texts.setdefault(text or raised.strip().rpartition("\n")[2], []).append(rank)
    if texts:
        alone = len(texts) > 1 or len(error.raised) < world_size
        return "; ".join(
            f"{text}{_ONLY}{', '.join(map(str, ranks))})" if alone else text
            for text, ranks in texts.items()
        )
    if error.exited:
        return "a rank died"
    return late
