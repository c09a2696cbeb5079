"""`make bench`: LocalTensor against torch's own simulator and against a plain loop over ranks.

Every figure is a ratio of medians measured side by side in one run. Claims (issue 2): eager at
least 6x faster than torch's own; aot_eager compiles no slower than torch's own at W = 32; a
compiled MLP step at most 1.3x the plain compiled loop.
"""

import datetime
import os
import platform
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._local_tensor as upstream
from torch.testing._internal.distributed.fake_pg import FakeStore

import localtensor_compile as lt

from .timing import medians, once

WORLDS = (2, 8, 32)
OURS, TORCH, LOOP = "localtensor_compile", "torch's own", "plain loop"


def mlp_loss(x: Any, w1: Any, w2: Any) -> Any:
    y = torch.relu(x @ w1) @ w2
    return (y * y).sum()


def pointwise(a: Any, b: Any) -> Any:
    c = (a + b) * a
    return c.relu() - b


def shards(world: int, *shape: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {r: torch.randn(*shape, generator=generator) for r in range(world)}


def train_step(fn: Callable[..., Any], x: Any, *weights: Any) -> None:
    fn(x, *weights).backward()
    for w in weights:
        w.grad = None


class Operands:
    """The MLP's and the pointwise program's operands for one implementation."""

    def __init__(self, world: int, make: Callable[[dict[int, torch.Tensor], bool], Any]) -> None:
        self.x = make(shards(world, 16, 32), False)
        self.w1 = make(shards(world, 32, 64), True)
        self.w2 = make(shards(world, 64, 32), True)
        self.a, self.b = make(shards(world, 8, 8), False), make(shards(world, 8, 8), False)


def plain(tensors: dict[int, torch.Tensor], requires_grad: bool) -> list[torch.Tensor]:
    return [t.clone().requires_grad_(requires_grad) for t in tensors.values()]


def eager(world: int) -> dict[str, dict[str, float]]:
    ours = Operands(world, lambda t, g: lt.LocalTensor(t, g))
    own = Operands(world, lambda t, g: upstream.LocalTensor(t, g))
    loop = Operands(world, plain)

    def loop_mlp() -> None:
        for operands in zip(loop.x, loop.w1, loop.w2):
            train_step(mlp_loss, *operands)

    def loop_pointwise() -> None:
        for a, b in zip(loop.a, loop.b):
            pointwise(a, b)

    ours_mode, own_mode = lt.LocalTensorMode(world), upstream.LocalTensorMode(world)
    mlp = {
        OURS: (ours_mode, lambda: train_step(mlp_loss, ours.x, ours.w1, ours.w2)),
        TORCH: (own_mode, lambda: train_step(mlp_loss, own.x, own.w1, own.w2)),
        LOOP: (nullcontext(), loop_mlp),
    }
    small = {
        OURS: (ours_mode, lambda: pointwise(ours.a, ours.b)),
        TORCH: (own_mode, lambda: pointwise(own.a, own.b)),
        LOOP: (nullcontext(), loop_pointwise),
    }
    return {"eager MLP step": medians(mlp), "eager pointwise": medians(small)}


def compile_time(world: int) -> dict[str, float]:
    """aot_eager compile and first step; outside torch's own mode, in which its graph is W * W."""
    ours = Operands(world, lambda t, g: lt.LocalTensor(t, g))
    own = Operands(world, lambda t, g: upstream.LocalTensor(t, g))
    times: dict[str, list[float]] = {OURS: [], TORCH: []}
    for _ in range(3):
        for name, operands in ((OURS, ours), (TORCH, own)):
            torch._dynamo.reset()
            compiled = torch.compile(mlp_loss, backend="aot_eager", fullgraph=True)
            step = lambda c=compiled, o=operands: train_step(c, o.x, o.w1, o.w2)
            times[name].append(once(step))
    return {name: min(t) for name, t in times.items()}


def compiled_step(world: int) -> dict[str, float]:
    """An Inductor-compiled step of all ranks against a loop that calls the compiled step of one."""
    ours = Operands(world, lambda t, g: lt.LocalTensor(t, g))
    loop = Operands(world, plain)

    torch._dynamo.reset()
    compiled = torch.compile(mlp_loss, fullgraph=True)
    compiled_one_rank = torch.compile(lambda x, w1, w2: mlp_loss(x, w1, w2), fullgraph=True)
    gradient = lt.LocalTensor({r: torch.ones(()) for r in range(world)})

    def loop_step() -> None:
        for operands in zip(loop.x, loop.w1, loop.w2):
            train_step(compiled_one_rank, *operands)

    def step() -> None:
        compiled(ours.x, ours.w1, ours.w2).backward(gradient)
        ours.w1.grad = ours.w2.grad = None

    return medians({OURS: (nullcontext(), step), LOOP: (nullcontext(), loop_step)})


def report(what: str, world: int, times: dict[str, float]) -> None:
    mine = times[OURS]
    text = ", ".join(f"{name} {t * 1e3:.2f} ms" for name, t in times.items())
    ratios = ", ".join(f"{t / mine:.2f}x {name}" for name, t in times.items() if name != OURS)
    print(f"{what:24} W={world:<3} {ratios}   ({text})", flush=True)


def main(arguments: list[str]) -> None:
    worlds = tuple(int(a) for a in arguments) or WORLDS
    print(
        f"{datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s). "
        "Ratios: how many times longer the others take.",
        flush=True,
    )
    for world in worlds:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        try:
            for what, times in eager(world).items():
                report(what, world, times)
            report("aot_eager compile + step", world, compile_time(world))
            report("inductor step", world, compiled_step(world))
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
