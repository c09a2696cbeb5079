"""Process groups of exported programs of single ranks, which are named by their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
import torch.fx as fx

from .._torch import process_group_named, register_process_group
from ..compile.extract import group_name, group_ranks, is_group_name
from ..errors import WorldError


def groups_in(module: fx.GraphModule) -> list[tuple[int, ...]]:
    """The groups of ranks that the collectives of a program name, nested graphs included."""
    found = set()
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                for value in (*node.args, *node.kwargs.values()):
                    if is_group_name(value):
                        found.add(value)
    return sorted(group_ranks(name) for name in found)


def connect(program: Any) -> Any:
    """On a real rank: give the groups that an exported program names their process groups.

    Call it on every rank, before the program runs. The default process group must be there.

    Args:
        program: an ExportedProgram of `RankPrograms.rank`, or its module.

    Returns:
        `program`.

    Raises:
        WorldError: no process group, or groups of ranks that it does not have or this process is
            not in.
    """
    groups = groups_in(getattr(program, "graph_module", program))
    if not dist.is_initialized():
        if not groups:
            return program
        raise WorldError(
            f"the program has collectives of ranks {', '.join(str(list(g)) for g in groups)}, but "
            "there is no process group. Call torch.distributed.init_process_group() first."
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    for ranks in groups:
        if rank not in ranks or ranks[-1] >= size:
            raise WorldError(
                f"the program has a collective of ranks {list(ranks)}, but this is rank {rank} of "
                f"{size}. Run the program of rank r on rank r, with as many ranks as were "
                "simulated."
            )
    for ranks in _of_all_ranks(groups):
        group = dist.group.WORLD if ranks == tuple(range(size)) else dist.new_group(list(ranks))
        if rank in ranks and process_group_named(group_name(ranks)) is None:
            register_process_group(group_name(ranks), group)
    return program


def _of_all_ranks(groups: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The groups of all ranks' programs: every rank has to make every group, in the same order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, list(groups))
    return sorted({tuple(ranks) for of_rank in found for ranks in of_rank})
