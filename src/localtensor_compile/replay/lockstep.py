"""All ranks' programs in one process, each on its own until it needs what others send.

A functional collective starts when a rank reaches it and is waited for by whoever uses its result.
Collectives of a group happen in the order in which its ranks start them, as on real processes;
ranks that start different ones, or wait for one that others never start, are an error here and
hang there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..bundle.portable import is_collective
from ..errors import CollectiveError, per_rank_text

OPS = torch.ops.localtensor
Groups = Mapping[str, Sequence[int]]
_WAIT = "wait_tensor"


@dataclass(eq=False)
class _Started:
    """A collective that a rank has started.

    Attributes:
        given: its tensor.
        options: its other arguments, the group left out.
        result: once all ranks of the group are there.
    """

    name: str
    ranks: tuple[int, ...]
    given: Tensor
    options: tuple[Any, ...]
    source: str
    result: Tensor | None = None

    def __str__(self) -> str:
        options = ", ".join([str(list(self.given.shape)), *(str(o) for o in self.options)])
        return f"{self.name}({options}) of ranks {list(self.ranks)}{self.source}"


@dataclass
class _Rank:
    rank: int
    steps: Generator[_Started, None, list[Any]]
    generator: Tensor | None
    results: list[Any] | None = None
    waits_for: _Started | None = None


@dataclass
class _World:
    """The collectives that ranks have started, in order, per group and rank."""

    queues: dict[tuple[int, ...], dict[int, deque[_Started]]] = field(default_factory=dict)
    joined: int = 0

    def start(self, rank: int, started: _Started) -> None:
        group = self.queues.setdefault(started.ranks, {r: deque() for r in started.ranks})
        group[rank].append(started)

    def complete(self) -> bool:
        """Do every collective that all its ranks have started; whether there was one."""
        some = False
        for ranks, waiting in self.queues.items():
            while all(waiting.values()):
                _join([waiting[r].popleft() for r in ranks])
                self.joined += 1
                some = True
        return some


def run_in_lockstep(
    programs: Mapping[int, fx.GraphModule],
    inputs: Mapping[int, Sequence[Any]],
    groups: Mapping[int, Groups],
    generators: Mapping[int, Tensor | None],
) -> tuple[dict[int, list[Any]], int]:
    """Run a program per rank.

    Args:
        programs: rank -> a graph of plain tensors, as torch.export makes it.
        inputs: rank -> the values of its placeholders, in order.
        groups: rank -> {name of a process group in its program: its ranks}.
        generators: rank -> state of its CPU generator at the start.

    Returns:
        Rank -> what its program returns, item by item; and how many collectives there were.

    Raises:
        CollectiveError: ranks of a group start different collectives, or wait for ever.
    """
    world = _World()
    ranks = [
        _Rank(r, _steps(module, inputs[r], r, groups[r], world), generators[r])
        for r, module in programs.items()
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        while True:
            for rank in ranks:
                _advance(rank)
            if not world.complete():
                break
    _require_finished(ranks, world)
    return {rank.rank: rank.results or [] for rank in ranks}, world.joined


def _advance(rank: _Rank) -> None:
    """Run a rank until it waits or ends."""
    if rank.results is not None or (rank.waits_for and rank.waits_for.result is None):
        return
    if rank.generator is not None:
        torch.set_rng_state(rank.generator)
    try:
        rank.waits_for = next(rank.steps)
    except StopIteration as end:
        rank.results, rank.waits_for = end.value, None
    if rank.generator is not None:
        rank.generator = torch.get_rng_state()


def _steps(
    module: fx.GraphModule, inputs: Sequence[Any], rank: int, groups: Groups, world: _World
) -> Generator[_Started, None, list[Any]]:
    """Runs a rank's program; yields what it has to wait for."""
    interpreter = fx.Interpreter(module)
    interpreter.args_iter = iter(inputs)
    env: dict[fx.Node, Any] = interpreter.env
    for node in module.graph.nodes:
        for used in node.all_input_nodes:
            while isinstance(env[used], _Started):
                started = env[used]
                if started.result is None:
                    yield started
                else:
                    env[used] = started.result
        if node.op == "output":
            return list(interpreter.run_node(node))
        if is_collective(node):
            args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
            started = _started(node, [*args, *kwargs.values()], groups)
            world.start(rank, started)
            env[node] = started
        elif _WAIT in str(node.target):
            env[node] = env[node.args[0]]
        else:
            env[node] = interpreter.run_node(node)
    raise AssertionError("a graph without output")


