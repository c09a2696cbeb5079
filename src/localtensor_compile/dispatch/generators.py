"""Random generators of ranks: one torch.Generator per rank and device.

`current()` finds the RankGenerators of the innermost world of this thread. Where no world is
active, and for an explicit `generator=`, one torch.Generator stands for all ranks: `replayed()`.
Knows nothing about tensors or about which ops draw.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from .._torch import stash_for_engine_threads, stashed
from ..errors import PlainTensorError, RankDivergence, UnsupportedError, WorldError

CPU = torch.device("cpu")


def default_generator(device: torch.device) -> Generator:
    """torch's own default generator of `device`.

    Raises:
        UnsupportedError: a device whose default generator torch does not show.
    """
    if device.type == "cpu":
        return torch.default_generator
    module = getattr(torch, device.type, None)
    init = getattr(module, "init", None)
    if init is not None:
        init()
    generators = getattr(module, "default_generators", None)
    if generators is None:
        raise UnsupportedError(
            f"random numbers per rank need the default generator of {device}, which torch does not "
            "offer for this kind of device. Use CPU or CUDA tensors."
        )
    return generators[_index(device)]


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.get_device_module(device).current_device()


def full_device(device: Any) -> torch.device:
    """A device with its index, so that "cuda" and "cuda:0" find the same generators."""
    device = torch.device(device)
    if device.type in ("cpu", "meta") or device.index is not None:
        return device
    return torch.device(device.type, _index(device))


def live_devices() -> list[torch.device]:
    """The CPU and, where the process can use them, the CUDA devices (whose runtime is started)."""
    if not torch.backends.cuda.is_built():
        return [CPU]
    if not torch.cuda.is_initialized():
        if not torch.cuda.is_available() or torch.cuda._is_in_bad_fork():
            return [CPU]
        torch.cuda.init()
    return [CPU, *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


class RankGenerators:
    """The generators of a world's ranks: those of the CPU now, others when first drawn on.

    Args:
        ranks: the ranks of the world.
        outer: the generators of the world around this one. A rank starts in the state that it has
            there; a rank that the outer world does not hold, or every rank where there is no outer
            world, starts in the state of torch's default generator, like a process that starts
            now. Ranks that were never seeded differently therefore draw the same bits.
    """

    def __init__(self, ranks: Collection[int], outer: RankGenerators | None = None) -> None:
        self.ranks: tuple[int, ...] = tuple(sorted(ranks))
        self._outer = outer
        self._generators: dict[torch.device, dict[int, Generator]] = {}
        # Seeds given for devices that have no generators yet: device type, or "" for all types.
        self._seeds: dict[str, Mapping[int, int]] = {}
        self.on(CPU)

    def on(self, device: torch.device) -> dict[int, Generator]:
        """{rank: generator} of a device."""
        generators = self._generators.get(device)
        if generators is None:
            device = full_device(device)
            generators = self._generators.get(device) or self._make(device)
        return generators

    def _make(self, device: torch.device) -> dict[int, Generator]:
        made = {r: Generator(device) for r in self.ranks}
        seeds = self._seeds.get(device.type, self._seeds.get(""))
        if seeds is not None:
            for r, generator in made.items():
                generator.manual_seed(seeds[r])
        else:
            state = default_generator(device).get_state()
            outer = {} if self._outer is None else self._outer.on(device)
            for r, generator in made.items():
                generator.set_state(outer[r].get_state() if r in outer else state)
        self._generators[device] = made
        return made

    def of_ranks(self, ranks: Collection[int], device: torch.device) -> dict[int, Generator]:
        """{rank: generator} of a device, which holds at least `ranks`.

        Raises:
            WorldError: ranks that are not in this world.
        """
        generators = self.on(device)
        missing = [r for r in ranks if r not in generators]
        if missing:
            raise WorldError(
                f"random numbers for ranks {missing} were asked for in a world of ranks "
                f"{list(self.ranks)}. Use LocalTensors of the active LocalTensorMode's ranks, or "
                "leave the mode."
            )
        return generators

    # ---- seeds and states
    def seed(self, seeds: Mapping[int, int], device_type: str = "") -> None:
        """Seed all devices of a type, or of all types, also those that are used only later."""
        if not device_type:
            self._seeds.clear()
        self._seeds[device_type] = dict(seeds)
        for device, generators in self._generators.items():
            if device_type in ("", device.type):
                for r, generator in generators.items():
                    generator.manual_seed(seeds[r])

    def seed_device(self, seeds: Mapping[int, int], device: torch.device) -> None:
        """Seed one device."""
        for r, generator in self.on(device).items():
            generator.manual_seed(seeds[r])

    def states(self, device: torch.device) -> dict[int, Tensor]:
        """{rank: state} (uint8 tensors, as torch.Generator.get_state)."""
        return {r: g.get_state() for r, g in self.on(device).items()}

    def set_states(self, states: Mapping[int, Tensor], device: torch.device) -> None:
        """Set the state of every rank in `states`."""
        generators = self.of_ranks(states.keys(), device)
        for r, state in states.items():
            generators[r].set_state(state)

    def diverged(self, device: torch.device = CPU) -> bool:
        """Whether ranks would draw different bits on `device`."""
        return _common_state(self.states(device)) is None

    # ---- lending a rank's state to torch's default generator
    @contextlib.contextmanager
    def as_default(self, ranks: Collection[int], device: torch.device) -> Iterator[Any]:
        """For ops that accept no generator: yields {rank: function}.

        Calling a rank's function makes torch's default generator that rank's until the next call
        or the end of the block.
        """
        with _lent(self.of_ranks(ranks, device), device) as turns:
            yield turns

    def on_rank(self, rank: int) -> OnRank:
        """Context manager: torch's default generators are those of `rank`."""
        return OnRank(self, rank)

    @contextlib.contextmanager
    def as_one(self, what: str, device: torch.device) -> Iterator[None]:
        """For a draw into a plain tensor: every rank draws the same bits, once for all.

        Raises:
            PlainTensorError: the ranks' states differ.
        """
        state = _common_state(self.states(device))
        if state is None:
            raise PlainTensorError(
                f"{what} would draw random numbers for a plain tensor, but the ranks' generators "
                "have different states: each rank would draw other values, and a plain tensor can "
                "hold only one rank's. Make the tensor inside LocalTensorMode, with rank_map or "
                "with replicate(), so that it has a shard per rank."
            )
        default = default_generator(device)
        outside = default.get_state()
        default.set_state(state)
        try:
            yield
        finally:
            after = default.get_state()
            default.set_state(outside)
            for generator in self.on(device).values():
                generator.set_state(after)


