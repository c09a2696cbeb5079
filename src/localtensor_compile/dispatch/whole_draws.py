"""Draws of a DTensor that do not depend on how it is sharded: see world/independent_rng.py.

While a DTensor runs a random op on its shards, `Whole` says what the global tensor is and which
piece of it each rank holds. Every rank then draws the global tensor and keeps its piece. The ranks
must draw the same: that is compared each time, in eager and when compiled code runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ShardError, UnsupportedError, per_rank_text
from ..values.equal import reconcile_when_run
from ..values.tensor import LocalTensor, _wrap
from .random_nodes import NODES

aten = torch.ops.aten


@dataclass(frozen=True)
class Whole:
    """A global tensor and, for each rank, the offset and the size of its piece per dimension."""

    shape: tuple[Any, ...]
    pieces: Mapping[int, Sequence[tuple[Any, Any]]]

    def draw(self, fill: Any, values: Sequence[Any], like: LocalTensor) -> dict[int, Tensor]:
        """Each rank's piece of fresh memory of `like`'s kind in which `fill(*values)` drew."""
        self._require_pieces(like)
        ranks = tuple(self.pieces)
        wholes = NODES[fill].emit_fill(
            ranks, [self.shape] * len(ranks), None, like.dtype, like.device, values
        )
        whole = reconcile_when_run(dict(zip(ranks, wholes)))
        return {r: _piece(whole, piece) for r, piece in self.pieces.items()}

    def keep_pieces(self, draw_whole: Callable[[], LocalTensor]) -> LocalTensor:
        """Each rank's piece, in memory of its own, of what `draw_whole` draws for every rank."""
        with _without_drawing():
            whole = reconcile_when_run(draw_whole()._local_tensors)
            return _wrap({r: _piece(whole, piece).clone() for r, piece in self.pieces.items()})

    def _require_pieces(self, like: LocalTensor) -> None:
        found = {r: tuple(t.shape) for r, t in like._local_tensors.items()}
        wanted = {r: tuple(size for _, size in piece) for r, piece in self.pieces.items()}
        if found != wanted:
            raise ShardError(
                "a draw that does not depend on sharding needs shards as DTensor lays them out: "
                f"sizes {per_rank_text(wanted)}, but found {per_rank_text(found)}. Redistribute "
                "to plain Shard, Replicate or Partial placements first."
            )


def _piece(whole: Tensor, piece: Sequence[tuple[Any, Any]]) -> Tensor:
    for d, (offset, size) in enumerate(piece):
        whole = whole.narrow(d, offset, size)
    return whole


class _Active(threading.local):
    whole: Whole | None = None


_active = _Active()


def active() -> Whole | None:
    """The global tensor of the random op that a DTensor runs now in this thread, or None."""
    return _active.whole


@contextlib.contextmanager
def drawing(whole: Whole) -> Iterator[None]:
    """Context manager: random ops on LocalTensors draw `whole`."""
    before, _active.whole = _active.whole, whole
    try:
        yield
    finally:
        _active.whole = before


def no_rule(func: Any) -> UnsupportedError:
    """The error for a random op whose draw of the whole tensor is not known."""
    return UnsupportedError(
        f"{func} on a DTensor cannot draw independently of sharding. Use uniform_, normal_, "
        "bernoulli_ with one probability, rand_like, randn_like, randint_like or dropout, for "
        "instance torch.rand_like(p) < p instead of torch.bernoulli(p)."
    )


def draw_pieces(whole: Whole, func: Any, values: Mapping[str, Any]) -> Any:
    """The result of the random aten op `func` on the pieces of `whole`.

    Raises:
        UnsupportedError: an op that draws in another way.
    """
    rule = _RULES.get(func)
    if rule is None:
        raise no_rule(func)
    # The pieces are made under no function mode: they are plain tensors.
    with _without_drawing():
        return rule(whole, values)


@contextlib.contextmanager
def _without_drawing() -> Iterator[None]:
    before, _active.whole = _active.whole, None
    try:
        yield
    finally:
        _active.whole = before


def _in_place(fill: Any, *names: str) -> Callable[[Whole, Mapping[str, Any]], Any]:
    def rule(whole: Whole, values: Mapping[str, Any]) -> Any:
        target = values["self"]
        drawn = whole.draw(fill, [values[n] for n in names], target)
        for r, piece in drawn.items():
            target._local_tensors[r].copy_(piece)
        return target

    return rule


def _like(fill: Any, arguments: Callable[[Mapping[str, Any]], Sequence[Any]]) -> Any:
    def rule(whole: Whole, values: Mapping[str, Any]) -> Any:
        options = {name: values[name] for name in ("dtype", "layout", "device", "memory_format")}
        result = aten.empty_like.default(values["self"], **options)
        for r, piece in whole.draw(fill, arguments(values), result).items():
            result._local_tensors[r].copy_(piece)
        return result

    return rule


def _native_dropout(whole: Whole, values: Mapping[str, Any]) -> Any:
    x, p = values["input"], values["p"]
    if values["train"] is False or p == 0:
        return aten.clone.default(x), aten.ones_like.default(x, dtype=torch.bool)
    kept = whole.draw(aten.bernoulli_.float, [1 - p], x)
    mask = _wrap({r: t.to(torch.bool) for r, t in kept.items()})
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return aten.mul.Tensor(aten.mul.Tensor(x, mask), scale), mask


_UNIFORM, _NORMAL = aten.uniform_.default, aten.normal_.default
_INTEGERS = getattr(aten.random_, "from")
_RULES: dict[Any, Callable[[Whole, Mapping[str, Any]], Any]] = {
    _UNIFORM: _in_place(_UNIFORM, "from", "to"),
    _NORMAL: _in_place(_NORMAL, "mean", "std"),
    aten.bernoulli_.float: _in_place(aten.bernoulli_.float, "p"),
    aten.cauchy_.default: _in_place(aten.cauchy_.default, "median", "sigma"),
    aten.exponential_.default: _in_place(aten.exponential_.default, "lambd"),
    aten.geometric_.default: _in_place(aten.geometric_.default, "p"),
    aten.log_normal_.default: _in_place(aten.log_normal_.default, "mean", "std"),
    aten.rand_like.default: _like(_UNIFORM, lambda v: (0.0, 1.0)),
    aten.randn_like.default: _like(_NORMAL, lambda v: (0.0, 1.0)),
    aten.randint_like.default: _like(_INTEGERS, lambda v: (0, v["high"])),
    aten.randint_like.low_dtype: _like(_INTEGERS, lambda v: (v["low"], v["high"])),
    aten.native_dropout.default: _native_dropout,
}