def _started(node: fx.Node, args: Sequence[Any], groups: Groups) -> _Started:
    name = str(getattr(node.target, "_schema").name).partition("::")[2]  # noqa: B009
    given, *options = args
    group = next(o for o in options if isinstance(o, str) and o in groups)
    kept = tuple(_plain(o) for o in options if o is not group)
    return _Started(name, tuple(groups[group]), given, kept, _source(node))


def _plain(option: Any) -> Any:
    return tuple(int(o) for o in option) if isinstance(option, (list, tuple)) else option


def _source(node: fx.Node) -> str:
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    lines = [t.strip() for t in trace if t.strip().startswith("File ")]
    return f", from {lines[-1]}" if lines else ""


# ---------------------------------------------------------------- collectives
_Run = Callable[[list[Tensor], tuple[Any, ...], list[int], int], list[Tensor]]

_RUN: dict[str, _Run] = {
    "all_reduce": lambda x, o, g, n: OPS.all_reduce(x, o[0], g, n),
    "reduce_scatter_tensor": lambda x, o, g, n: OPS.reduce_scatter(x, o[0], g, n),
    "all_gather_into_tensor": lambda x, o, g, n: OPS.all_gather(x, g, n),
    "broadcast": lambda x, o, g, n: OPS.broadcast(x, o[0], g, n),
    "shard_dim_alltoall": lambda x, o, g, n: OPS.shard_dim_alltoall(x, o[0], o[1], g, n),
}


def _join(started: Sequence[_Started]) -> None:
    _require_same(started)
    first, size = started[0], len(started)
    shards, group = [s.given for s in started], list(range(size))
    if first.name == "all_to_all_single":
        received = [n for s in started for n in s.options[0]]
        sent = [n for s in started for n in s.options[1]]
        results = OPS.all_to_all_single(shards, sent, received, group, size)
    elif first.name in _RUN:
        results = _RUN[first.name](shards, first.options, group, size)
    else:
        raise CollectiveError(
            f"{first} cannot be replayed in one process. Replay it on real processes, with "
            "`torchrun -m localtensor_compile.replay`."
        )
    for s, result in zip(started, results):
        s.result = result


def _require_same(started: Sequence[_Started]) -> None:
    """The ranks of a group do the same."""

    def key(s: _Started) -> Any:
        own = s.name == "all_to_all_single"
        shape = tuple(s.given.shape[1:] if own else s.given.shape)
        return s.name, s.given.dtype, shape, () if own else s.options

    if len({key(s) for s in started}) > 1:
        found = per_rank_text(dict(zip(started[0].ranks, started)))
        raise CollectiveError(
            f"the next collectives of ranks {list(started[0].ranks)} differ: {found}. On real "
            "processes this hangs or corrupts data."
        )


def _require_finished(ranks: Iterable[_Rank], world: _World) -> None:
    waiting = {r.rank: f"waits in {r.waits_for}" for r in ranks if r.results is None}
    for queues in world.queues.values():
        for rank, queue in queues.items():
            if queue:
                waiting.setdefault(rank, f"ended, having started {queue[0]}")
    if waiting:
        raise CollectiveError(
            f"ranks wait for collectives that others never start: {per_rank_text(waiting)}. On "
            "real processes this hangs."
        )
