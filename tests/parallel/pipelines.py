"""torch.distributed.pipelining: a program of one rank, run by real processes and by runner threads.

Each program is called on every rank, with a default process group, and returns what that rank has:
losses, outputs, gradients and parameters of its stages. Stages hand on tensors of other widths, so
that a tensor of the wrong stage or micro batch does not fit or is seen.
"""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, SplitPoint, pipeline
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from .harness import draw, fill

CPU = torch.device("cpu")
SINGLE = ("ScheduleGPipe", "Schedule1F1B")
LOOPED = ("ScheduleLoopedBFS", "ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")
V_SHAPED = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
SPLIT_BACKWARD = ("ScheduleInterleavedZeroBubble", *V_SHAPED)
"""Schedules that torch refuses to run with compiled stages."""
HIDDEN = 12  # divides by the ranks of TP


class Stage(nn.Module):
    """A feed-forward block that hands on rows of another width."""

    def __init__(self, width: int, following: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, HIDDEN)
        self.down = nn.Linear(HIDDEN, following)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.up(self.norm(x))), self.dropout)
        # Not a view, as TP's layers return: torch's split backward detaches it in place.
        return F.silu(self.down(x))


def stage_module(index: int, dropout: float = 0.0) -> nn.Module:
    """Stage `index`: its input is 4 + index wide."""
    return fill(Stage(4 + index, 5 + index, dropout), seed=100 * (index + 1))


def stages_of(schedule: str, rank: int, ranks: int) -> list[int]:
    """The stages that a rank of the pipeline holds, in order."""
    if schedule in SINGLE:
        return [rank]
    if schedule in V_SHAPED:
        return [rank, 2 * ranks - 1 - rank]
    return [rank, rank + ranks]


def scheduled(schedule: str, stages: list[Any], microbatches: int, **options: Any) -> Any:
    """The schedule of that name for a rank's stages."""
    argument: Any = stages[0] if schedule in SINGLE else stages
    kind = getattr(pipelining, schedule)
    return kind(argument, microbatches, loss_fn=loss_of, **options)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    if isinstance(output, DTensor):
        output = output.to_local()
    return F.mse_loss(output, target)


def local(value: Any) -> Tensor:
    value = value.detach()
    return (value.to_local() if isinstance(value, DTensor) else value).clone()


def state(stages: list[Any]) -> dict[str, Tensor]:
    """Gradients and parameters of a rank's stages."""
    found = {}
    for stage in stages:
        for name, parameter in stage.submod.named_parameters():
            label = f"stage {stage.stage_index} {name.removeprefix('_orig_mod.')}"
            found[label] = local(parameter)
            if parameter.grad is not None:
                found[f"{label} grad"] = local(parameter.grad)
    return found


def run_steps(
    schedule: Any,
    stages: list[Any],
    rank: int,
    *,
    batch: int,
    steps: int = 2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Optimizer steps, each on another batch."""
    found: dict[str, Tensor] = {}
    width = 4 + stages[0].num_stages
    parameters = [p for s in stages for p in s.submod.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        args = [draw(batch, 4, seed=seed + step)] if any(s.is_first for s in stages) else []
        options: dict[str, Any] = {}
        last = any(s.is_last for s in stages)
        losses: list[Tensor] = []
        if last:
            options = {"target": draw(batch, width, seed=seed + 50 + step), "losses": losses}
        output = schedule.step(*args, **options)
        if last:
            found[f"losses {step}"] = torch.stack([loss.detach() for loss in losses])
            found[f"output {step}"] = local(output)
        optimizer.step()
    return {**found, **state(stages)}


def train(
    schedule: str = "Schedule1F1B",
    *,
    microbatches: int = 4,
    backend: str | None = None,
    dropout: float = 0.0,
    group_of: tuple[int, ...] = (),
    static: bool = False,
    steps: int = 2,
    **options: Any,
) -> dict[str, Tensor]:
    """Stages made by hand.

    Args:
        backend: compile the stages with it.
        dropout: random numbers, seeded by rank.
        group_of: the pipeline is made of these ranks, in this order; others do nothing.
        static: give the shapes, where they are else sent from stage to stage.
    """
    group = dist.new_group(list(group_of)) if group_of else None
    if group_of and dist.get_rank() not in group_of:
        return {}
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(rank)
    indices = stages_of(schedule, rank, ranks)
    count = ranks * len(indices)
    batch = 2 * microbatches
    made = []
    for index in indices:
        module: Any = stage_module(index, dropout)
        if backend is not None:
            module = torch.compile(module, backend=backend)
        shapes: dict[str, Any] = {}
        if static:
            shapes["input_args"] = torch.empty(2, 4 + index, requires_grad=index > 0)
            shapes["output_args"] = torch.empty(2, 5 + index, requires_grad=True)
        made.append(PipelineStage(module, index, count, CPU, group=group, **shapes))
    runs = scheduled(schedule, made, microbatches, **options)
    return run_steps(runs, made, rank, batch=batch, steps=steps)


def wrapped(
    schedule: str = "Schedule1F1B",
    *,
    by: tuple[str, ...] = ("tp",),
    sizes: tuple[int, ...] = (2, 2),
    microbatches: int = 4,
    backend: str | None = None,
    steps: int = 2,
) -> dict[str, Tensor]:
    """A mesh of ("pp", *by): stages cut by TP, FSDP2, DDP, or TP and FSDP2.

    With FSDP2 or DDP each data rank has its own batch.
    """
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", *by))
    group, rank = mesh.get_group("pp"), mesh.get_local_rank("pp")
    indices = stages_of(schedule, rank, sizes[0])
    made = []
    for index in indices:
        module: Any = stage_module(index)
        if "tp" in by:
            plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            module = parallelize_module(module, mesh["tp"], plan)
        if backend is not None:
            module.compile(backend=backend)
        if "fsdp" in by:
            module = fully_shard(module, mesh=mesh["fsdp"])
        if "ddp" in by:
            module = DistributedDataParallel(module, process_group=mesh.get_group("ddp"))
        made.append(PipelineStage(module, index, sizes[0] * len(indices), CPU, group=group))
    runs = scheduled(schedule, made, microbatches)
    seed = next((1000 * mesh.get_local_rank(d) for d in by if d in ("fsdp", "ddp")), 0)
    return run_steps(runs, made, rank, batch=2 * microbatches, seed=seed, steps=steps)


# ---------------------------------------------------------------- the tracing front end
class Whole(nn.Module):
    """A model that `pipeline` cuts, with a skip connection from the first part to the last."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(layers)])
        self.head = nn.Linear(6, 4 + layers)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = torch.cat([x, x[:, :2]], dim=1)
        first = x
        if scale is not None:
            x = x * scale
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x + first)


