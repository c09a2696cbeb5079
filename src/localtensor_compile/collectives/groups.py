"""All groups of ranks that one process group stands for.

A real rank names only the group that it belongs to; the other ranks name theirs in the same call.
The simulator sees one name and must find the other groups: `register_family` records them when
they are made (the fibres of a DeviceMesh dimension, dist.new_subgroups). A group that was made on
its own stands for itself, and ranks outside it do not take part.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from .._torch import group_ranks, resolve_group
from ..errors import CollectiveError
from ..values import tensor


@dataclass(frozen=True)
class Groups:
    """The groups of one collective over the shards of some ranks.

    Attributes:
        positions: indices into the tuple of shards, group after group, in group-rank order.
        size: ranks per group.
        ranks: the same groups as global ranks.
        family: whether the process group is one of several that ranks call at the same time.
    """

    positions: tuple[int, ...]
    size: int
    ranks: tuple[tuple[int, ...], ...]
    family: bool

    @functools.cached_property
    def members(self) -> set[int]:
        return {r for group in self.ranks for r in group}


class _Registry:
    """Families by group name, valid for one default process group."""

    def __init__(self) -> None:
        self.world: Any = None
        self.families: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.found: dict[tuple[str, tuple[int, ...]], Groups] = {}

    def refresh(self) -> None:
        world = dist.group.WORLD
        if world is not self.world:
            self.world = world
            self.families.clear()
            self.found.clear()


_registry = _Registry()


def register_family(group_name: str, groups: Iterable[Iterable[int]]) -> None:
    """Record that ranks call `group_name` together with these groups of ranks."""
    _registry.refresh()
    family = tuple(tuple(int(r) for r in group) for group in groups)
    _registry.families[group_name] = family
    _registry.found.clear()


def fingerprint(ranks: Sequence[int] = ()) -> str:
    """Text that tells apart worlds in which one group name stands for different groups.

    Part of the key of torch's compile caches: graphs name a group, compiled code holds its ranks.
    """
    _registry.refresh()
    if not dist.is_initialized():
        return f"ranks={list(ranks)}"
    made = {str(pg.group_name): sorted(ranks_) for pg, ranks_ in group_ranks().items()}
    families = sorted(_registry.families.items())
    return f"ranks={list(ranks)};groups={sorted(made.items())};families={families}"


def groups_of(group: Any, ranks: Sequence[int]) -> Groups:
    """The groups that `group` (a name, a ProcessGroup or a boxed one) stands for.

    Groups that are given stand for themselves.

    Args:
        ranks: the ranks that the operands have shards of, in order.

    Raises:
        CollectiveError: no such process group, or a group of which only some ranks have shards.
    """
    if isinstance(group, Groups):
        return group
    _registry.refresh()
    if not isinstance(group, str):
        name = resolve_group(group).group_name
    else:
        name = group
    key = (name, tuple(ranks))
    found = _registry.found.get(key)
    if found is None:
        found = _registry.found[key] = _find(name, group, ranks)
    return found


def mesh_groups(ranks: Sequence[int]) -> dict[str, frozenset[tuple[int, ...]]]:
    """The groups of each mesh dimension that has process groups of its own, by its name."""
    found: dict[str, frozenset[tuple[int, ...]]] = {}
    for process_group in group_ranks():
        if _made_by_mesh(process_group):
            name = str(process_group.group_desc).removeprefix("mesh_")
            found.setdefault(name, frozenset(groups_of(process_group, ranks).ranks))
    return found


def _find(name: str, group: Any, ranks: Sequence[int]) -> Groups:
    try:
        process_group = resolve_group(group)
        own = tuple(dist.get_process_group_ranks(process_group))
    except Exception as error:
        raise CollectiveError(
            f"the process group {name!r} is not part of the simulated world: {error}. Create "
            "groups and meshes inside LocalTensorMode, after the world exists."
        ) from error
    family = _registry.families.get(name)
    if family is None or own not in family:
        family = _grid(own, process_group) if _made_by_mesh(process_group) else (own,)
    position = {r: i for i, r in enumerate(ranks)}
    complete = []
    for one in family:
        missing = [r for r in one if r not in position]
        if not missing:
            complete.append(one)
        elif len(missing) < len(one) or one == own:
            raise CollectiveError(
                f"a collective on the group of ranks {list(one)} got a LocalTensor without shards "
                f"of ranks {missing}. On real processes the other ranks would wait for these "
                "forever: give every rank of the group a shard."
            )
    return Groups(
        positions=tuple(position[r] for one in complete for r in one),
        size=len(own),
        ranks=tuple(complete),
        family=len(family) > 1 or len(own) == dist.get_world_size(),
    )


def _made_by_mesh(process_group: Any) -> bool:
    """Whether a DeviceMesh made the group before anybody could record its family."""
    return str(getattr(process_group, "group_desc", "")).startswith("mesh_")


def _grid(own: tuple[int, ...], process_group: Any) -> tuple[tuple[int, ...], ...]:
    """The groups that tile the world with the shape of `own`: its regular grid.

    `own` must be a regular grid itself, {o + a*s1 + b*s2 ...} with each stride a multiple of the
    extent below it; the other groups are its translates that fill the world.
    """
    world = dist.get_world_size()
    if len(own) == world:
        return (own,)
    dims = _factor(own)
    if dims is None or world % len(own):
        raise CollectiveError(
            f"the group of ranks {list(own)} of a DeviceMesh is not a regular grid of a world of "
            f"{world} ranks, so that the groups of the other ranks cannot be told from it. Create "
            "the DeviceMesh inside LocalTensorMode, where its groups are recorded."
        )
    offsets = [sum(c) for c in _coordinates(dims)]
    seen: set[int] = set()
    groups = []
    for start in range(world):
        if start in seen:
            continue
        group = tuple(start + o for o in offsets)
        if any(r in seen or r >= world for r in group):
            raise CollectiveError(
                f"the group of ranks {list(own)} of a DeviceMesh does not tile a world of {world} "
                "ranks. Create the DeviceMesh inside LocalTensorMode, where its groups are "
                "recorded."
            )
        seen.update(group)
        groups.append(group)
    return tuple(groups)


def _factor(ranks: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """`ranks` as (extent, stride) pairs from the innermost dimension out, or None."""
    rest = [r - ranks[0] for r in ranks]
    dims: list[tuple[int, int]] = []
    while len(rest) > 1:
        stride = rest[1]
        if stride <= 0:
            return None
        extent = 1
        while extent < len(rest) and rest[extent] == extent * stride:
            extent += 1
        if len(rest) % extent:
            return None
        inner = rest[:extent]
        outer = rest[::extent]
        if [o + i for o in outer for i in inner] != rest:
            return None
        dims.append((extent, stride))
        rest = outer
    return dims


def _coordinates(dims: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    coordinates: list[tuple[int, ...]] = [()]
    for extent, stride in dims:
        coordinates = [(*c, i * stride) for i in range(extent) for c in coordinates]
    return coordinates


tensor.cache_key_context = fingerprint
