"""State dicts of DTensor models, and checkpoints that real and simulated ranks exchange."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from localtensor_compile.check.program import World

from .harness import draw, fill
from .tensor_parallel import MLP


def tensors(world: Any, seed: int) -> dict[str, Any]:
    """Uneven, replicated, empty and twice sharded tensors, nested dicts and plain values."""
    mesh = world.mesh(names="d")
    state: dict[str, Any] = {
        "rows": distribute_tensor(draw(7, 3, seed=seed), mesh, [Shard(0)]),
        "columns": distribute_tensor(draw(2, 5, seed=seed + 1), mesh, [Shard(1)]),
        "same": distribute_tensor(draw(4, seed=seed + 2), mesh, [Replicate()]),
        "nested": {"few": distribute_tensor(draw(1, 2, seed=seed + 3), mesh, [Shard(0)])},
        "step": seed,
        "list": [seed, "text"],
    }
    if world.size % 2 == 0:
        grid = world.mesh((2, world.size // 2), ("a", "b"))
        state["blocks"] = distribute_tensor(draw(5, 6, seed=seed + 4), grid, [Shard(0), Shard(1)])
    return state


def save(size: int, folder: str) -> list[str]:
    dcp.save(tensors(World(size), 0), checkpoint_id=folder)
    return sorted(os.listdir(folder))


def load(size: int, folder: str) -> dict[str, bool]:
    """Whether each tensor and value is what was saved, on every rank."""
    found, saved = tensors(World(size), 100), tensors(World(size), 0)
    if "blocks" in found and not _holds(folder, "blocks"):
        del found["blocks"], saved["blocks"]
    dcp.load(found, checkpoint_id=folder)
    found["few"], saved["few"] = found.pop("nested")["few"], saved.pop("nested")["few"]
    return {
        name: torch.equal(value.to_local(), saved[name].to_local())
        if isinstance(value, DTensor)
        else value == saved[name]
        for name, value in found.items()
    }


def _holds(folder: str, name: str) -> bool:
    return name in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata


def trained(world: Any, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    mesh = world.mesh(names="tp")
    model = fill(MLP(hidden=10), seed)
    up = ColwiseParallel(use_local_output=False)
    parallelize_module(model, mesh, {"up": up, "down": RowwiseParallel()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(draw(4, 8, seed=9)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def state_dicts(world: Any, full: bool = False, offload: bool = False) -> dict[str, Any]:
    """Model and optimizer state dicts, handed to a model that was initialized otherwise."""
    options = StateDictOptions(full_state_dict=full, cpu_offload=offload)
    model, optimizer = trained(world)
    weights = get_model_state_dict(model, options=options)
    moments = get_optimizer_state_dict(model, optimizer, options=options)
    found = {f"saved {name}": value for name, value in weights.items()}
    for name, state in moments["state"].items():
        found[f"saved {name} exp_avg"] = state["exp_avg"]
    other, its_optimizer = trained(world, seed=50)
    set_model_state_dict(other, weights, options=options)
    set_optimizer_state_dict(other, its_optimizer, moments, options=options)
    for name, parameter in other.named_parameters():
        found[f"loaded {name}"] = parameter.detach()
        found[f"loaded {name} exp_avg"] = its_optimizer.state[parameter]["exp_avg"]
    return found


def broadcast(world: Any) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    weights = fill(MLP(hidden=10), 7).state_dict()
    model, _ = trained(world)
    set_model_state_dict(model, weights, options=options)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
