"""Models that are exported, and running a rank's exported program on real processes."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import localtensor_compile as lt
from localtensor_compile.check.program import World
from tests.parallel.harness import draw, fill


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


class MLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)

    def forward(self, x: Any) -> Any:
        return self.down(F.gelu(self.up(x)))


def tp_mlp(hidden: int) -> tuple[nn.Module, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    x = lt.rank_map(lambda rank: draw(5, 8, seed=9))
    return parallelize_module(fill(MLP(hidden)), mesh, plan), x


class Statistics(nn.Module):
    """State that differs per rank, is written in place, and is put in another's place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", lt.rank_map(lambda rank: torch.arange(4.0) * rank))
        self.register_buffer("last", torch.zeros(4), persistent=False)
        self.offset = lt.rank_map(lambda rank: torch.ones(4) * rank)

    def forward(self, x: Any, *, scale: float = 1.0) -> Any:
        y = self.norm(x) * scale + self.offset
        self.seen.add_(y.sum(0))
        self.last = funcol.all_reduce(y.mean(0), "max", dist.group.WORLD) + self.seen
        return {"normed": y, "rows": x.shape[0], "nothing": None, "shared": (self.last, 3)}


def statistics() -> tuple[nn.Module, Any]:
    return Statistics(), uneven_rows()


def uneven_rows() -> Any:
    return lt.rank_map(lambda rank: draw(3 + 2 * rank, 4, seed=rank))


def even_rows() -> Any:
    return lt.rank_map(lambda rank: draw(6, 4, seed=rank))


def rows_exchanged(x: Any) -> Any:
    """Rank r sends r + 1 rows to every rank."""
    size, rank = dist.get_world_size(), dist.get_rank()
    each = rank + 1
    rows = x[:1].expand(4, 4) if size == 1 else x.repeat(size * 4, 1)[: each * size]
    sent = [each] * size
    received = [r + 1 for r in range(size)]
    return funcol.all_to_all_single(rows * 2, received, sent, dist.group.WORLD)


def unused_result(x: Any) -> Any:
    funcol.all_reduce(x.sum(0), "sum", dist.group.WORLD)
    return x.cos()


def broadcast(x: Any) -> Any:
    return funcol.broadcast(x, 1, dist.group.WORLD) * (dist.get_rank() + 1)


def scattered(x: Any) -> Any:
    size = dist.get_world_size()
    gathered = funcol.all_gather_tensor(x, 0, dist.group.WORLD)
    return funcol.reduce_scatter_tensor(gathered.sin(), "sum", 0, dist.group.WORLD), size


def made_inside(x: Any) -> Any:
    rows = x.shape[0]
    total = x.sum(0) + torch.ones(4) * rows
    return funcol.all_reduce(total, "sum", dist.group.WORLD), torch.arange(rows) + x[:, 0]


def noisy(x: Any) -> Any:
    dropped = F.dropout(x, 0.5)
    return funcol.all_reduce(
        dropped.sum(0) + torch.randn(4), "sum", dist.group.WORLD
    ), torch.rand_like(x)


def branching(x: Any) -> Any:
    flag = x.sum() > 0
    y = torch.cond(flag, lambda t: t.sin(), lambda t: t.cos() * 2, (x,))
    return funcol.all_reduce(y.sum(0), "sum", dist.group.WORLD)


