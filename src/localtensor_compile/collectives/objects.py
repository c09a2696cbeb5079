"""Object collectives: Python objects instead of tensors.

One Python object stands for all ranks, unless it holds LocalTensors or per-rank numbers. So a
received object is what each rank would see of the sender's, combined again.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..errors import CollectiveError
from ..values.ranked import combine, pick_tree, ranks_of
from .groups import Groups, groups_of


def _groups(group: Any, world_ranks: tuple[int, ...]) -> Groups:
    return groups_of(dist.group.WORLD if group is None else group, world_ranks)


def _received(
    obj: Any, groups: Groups, ranks: tuple[int, ...], sender: Callable[[Any], int]
) -> Any:
    """What every rank holds after `obj` of `sender(its group)` arrives."""
    if ranks_of(obj) is None:
        return copy.deepcopy(obj)
    group_of = {r: g for g in groups.ranks for r in g}
    outside = [r for r in ranks if r not in group_of]
    if outside:
        raise CollectiveError(
            f"an object with per-rank values is sent inside the group {list(groups.ranks[0])}, but "
            f"ranks {outside} are not in it and would keep something else. Send plain objects, or "
            "use groups that cover every rank (dist.new_subgroups or a DeviceMesh)."
        )
    seen = {r: copy.deepcopy(pick_tree(obj, sender(group_of[r]))) for r in ranks}
    return combine(seen, "an object collective")


def _root(root: int | None, group_root: int | None, groups: Groups) -> int:
    """The root as a group rank, from a global rank or a group rank."""
    if group_root is not None:
        return group_root
    root = 0 if root is None else root
    for group in groups.ranks:
        if root in group:
            return group.index(root)
    raise CollectiveError(
        f"rank {root} is the root of an object collective on the group "
        f"{list(groups.ranks[0])}, but is not part of it."
    )


def all_gather_object(
    ranks: tuple[int, ...], object_list: list[Any], obj: Any, group: Any = None
) -> None:
    groups = _groups(group, ranks)
    if len(object_list) != groups.size:
        raise CollectiveError(
            f"all_gather_object got a list of {len(object_list)} for a group of {groups.size} "
            "ranks. Give it one entry per rank of the group."
        )
    for k in range(groups.size):
        object_list[k] = _received(obj, groups, ranks, operator.itemgetter(k))


def gather_object(
    ranks: tuple[int, ...],
    obj: Any,
    object_gather_list: list[Any] | None = None,
    dst: int | None = None,
    group: Any = None,
    group_dst: int | None = None,
) -> None:
    groups = _groups(group, ranks)
    _root(dst, group_dst, groups)
    if object_gather_list is None:
        raise CollectiveError(
            "gather_object got no object_gather_list. In a simulated world the destination is "
            "one of the ranks, so pass the list on every rank."
        )
    all_gather_object(ranks, object_gather_list, obj, group)


def broadcast_object_list(
    ranks: tuple[int, ...],
    object_list: list[Any],
    src: int | None = None,
    group: Any = None,
    device: Any = None,
    group_src: int | None = None,
    weights_only: bool | None = None,
) -> None:
    groups = _groups(group, ranks)
    root = _root(src, group_src, groups)
    root_of = operator.itemgetter(root)
    object_list[:] = [_received(o, groups, ranks, root_of) for o in object_list]


def scatter_object_list(
    ranks: tuple[int, ...],
    scatter_object_output_list: list[Any],
    scatter_object_input_list: list[Any] | None = None,
    src: int | None = None,
    group: Any = None,
    group_src: int | None = None,
) -> None:
    groups = _groups(group, ranks)
    root = _root(src, group_src, groups)
    if not scatter_object_input_list or len(scatter_object_input_list) != groups.size:
        raise CollectiveError(
            "scatter_object_list needs one input object per rank of the group "
            f"({groups.size}), but got {len(scatter_object_input_list or [])}. In a simulated "
            "world the source is one of the ranks, so pass the list on every rank."
        )
    mine = {
        r: copy.deepcopy(pick_tree(scatter_object_input_list[k], group[root]))
        for group in groups.ranks
        for k, r in enumerate(group)
    }
    if set(mine) != set(ranks):
        raise CollectiveError(
            f"scatter_object_list on the group {list(groups.ranks[0])} leaves other ranks without "
            "an object. Use groups that cover every rank."
        )
    scatter_object_output_list[0] = combine(dict(sorted(mine.items())), "scatter_object_list")
