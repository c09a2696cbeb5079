"""Real gloo processes: a pool of workers, started once, that run a program on W ranks.

What a program returns is not looked at here; comparing it is the business of other modules.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from ._gloo_server import Server, Worker, environ
from ._gloo_target import GlooError as GlooError
from ._gloo_target import Target, target_of
from ._gloo_worker import Run, decode, encode, inside

# Once a rank has failed, how long the others may take to fail by themselves, in seconds.
_GRACE = 0.5
# For a worker to say where it waits, or to destroy its process group, in seconds.
_PATIENCE = 5.0

Progress = Callable[[str], None]


class GlooPool:
    """Worker processes that run one program after the other, each on any number of ranks.

    Every program finds default dtype, environment and directory as in a process that has just been
    started, random generators without a fixed seed, and one thread. What it prints goes to the
    terminal; what C++ and the warnings module print is kept back, and shown only where a worker
    dies.

    Args:
        size: workers to start now. `run` starts what it needs beyond them.
        start_timeout: seconds for the first start, which imports torch once for all workers.
        preload: modules to import then, besides torch and this package.
    """

    def __init__(
        self,
        size: int = 0,
        *,
        start_timeout: float = 120.0,
        preload: tuple[str, ...] = (),
    ) -> None:
        self._start_timeout, self._preload = start_timeout, preload
        self._lock = threading.Lock()
        self._server: Server | None = None
        self._workers: list[Worker | None] = []
        self._closed = False
        if size:
            with self._lock:
                self._members(size, None)

    def run(
        self,
        function: str | Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 300.0,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> dict[int, Any]:
        """Call function(*args, **kwargs) on each of `world_size` processes, joined by gloo.

        RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as torchrun sets them, and
        the default process group is there when the function is called.

        Args:
            function: "FILE.py:NAME", "MODULE:NAME" or a function at the top level of a module. A
                file is imported once per worker, and again after it has changed.
            args, kwargs: each rank gets a copy.
            timeout: seconds for the whole program.
            progress: called with a line of text when something has happened.

        Returns:
            {rank: return value}. Tensors come back dense, contiguous, on the CPU and without
            autograd history; of a DTensor the local shard.

        Raises:
            GlooError: a rank raised or died, or time is up. The pool can be used again after it.
        """
        target = target_of(function)
        if world_size < 1:
            raise GlooError(f"world_size is {world_size}, but a program needs at least one rank.")
        try:
            call = encode((args, kwargs))
        except Exception as error:
            raise GlooError(
                f"the arguments of {target} cannot be sent to another process: {error}. Pass "
                "dense tensors, numbers, strings, and containers of them."
            ) from error
        with self._lock:
            try:
                program = self._run(target, world_size, call, timeout, progress)
            except GlooError:
                raise
            except BaseException:  # Ctrl-C too: nobody knows what the processes do now
                self._stop()
                raise
        return {rank: _decoded(target, rank, program.returned[rank]) for rank in range(world_size)}

    def _run(
        self,
        target: Target,
        world_size: int,
        call: bytes,
        timeout: float,
        progress: Progress | None,
    ) -> _Running:
        program = _Running(target, self._members(world_size, progress), progress)
        with tempfile.TemporaryDirectory() as directory:
            program.start(call, os.path.join(directory, "store"))
            program.wait_for_end(timeout)
            error = program.error(timeout) if program.failed else None
            self._discard(program.release())
        if error is not None:
            raise error
        return program

    def close(self) -> None:
        """End all workers. A closed pool cannot be used again."""
        with self._lock:
            self._closed = True
            self._stop()

    def __enter__(self) -> GlooPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server, self._workers = None, []

    def _members(self, world_size: int, progress: Progress | None) -> list[Worker]:
        """Workers 0 to world_size - 1; those that are missing or have died are started."""
        if self._closed:
            raise GlooError("this GlooPool is closed. Make a new one, or use shared_pool().")
        if inside():
            raise GlooError(
                "a program on real gloo processes starts more of them. If its file does so when "
                'it is imported, put that under `if __name__ == "__main__":`.'
            )
        if self._server is not None and not self._server.alive:
            self._stop()
        self._workers += [None] * (world_size - len(self._workers))
        # An idle worker is silent: one that can be read from has died.
        self._discard([w for w in self._workers if w is not None and w.channel.poll()])
        missing = [i for i in range(world_size) if self._workers[i] is None]
        if missing:
            if progress is not None:
                progress(f"starting {len(missing)} gloo processes")
            if self._server is None:
                self._server = Server(self._start_timeout, self._preload)
                weakref.finalize(self, Server.close, self._server)
            for i in missing:
                self._workers[i] = self._server.fork()
        return [w for w in self._workers[:world_size] if w is not None]

    def _discard(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            worker.kill()
            self._workers[self._workers.index(worker)] = None


_shared: tuple[int, GlooPool] | None = None
_sharing = threading.Lock()


def shared_pool() -> GlooPool:
    """The pool of this process: made on first use, closed at exit."""
    global _shared
    with _sharing:
        if _shared is None or _shared[0] != os.getpid() or _shared[1]._closed:
            _shared = os.getpid(), GlooPool()
        return _shared[1]


# ---------------------------------------------------------------- one run
@dataclass
class _Running:
    """A program on its way through the workers."""

    target: Target
    members: list[Worker]
    progress: Progress | None
    returned: dict[int, bytes] = field(default_factory=dict)
    raised: dict[int, str] = field(default_factory=dict)
    exited: dict[int, int | None] = field(default_factory=dict)
    waiting: dict[int, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return len(self.returned) < len(self.members)

    def _unfinished(self) -> dict[Connection, int]:
        ended = {**self.returned, **self.raised, **self.exited}
        return {w.channel: r for r, w in enumerate(self.members) if r not in ended}

    def start(self, call: bytes, store: str) -> None:
        path = list(sys.path)
        if not self.target.is_module:
            path.insert(0, os.path.dirname(self.target.source))  # as `python FILE` does
        run = Run(
            target=self.target,
            rank=0,
            world_size=len(self.members),
            store=store,
            port=_free_port(),
            environ=environ(),
            path=path,
            directory=os.getcwd(),
            call=call,
        )
        for rank, worker in enumerate(self.members):
            worker.clear_log()
            worker.send(replace(run, rank=rank))

    def wait_for_end(self, timeout: float) -> None:
        """Until all ranks have ended, time is up, or some have failed and the others hang."""
        deadline = limit = time.monotonic() + timeout
        while unfinished := self._unfinished():
            ready = wait(list(unfinished), max(0.0, limit - time.monotonic()))
            if not ready:
                return
            for channel in ready:
                self._hear(unfinished[channel])  # type: ignore[index]
            if self.raised or self.exited:
                limit = min(deadline, time.monotonic() + _GRACE)

    def _hear(self, rank: int) -> None:
        kind, payload = self.members[rank].receive()
        if kind == "where":
            self.waiting[rank] = payload
        else:
            if kind == "returned":
                self.returned[rank] = payload
            elif kind == "raised":
                self.raised[rank] = payload
            else:
                self.exited[rank] = payload
            self.waiting.pop(rank, None)
            if self.progress is not None:
                ended = len(self.members) - len(self._unfinished())
                self.progress(f"rank {rank} {kind} ({ended} of {len(self.members)})")

    def _ask_where(self) -> None:
        for rank in self._unfinished().values():
            self.members[rank].send("where")
        limit = time.monotonic() + _PATIENCE
        while asked := {c: r for c, r in self._unfinished().items() if r not in self.waiting}:
            ready = wait(list(asked), max(0.0, limit - time.monotonic()))
            if not ready:
                for rank in asked.values():
                    self.waiting[rank] = "in native code that does not let Python answer"
            for channel in ready:
                self._hear(asked[channel])  # type: ignore[index]

    def release(self) -> list[Worker]:
        """Let the ranks that ended destroy their process groups. Returns the workers to give up."""
        ended = {**self.returned, **self.raised}
        busy = {self.members[r].channel: self.members[r] for r in ended}
        for worker in busy.values():
            worker.send("release")
        lost = [w for r, w in enumerate(self.members) if r not in ended]
        limit = time.monotonic() + _PATIENCE
        while busy and (ready := wait(list(busy), max(0.0, limit - time.monotonic()))):
            for channel in ready:
                kind, _ = busy[channel].receive()  # type: ignore[index]
                if kind == "died":
                    lost.append(busy[channel])  # type: ignore[index]
                if kind in ("died", "idle"):
                    del busy[channel]  # type: ignore[arg-type]
        return lost + list(busy.values())

    def error(self, timeout: float) -> GlooError:
        self._ask_where()
        parts = []
        for rank, code in sorted(self.exited.items()):
            wrote = self.members[rank].log_tail()
            parts.append(
                f"rank {rank} of {len(self.members)} died while running {self.target}: "
                f"{_exit_text(code)}." + (f" Its process wrote:\n{wrote}" if wrote else "")
            )
        for text, ranks in _folded(self.raised).items():
            if self.exited:  # most likely only the connection to the dead rank
                text = text.rpartition("\n")[2]
            parts.append(f"{_ranks(ranks)} raised while running {self.target}:\n{text}")
        if not parts:
            parts.append(f"{self.target} did not end within {timeout:g} s on real gloo processes.")
        for text, ranks in _folded(self.waiting).items():
            parts.append(f"{_ranks(ranks)} had not finished: {text}")
        if self.returned:
            parts.append(f"{_ranks(self.returned)} had finished.")
        if self.waiting:
            parts.append(
                "A collective waits until every rank of its group calls it: all ranks must call "
                "the same collectives in the same order."
                + ("" if self.raised or self.exited else " If it is only slow, give it more time.")
            )
        return GlooError(
            "\n".join(parts), raised=self.raised, exited=self.exited, waiting=self.waiting
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _folded(texts: dict[int, str]) -> dict[str, list[int]]:
    """The ranks of each text."""
    result: dict[str, list[int]] = {}
    for rank in sorted(texts):
        result.setdefault(texts[rank], []).append(rank)
    return result


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _exit_text(code: int | None) -> str:
    if code is None:
        return "exit code unknown"
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _decoded(target: Target, rank: int, data: bytes) -> Any:
    try:
        return decode(data)
    except Exception as error:
        raise GlooError(
            f"what {target} returned on rank {rank} cannot be read in this process: {error}. "
            "Return dense tensors, numbers, strings, and containers of them."
        ) from error