def dtensors() -> tuple[nn.Module, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(draw(10, 4, seed=3), mesh, [Shard(0)])
    weight = distribute_tensor(draw(10, 6, seed=4), mesh, [Shard(1)])

    def product(x: DTensor) -> Any:
        y = x.t() @ weight
        columns = x.redistribute(placements=[Shard(1)])
        return y.sum(1).full_tensor(), y.redistribute(placements=[Replicate()]), x * 2, columns

    return Function(product), x


def two_dimensions() -> tuple[nn.Module, Any]:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.LayerNorm(8), MLP(6))
    plan = {
        "0": SequenceParallel(),
        "1.up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "1.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(fill(model), mesh["tp"], plan)
    of_dp = mesh.get_group("dp")

    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return funcol.all_reduce(self.model(x), "avg", of_dp)

    return Averaged(), lt.rank_map(lambda rank: draw(2, 3, 8, seed=rank))


def _function(function: Any, rows: Any) -> Any:
    return lambda: (Function(function), rows())


MODELS: dict[str, Any] = {
    "mlp": lambda: tp_mlp(12),
    "uneven mlp": lambda: tp_mlp(7),
    "mlp of empty shards": lambda: tp_mlp(2),
    "statistics": statistics,
    "all to all": _function(rows_exchanged, even_rows),
    "unused result": _function(unused_result, uneven_rows),
    "broadcast": _function(broadcast, even_rows),
    "reduce scatter": _function(scattered, even_rows),
    "made inside": _function(made_inside, uneven_rows),
    "noisy": _function(noisy, uneven_rows),
    "cond": _function(branching, even_rows),
    "DTensors": dtensors,
}


def seeded(model: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        return model(*args, **kwargs)


def saved(program: Any) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def run_saved(programs: dict[int, bytes], inputs: dict[int, Any], calls: int) -> Any:
    """On a real rank: its program, loaded, and what it holds afterwards."""
    rank = dist.get_rank()
    program = lt.connect(torch.export.load(io.BytesIO(programs[rank])))
    module = program.module()
    results = [seeded(module, *inputs[rank]) for _ in range(calls)]
    return results, {name: value.detach() for name, value in module.state_dict().items()}


def run_compiled(programs: dict[int, bytes], inputs: dict[int, Any]) -> Any:
    """On a real rank: its program, compiled ahead of time by Inductor and loaded."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    rank = dist.get_rank()
    program = lt.connect(torch.export.load(io.BytesIO(programs[rank])))
    with tempfile.TemporaryDirectory() as directory:
        package = aoti_compile_and_package(program, package_path=f"{directory}/rank{rank}.pt2")
        with torch.no_grad():
            return aoti_load_package(package)(*inputs[rank])


def connect_error(program: bytes) -> str:
    """On a real rank: why the program is not its own."""
    try:
        lt.connect(torch.export.load(io.BytesIO(program)))
    except lt.WorldError as error:
        return str(error)
    return ""


@dataclass
class Exported:
    """What a program compiled, exported when it was first called.

    Attributes:
        ranks: rank -> its saved program.
        all_ranks: the saved program of all.
        given: (args, kwargs).
        returned: by the model itself.
    """

    ranks: dict[int, bytes]
    all_ranks: bytes
    given: Any
    returned: Any


class ExportingWorld(World):
    """Exports instead of compiling."""

    def __init__(self, world_size: int) -> None:
        super().__init__(world_size, "cpu", None)
        self.exported: list[Exported] = []

    def compile(self, target: Any, **options: Any) -> Any:
        return Exporting(self, target)


class Exporting(nn.Module):
    def __init__(self, world: ExportingWorld, target: Any) -> None:
        super().__init__()
        self.target, self.world, self.seen = target, world, False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.seen:
            self.seen = True
            is_module = isinstance(self.target, nn.Module)
            model = self.target if is_module else AnyFunction(self.target)
            with torch._dynamo.config.patch(capture_scalar_outputs=True):
                programs = lt.export(model, args, kwargs)
            ranks = {rank: saved(programs.rank(rank)) for rank in programs.ranks}
            returned = seeded(model, *args, **kwargs)
            found = Exported(ranks, saved(programs.all_ranks), (args, kwargs), returned)
            self.world.exported.append(found)
        return self.target(*args, **kwargs)


class AnyFunction(nn.Module):
    """A function of any arguments as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def run_each_saved(programs: list[dict[int, bytes]], inputs: list[dict[int, Any]]) -> list[Any]:
    """On a real rank: what its programs return."""
    rank = dist.get_rank()
    found = []
    for files, given in zip(programs, inputs):
        module = lt.connect(torch.export.load(io.BytesIO(files[rank]))).module()
        args, kwargs = given[rank]
        found.append(seeded(module, *args, **kwargs))
    return found