def traced(
    schedule: str = "Schedule1F1B", *, microbatches: int = 4, keyword: bool = False
) -> dict[str, Tensor]:
    """`pipeline` cuts a model into one stage per rank.

    Args:
        keyword: give the model a keyword argument too, whose rows are cut with the batch.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = fill(Whole(ranks))
    spec = {f"layers.{i}": SplitPoint.BEGINNING for i in range(1, ranks)}
    example = {"scale": torch.ones(2, 6)} if keyword else {}
    pipe = pipeline(model, (draw(2, 4),), example, spec)
    stage = pipe.build_stage(rank, CPU)
    runs = scheduled(schedule, [stage], microbatches)
    if keyword and rank == 0:
        given = {"scale": draw(2 * microbatches, 6, seed=9)}
        runs.step = functools.partial(runs.step, **given)
    found = run_steps(runs, [stage], rank, batch=2 * microbatches)
    found["stages"] = torch.tensor(pipe.num_stages)
    return found


# ---------------------------------------------------------------- more than training
class Pair(nn.Module):
    """Two inputs and two outputs, one of integers, which has no gradient."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 4), last

    def forward(self, x: Tensor, index: Tensor) -> Any:
        x = torch.tanh(self.linear(x)) * index[:, None]
        return x if self.last else (x, index + 1)


def several_outputs(schedule: str = "ScheduleGPipe", microbatches: int = 3) -> dict[str, Tensor]:
    """Stages that hand on two tensors, of which one needs no gradient."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stage = PipelineStage(fill(Pair(rank == ranks - 1), seed=rank), rank, ranks, CPU)
    runs = scheduled(schedule, [stage], microbatches)
    batch = 2 * microbatches
    args = (draw(batch, 4), torch.arange(batch)) if rank == 0 else ()
    losses: list[Tensor] = []
    last = {"target": draw(batch, 4, seed=1), "losses": losses} if stage.is_last else {}
    output = runs.step(*args, **last)
    found = state([stage])
    if stage.is_last:
        found |= {"losses": torch.stack(losses).detach(), "output": local(output)}
    return found


def evaluated(
    schedule: str = "ScheduleInterleaved1F1B", microbatches: int = 4
) -> dict[str, Tensor]:
    """`eval` runs the forward only; a training step follows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    indices = stages_of(schedule, rank, ranks)
    made = [PipelineStage(stage_module(i), i, 2 * ranks, CPU) for i in indices]
    runs = scheduled(schedule, made, microbatches)
    batch, found = 2 * microbatches, {}
    args = [draw(batch, 4, seed=7)] if rank == 0 else []
    last = rank == ranks - 1
    target = {"target": draw(batch, 4 + 2 * ranks, seed=8)} if last else {}
    with torch.no_grad():
        output = runs.eval(*args, **target)
    if last:
        found["evaluated"] = local(output)
    return {**found, **run_steps(runs, made, rank, batch=batch, steps=1)}


def from_csv(actions: str, microbatches: int = 2) -> dict[str, Tensor]:
    """A schedule of the user's own, as the rows of a CSV file: one row of actions per rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    made = [PipelineStage(stage_module(rank), rank, ranks, CPU)]
    runs = pipelining.schedules._PipelineScheduleRuntime(made, microbatches, loss_fn=loss_of)
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(actions)
        file.flush()
        runs._load_csv(file.name, format="compute_only")
    return run_steps(runs, made, rank, batch=2 * microbatches, steps=1)
