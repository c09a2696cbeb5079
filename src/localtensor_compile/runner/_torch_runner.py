"""The private torch names that a runner reads or replaces, in one place.

What is replaced, and for how long: `installed()` around a run. Each replacement does nothing new in
a thread that is no rank.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh
import torch.distributed.distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel

from .._torch import register_process_group
from ..collectives import plain
from ..errors import WorldError
from ..world.state import local_tensor_mode
from . import _torch_dynamo
from .scheduler import current_rank

BACKEND = "localtensor_runner"

NewGroup = Callable[[str, tuple[int, ...], int], Any]
"""(group name, global ranks; empty: all, size) -> the process group of the thread's rank."""

GroupObserver = Callable[[int, str, tuple[int, ...], str], None]
"""Called with (rank, name of the group, its ranks, its description)."""

_group_observers: list[GroupObserver] = []


@contextlib.contextmanager
def watching_groups(observer: GroupObserver) -> Iterator[None]:
    """Context manager: `observer` hears of every group that a rank makes, a member of it or not.

    The default group has no ranks.
    """
    _group_observers.append(observer)
    try:
        yield
    finally:
        _group_observers.remove(observer)


# ---------------------------------------------------------------- state of the process per rank
_TABLES = (
    "_pg_map", "_pg_names", "_pg_group_ranks", "_pg_backend_config", "_tags_to_pg", "_pg_to_tag",
)  # fmt: skip


def process_wide_names() -> list[tuple[Any, str, Callable[[], Any]]]:
    """(owner, attribute, what a new process has) of torch's state of which a process has one."""
    names: list[tuple[Any, str, Callable[[], Any]]] = [(c10d, name, dict) for name in _TABLES]
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
def installed(
    new_group: NewGroup, ranks: int, more: Iterable[tuple[Any, str, Any]] = ()
) -> Iterator[None]:
    """Context manager: process groups that rank threads make are made by `new_group`.

    `more`: (owner, name, replacement) of other names.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch_dynamo.isolated(ranks))
        stack.enter_context(_backend(new_group))
        isolate = torch._C._distributed_c10d._set_thread_isolation_mode
        isolate(True)  # names of groups mean another group in every thread
        stack.callback(isolate, False)
        for owner, name, replacement in (*_replacements(), *more):
            stack.callback(_put_back, owner, name, vars(owner).get(name, _MISSING))
            setattr(owner, name, replacement)
        yield


_MISSING = object()


def _put_back(owner: Any, name: str, before: Any) -> None:
    if before is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, before)


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
            held = getattr(backend, table)
            held.clear()
            (held.update if isinstance(held, dict) else held.extend)(content)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    yield c10d, "_new_process_group_helper", _group_helper(c10d._new_process_group_helper)
    mesh = device_mesh.DeviceMesh
    yield mesh, "__init__", _mesh_of_thread(mesh.__init__)
    for name in _MESH_METHODS:
        if name in vars(mesh):  # not all in every supported version
            yield mesh, name, _own_mesh_only(vars(mesh)[name])
    for name in (*plain.METHODS, *_MORE_METHODS):
        if hasattr(dist.ProcessGroup, name):
            method = _own_group_only(getattr(dist.ProcessGroup, name))
            yield dist.ProcessGroup, name, method
    yield from _torch_dynamo.replacements()


_MESH_METHODS = (
    "get_coordinate", "_sym_get_coordinate", "get_rank", "get_local_rank", "get_group",
)  # fmt: skip
_MORE_METHODS = ("allgather", "_allgather_base", "all_gather_single", "barrier")


def _own_mesh_only(original: Any) -> Any:
    """A mesh that was made outside knows the place of its process, not that of each rank."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        rank = current_rank()
        if rank is not None and self._thread_id is None and local_tensor_mode() is None:
            raise WorldError(
                f"a DeviceMesh that was made outside the ranks' threads was used by rank {rank}: "
                "it knows one place only. Make it inside the function that each rank runs."
            )
        return original(self, *args, **kwargs)

    return method


