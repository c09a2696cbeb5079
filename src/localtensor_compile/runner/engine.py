"""Ranks in threads, with a process group between them: what LocalRunnerMode and `run` stand on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..errors import WorldError
from . import _torch_runner, script_hooks
from .exchange import Exchange, Observer
from .process_group import RunnerGroup
from .process_state import Piece, ProcessState
from .scheduler import Scheduler, current_rank
from .store import RunnerStore

_lock = threading.Lock()
_engine: Engine | None = None


def current_engine() -> Engine | None:
    """The engine that runs in this process, or None."""
    return _engine


class Engine:
    """Runs `fn(rank)` of every rank in a thread of its own, one at a time.

    Args:
        ranks: how many, or the ranks of a world of max(ranks) + 1.
        seed: of the interleaving: who runs next at every call that may wait is drawn. None: ranks
            take turns.
        timeout: seconds that a rank may run without a call that lets others run.
        observers: each is given every `calls.Call` as it is launched.
        init_group: whether each rank's thread starts with a default process group, as after
            init_process_group("gloo").
        pieces: more state that each rank has its own of.
        stop_on_error: whether an error of one rank stops the others.
        script: whether the ranks are scripts, which call what belongs to a process.
    """

    def __init__(
        self,
        ranks: int | Collection[int],
        *,
        seed: int | None = None,
        timeout: float | None = None,
        observers: Sequence[Observer] = (),
        init_group: bool = True,
        pieces: Iterable[Piece] = (),
        stop_on_error: bool = True,
        script: bool = False,
    ) -> None:
        self.ranks = tuple(range(ranks)) if isinstance(ranks, int) else tuple(sorted(ranks))
        self.world_size = self.ranks[-1] + 1
        self.scheduler = Scheduler(
            self.ranks,
            seed=seed,
            timeout=timeout,
            on_switch=ProcessState(self.ranks, pieces),
            stop_on_error=stop_on_error,
        )
        self.exchange = Exchange(self.scheduler, observers)
        self.store = RunnerStore.of(self.scheduler)
        self._init_group, self._script = init_group, script
        self._existing: _torch_runner.ExistingGroups | None = None
        self._undo = contextlib.ExitStack()

    def run(self, fn: Callable[[int], Any]) -> dict[int, Any]:
        """{rank: fn(rank)}.

        Raises:
            BaseException: what the first rank to fail raised; the others are stopped.
            RunnerDeadlock: all ranks wait for each other.
            RunnerTimeout: a rank ran for too long.
            WorldError: another engine runs in this process.
        """
        self.install()
        try:
            self.start(fn)
            return self.join()
        finally:
            self.uninstall()

    def install(self) -> None:
        """Replace what has to be replaced in torch. Raises WorldError if another engine has."""
        global _engine
        with _lock:
            if _engine is not None:
                raise WorldError(
                    "ranks already run in threads of this process: only one LocalRunnerMode can "
                    "be active at a time. Leave it first."
                )
            _engine = self
        self._undo.callback(_forget)
        hooks = [*script_hooks.for_all_runs()]
        if self._script:
            hooks += script_hooks.for_scripts(self.store)
        installed = _torch_runner.installed(self._new_group, len(self.ranks), hooks)
        try:
            self._undo.enter_context(installed)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        self._undo.close()

    def start(self, fn: Callable[[int], Any]) -> None:
        """Start the ranks. `install` must have been called."""
        if dist.is_initialized():
            self._existing = _torch_runner.ExistingGroups()
        self.scheduler.start(lambda rank: self._on_rank(rank, fn))

    def join(self) -> dict[int, Any]:
        """Wait for the ranks. Returns and raises what `run` does."""
        return self.scheduler.join()

    def _on_rank(self, rank: int, fn: Callable[[int], Any]) -> Any:
        existing = self._existing
        if self._init_group:
            dist.init_process_group(
                "gloo", rank=rank, world_size=self.world_size, store=self.store.of_rank()
            )
            if existing is not None:
                existing.mirror(rank, lambda name, ranks: self._new_group(name, ranks, len(ranks)))
        elif existing is not None and not self._script:
            existing.share()
        try:
            # The autograd engine's threads are no ranks: backward runs in the rank's own.
            with torch.autograd.set_multithreading_enabled(False):
                return fn(rank)
        finally:
            if self._init_group and dist.is_initialized():
                dist.destroy_process_group()  # the names that this thread registered

    def _new_group(self, name: str, ranks: tuple[int, ...], size: int) -> RunnerGroup:
        rank = current_rank()
        ranks = ranks or tuple(range(self.world_size))
        if rank is None or len(ranks) != size:
            raise WorldError(
                f"init_process_group was called for {size} ranks, but {self.world_size} ranks run "
                "in threads of this process. Call it with their number, or leave it out."
            )
        return RunnerGroup(self.exchange, name, ranks, rank)


def _forget() -> None:
    global _engine
    _engine = None
