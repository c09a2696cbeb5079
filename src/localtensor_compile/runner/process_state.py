"""What a process has one of, and each rank its own: exchanged when the baton changes hands.

torch's record of process groups, random number generators (torch, random, numpy). `localtensor run`
adds what a script can see of its process.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ..collectives import groups
from . import _torch_dynamo, _torch_runner


class Piece(Protocol):
    """One kind of state. `fresh` is called once per rank, before it runs."""

    def fresh(self, rank: int) -> Any: ...

    def get(self) -> Any: ...

    def set(self, state: Any) -> None: ...


class Attribute:
    """An attribute of a module or object. `fresh(rank)` is what a rank starts with."""

    def __init__(self, owner: Any, name: str, fresh: Callable[[int], Any]) -> None:
        self.owner, self.name, self.fresh = owner, name, fresh

    def get(self) -> Any:
        return getattr(self.owner, self.name)

    def set(self, state: Any) -> None:
        setattr(self.owner, self.name, state)


def _new_in_process(owner: Any, name: str, fresh: Callable[[], Any]) -> Attribute:
    return Attribute(owner, name, lambda rank: fresh())


class Generators:
    """torch's, Python's and numpy's default random numbers. Every rank starts with the caller's."""

    def fresh(self, rank: int) -> Any:
        return self.get()

    def get(self) -> Any:
        numpy = sys.modules.get("numpy.random")
        return (
            [(g, g.get_state()) for g in _torch_runner.generators()],
            random.getstate(),
            None if numpy is None else numpy.get_state(),
        )

    def set(self, state: Any) -> None:
        torch_states, python_state, numpy_state = state
        for generator, value in torch_states:
            generator.set_state(value)
        random.setstate(python_state)
        if numpy_state is not None:
            sys.modules["numpy.random"].set_state(numpy_state)


class ProcessState:
    """The `on_switch` of a scheduler: every piece of state, per rank and for the caller (None)."""

    def __init__(self, ranks: Iterable[int], pieces: Iterable[Piece] = ()) -> None:
        self.pieces: list[Piece] = [
            *(_new_in_process(*found) for found in _torch_runner.process_wide_names()),
            # init_process_group wraps it, to print the rank.
            Attribute(sys, "excepthook", lambda rank: sys.__excepthook__),
            # Which groups belong together is known per world of groups.
            Attribute(groups, "_registry", lambda rank: groups._Registry()),
            Generators(),
            *pieces,
        ]
        self._ranks = tuple(ranks)
        self._held: dict[int | None, list[Any]] = {}

    def save(self, rank: int | None) -> None:
        if rank is None:
            for r in self._ranks:
                self._held[r] = [p.fresh(r) for p in self.pieces]
        self._held[rank] = [p.get() for p in self.pieces]

    def load(self, rank: int | None) -> None:
        for piece, state in zip(self.pieces, self._held[rank]):
            piece.set(state)

    def pinned(self) -> str | None:
        return "torch.compile compiles" if _torch_dynamo.compiling_in_this_thread() else None
