"""torch.distributed per rank: ranks, groups and their families, meshes, object collectives."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch._dynamo.trace_rules as trace_rules
import torch.distributed as dist
import torch.distributed.c10d_logger as c10d_logger
import torch.distributed.device_mesh as device_mesh
import torch.distributed.distributed_c10d as c10d

from ...collectives import objects
from ...collectives.groups import register_family
from ...compile.dynamo_support import rank_constant
from ...values.int_node import make_int
from .. import rank_threads, torch_hooks
from ..mesh import MeshMethods, per_rank_int, plain_mesh_args
from ..state import acting, enabled_local_tensor_mode

Replacement = tuple[Any, str, Any]
MISSING: Any = torch_hooks.MISSING


def init_simulated_process_group(world_size: int) -> None:
    """torch's fake backend: a group of the right size whose own collectives move no data."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


def replacements() -> Iterator[Replacement]:
    yield from _mesh()
    yield from _ranks()
    yield from _groups()
    yield from _objects()


def when_enabled(original: Any, replacement: Callable[..., Any]) -> Any:
    """`replacement(original, mode, *args)` while the thread's mode is enabled, else `original`."""

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        mode = enabled_local_tensor_mode()
        if mode is None:
            return original(*args, **kwargs)
        return replacement(original, mode, *args, **kwargs)

    return wrapper


def _when_acting(ours: Callable[..., Any], otherwise: Any) -> Any:
    """`ours(*args)` in a thread that is one rank, else `otherwise`."""

    @functools.wraps(otherwise)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return (otherwise if acting.rank is None else ours)(*args, **kwargs)

    return wrapper


# ---------------------------------------------------------------- meshes
_MESH_METHODS = (
    "get_coordinate",
    "_sym_get_coordinate",
    "_is_current_rank_part_of_mesh",
    "get_rank",
    "get_local_rank",
)


