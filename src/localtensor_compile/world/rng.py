"""Random number state of a world's ranks: torch.manual_seed and its relatives, per rank.

On entry to a LocalTensorMode every rank's generator is a copy of torch's default one (of the outer
mode's, where modes nest), as if W processes started now: seeded alike, they draw alike. torch's
own default generators are not touched by anything that ranks do, and are on exit what they were
on entry. A mode that is entered again after it was left starts anew.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .._torch import disable_dynamo, tracing_active
from ..dispatch.draws import Draw
from ..dispatch.generators import (
    CPU,
    OnRank,
    RankGenerators,
    current,
    full_device,
    live_devices,
    pop,
    push,
)
from ..dispatch.random_factories import RANDOM_FACTORIES, random_factory
from ..errors import WorldError
from ..values.int_node import make_int
from ..values.rank_node import value_on_rank
from ..values.tensor import LocalTensor, _wrap
from .per_rank_code import _join, _split
from .random_checks import RANDOM_NAMES, check_graph
from .state import enabled_local_tensor_mode

Replacement = tuple[Any, str, Any]


class ModeGenerators:
    """The generators of a mode's ranks while the mode is entered; the mode enters and leaves it."""

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.generators: RankGenerators | None = None
        self._depth = 0

    def __enter__(self) -> ModeGenerators:
        if self.generators is None:
            self.generators = RankGenerators(self.mode.ranks, current())
        push(self.generators)
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self.generators is not None:
            pop(self.generators)
        if self._depth == 0:
            self.generators = None

    def on_rank(self, rank: int) -> Any:
        """Context manager: torch's default generators are those of `rank`."""
        if torch.compiler.is_compiling():
            return _TracedRank(rank)
        if self.generators is None:
            return contextlib.nullcontext()
        return OnRank(self.generators, rank)


class _TracedRank(TorchFunctionMode):
    """on_rank where Dynamo traces: a graph cannot switch torch's default generator, so that the
    random functions called meanwhile become nodes of that rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        if func in RANDOM_NAMES:
            return _draw_on_rank(self.rank, RANDOM_NAMES[func], args, kwargs)
        return func(*args, **kwargs)


@torch.compiler.allow_in_graph
def _draw_on_rank(rank: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a random function for one rank: plain tensors in, plain tensors out, differentiable."""
    func = attrgetter(name)(torch)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    held = [_join((rank,), False, t) if isinstance(t, Tensor) else t for t in leaves]
    args, kwargs = pytree.tree_unflatten(held, spec)
    with torch._C.DisableTorchFunction():
        if func in RANDOM_FACTORIES:
            result = random_factory(func, (rank,), args, kwargs)
        else:
            result = func(*args, **kwargs)
    return pytree.tree_map_only(LocalTensor, lambda t: _split(t)[0], result)


# ---------------------------------------------------------------- torch's functions, per rank
def _seeds(generators: RankGenerators, seed: Any) -> dict[int, int]:
    """{rank: int} of an int, a per-rank int or a tensor of either."""
    if isinstance(seed, LocalTensor):
        missing = [r for r in generators.ranks if r not in seed._local_tensors]
        if missing:
            raise WorldError(f"the seed has no value for ranks {missing} of the active mode.")
        return {r: int(seed._local_tensors[r]) for r in generators.ranks}
    if isinstance(seed, (torch.SymInt, torch.SymFloat)):
        return {r: int(value_on_rank(seed, r)) for r in generators.ranks}
    return dict.fromkeys(generators.ranks, int(seed))


def _states(generators: RankGenerators, state: Tensor) -> dict[int, Tensor]:
    if isinstance(state, LocalTensor):
        return dict(state._local_tensors)
    return dict.fromkeys(generators.ranks, state)


def _local(states: Mapping[int, Tensor]) -> LocalTensor:
    return _wrap(dict(states))


