"""The far side of check/gloo.py: a fork server that imports torch once, and its gloo workers.

Runs in processes of its own, spoken to through sockets. Not multiprocessing's fork server: that
one runs the user's main script again in every worker.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import os
import pickle
import queue
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import typing_extensions

from ._gloo_target import Programs, Target

# A request to the fork server is one letter and a process id; an answer is one number.
REQUEST = struct.Struct("!cq")
ANSWER = struct.Struct("!q")
READY, FORK, WAIT = b"R", b"F", b"W"

_inside = False

# Imported before the first fork, so that the workers do not each pay for them.
_PRELOAD = ("torch.distributed.tensor", "localtensor_compile")


@dataclass(frozen=True)
class Run:
    """One program on one rank. `call` holds the encoded (args, kwargs)."""

    target: Target
    rank: int
    world_size: int
    store: str  # a path at which no file is yet
    port: int  # a free one
    environ: dict[str, str]
    path: list[str]
    directory: str
    call: bytes


# ---------------------------------------------------------------- values on the wire
class _Pickler(pickle.Pickler):
    """Tensors travel by value: no shared memory, no autograd history, no storage behind views."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        to_local = getattr(value, "to_local", None)
        if to_local is not None:  # a DTensor: its process group cannot leave this process
            value = to_local()
        wait = getattr(value, "wait", None)
        if wait is not None:  # an AsyncCollectiveTensor
            value = wait()
        if value.layout is not torch.strided or value.is_quantized:
            raise TypeError(f"{value.dtype} tensor of layout {value.layout}")
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        data = bytearray(plain.view(-1).view(torch.uint8).numpy())
        return _tensor_of, (data, value.dtype, tuple(value.shape))


def _tensor_of(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    # from_numpy is the one factory that a TorchFunctionMode of the caller does not see.
    return torch.from_numpy(np.frombuffer(data, np.uint8)).view(dtype).view(shape)


def encode(value: Any) -> bytes:
    """`value` as bytes; any exception of pickle's where it cannot be sent."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def decode(data: bytes) -> Any:
    return pickle.loads(data)


# ---------------------------------------------------------------- fork server
def serve(control_fd: int, out_fd: int, err_fd: int, preload: list[str]) -> None:
    """Fork a worker per request until the pool closes its end or dies; then kill all of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in (*_PRELOAD, *preload):
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=control_fd)
    parent = os.getppid()
    control.sendall(READY)
    workers: set[int] = set()
    try:
        # The time-out is for a pool's process that died while a child of it holds its sockets.
        while os.getppid() == parent:
            if not select.select([control], [], [], 2.0)[0]:
                continue
            request, fds, _, _ = socket.recv_fds(control, REQUEST.size, 2)
            if len(request) < REQUEST.size:
                return
            kind, pid = REQUEST.unpack(request)
            if kind == FORK:
                answer = os.fork()
                if answer == 0:
                    control.close()
                    _worker_process(fds[0], fds[1], out_fd, err_fd)
                workers.add(answer)
            else:
                answer = _exit_code(pid)
                workers.discard(pid)
            for fd in fds:
                os.close(fd)
            control.sendall(ANSWER.pack(answer))
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        for pid in workers:
            os.waitpid(pid, 0)


def _exit_code(pid: int) -> int:
    """Of a worker that has closed its channel; one that does not end within a second is killed."""
    for _ in range(100):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def inside() -> bool:
    """Whether this process is a gloo worker."""
    return _inside


def _worker_process(channel_fd: int, log_fd: int, out_fd: int, err_fd: int) -> NoReturn:
    global _inside
    _inside = True
    try:
        # What the program prints goes to the user's terminal; what C++ prints goes to the log,
        # and so do the streams that torch's loggers got hold of before.
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        sys.stdout = open(out_fd, "w", buffering=1, encoding="utf-8", errors="replace")
        sys.stderr = open(err_fd, "w", buffering=1, encoding="utf-8", errors="replace")
        warnings.showwarning = _log_warning
        faulthandler.enable(file=2, all_threads=False)
        _Worker(Connection(channel_fd)).serve()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(1)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    with open(2, "w", closefd=False) as log:
        log.write(warnings.formatwarning(message, category, filename, lineno, line))


# ---------------------------------------------------------------- worker
class _Worker:
    """Runs programs in the main thread. A second one listens, so that a hang can be asked about."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._main = threading.get_ident()
        self._programs = Programs()

    def serve(self) -> NoReturn:
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            run = self._inbox.get()
            self._send(*self._run(run))
            self._inbox.get()  # "release": no rank closes its connections before all have ended
            if dist.is_initialized():
                dist.destroy_process_group()
            self._send("idle", None)

    def _run(self, run: Run) -> tuple[str, Any]:
        try:
            self._enter(run)
            function = self._programs.function(run.target)
            # Not env://: TCPStore asks the name server who 127.0.0.1 is, on every connection.
            store = dist.FileStore(run.store, run.world_size)
            dist.init_process_group("gloo", store=store, rank=run.rank, world_size=run.world_size)
            args, kwargs = decode(run.call)
            result = function(*args, **kwargs)
            try:
                return "returned", encode(result)
            except Exception as error:
                raise TypeError(
                    f"{run.target} returned what cannot be sent to another process: {error}. "
                    "Return dense tensors, numbers, strings, and containers of them."
                ) from None
        except BaseException as error:
            return "raised", _traceback_text(error)

    def _enter(self, run: Run) -> None:
        """The state of a process that torchrun has just started."""
        for seed in (torch.seed, random.seed, np.random.seed):
            seed()  # of no fixed value: ranks that do not set a seed must not agree by chance
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        torch.set_num_threads(1)
        os.environ.clear()
        os.environ.update(
            run.environ,
            RANK=str(run.rank),
            LOCAL_RANK=str(run.rank),
            GROUP_RANK="0",
            WORLD_SIZE=str(run.world_size),
            LOCAL_WORLD_SIZE=str(run.world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(run.port),
        )
        os.chdir(run.directory)
        sys.path[:] = run.path
        sys.argv = [run.target.source]

    def _listen(self) -> None:
        while True:
            try:
                message = pickle.loads(self._channel.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # the pool is gone; the main thread may hang in a collective
            if message == "where":
                self._send("where", _where(self._main))
            else:
                self._inbox.put(message)

    def _send(self, kind: str, payload: Any) -> None:
        with self._sending, contextlib.suppress(BrokenPipeError):
            self._channel.send_bytes(pickle.dumps((kind, payload)))


# ---------------------------------------------------------------- what a rank says about itself
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = os.path.dirname(threading.__file__) + os.sep


def _traceback_text(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _where(thread: int) -> str:
    """`FILE:LINE in FUNCTION: SOURCE` of the innermost line of the user's that `thread` is in."""
    for frame in reversed(traceback.extract_stack(sys._current_frames()[thread])):
        file = frame.filename
        in_stdlib = file.startswith(_STDLIB) and "site-packages" not in file
        if not in_stdlib and not file.startswith((_HERE, _TORCH, typing_extensions.__file__, "<")):
            return f"{file}:{frame.lineno} in {frame.name}: {frame.line}"
    return "in no line of the program: starting up, or returned"
