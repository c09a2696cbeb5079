"""The private torch names that a runner reads or replaces, in one place.

What is replaced, and for how long: `installed()` around a run. Each replacement does nothing new in
a thread that is no rank.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh
import torch.distributed.distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel

from . import _torch_dynamo
from .scheduler import current_rank

BACKEND = "localtensor_runner"

NewGroup = Callable[[str, tuple[int, ...], int], Any]
"""(group name, global ranks; empty: all, size) -> the process group of the thread's rank."""

MakesGroup = Callable[[str, tuple[int, ...], str], None]
"""(group name, global ranks; empty: all, description): the thread's rank makes a group."""


# ---------------------------------------------------------------- state of the process per rank
def process_wide_names() -> list[tuple[Any, str, Callable[[], Any]]]:
    """(owner, attribute, what a new process has) of torch's state of which a process has one."""
    names: list[tuple[Any, str, Callable[[], Any]]] = [
        (c10d, name, dict)
        for name in (
            "_pg_map",
            "_pg_names",
            "_pg_group_ranks",
            "_pg_backend_config",
            "_tags_to_pg",
            "_pg_to_tag",
        )
    ]
    names += [
        (c10d, "_group_count", int),
        (c10d, "_backend", lambda: c10d.Backend.UNDEFINED),
        (c10d, "_default_pg_init_method", lambda: None),
        (c10d._world, "_default_pg", lambda: None),
        (c10d._world, "_pg_coalesce_state", dict),
        (c10d._world, "_comms", list),
        (DistributedDataParallel, "_active_ddp_module", lambda: None),
    ]
    names += _torch_dynamo.process_wide_names()
    return [n for n in names if hasattr(n[0], n[1])]


def generators() -> list[torch.Generator]:
    """torch's default generators that a process has: the CPU's, and those of devices in use."""
    found = [torch.default_generator]
    if torch.cuda.is_initialized():  # pragma: no cover - needs a GPU
        found += list(torch.cuda.default_generators)
    return found


# ---------------------------------------------------------------- replaced while ranks run
@contextlib.contextmanager
def installed(new_group: NewGroup, ranks: int, makes_group: MakesGroup) -> Iterator[None]:
    """Context manager: process groups that rank threads make are made by `new_group`.

    `makes_group` is called before, also by ranks that are no members.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch_dynamo.isolated(ranks))
        stack.enter_context(_backend(new_group))
        isolate = torch._C._distributed_c10d._set_thread_isolation_mode
        isolate(True)  # names of groups mean another group in every thread
        stack.callback(isolate, False)
        for owner, name, replacement in _replacements(makes_group):
            stack.callback(setattr, owner, name, owner.__dict__[name])
            setattr(owner, name, replacement)
        yield


@contextlib.contextmanager
def _backend(new_group: NewGroup) -> Iterator[None]:
    """Our backend's name is known to c10d, which makes groups of it by `new_group`."""
    backend: Any = dist.Backend
    tables = ("backend_list", "backend_type_map", "backend_capability", "_plugins")
    before = {t: getattr(backend, t).copy() for t in tables}

    def create(options: Any, _: Any) -> Any:
        ranks = tuple(options.global_ranks_in_group)
        return new_group(options.group_id, ranks, options.group_size)

    backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
    try:
        yield
    finally:
        delattr(backend, BACKEND.upper())
        for table, content in before.items():
            setattr(backend, table, content)


def _replacements(makes_group: MakesGroup) -> Iterator[tuple[Any, str, Any]]:
    helper = _group_helper(c10d._new_process_group_helper, makes_group)
    yield c10d, "_new_process_group_helper", helper
    mesh = device_mesh.DeviceMesh
    yield mesh, "__init__", _mesh_of_thread(mesh.__init__)
    yield from _torch_dynamo.replacements()


def _group_helper(original: Any, makes_group: MakesGroup) -> Any:
    @functools.wraps(original)
    def helper(
        size: Any, rank: Any, ranks: Any, backend: Any, store: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if current_rank() is None or backend == c10d.Backend.FAKE:
            return original(size, rank, ranks, backend, store, *args, **kwargs)
        name = args[0] if args else kwargs["group_name"]
        makes_group(str(name), tuple(ranks), kwargs.get("group_desc") or "")
        kwargs.pop("backend_options", None)
        kwargs.pop("device_id", None)
        group, prefix = original(size, rank, ranks, BACKEND, store, *args, **kwargs)
        if isinstance(group, dist.ProcessGroup):  # else this rank is no member
            c10d._world.pg_map[group] = (backend, prefix)
            c10d._world.pg_backend_config[group] = str(c10d.BackendConfig(backend))
        return group, prefix

    return helper


def _mesh_of_thread(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if current_rank() is not None:
            # As torch does for its own threads: meshes of two ranks are not equal, so that caches
            # of one rank do not answer another.
            self._thread_id = threading.get_ident()
            self._hash = None

    return init
