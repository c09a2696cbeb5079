"""A bundle's programs on this real rank."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.export import ExportedProgram

from ..bundle.errors import BundleError
from ..bundle.load import Bundle
from ..bundle.portable import is_collective
from .results import Outcome, outcome
from .simulated import given


def replay_on_this_rank(bundle: Bundle) -> list[Outcome]:
    """Run this rank's program of every graph, and compare with the capture.

    torch.distributed must be initialised; all ranks call it.

    Raises:
        BundleError: another number of ranks than were captured.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    require_world(bundle, size)
    names = _process_groups(bundle)
    device = _device(bundle)
    results: dict[str, list[Any]] = {}
    found = []
    for graph in bundle.manifest.graphs:
        part, values = graph.part(rank), bundle.values(rank)[graph.title]
        program = bundle.program(graph.title, rank)
        _connect(program, {name: names[ranks] for name, ranks in part.groups[rank].items()})
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        inputs = given(graph, rank, values["given"], results.get(graph.forward or "", []))
        inputs = [v.to(device) if isinstance(v, torch.Tensor) else v for v in inputs]
        if values["generator"] is not None:
            torch.set_rng_state(values["generator"])
        with torch.no_grad():
            results[graph.title] = list(program.module()(*inputs))
        found.append(outcome(graph.title, rank, values, inputs, results[graph.title]))
    return found


def require_world(bundle: Bundle, size: int) -> None:
    """Raise BundleError unless the bundle holds the programs of `size` ranks."""
    if size != bundle.world_size:
        raise BundleError(
            f"{bundle.directory} holds the programs of {bundle.world_size} ranks, but there are "
            f"{size} processes. Start as many as ranks: torchrun --nproc-per-node "
            f"{bundle.world_size}."
        )


def _process_groups(bundle: Bundle) -> dict[tuple[int, ...], str]:
    """Ranks -> name of their process group. All ranks make all groups, in the same order."""
    every = tuple(range(dist.get_world_size()))
    made: dict[tuple[int, ...], Any] = {
        ranks: dist.group.WORLD if ranks == every else dist.new_group(list(ranks))
        for ranks in bundle.manifest.groups()
    }
    own = dist.get_rank()
    return {ranks: str(group.group_name) for ranks, group in made.items() if own in ranks}


def _connect(program: ExportedProgram, names: dict[str, str]) -> None:
    """Write the names of this process's groups into a program."""
    for node in program.graph.nodes:
        if node.op == "call_function" and is_collective(node):
            node.args = tuple(names.get(a, a) if isinstance(a, str) else a for a in node.args)


def _device(bundle: Bundle) -> torch.device:
    device = torch.device(bundle.manifest.device)
    if device.type == "cpu":
        return device
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
