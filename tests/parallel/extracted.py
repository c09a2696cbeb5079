"""Programs of one collective each, and running a rank's extracted program on real processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

from localtensor_compile.compile.extract import group_name


def step_of(name: str, world: Any) -> Any:
    group, size = dist.group.WORLD, world.size
    return {
        "all_reduce": lambda x: funcol.all_reduce(x.sin(), "sum", group) * 2,
        "maximum": lambda x: funcol.all_reduce(x, "max", group),
        "all_gather": lambda x: funcol.all_gather_tensor(x.cos(), 0, group),
        "gathered columns": lambda x: funcol.all_gather_tensor(x, 1, group),
        "reduce_scatter": lambda x: funcol.reduce_scatter_tensor(
            x.repeat(size, 1), "sum", 0, group
        ),
        "broadcast": lambda x: funcol.broadcast(x, size - 1, group),
        "all_to_all": lambda x: funcol.all_to_all_single(
            x.repeat(size, 1), [x.shape[0]] * size, [x.shape[0]] * size, group
        ),
        "unused result": lambda x: (funcol.all_reduce(x, "sum", group), x * 2)[1],
        "dropout": lambda x: F.dropout(x, 0.5) + torch.rand_like(x),
    }[name]


NAMES = (
    "all_reduce", "maximum", "all_gather", "gathered columns", "reduce_scatter", "broadcast",
    "all_to_all", "unused result", "dropout",
)  # fmt: skip


def one_collective(world: Any, name: str) -> dict[str, Any]:
    x = world.rank_map(lambda r: torch.ones(2, 4) * (r + 1))
    differentiable = name not in ("maximum", "broadcast")
    out = world.compile(step_of(name, world))(x.requires_grad_(differentiable))
    if differentiable:
        out.sum().backward()
    return {"out": out}


def portable(module: Any) -> tuple[str, dict[str, Any]]:
    """(code, constants) of a program. Unpickling a GraphModule would run its draws."""
    code = module.graph.python_code("self")
    constants = {
        n.target: getattr(module, n.target) for n in module.graph.nodes if n.op == "get_attr"
    }
    return code.src, constants


def run_program(
    programs: dict[int, Any], inputs: dict[int, list[Any]], groups: list[tuple[int, ...]]
) -> list[Any]:
    """On a real rank: its extracted program, on its inputs. All ranks make all `groups`."""
    every = tuple(range(dist.get_world_size()))
    made = {g: dist.group.WORLD if g == every else dist.new_group(g) for g in groups}
    code, constants = programs[dist.get_rank()]
    for ranks, group in made.items():
        if dist.get_rank() not in ranks:
            continue
        code = code.replace(repr(group_name(ranks)), repr(str(group.group_name)))
    scope: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": torch.inf}
    exec(code, scope)
    torch.manual_seed(0)
    with torch.no_grad():
        found = scope["forward"](SimpleNamespace(**constants), *inputs[dist.get_rank()])
    return [v for v in found if isinstance(v, torch.Tensor)]