def _manual_seed(generators: RankGenerators, seed: Any) -> torch.Generator:
    generators.seed(_seeds(generators, seed))
    return torch.default_generator


def _new_seeds(generators: RankGenerators) -> dict[int, int]:
    return {r: torch.Generator().seed() for r in generators.ranks}


def _seed(generators: RankGenerators) -> Any:
    seeds = _new_seeds(generators)
    generators.seed(seeds)
    return make_int(seeds)


def _initial_seed(generators: RankGenerators) -> Any:
    return make_int({r: g.initial_seed() for r, g in generators.on(CPU).items()})


def _get_rng_state(generators: RankGenerators) -> LocalTensor:
    return _local(generators.states(CPU))


def _set_rng_state(generators: RankGenerators, new_state: Tensor) -> None:
    generators.set_states(_states(generators, new_state), CPU)


def _cuda(device: Any = "cuda") -> torch.device:
    if isinstance(device, int):
        return torch.device("cuda", device)
    return full_device("cuda" if device is None else device)


def _cuda_devices() -> list[torch.device]:
    return [d for d in live_devices() if d.type == "cuda"]


def _cuda_manual_seed(generators: RankGenerators, seed: Any) -> None:
    if _cuda_devices():
        generators.seed_device(_seeds(generators, seed), _cuda())


def _cuda_manual_seed_all(generators: RankGenerators, seed: Any) -> None:
    generators.seed(_seeds(generators, seed), "cuda")


def _cuda_seed(generators: RankGenerators) -> None:
    if _cuda_devices():
        generators.seed_device(_new_seeds(generators), _cuda())


def _cuda_seed_all(generators: RankGenerators) -> None:
    generators.seed(_new_seeds(generators), "cuda")


def _cuda_initial_seed(generators: RankGenerators) -> Any:
    return make_int({r: g.initial_seed() for r, g in generators.on(_cuda()).items()})


def _cuda_get_rng_state(generators: RankGenerators, device: Any = "cuda") -> LocalTensor:
    return _local(generators.states(_cuda(device)))


def _cuda_get_rng_state_all(generators: RankGenerators) -> list[LocalTensor]:
    return [_local(generators.states(d)) for d in _cuda_devices()]


def _cuda_set_rng_state(
    generators: RankGenerators, new_state: Tensor, device: Any = "cuda"
) -> None:
    generators.set_states(_states(generators, new_state), _cuda(device))


def _cuda_set_rng_state_all(generators: RankGenerators, new_states: Any) -> None:
    for i, state in enumerate(new_states):
        _cuda_set_rng_state(generators, state, i)


_CPU_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "manual_seed": _manual_seed,
    "seed": _seed,
    "initial_seed": _initial_seed,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
}
_CUDA_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "manual_seed": _cuda_manual_seed,
    "manual_seed_all": _cuda_manual_seed_all,
    "seed": _cuda_seed,
    "seed_all": _cuda_seed_all,
    "initial_seed": _cuda_initial_seed,
    "get_rng_state": _cuda_get_rng_state,
    "get_rng_state_all": _cuda_get_rng_state_all,
    "set_rng_state": _cuda_set_rng_state,
    "set_rng_state_all": _cuda_set_rng_state_all,
}
# torch's compiler saves and restores the process's own state around what it does.
_INTERNAL = (
    "torch._dynamo.",
    "torch._functorch._aot_autograd.",
    "torch._functorch.aot_autograd",
    "torch._functorch.partitioners",
    "torch._inductor.",
)


def _per_rank(original: Any, per_rank: Callable[..., Any]) -> Any:
    # Without the attributes: among them is torch's own Dynamo-disabled form of the original.
    @functools.wraps(original, updated=())
    def function(*args: Any, **kwargs: Any) -> Any:
        mode = enabled_local_tensor_mode()
        generators = None if mode is None else mode._rng.generators
        if generators is None or _called_by_compiler(2):
            return original(*args, **kwargs)
        return per_rank(generators, *args, **kwargs)

    # Like torch's own: Dynamo breaks the graph here.
    return disable_dynamo(function, recursive=True)