class OnRank:
    """Context manager: torch's default generators are those of one rank, the outer ones after."""

    def __init__(self, generators: RankGenerators, rank: int) -> None:
        self.generators = generators
        self.rank = rank
        self._outside: list[tuple[Generator, Generator, Tensor]] = []

    def __enter__(self) -> None:
        for device in live_devices():
            mine = self.generators.of_ranks((self.rank,), device)[self.rank]
            default = default_generator(device)
            self._outside.append((default, mine, default.get_state()))
            default.set_state(mine.get_state())

    def __exit__(self, *exc: object) -> None:
        while self._outside:
            default, mine, outside = self._outside.pop()
            mine.set_state(default.get_state())
            default.set_state(outside)


@contextlib.contextmanager
def _lent(
    generators: Mapping[int, Generator], device: torch.device
) -> Iterator[Mapping[int, Callable[[], None]]]:
    default = default_generator(device)
    outside = default.get_state()
    lent: list[Generator] = []

    def give_back() -> None:
        if lent:
            lent.pop().set_state(default.get_state())

    def turn(generator: Generator) -> None:
        give_back()
        default.set_state(generator.get_state())
        lent.append(generator)

    try:
        yield {r: functools.partial(turn, g) for r, g in generators.items()}
    finally:
        give_back()
        default.set_state(outside)


