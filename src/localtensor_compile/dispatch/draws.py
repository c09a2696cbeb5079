"""Calling one random op for one rank: with the rank's generator, whatever the op accepts.

Most aten overloads take a generator, or have a sibling that does. For the others torch's default
generator becomes the rank's for the length of the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Generator

from ..errors import UnsupportedError
from .generators import current, default_generator, is_default, replayed, replayed_as_default


class Draw:
    """How to call a random function for a rank: `call(*args, **kwargs, **{keyword: turn})`.

    `turn` comes from `turns()`: the rank's generator, or a function that makes torch's default
    generator the rank's.
    """

    __slots__ = ("call", "keyword", "takes_generator")

    def __init__(self, func: Any) -> None:
        overload = with_generator(func)
        self.takes_generator = overload is not None
        self.keyword = "generator" if overload is not None else "_turn"
        call = _in_turn(func) if overload is None else overload
        self.call: Callable[..., Any] = getattr(call, "_op", call)

    def direct(self, ranks: Collection[int], device: torch.device) -> Mapping[int, Any] | None:
        """`turns` where it has nothing to do before and after the calls, which is nearly always."""
        world = current()
        if world is None or not self.takes_generator or device.type == "meta":
            return None
        return world.of_ranks(ranks, device)

    @contextlib.contextmanager
    def turns(
        self,
        ranks: Collection[int],
        device: torch.device,
        generator: Generator | None = None,
    ) -> Iterator[Mapping[int, Any]]:
        """{rank: turn} for one call per rank, in any order.

        Args:
            generator: what the user passed as `generator=`; every rank replays it, and it advances
                once. Without one, the generators of the active world, and outside every world
                torch's default generator, replayed.

        Raises:
            WorldError: ranks outside the active world.
            RankDivergence: see `replayed`.
        """
        if device.type == "meta":
            yield dict.fromkeys(ranks)
            return
        if generator is not None and is_default(generator):
            generator = None
        world = current()
        if generator is None and world is not None:
            if self.takes_generator:
                yield world.of_ranks(ranks, device)
                return
            with world.as_default(ranks, device) as turns:
                yield turns
            return
        if generator is None:
            generator = default_generator(device)
        replay = replayed if self.takes_generator else replayed_as_default
        with replay(generator, ranks) as copies:
            yield copies


def _in_turn(func: Any) -> Callable[..., Any]:
    func = getattr(func, "_op", func)

    def call(*args: Any, _turn: Callable[[], None] | None, **kwargs: Any) -> Any:
        if _turn is not None:
            _turn()
        return func(*args, **kwargs)

    return call


def with_generator(func: Any) -> Any:
    """The overload of an aten op that takes a generator (the op itself, or a sibling), or None.

    Functions that are no aten ops are taken to accept `generator=`.
    """
    if not isinstance(func, torch._ops.OpOverload):
        return func
    arguments = func._schema.arguments
    if any(_is_generator(a) for a in arguments):
        return func
    wanted = [(a.name, str(a.type)) for a in arguments]
    packet = func.overloadpacket
    for name in packet.overloads():
        sibling = getattr(packet, name)
        others = sibling._schema.arguments
        if len(others) == len(arguments) + 1 and wanted == [
            (a.name, str(a.type)) for a in others if not _is_generator(a)
        ]:
            return sibling
    return None


def _is_generator(argument: Any) -> bool:
    return "Generator" in str(argument.type)


def traced_generator_error(what: str) -> UnsupportedError:
    """The error for `generator=` inside a compiled function (torch.compile cannot do it either)."""
    return UnsupportedError(
        f"{what} got generator= inside a compiled or traced function. torch.compile does not "
        "support generators there. Leave it out (each rank draws from its own default generator, "
        "seeded by torch.manual_seed), or draw outside of the compiled function."
    )