def _mesh() -> Iterator[Replacement]:
    mesh_class = device_mesh.DeviceMesh
    for name in _MESH_METHODS:
        original = mesh_class.__dict__.get(name)
        if original is None:  # not in every supported version
            continue
        ours = getattr(MeshMethods, name)

        def replacement(original: Any, mode: Any, *args: Any, _ours: Any = ours, **kw: Any) -> Any:
            return _ours(*args, **kw)

        yield mesh_class, name, _when_acting(ours, when_enabled(original, replacement))

    def init(original: Any, mode: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = plain_mesh_args(args, kwargs)
        with mode.disable():
            original(*args, **kwargs)

    yield mesh_class, "__init__", when_enabled(mesh_class.__init__, init)

    def all_submeshes(original: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
        with mode.disable():  # it asks whether its process is in each
            return original(*args, **kwargs)

    submeshes = mesh_class.__dict__.get("_get_all_submeshes")
    if submeshes is not None:
        yield mesh_class, "_get_all_submeshes", when_enabled(submeshes, all_submeshes)

    one_group = mesh_class.__dict__.get("_init_one_process_group")
    if one_group is not None:
        yield mesh_class, "_init_one_process_group", staticmethod(_recording(one_group.__func__))


# Every rank makes all groups of a mesh dimension and keeps the name of its own. The calls of
# new_group made meanwhile are the family of that name.
_recorders: list[list[list[int]]] = []


def _recording(original: Any) -> Any:
    @functools.wraps(original)
    def init_one_process_group(*args: Any, **kwargs: Any) -> Any:
        made: list[list[int]] = []
        _recorders.append(made)
        try:
            name = original(*args, **kwargs)
        finally:
            _recorders.pop()
        if name is not None and made:
            register_family(name, made)
        return name

    return init_one_process_group


# ---------------------------------------------------------------- ranks
# Parts of torch that ask for the rank of the *process*: to name log files, to build groups. Others
# (torch.distributed.nn, DTensor's experiments) compute with it and get the rank of each rank.
_ASKS_FOR_PROCESS = (
    "torch._",
    "torch.distributed._state_dict_utils",
    "torch.distributed.c10d_logger",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.distributed_c10d",
    "torch.distributed.elastic",
    "torch.distributed.logging_handlers",
    "torch.distributed.tensor.debug",
    "torch.profiler",
)
_TRANSPARENT_MODULES = (
    "localtensor_compile",
    "contextlib",
    "functools",
)
# Every function of torch.distributed is wrapped by its logger, which asks for ranks itself, too.
_LOGGER_FILE = c10d_logger.__file__
# Dynamo calling a ProcessGroup method for traced user code.
_ASKS_FOR_USER = "torch._dynamo.variables.script_object"


def _asked_by_torch(transparent: Collection[Any] = ()) -> bool:
    """Whether a part of torch that means its process called the function that calls this."""
    frame = sys._getframe(2)
    while frame is not None and (
        frame.f_code in transparent
        or (frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _LOGGER_FILE)
        or frame.f_globals.get("__name__", "").startswith(_TRANSPARENT_MODULES)
    ):
        frame = frame.f_back  # type: ignore[assignment]
    name = frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.startswith(_ASKS_FOR_PROCESS) and name != _ASKS_FOR_USER


def _ranks() -> Iterator[Replacement]:
    original = c10d.get_rank

    @functools.wraps(original)
    def get_rank(group: Any = None) -> Any:
        if simulated_ranks() is None:
            return original(group)
        if _pretended:
            return original(group)
        # In a traced frame the caller is traced code; a stack walk would see Dynamo instead.
        if not torch.compiler.is_dynamo_compiling() and _asked_by_torch():
            return original(group)
        if group is None:
            return rank_constant(simulated_ranks(), simulated_ranks())
        return rank_constant(*group_ranks(group))

    # Dynamo takes whatever distributed_c10d calls get_rank for a constant of the process, so the
    # name that users call must be another function object, which it then traces.
    yield c10d, "get_rank", functools.wraps(original)(lambda group=None: get_rank(group))
    yield dist, "get_rank", get_rank

    # Dynamo also knows the function by its name, as a constant of the process.
    for rules in trace_rules.torch_name_rule_map:
        if "torch.distributed.get_rank" in rules:
            yield rules, "torch.distributed.get_rank", MISSING

    # `from torch.distributed import get_rank` before the mode keeps the original, which asks the
    # group: to whom it answers is then its caller.
    transparent = {inspect.unwrap(original).__code__}
    own_rank = dist.ProcessGroup.rank

    @functools.wraps(own_rank)
    def rank(self: Any) -> Any:
        if acting.rank is not None:
            return dist.get_group_rank(self, acting.rank) if self.size() > 1 else 0
        mode = enabled_local_tensor_mode()
        if mode is None or _pretended:
            return _pretended[-1] if _pretended else own_rank(self)
        if _asked_by_torch(transparent):
            return own_rank(self)
        ranks, values = group_ranks(self)
        return per_rank_int(dict(zip(ranks, values)))

    yield dist.ProcessGroup, "rank", rank

    from torch._dynamo.variables import distributed as dynamo_distributed
    from torch._dynamo.variables.builder import SourcelessBuilder

    variable = getattr(dynamo_distributed, "ProcessGroupVariable", None)
    if variable is None:  # newer torch calls the replaced method above
        return
    call_method = variable.call_method

    @functools.wraps(call_method)
    def traced_call(self: Any, tx: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rank" and enabled_local_tensor_mode() is not None:
            ranks, values = group_ranks(self.as_python_constant())
            return SourcelessBuilder.create(tx, make_int(dict(zip(ranks, values))))
        return call_method(self, tx, name, *args, **kwargs)

    yield variable, "call_method", traced_call


# While a group is made, or a rooted collective checks its arguments: the rank to act as.
_pretended: list[int] = []


@contextlib.contextmanager
def pretend_rank(rank: int) -> Iterator[None]:
    _pretended.append(rank)
    try:
        yield
    finally:
        _pretended.pop()


@torch._dynamo.assume_constant_result
def simulated_ranks() -> Any:
    mode = enabled_local_tensor_mode()
    return None if mode is None else mode._sorted_ranks


@torch._dynamo.assume_constant_result
def group_ranks(group: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The mode's ranks and the rank of each in its group; -1 outside, as dist.get_rank says."""
    from ...collectives.groups import groups_of

    mode = enabled_local_tensor_mode()
    ranks = mode._sorted_ranks  # type: ignore[union-attr]
    where = {r: g.index(r) for g in groups_of(group, ranks).ranks for r in g}
    return ranks, tuple(where.get(r, -1) for r in ranks)


# ---------------------------------------------------------------- groups
def _groups() -> Iterator[Replacement]:
    original = c10d.new_group

    @functools.wraps(original)
    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and _recorders:  # also while DeviceMesh.__init__ disables the mode
            ranks = [int(r) for r in ranks]
            _recorders[-1].append(sorted(ranks))
            return original(ranks, *args, **kwargs)
        mode = enabled_local_tensor_mode()
        if mode is None or ranks is None:
            return original(ranks, *args, **kwargs)
        ranks = [int(r) for r in ranks]
        # The simulated process holds every rank: a group without rank 0 exists as well.
        with pretend_rank(min(ranks)) if ranks else contextlib.nullcontext():
            return original(ranks, *args, **kwargs)

    yield c10d, "new_group", new_group
    yield dist, "new_group", new_group
    yield device_mesh, "new_group", new_group

    def subgroups(original: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
        made: list[list[int]] = []
        _recorders.append(made)
        try:
            own, groups = original(*args, **kwargs)
        finally:
            _recorders.pop()
        if own is not None:
            register_family(own.group_name, made)
        return own, groups

    by_enumeration = when_enabled(c10d.new_subgroups_by_enumeration, subgroups)
    yield c10d, "new_subgroups_by_enumeration", by_enumeration
    yield dist, "new_subgroups_by_enumeration", by_enumeration
    # new_subgroups calls the function above through its module.


# ---------------------------------------------------------------- object collectives
def _objects() -> Iterator[Replacement]:
    for name in (
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
    ):
        ours = getattr(objects, name)

        def replacement(original: Any, mode: Any, *args: Any, _ours: Any = ours, **kw: Any) -> Any:
            return _ours(mode._sorted_ranks, *args, **kw)

        wrapped = when_enabled(getattr(c10d, name), replacement)
        wrapped = _when_acting(getattr(rank_threads, name), wrapped)
        yield c10d, name, wrapped
        yield dist, name, wrapped