# Where the wrapper that disables Dynamo lives.
_DISABLERS = ("torch._compile", "torch._dynamo.eval_frame")


def _called_by_compiler(depth: int) -> bool:
    frame: Any = sys._getframe(depth)
    while frame is not None and frame.f_globals.get("__name__") in _DISABLERS:
        frame = frame.f_back
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return name.startswith(_INTERNAL)


def replacements() -> Iterator[Replacement]:
    """(owner, attribute, replacement) of every random state function of torch.

    torch.random.fork_rng and torch.utils.checkpoint call these by name.
    """
    for name, per_rank in _CPU_FUNCTIONS.items():
        function = _per_rank(getattr(torch.random, name), per_rank)
        yield torch.random, name, function
        yield torch, name, function
    for name, per_rank in _CUDA_FUNCTIONS.items():
        function = _per_rank(getattr(torch.cuda.random, name), per_rank)
        yield torch.cuda.random, name, function
        yield torch.cuda, name, function
    init = torch.nn.init
    yield init, "_no_grad_trunc_normal_", _trunc_normal(init._no_grad_trunc_normal_)
    yield from _dynamo_replacements()


def _trunc_normal(original: Any) -> Any:
    """trunc_normal_ draws again until every value is in bounds: as often as each rank needs."""

    @functools.wraps(original, updated=())
    def trunc_normal(tensor: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
        shard = getattr(tensor, "_local_tensor", None)  # of a DTensor
        if isinstance(shard, LocalTensor) and shard.device.type == "cpu":
            # Real CPU ranks draw into their own shard, and DTensor drops a generator there.
            mode = enabled_local_tensor_mode()
            if mode is not None and mode.sharding_independent_rng:
                from .independent_rng import whole_of

                whole = whole_of(tensor._spec, mode._sorted_ranks)
                memory = shard.new_empty(whole.shape)
                shard.copy_(whole.keep_pieces(lambda: trunc_normal(memory, *args, **kwargs)))
            else:
                trunc_normal(shard, *args, **kwargs)
            torch.autograd.graph.increment_version(tensor)
            return tensor
        if not isinstance(tensor, LocalTensor) or tracing_active():
            return original(tensor, *args, generator=generator, **kwargs)
        shards = tensor._local_tensors
        with (
            torch._C.DisableTorchFunction(),
            _BY_GENERATOR.turns(shards.keys(), tensor.device, generator) as generators,
        ):
            for r, shard in shards.items():
                original(shard, *args, generator=generators[r], **kwargs)
        torch.autograd.graph.increment_version(tensor)
        return tensor

    return disable_dynamo(trunc_normal, recursive=True)


_BY_GENERATOR = Draw(torch.normal)  # for functions that take generator=


def _dynamo_replacements() -> Iterator[Replacement]:
    import torch._dynamo.output_graph as output_graph
    import torch._dynamo.variables.torch as torch_variables

    # Dynamo hides these from function modes, although they can be overridden.
    known = torch_variables.get_overridable_functions
    shown = known() | RANDOM_NAMES.keys()

    @functools.wraps(known, updated=())
    def get_overridable_functions() -> Any:
        return known() if enabled_local_tensor_mode() is None else shown

    compile_graph = output_graph.OutputGraph.call_user_compiler

    @functools.wraps(compile_graph)
    def call_user_compiler(self: Any, gm: Any, *args: Any, **kwargs: Any) -> Any:
        if enabled_local_tensor_mode() is not None:
            check_graph(gm)
        return compile_graph(self, gm, *args, **kwargs)

    yield torch_variables, "get_overridable_functions", get_overridable_functions
    yield output_graph.OutputGraph, "call_user_compiler", call_user_compiler
