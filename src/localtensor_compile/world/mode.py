"""LocalTensorMode: a simulated world of ranks in this process.

Ops on LocalTensors need no mode. Being inside one means: a process group exists, factories make a
shard per rank, DeviceMesh and dist.get_rank answer per rank, random numbers have a state per rank,
and DTensor finds our LocalTensor. All of it is undone on exit, whatever happens in between.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import groups, ops
from ..errors import WorldError
from ..stacked import counts
from ..stacked.layout import expanded, is_stacked
from ..values.ranked import pick
from ..values.tensor import LocalTensor, _wrap_stacked
from . import torch_hooks
from .per_rank_code import join_shards, split_shards
from .plain_replicas import PlainReplicas
from .state import enabled_local_tensor_mode, get_local_tensor_mode_list, local_tensor_mode

REDUCTIONS = ("gloo", "rank_order")
LAYOUTS = ("per_rank", "stacked", "auto")
_MANY = 8  # from this many ranks on, layout="auto" stacks


class LocalTensorMode:
    """Context manager: the code inside runs as an SPMD program on simulated ranks.

    Args:
        ranks: the number of ranks (0 to ranks-1), or the ranks themselves.
        reduction: association order of floating point reductions in collectives: "gloo" (bit for
            bit what real gloo processes compute) or "rank_order" (a left fold in rank order).
        sharding_independent_rng: whether random ops on a DTensor draw the global tensor, so that
            its values depend on neither placements nor number of ranks. Real ranks draw into their
            own shards, which is the default here too. Ranks must be seeded alike.
        layout: how the tensors made inside hold their shards. "per_rank": a tensor per rank, each
            op once per rank; bit for bit what real ranks compute. "stacked": shards of one size in
            one tensor [ranks, *local], each op once for all ranks; a matmul may round differently.
            "auto": stacked from 8 ranks on. See `stats()`.

    Where no process group exists, one of max(ranks)+1 simulated ranks is made on entry and
    destroyed on exit; torch.distributed functions work on it. Modes nest: the innermost counts.

    Raises:
        WorldError: no ranks, or ranks outside an existing process group.
    """

    def __init__(
        self,
        ranks: int | Collection[int],
        *,
        reduction: str = "gloo",
        sharding_independent_rng: bool = False,
        layout: str = "per_rank",
    ) -> None:
        if isinstance(ranks, int):
            if ranks < 1:
                raise WorldError(
                    f"LocalTensorMode needs at least one rank, but got {ranks}. Give it the number "
                    "of ranks, or a set of ranks."
                )
            ranks = range(ranks)
        if not ranks:
            raise WorldError(
                "LocalTensorMode needs at least one rank, but got none. Give it the number of "
                "ranks, or a set of ranks."
            )
        bad = [r for r in ranks if not isinstance(r, int) or isinstance(r, bool) or r < 0]
        if bad:
            raise WorldError(f"ranks are ints from 0 up, but LocalTensorMode got {bad!r}.")
        if reduction not in REDUCTIONS:
            raise WorldError(
                f"unknown reduction {reduction!r}. LocalTensorMode knows {', '.join(REDUCTIONS)}."
            )
        self.ranks: frozenset[int] = frozenset(ranks)
        self._sorted_ranks: tuple[int, ...] = tuple(sorted(self.ranks))
        if layout not in LAYOUTS:
            raise WorldError(
                f"unknown layout {layout!r}. LocalTensorMode knows {', '.join(LAYOUTS)}."
            )
        self.reduction = reduction
        self.layout = layout
        self.stacked = is_stacked_layout(layout, len(self.ranks))
        self._counted = counts.snapshot()
        self.sharding_independent_rng = sharding_independent_rng
        self._disable = True
        self._exits: list[contextlib.ExitStack] = []
        self._function_mode = torch_hooks.function_mode(self)
        self._rng = torch_hooks.rank_generators(self)
        self._replicas = PlainReplicas(self._sorted_ranks, self.stacked)

    def __repr__(self) -> str:
        layout = "" if self.layout == "per_rank" else f", layout={self.layout!r}"
        ranks = list(self._sorted_ranks)
        return f"LocalTensorMode(ranks={ranks}, reduction={self.reduction!r}{layout})"

    def stats(self) -> dict[str, Any]:
        """What became of ops on stacked tensors since the mode was entered, in this thread.

        Returns:
            "stacked": the number of ops that ran once for all ranks; "per_rank": {op: times} of
            those that ran once per rank; "joined": {op: times} shards were copied into a stack;
            "left": {op: times} the result stayed per rank, because ranks differ in size.
        """
        return counts.since(self._counted)

    # ---- entering and leaving
    def __enter__(self) -> LocalTensorMode:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_process_group(self._sorted_ranks))
            modes = get_local_tensor_mode_list()
            modes.append(self)
            self._counted = counts.snapshot()
            stack.callback(modes.pop)
            stack.callback(setattr, self, "_disable", self._disable)
            self._disable = False
            stack.callback(setattr, ops.settings, "order", ops.settings.order)
            ops.settings.order = self.reduction
            stack.enter_context(torch_hooks.installed())
            stack.enter_context(torch_hooks.cache_key(self._fingerprint))
            stack.enter_context(self._rng)
            stack.callback(self._replicas.forget)
            if self.sharding_independent_rng:
                stack.enter_context(torch_hooks.independent_draws())
            stack.enter_context(self._function_mode)
            self._exits.append(stack.pop_all())
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.pop().__exit__(exc_type, exc, traceback)

    def _fingerprint(self) -> str:
        text = groups.fingerprint(self._sorted_ranks)
        if self.stacked:
            text += ";stacked"
        return f"{text};sharding_independent_rng" if self.sharding_independent_rng else text

    def disable_(self) -> None:
        """Stop simulating until `enable_`: factories make plain tensors, the rank is one int."""
        self._disable = True

    def enable_(self) -> None:
        """Undo `disable_`."""
        self._disable = False

    def disable(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: run code outside the simulation, e.g. on single shards."""
        return Disabled(self)

    @contextlib.contextmanager
    def per_rank_layout(self) -> Iterator[None]:
        """Context manager: tensors made inside hold a tensor per rank, whatever the layout is.

        For graphs that are taken apart into ranks.
        """
        was = self.stacked
        self.stacked = self._function_mode.stacked = False
        try:
            yield
        finally:
            self.stacked = self._function_mode.stacked = was

    # ---- per-rank code
    def rank_map(self, cb: Callable[[int], Tensor]) -> LocalTensor:
        """The LocalTensor whose shard of rank r is `cb(r)`, run with the simulation disabled."""
        ranks = self._sorted_ranks
        return join_shards(ranks, [self._on_rank(r, cb, r) for r in ranks], self.stacked)

    def tensor_map(self, tensor: Tensor, cb: Callable[[int, Tensor], Tensor | None]) -> LocalTensor:
        """The LocalTensor of `cb(r, shard of rank r)`; ranks where it is None are left out."""
        ranks: list[int] = []
        results: list[Tensor] = []
        shards = split_shards(tensor, self._sorted_ranks)
        for r, shard in shards.items():
            result = self._on_rank(r, cb, r, shard)
            if result is not None:
                ranks.append(r)
                results.append(result)
        return join_shards(tuple(ranks), results)

    def _on_rank(self, rank: int, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with Disabled(self), self._rng.on_rank(rank):
            return fn(*args, **kwargs)


def is_stacked_layout(layout: str, world_size: int) -> bool:
    """Whether a mode of this layout and number of ranks makes stacked LocalTensors."""
    return layout == "stacked" or (layout == "auto" and world_size >= _MANY)


class Disabled:
    """Context manager that disables a mode and restores what it was (a class: Dynamo traces it)."""

    def __init__(self, mode: LocalTensorMode) -> None:
        self.mode = mode
        self.was = mode._disable

    def __enter__(self) -> None:
        self.was = self.mode._disable
        self.mode._disable = True

    def __exit__(self, *exc: object) -> None:
        self.mode._disable = self.was


@contextlib.contextmanager
def _process_group(ranks: tuple[int, ...]) -> Iterator[None]:
    """A simulated default process group, unless there is one that holds `ranks` already."""
    if dist.is_initialized():
        world = dist.get_world_size()
        outside = [r for r in ranks if r >= world]
        if outside:
            raise WorldError(
                f"LocalTensorMode got ranks {outside}, but the process group that exists has "
                f"ranks 0 to {world - 1}. Use ranks inside it, or destroy it first with "
                "torch.distributed.destroy_process_group()."
            )
        yield
        return
    torch_hooks.init_simulated_process_group(world_size=ranks[-1] + 1)
    try:
        yield
    finally:
        if dist.is_initialized():
            torch_hooks.destroy_simulated_process_group()


def rank_map(cb: Callable[[int], Tensor]) -> Tensor:
    """`cb(rank)` of every rank as one tensor.

    In a LocalTensorMode the LocalTensor of all ranks' results; on a real rank of a process group
    `cb(dist.get_rank())`. So the same code runs simulated and under torchrun.
    """
    mode = enabled_local_tensor_mode()
    return cb(dist.get_rank()) if mode is None else mode.rank_map(cb)


def tensor_map(tensor: Tensor, cb: Callable[[int, Tensor], Tensor | None]) -> Tensor | None:
    """`cb(rank, shard)` of every rank as one tensor; on a real rank its own rank and tensor."""
    mode = enabled_local_tensor_mode()
    return cb(dist.get_rank(), tensor) if mode is None else mode.tensor_map(tensor, cb)


def maybe_disable_local_tensor_mode() -> contextlib.AbstractContextManager[None]:
    """Context manager: no simulation inside, whether or not a mode is active."""
    mode = local_tensor_mode()
    return contextlib.nullcontext() if mode is None else mode.disable()


def replicate(value: Any, ranks: Collection[int] | None = None) -> Any:
    """A plain tensor (or an nn.Module's parameters and buffers) with a copy on every rank.

    Args:
        value: a tensor, or a module, which is changed in place and returned.
        ranks: by default the ranks of the active mode.

    Raises:
        WorldError: no ranks given and no mode active.
    """
    if ranks is None:
        mode = enabled_local_tensor_mode()
        if mode is None:
            raise WorldError("replicate() needs ranks, or an active LocalTensorMode.")
        ranks = mode._sorted_ranks
    if isinstance(value, torch.nn.Module):
        for module in value.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not isinstance(parameter, LocalTensor):
                    copy = replicate(parameter.detach(), ranks)
                    module._parameters[name] = torch.nn.Parameter(copy, parameter.requires_grad)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None and not isinstance(buffer, LocalTensor):
                    module._buffers[name] = replicate(buffer, ranks)
        return value
    requires_grad = getattr(value, "requires_grad", False)
    mode = local_tensor_mode()
    if is_stacked(value) and set(ranks) == value._ranks:
        return value.detach().clone().requires_grad_(requires_grad)
    if mode is not None and mode.stacked and type(value) is Tensor:
        with torch._C.DisableTorchFunction():
            stack = expanded(value.detach(), len(ranks))
        return _wrap_stacked(stack, tuple(sorted(ranks)), requires_grad)
    with torch._C.DisableTorchFunction():
        shards = {r: pick(value, r).detach().clone() for r in ranks}
    return LocalTensor(shards, requires_grad)
