"""The compiled tensor-parallel MLP against JAX's simulated host devices: jit(shard_map)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .machine import cores
from .models import Loss, module_step, tp_mlp, tp_mlp_batched, train_step
from .plot import Plot
from .report import Bound, Section, figure, milliseconds, progress, ratio
from .timing import LEAST, once
from .worlds import BATCHED, STACKED, compiled, mode, process_group

JAX = "JAX"
RANKS = (8, 64)
COMPILED = (2, 8, 64, 256)
SIZE = (64, 256, 1024)  # tokens, width, hidden width of all ranks together
BOUNDED = (8, 64)


class JaxWorker:
    """A process with jax that has compiled the program and runs steps on demand."""

    def __init__(self, python: str, ranks: int, size: tuple[int, int, int]) -> None:
        script = Path(__file__).with_name("jax_mlp.py")
        command = [python, str(script), *map(str, (ranks, *size))]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )
        self.first: dict[str, Any] = json.loads(self._line())

    def steps(self, count: int) -> float:
        """Seconds of one of `count` steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process with jax ended with {self.process.wait()}")
        return line

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def wave(n: int, m: int, seed: int) -> Tensor:
    """The numbers that jax_mlp.py computes with."""
    return torch.sin(torch.arange(n * m).float() * 0.7 + seed).reshape(n, m) / n**0.5


class Ours:
    """The same program on LocalTensors, compiled by Inductor."""

    def __init__(self, ranks: int, size: tuple[int, int, int]) -> None:
        tokens, width, hidden = size
        self.world = mode(ranks)
        with self.world:
            weights = wave(width, hidden, 2), wave(hidden, width, 3)
            model = tp_mlp(ranks, width, hidden, weights)
            x = self.world.rank_map(lambda rank: wave(tokens, width, 1))
            self.parameters = list(model.parameters())
            made = compiled("inductor")(Loss(model))
            loss = made(x)
            loss.backward()
            self.loss = float(loss.detach().reconcile())
            self.norms = [
                float(p.grad.full_tensor().reconcile().square().sum()) for p in self.parameters
            ]
            for parameter in self.parameters:
                parameter.grad = None
        self.step = partial(module_step, made, x, self.parameters)


def by_hand(ranks: int, size: tuple[int, int, int]) -> partial[None]:
    """The hand-written batched program, compiled by Inductor."""
    tokens, width, hidden = size
    w1 = wave(width, hidden, 2).reshape(width, ranks, -1).permute(1, 0, 2).contiguous()
    w2 = wave(hidden, width, 3).reshape(ranks, -1, width).contiguous()
    x = wave(tokens, width, 1).expand(ranks, -1, -1).contiguous()
    operands = [x, w1.requires_grad_(), w2.requires_grad_()]
    return partial(train_step, compiled("inductor")(tp_mlp_batched), operands, torch.ones(ranks))


def turns(
    python: str, ranks: int, size: tuple[int, int, int], rounds: int
) -> tuple[dict[str, float], str]:
    """Median seconds of a step of each contestant, and the version of jax.

    Raises:
        RuntimeError: loss or gradients differ: then they do not run the same program.
    """
    torch._dynamo.reset()
    worker = JaxWorker(python, ranks, size)
    try:
        with process_group(ranks):
            mine = Ours(ranks, size)
            same_values(worker.first, mine, ranks)
            hand = by_hand(ranks, size)
            times: dict[str, list[float]] = {STACKED: [], JAX: [], BATCHED: []}
            with mine.world:
                mine.step()
                count = max(1, min(50, int(5 * LEAST / once(mine.step))))
            hand()
            worker.steps(count)
            for _ in range(rounds):
                with mine.world:
                    times[STACKED].append(once(lambda: repeat(mine.step, count)) / count)
                times[JAX].append(worker.steps(count))
                times[BATCHED].append(once(lambda: repeat(hand, count)) / count)
    finally:
        worker.close()
    return {name: statistics.median(t) for name, t in times.items()}, worker.first["jax"]


def repeat(call: Any, count: int) -> None:
    for _ in range(count):
        call()


def same_values(first: dict[str, Any], mine: Ours, ranks: int) -> None:
    for theirs, ours in zip([first["loss"], *first["norms"]], [mine.loss, *mine.norms]):
        if not math.isclose(theirs, ours, rel_tol=1e-4):
            raise RuntimeError(f"W = {ranks}: JAX computes {theirs}, we {ours}")


@contextlib.contextmanager
def on(count: int) -> Iterator[None]:
    """This process, and those that it starts, on so many cores and threads."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, sorted(allowed)[:count])
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, allowed)


def run(quick: bool) -> Section | str:
    python = os.environ.get("JAX_PYTHON")
    if not python:
        return "JAX_PYTHON names no Python that has jax"
    worlds, rounds = ((2,), 2) if quick else (RANKS, 9)
    size = (4, 8, 16) if quick else SIZE
    rows, bounds = [], []
    version = ""
    for count in sorted({1, min(2, cores())}):
        for ranks in worlds:
            with on(count):
                found, version = turns(python, ranks, size, rounds)
            mine = found[STACKED]
            rows.append(
                [
                    str(count),
                    str(ranks),
                    milliseconds(mine),
                    milliseconds(found[JAX]),
                    ratio(mine / found[JAX]),
                    ratio(mine / found[BATCHED]),
                ]
            )
            progress("against_jax", rows[-1])
            if ranks in BOUNDED:
                name = f"{count} core{'s' * (count > 1)}, W = {ranks}"
                bounds.append(Bound(name, mine / found[JAX], at_most=1.0))
    compile_times: dict[int, float] = {}
    for ranks in worlds if quick else COMPILED:
        compile_times[ranks] = statistics.median(
            jax_compile(python, ranks, size) for _ in range(1 if quick else 5)
        )
    grown = ", ".join(f"{figure(s)} s at W = {r}" for r, s in compile_times.items())
    tokens, width, hidden = size
    return Section(
        "against_jax",
        "Against JAX host devices",
        f"The tensor-parallel MLP, {tokens} x {width}, {hidden} hidden of all ranks together, "
        "float32, forward and backward (gradients of the weights), compiled. Ours is "
        "`parallelize_module` under `torch.compile` with Inductor in the stacked layout; JAX "
        f"{version} runs `jit(value_and_grad(shard_map))` with "
        "`--xla_force_host_platform_device_count` in a process of its own and waits for results; "
        "the contestants take turns on the same cores. Loss and gradients are compared first. "
        "Ratios say how many times as long the stacked layout takes. "
        f"JAX compiles in {grown}; compare *Compile time*.",
        ("cores", "W", "stacked", JAX, "against JAX", "against batched by hand"),
        rows,
        bounds,
        None
        if quick
        else Plot("JAX: compile, a fresh process each", "seconds", {JAX: compile_times}),
        threads=min(2, cores()),
    )


def jax_compile(python: str, ranks: int, size: tuple[int, int, int]) -> float:
    """Seconds of JAX's first step in a fresh process; hidden columns for every rank."""
    tokens, width, hidden = size
    worker = JaxWorker(python, ranks, (tokens, width, max(hidden, ranks)))
    worker.close()
    return float(worker.first["compile"])