def _own_group_only(original: Any) -> Any:
    """A group that was made outside does not connect the ranks."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        rank = current_rank()
        if rank is not None and local_tensor_mode() is None:
            raise WorldError(
                f"a process group that was made outside the ranks' threads was used by rank {rank}"
                ", which it does not connect to the other ranks. Make it with dist.new_group "
                "inside the function that each rank runs."
            )
        return original(self, *args, **kwargs)

    return method


def _group_helper(original: Any) -> Any:
    @functools.wraps(original)
    def helper(
        size: Any, rank: Any, ranks: Any, backend: Any, store: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if current_rank() is None or backend == c10d.Backend.FAKE:
            return original(size, rank, ranks, backend, store, *args, **kwargs)
        name = args[0] if args else kwargs["group_name"]
        for observer in _group_observers:
            description = kwargs.get("group_desc") or ""
            observer(current_rank() or 0, str(name), tuple(ranks), description)
        if "nccl" in str(backend) and not ranks and current_rank() == 0:
            warnings.warn(
                "backend nccl between ranks in threads: its collectives are computed as gloo's, "
                "on the CPU, and sums are added up in gloo's order",
                stacklevel=5,
            )
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


def boxed_callback_work(wait: Callable[[Any], bool]) -> Any:
    """A boxed c10d Work whose wait(timeout) is `wait`."""
    from torch._C._distributed_c10d import PythonCallbackWork

    return dist.Work.boxed(PythonCallbackWork(wait))


# ---------------------------------------------------------------- groups that exist already
class ExistingGroups:
    """The process groups of the thread that makes this, for rank threads to have too."""

    def __init__(self) -> None:
        self.default = c10d._world.default_pg
        self._tables = {t: getattr(c10d, t) for t in _TABLES}
        self._groups = list(c10d._pg_map)
        self._count = c10d._group_count

    def share(self) -> None:
        """The calling thread has the same groups: for threads that are no rank."""
        for name, table in self._tables.items():
            copies = {k: [*v] if isinstance(v, list) else v for k, v in table.items()}
            setattr(c10d, name, copies)
        c10d._world._default_pg, c10d._group_count = self.default, self._count
        for group in self._groups:
            register_process_group(self._tables["_pg_names"][group], group)

    def mirror(self, rank: int, make: Callable[[str, tuple[int, ...]], Any]) -> None:
        """The calling thread's rank has a group `make(name, ranks)` for each of these."""
        c10d._group_count = max(c10d._group_count, self._count)  # new groups get new names
        ranks_of = self._tables["_pg_group_ranks"]
        for group in self._groups:
            if group is self.default:
                continue
            name = self._tables["_pg_names"][group]
            mine = make(name, tuple(ranks_of[group]))
            mine._set_group_desc(group.group_desc)
            tag = self._tables["_pg_to_tag"][group]
            # The original too, so that c10d's log can name it when its use is refused.
            c10d._pg_map[group] = self._tables["_pg_map"][group]
            c10d._pg_group_ranks[group] = ranks_of[group]
            c10d._pg_map[mine] = self._tables["_pg_map"][group]
            c10d._pg_names[mine] = name
            c10d._pg_group_ranks[mine] = ranks_of[group]
            c10d._pg_backend_config[mine] = self._tables["_pg_backend_config"][group]
            c10d._pg_to_tag[mine] = tag
            for t in {tag, ""}:
                c10d._tags_to_pg.setdefault(t, []).append(mine)
            register_process_group(name, mine)


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Context manager: no torch function mode and no dispatch mode of this thread has a say."""
    from torch.utils._python_dispatch import _disable_current_modes

    listen = (
        _disable_current_modes()
        if torch._C._len_torch_dispatch_stack()
        else contextlib.nullcontext()
    )
    with torch._C.DisableTorchFunction(), listen:
        yield
