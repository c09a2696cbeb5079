"""What is replaced while scripts run as ranks: calls that would hold up every rank, or that need a
process of their own. In threads that are no rank they do what they always did.
"""

from __future__ import annotations

import functools
import os
import pdb
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
import torch.distributed.rendezvous as rendezvous_module

from ..errors import WorldError
from .scheduler import current_rank, current_scheduler
from .store import RunnerStore

Replacement = tuple[Any, str, Any]


def for_all_runs() -> Iterator[Replacement]:
    """Ranks that poll let the others run."""
    sleep = time.sleep

    @functools.wraps(sleep)
    def sleep_and_give_way(seconds: float) -> None:
        if current_scheduler() is None or seconds < 0:
            sleep(seconds)
            return
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            sleep(min(left, 0.05))  # in pieces, so that the rank can be stopped
        scheduler = current_scheduler()
        if scheduler is not None:
            scheduler.give_way()

    yield time, "sleep", sleep_and_give_way


def for_scripts(store: RunnerStore) -> Iterator[Replacement]:
    """What a script under `localtensor run` calls as if it had a process."""
    yield c10d, "rendezvous", _rendezvous(c10d.rendezvous, store)
    for name in ("TCPStore", "FileStore"):
        shared = _shared_store(getattr(dist, name), store)
        for owner in (dist, c10d, rendezvous_module):
            if hasattr(owner, name):
                yield owner, name, shared
    yield signal, "signal", _signal(signal.signal)
    yield sys, "breakpointhook", _breakpoint(sys.breakpointhook)


def _rendezvous(original: Any, store: RunnerStore) -> Any:
    @functools.wraps(original)
    def rendezvous(url: str, rank: int = -1, world_size: int = -1, **options: Any) -> Any:
        if current_rank() is None:
            yield from original(url, rank, world_size, **options)
            return
        query = parse_qs(urlparse(url).query)
        if rank == -1:
            rank = int(query["rank"][0] if "rank" in query else _variable("RANK"))
        if world_size == -1:
            given = query["world_size"][0] if "world_size" in query else _variable("WORLD_SIZE")
            world_size = int(given)
        if rank != current_rank():
            raise WorldError(
                f"init_process_group was called as rank {rank} by the script that runs as rank "
                f"{current_rank()}. Use the RANK of the environment."
            )
        yield store.of_rank(), rank, world_size

    return rendezvous


def _variable(name: str) -> str:
    if name not in os.environ:
        raise ValueError(
            "Error initializing torch.distributed using env:// rendezvous: "
            f"environment variable {name} expected, but not set"
        )
    return os.environ[name]


def _shared_store(original: Any, store: RunnerStore) -> Any:
    """A store class whose objects of one address share their keys, as those of processes do."""
    stores: dict[str, RunnerStore] = {}

    @functools.wraps(original, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        if current_rank() is None:
            return original(*args, **kwargs)
        names = ("host_name", "port") if original.__name__ == "TCPStore" else ("file_name",)
        given = [kwargs.get(n, args[i] if i < len(args) else None) for i, n in enumerate(names)]
        address = f"{original.__name__} {given}"
        if address not in stores:
            stores[address] = RunnerStore.of(store.scheduler)
        made = stores[address].of_rank()
        timeout = kwargs.get("timeout")
        if isinstance(timeout, timedelta):
            made.set_timeout(timeout)
        return made

    return make


def _signal(original: Any) -> Any:
    """Python lets only the main thread of a process set handlers, which no rank's thread is."""
    handlers: dict[tuple[int, Any], Any] = {}

    @functools.wraps(original)
    def set_handler(number: Any, handler: Any) -> Any:
        rank = current_rank()
        if rank is None:
            return original(number, handler)
        before = handlers.get((rank, number), signal.getsignal(number))
        handlers[rank, number] = handler
        return before

    return set_handler


def _breakpoint(original: Callable[..., Any]) -> Any:
    def hook(*args: Any, **kwargs: Any) -> Any:
        scheduler = current_scheduler()
        if scheduler is None:
            return original(*args, **kwargs)
        scheduler.paused_clock = True
        if os.environ.get("PYTHONBREAKPOINT"):
            return original(*args, **kwargs)
        output = sys.__stdout__
        print(
            f"breakpoint of rank {current_rank()}: every rank stops here. "
            "lt.at(rank) looks at another one.",
            file=output,
            flush=True,
        )
        debugger = pdb.Pdb(stdout=output)
        debugger.set_trace(sys._getframe(1))
        return None

    return hook
