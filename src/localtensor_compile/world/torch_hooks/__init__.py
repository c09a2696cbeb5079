"""Every torch name that is replaced while a LocalTensorMode is active, in one place.

`installed()` puts all replacements in place when the first mode of the process is entered and
takes them out when the last one is left. Each replacement asks for the mode of its own thread and
calls the original where there is none, so other threads see no change. On leaving, a name that
somebody else replaced meanwhile is reported instead of being overwritten.

The modules of this folder each yield (owner, attribute, replacement).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..._torch import MAX_VERSION, MIN_VERSION, VERSION
from ...errors import UnsupportedError

_lock = threading.RLock()
_users = 0
_undo = contextlib.ExitStack()

Replacement = tuple[Any, str, Any]
MISSING: Any = object()
"""As the replacement of a dict's item: the item is taken out."""


def all_replacements() -> Iterator[Replacement]:
    """Every (owner, attribute, replacement), built fresh from what torch has now."""
    from . import (
        artifacts,
        autograd,
        checkpoint,
        collectives,
        context_parallel,
        ddp,
        distributed,
        dtensor,
        export,
        factories,
        fsdp,
        random,
    )

    # factories.py wraps what random.py has replaced.
    for module in (
        artifacts,
        autograd,
        distributed,
        collectives,
        dtensor,
        context_parallel,
        fsdp,
        ddp,
        checkpoint,
        export,
        random,
        factories,
    ):
        yield from module.replacements()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Context manager: torch's names are replaced inside.

    Raises:
        UnsupportedError: this version of torch is not supported.
    """
    global _users
    if not MIN_VERSION <= VERSION <= MAX_VERSION:
        raise UnsupportedError(
            f"localtensor_compile supports torch {_dots(MIN_VERSION)} to {_dots(MAX_VERSION)}, but "
            f"this is torch {_dots(VERSION)}. Install a supported version."
        )
    with _lock:
        if _users == 0:
            _install()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _undo.close()


def _dots(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _install() -> None:
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in all_replacements():
            stack.callback(_replace(owner, name, replacement))
        _undo.push(stack.pop_all())


def _replace(owner: Any, name: str, replacement: Any) -> Any:
    """Set owner.name (or owner[name] of a dict) and return the function that undoes it."""
    if isinstance(owner, dict):
        before = owner.get(name, MISSING)
        if replacement is MISSING:
            owner.pop(name, None)
        else:
            owner[name] = replacement

        def undo_item() -> None:
            if before is MISSING:
                owner.pop(name, None)
            else:
                owner[name] = before

        return undo_item
    # The raw attribute, so that staticmethods come back as such.
    before = owner.__dict__.get(name, MISSING) if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, replacement)

    def undo() -> None:
        if before is MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo


@contextlib.contextmanager
def cache_key(text: Callable[[], str]) -> Iterator[None]:
    """Context manager: compile caches tell this world from others.

    `text()` is asked whenever a cache key is computed: groups are made while the mode is active.
    """
    import torch.compiler.config as config

    before = config.cache_key_tag
    config.cache_key_tag = _Tag(before, text)
    try:
        yield
    finally:
        config.cache_key_tag = before


class _Tag(str):
    """A string that is pickled with what its text is at that moment."""

    def __new__(cls, before: str, text: Callable[[], str]) -> _Tag:
        self = super().__new__(cls, before)
        self.before, self.text = before, text
        return self

    before: str
    text: Callable[[], str]

    def __str__(self) -> str:
        return f"{self.before}localtensor:{self.text()}"

    def __format__(self, spec: str) -> str:
        return str(self)

    def __reduce__(self) -> Any:
        return str, (str(self),)


def init_simulated_process_group(world_size: int) -> None:
    """A default process group of `world_size` simulated ranks."""
    from .distributed import init_simulated_process_group as init

    init(world_size)


def destroy_simulated_process_group() -> None:
    """Destroy all process groups, and what torch remembers of their meshes."""
    import torch.distributed as dist

    from .dtensor import forget_sharding

    dist.destroy_process_group()
    forget_sharding()


def function_mode(mode: Any) -> Any:
    """The torch function mode that turns factories into per-rank factories."""
    from ..factories import FactoryMode
    from ..independent_rng import IndependentFactoryMode

    return (IndependentFactoryMode if mode.sharding_independent_rng else FactoryMode)(mode)


def independent_draws() -> contextlib.AbstractContextManager[None]:
    """Context manager: a DTensor draws the global tensor, whatever its sharding."""
    from ..independent_rng import tracking

    return tracking()


def rank_generators(mode: Any) -> Any:
    """The random number generators of the mode's ranks."""
    from ..rng import ModeGenerators

    return ModeGenerators(mode)
