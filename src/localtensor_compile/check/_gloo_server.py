"""The processes behind a gloo pool, seen from the caller: starting, speaking to and ending them."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from ._gloo_target import GlooError
from ._gloo_worker import ANSWER, FORK, READY, REQUEST, WAIT

_START = (
    "import json, sys; path, *fds = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from localtensor_compile.check._gloo_worker import serve; serve(*fds)"
)


class Worker:
    """One worker process."""

    def __init__(self, server: Server, pid: int, channel: Connection, log: IO[bytes]) -> None:
        self._server = server
        self._pid: int | None = pid
        self.channel = channel
        self._log = log

    def send(self, message: object) -> None:
        """That a worker has died is seen when it is read from."""
        with contextlib.suppress(OSError):
            self.channel.send_bytes(pickle.dumps(message))

    def receive(self) -> tuple[str, Any]:
        """What the worker sent, or ("died", its exit code)."""
        try:
            kind, payload = pickle.loads(self.channel.recv_bytes())
            return kind, payload
        except (EOFError, OSError):
            return "died", self._exit_code()

    def clear_log(self) -> None:
        os.ftruncate(self._log.fileno(), 0)

    def log_tail(self, size: int = 4000) -> str:
        """The end of what the process wrote past Python: C++ logs, the stack of a crash."""
        start = max(0, os.fstat(self._log.fileno()).st_size - size)
        return os.pread(self._log.fileno(), size, start).decode(errors="replace").strip()

    def kill(self) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._exit_code()
        self._server.forget(self)
        self.close()

    def close(self) -> None:
        self.channel.close()
        self._log.close()

    def _exit_code(self) -> int | None:
        pid, self._pid = self._pid, None
        try:
            return None if pid is None else self._server.request(WAIT, pid)
        except OSError:  # the server is gone, and with it the exit code
            return None


class Server:
    """The process that forks the workers, in its own session: Ctrl-C reaches only the caller."""

    def __init__(self, timeout: float, preload: tuple[str, ...] = ()) -> None:
        if not hasattr(os, "fork"):
            raise GlooError("real gloo processes need an operating system that has fork.")
        self._owner = os.getpid()
        self._workers: set[Worker] = set()
        self._control, far = socket.socketpair()
        self._log = tempfile.TemporaryFile()
        outputs = [_duplicate(1), _duplicate(2)]
        fds = [far.fileno(), *outputs]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps([sys.path, *fds, preload])],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=fds,
            env=environ(),
            start_new_session=True,
        )
        far.close()
        for fd in outputs:
            os.close(fd)
        try:
            ready = select.select([self._control], [], [], timeout)[0]
            if not ready or self._control.recv(1) != READY:
                self._log.seek(0)
                text = self._log.read().decode(errors="replace").strip()
                why = "ended" if ready else f"was not ready after {timeout:g} s"
                raise GlooError(f"the process that starts the gloo workers {why}. {text}".rstrip())
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> Worker:
        near, far = Pipe()
        log = tempfile.TemporaryFile("a+b")
        with far:
            pid = self.request(FORK, 0, [far.fileno(), log.fileno()])
        worker = Worker(self, pid, near, log)
        self._workers.add(worker)
        return worker

    def forget(self, worker: Worker) -> None:
        self._workers.discard(worker)

    def request(self, kind: bytes, pid: int, fds: list[int] | None = None) -> int:
        """Raises OSError where the server is gone."""
        socket.send_fds(self._control, [REQUEST.pack(kind, pid)], fds or [])
        data = self._control.recv(ANSWER.size, socket.MSG_WAITALL)
        if len(data) < ANSWER.size:
            raise ConnectionResetError("the server has closed its connection")
        answer: int = ANSWER.unpack(data)[0]
        return answer

    def close(self) -> None:
        """The server kills and reaps its workers when its connection closes."""
        if os.getpid() != self._owner:  # a fork of the owner: the processes are not its own
            return
        self._control.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for worker in self._workers:
            worker.close()
        self._log.close()


def _duplicate(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError:  # closed
        return os.open(os.devnull, os.O_WRONLY)


def environ() -> dict[str, str]:
    """The caller's environment, with one thread per rank and gloo on the loopback interface."""
    result = dict(os.environ)
    result.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    # All ranks are on this machine. Without it gloo looks up the host's name, which can be slow.
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:
        result.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    return result