def _common_state(states: Mapping[int, Tensor]) -> Tensor | None:
    """The state that all ranks have, or None."""
    it = iter(states.values())
    first = next(it)
    return first if all(torch.equal(first, s) for s in it) else None


# ---- the world of this thread
_TLS_KEY = "localtensor_compile.rank_generators"
_local = threading.local()


def current() -> RankGenerators | None:
    """The generators of the innermost world of this thread, or None.

    On a thread of the autograd engine (CUDA backward) the world of the thread that called
    backward: torch hands its own thread-local store on to such threads.
    """
    entries = getattr(_local, "entries", None)
    if not entries:
        entries = stashed(_TLS_KEY)
    return entries[-1] if entries else None


def push(generators: RankGenerators) -> None:
    """Make these the current generators of this thread."""
    entries = getattr(_local, "entries", None)
    if entries is None:
        entries = _local.entries = []
        stash_for_engine_threads(_TLS_KEY, entries)
    entries.append(generators)


def pop(generators: RankGenerators) -> None:
    """Undo the last `push` of these generators."""
    entries = _local.entries
    for i in reversed(range(len(entries))):
        if entries[i] is generators:
            del entries[i]
            return


# ---- one generator for all ranks
# Where ranks drew different amounts from one Generator: its address -> the generator (so that the
# address stays its own), the state it was left in, {rank: state}. By address, because every call
# through the dispatcher makes a new Python object for the same generator.
_left: dict[int, tuple[Generator, Tensor, dict[int, Tensor]]] = {}


def is_default(generator: Generator) -> bool:
    """Whether this is torch's default generator of a device (as torch.manual_seed returns)."""
    return generator._cdata == default_generator(generator.device)._cdata


@contextlib.contextmanager
def replayed(generator: Generator, ranks: Collection[int]) -> Iterator[dict[int, Generator]]:
    """{rank: generator}, each a copy of `generator`, which then advances once.

    What real processes do that each make and seed a generator of their own in the same way. Ranks
    that draw different amounts (uneven shards) go on from their own states at the next call, until
    the generator is seeded again.

    Raises:
        RankDivergence: the ranks' states differ, and the generator was used or changed otherwise
            in between, so that nobody can say what the ranks' states are now.
    """
    copies = {}
    for r, state in _states_of(generator, ranks).items():
        copies[r] = Generator(generator.device)
        copies[r].set_state(state)
    yield copies
    after = {r: g.get_state() for r, g in copies.items()}
    common = _common_state(after)
    if common is not None:
        _left.pop(generator._cdata, None)
        generator.set_state(common)
    else:
        first = next(iter(after.values()))
        generator.set_state(first)
        _left[generator._cdata] = (generator, first, after)


@contextlib.contextmanager
def replayed_as_default(
    generator: Generator, ranks: Collection[int]
) -> Iterator[Mapping[int, Callable[[], None]]]:
    """`replayed` for ops that accept no generator: as `RankGenerators.as_default`."""
    with replayed(generator, ranks) as copies, _lent(copies, generator.device) as turns:
        yield turns


def _states_of(generator: Generator, ranks: Collection[int]) -> dict[int, Tensor]:
    state = generator.get_state()
    known = _left.get(generator._cdata)
    if known is None:
        return dict.fromkeys(sorted(ranks), state)
    _, left, states = known
    if torch.equal(left, state) and all(r in states for r in ranks):
        return {r: states[r] for r in sorted(ranks)}
    seeded = Generator(generator.device).manual_seed(generator.initial_seed())
    if torch.equal(seeded.get_state(), state):
        return dict.fromkeys(sorted(ranks), state)
    what = (
        "torch's default generator"
        if is_default(generator)
        else "a torch.Generator passed as generator="
    )
    raise RankDivergence(
        f"{what} stands for the generators of ranks {sorted(states)}, which drew different amounts "
        "from it and so have different states, and it was then used for a plain tensor, for other "
        "ranks, or got another state. The ranks' states are not known any more. Seed it again, or "
        "draw inside LocalTensorMode without generator=, where every rank has a generator."
    )
