"""What a script sees of its process, per rank: environment, arguments, __main__, modules, logging.

Pieces of `process_state.ProcessState`. Modules of the standard library and of installed packages
are shared by the ranks; those of the script's project, which keep state in their globals, are each
rank's own: every rank imports them for itself.
"""

from __future__ import annotations

import logging
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch

from .stacks import is_users


class Environment:
    """os.environ. Every rank starts with the caller's and what `of_rank` adds."""

    def __init__(self, of_rank: Callable[[int], Mapping[str, str]]) -> None:
        self._of_rank = of_rank

    def fresh(self, rank: int) -> dict[str, str]:
        return {**os.environ, **self._of_rank(rank)}

    def get(self) -> dict[str, str]:
        return dict(os.environ)

    def set(self, state: dict[str, str]) -> None:
        for name in os.environ.keys() - state.keys():
            del os.environ[name]
        for name, value in state.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


class Folder:
    """The working directory."""

    def fresh(self, rank: int) -> str:
        return os.getcwd()

    get = staticmethod(os.getcwd)

    def set(self, state: str) -> None:
        if state != os.getcwd():
            os.chdir(state)


class Modules:
    """sys.modules: __main__ and the modules of the script's project."""

    def __init__(self) -> None:
        self._shared = set(sys.modules) - {"__main__"}
        self._count = -1
        self._own: set[str] = {"__main__"}

    def fresh(self, rank: int) -> dict[str, ModuleType]:
        return {"__main__": ModuleType("__main__")}

    def get(self) -> dict[str, ModuleType]:
        if len(sys.modules) != self._count:
            self._classify()
        return {n: sys.modules[n] for n in self._own if n in sys.modules}

    def _classify(self) -> None:
        for name in sys.modules.keys() - self._shared - self._own:
            if _is_of_project(sys.modules[name]):
                self._own.add(name)
            else:
                self._shared.add(name)
        self._count = len(sys.modules)

    def set(self, state: dict[str, ModuleType]) -> None:
        for name in self._own - state.keys():
            sys.modules.pop(name, None)
        sys.modules.update(state)
        self._count = len(sys.modules)


_INSTALLED = tuple(
    os.path.join(os.path.realpath(path), "")
    for path in {
        *(sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
        os.path.dirname(os.path.dirname(torch.__file__)),
    }
)


def _is_of_project(module: Any) -> bool:
    spec = getattr(module, "__spec__", None)
    file = getattr(module, "__file__", None) or getattr(spec, "origin", None)
    if file in (None, "namespace"):
        paths = list(getattr(module, "__path__", ()))
        file = paths[0] if paths else None
    if file is None or file in ("built-in", "frozen"):
        return False
    real = os.path.realpath(file)
    # A compiled extension can be loaded only once.
    return is_users(real) and not real.startswith(_INSTALLED) and not real.endswith((".so", ".pyd"))


class Logging:
    """Handlers and levels of the root logger, and of loggers that ranks make."""

    def __init__(self) -> None:
        self._shared = set(logging.root.manager.loggerDict)

    def fresh(self, rank: int) -> dict[str, Any]:
        return {"": ([], logging.WARNING, False, True)}

    def get(self) -> dict[str, Any]:
        names = logging.root.manager.loggerDict.keys() - self._shared
        found: dict[str, Any] = {}
        for name in ("", *names):
            one = logging.root if name == "" else logging.root.manager.loggerDict[name]
            if isinstance(one, logging.Logger):
                found[name] = [*one.handlers], one.level, one.disabled, one.propagate
        return found

    def set(self, state: dict[str, Any]) -> None:
        for name in logging.root.manager.loggerDict.keys() - self._shared - state.keys():
            one = logging.root.manager.loggerDict[name]
            if isinstance(one, logging.Logger):
                one.handlers, one.level, one.disabled, one.propagate = [], 0, False, True
        for name, (handlers, level, disabled, propagate) in state.items():
            one = logging.getLogger(name) if name else logging.root
            one.handlers, one.level = [*handlers], level
            one.disabled, one.propagate = disabled, propagate
        logging.root.manager._clear_cache()  # type: ignore[attr-defined]
