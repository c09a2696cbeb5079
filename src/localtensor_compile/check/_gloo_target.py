"""Which function a gloo worker has to call: named here in the caller, found again in the worker."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import LocalTensorError


class GlooError(LocalTensorError):
    """A program failed on real gloo processes, or could not be started on them.

    Attributes:
        raised: traceback text of each rank that raised.
        exited: exit code of each rank that died: -N if signal N killed it, None if unknown.
        waiting: for each rank that had not finished, the line of the program it was in.
    """

    def __init__(
        self,
        message: str,
        *,
        raised: Mapping[int, str] | None = None,
        exited: Mapping[int, int | None] | None = None,
        waiting: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.raised = dict(raised or {})
        self.exited = dict(exited or {})
        self.waiting = dict(waiting or {})


@dataclass(frozen=True)
class Target:
    """`name`, which may be dotted, in the file or, if `is_module`, in the module `source`."""

    source: str
    is_module: bool
    name: str

    def __str__(self) -> str:
        return f"{self.source if self.is_module else os.path.basename(self.source)}:{self.name}"


def target_of(function: str | Callable[..., Any]) -> Target:
    """Where other processes find `function`: "FILE.py:NAME", "MODULE:NAME" or a function.

    Raises:
        GlooError: they cannot find it.
    """
    if callable(function):
        return _target_of_callable(function)
    source, _, name = function.rpartition(":")
    if not source or not name:
        raise GlooError(
            f"{function!r} names no function. Write FILE.py:FUNCTION or MODULE:FUNCTION."
        )
    if not source.endswith(".py"):
        return Target(source, True, name)
    if not os.path.isfile(source):
        raise GlooError(f"there is no file {source!r} (current directory: {os.getcwd()}).")
    return Target(os.path.abspath(source), False, name)


def _target_of_callable(function: Callable[..., Any]) -> Target:
    name = getattr(function, "__qualname__", None)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if name is None or module is None or "<" in name or _attribute(module, name) is not function:
        raise GlooError(
            f"{name or repr(function)} cannot run in other processes, which cannot import it: it "
            "is a lambda, or made inside another function, or bound to an object. Define a "
            "function at the top level of a file, and pass what it needs as arguments."
        )
    file = getattr(module, "__file__", None)
    if file is None:
        raise GlooError(
            f"{name} was defined interactively, so other processes cannot import it. Put it "
            "into a file."
        )
    if module.__name__ != "__main__":
        in_package = bool(module.__package__) and module.__package__ != module.__name__
        import_name = module.__name__ if in_package else None
    else:  # `python -m PACKAGE.MODULE`; a script has no package
        spec = module.__spec__
        import_name = spec.name if spec is not None and spec.parent else None
    if import_name is not None:
        return Target(import_name, True, name)
    return Target(os.path.abspath(file), False, name)


def _attribute(module: ModuleType, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


# ---------------------------------------------------------------- in the worker
_Version = tuple[int, int]


@dataclass
class _Loaded:
    module: ModuleType
    versions: dict[str, _Version]  # of the files it was made from
    helpers: set[str]  # names of the modules that it imported from its own directory


class Programs:
    """The programs imported so far; one of which a file has changed is imported again."""

    def __init__(self) -> None:
        self._files: dict[str, _Loaded] = {}
        self._modules: dict[str, _Version] = {}

    def function(self, target: Target) -> Callable[..., Any]:
        value: Any = self._module(target.source) if target.is_module else self._file(target.source)
        for part in target.name.split("."):
            if not hasattr(value, part):
                raise AttributeError(f"{target.source} has no function {target.name!r}")
            value = getattr(value, part)
        return value

    def _module(self, name: str) -> ModuleType:
        module = importlib.import_module(name)
        version = _version(module.__file__ or "")
        if self._modules.setdefault(name, version) != version:
            linecache.checkcache()
            module = importlib.reload(module)
            self._modules[name] = version
        return module

    def _file(self, path: str) -> ModuleType:
        known = self._files.get(path)
        if known is not None and all(_version(f) == v for f, v in known.versions.items()):
            return known.module
        linecache.checkcache()
        # Another program's helpers.py must not be taken for this one's, nor an older one.
        for program in self._files.values():
            for name in program.helpers:
                sys.modules.pop(name, None)
        name = Path(path).stem  # as `import` has it, so that objects of its classes can travel
        if known is not None:
            name = known.module.__name__
        elif name in sys.modules:
            name = f"{name}_{len(self._files)}"
        before = set(sys.modules)
        module = _execute(name, path)
        helpers = {n for n in set(sys.modules) - before - {name} if _is_helper(n, path, before)}
        files = [path, *(str(sys.modules[n].__file__) for n in helpers)]
        self._files[path] = _Loaded(module, {f: _version(f) for f in files}, helpers)
        return module


def _execute(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Not through the loader: its bytecode cache misses a second change within one second.
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    sys.modules[name] = module
    try:
        exec(code, module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _is_helper(name: str, program: str, before: set[str]) -> bool:
    """Whether module `name`, which was not there `before`, lies beside the program's file."""
    file = getattr(sys.modules[name], "__file__", None)
    return (
        file is not None
        and name.partition(".")[0] not in before
        and file.startswith(os.path.dirname(program) + os.sep)
        and "site-packages" not in file
    )


def _version(file: str) -> _Version:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return (0, 0)
    return status.st_mtime_ns, status.st_size
