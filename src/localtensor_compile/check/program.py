"""A program under check: what it is given (World) and how it is found, here and in other processes.

What a program returns is read in outputs.py; who runs it is decided in engines.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import typing_extensions
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import LocalTensorError
from ..world.mode import rank_map
from ._gloo_target import Programs, Target, target_of
from ._gloo_worker import decode, encode

T = TypeVar("T")

DEFAULT_FUNCTION = "program"
DEGREES = ("dp", "tp", "pp")

_STDLIB = f"{sysconfig.get_path('stdlib')}{os.sep}"
# torch's deprecated functions go through typing_extensions.
_NOT_USERS = (
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parents[1]}{os.sep}",
    typing_extensions.__file__,
    "<",
)


class ProgramError(LocalTensorError, ValueError):
    """A program that cannot be loaded or run, or a result that cannot be compared."""


class World:
    """What a program needs to know about where it runs. Everything else is ordinary torch.

    Args:
        size: number of ranks.
        device: where the program should put its tensors.
        backend: the torch.compile backend of `compile` or its name, None for eager.
        degrees: degrees of parallelism that `degree` answers with; their product is the size.

    Attributes:
        size: number of ranks.
        device: a torch.device.
        compiled: how many times `compile` was called for a compiled run.
        asked: the names that `degree` was asked for.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        backend: str | Callable[..., Any] | None = None,
        degrees: Mapping[str, int] | None = None,
    ) -> None:
        self.size = size
        self.device = torch.device(device)
        self.compiled = 0
        self.asked: set[str] = set()
        self._backend = backend
        self._degrees = {"tp": size} if degrees is None else dict(degrees)

    def degree(self, name: str) -> int:
        """How many ranks share the work in one way: "dp" (data), "tp" (tensor) or "pp" (pipeline).

        `localtensor matrix` runs a program with several of them; elsewhere "tp" is the world size
        and the others are 1. Their product is the world size.

        Raises:
            ProgramError: another name.
        """
        if name not in DEGREES:
            raise ProgramError(f"degree({name!r}): the names are {', '.join(DEGREES)}.")
        self.asked.add(name)
        return self._degrees.get(name, 1)

    def mesh(
        self, shape: int | Sequence[int] | None = None, names: str | Sequence[str] | None = None
    ) -> DeviceMesh:
        """A DeviceMesh over all ranks: of one dimension, or of `shape` with dimensions `names`."""
        sizes = (self.size,) if shape is None else (shape,) if isinstance(shape, int) else shape
        labels = (names,) if isinstance(names, str) else names
        return init_device_mesh(
            self.device.type,
            tuple(sizes),
            mesh_dim_names=None if labels is None else tuple(labels),
        )

    def compile(self, target: T, *, fullgraph: bool = True, **options: Any) -> T:
        """`target` (a function or module) itself in an eager run, else torch.compile of it.

        Args:
            target: what to compile.
            fullgraph: whether a graph break is an error.
            options: passed to torch.compile (dynamic, mode, options).

        Raises:
            ProgramError: a `backend` among the options; the engine decides that.
        """
        if "backend" in options:
            raise ProgramError(
                f"world.compile(..., backend={options['backend']!r}): the engine that runs the "
                "program chooses the backend. Leave it out, and name backends in lt.check(..., "
                "backends=...) or --backend."
            )
        if self._backend is None:
            return target
        self.compiled += 1
        compiled: T = torch.compile(target, fullgraph=fullgraph, backend=self._backend, **options)
        return compiled

    def rank_map(self, callback: Callable[[int], Any]) -> Any:
        """`callback(rank)` of every simulated rank as one LocalTensor; of this rank if real."""
        return rank_map(callback)


ProgramFunction = Callable[[World], Mapping[str, Any]]


@dataclass(frozen=True)
class Program:
    """A function under check and the name it has in reports."""

    function: ProgramFunction
    name: str


def as_program(program: Program | ProgramFunction) -> Program:
    """A Program of a function; of a Program, itself."""
    if isinstance(program, Program):
        return program
    if not callable(program):
        raise ProgramError(
            f"a program is a function program(world) that returns named tensors, found "
            f"{type(program).__name__}."
        )
    function = getattr(program, "func", program)
    return Program(program, getattr(function, "__qualname__", type(program).__name__))


# ---- finding a program in a file
_importing = 0


def load_program(spec: str) -> Program:
    """The program that FILE or FILE:FUNCTION names (function `program` where none is named).

    The file is imported, not run as a script: a `main(program)` call in it does nothing then.

    Raises:
        ProgramError: no such file or function, or the file raised while it was imported.
    """
    file, function = _split(spec)
    path = Path(file)
    if path.is_dir():
        raise ProgramError(f"{file} is a directory: name a Python file, as in {file}/FILE.py.")
    if not path.is_file():
        raise ProgramError(f"no such file: {file} (looked from {Path.cwd()}).")
    path = path.resolve()
    try:
        module = _load_module(_module_name(path), str(path))
    except Exception as error:
        raise ProgramError(f"{file} could not be imported.\n{user_traceback(error)}") from error
    target: Any = module
    for part in function.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        names = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        found = "it is not callable" if target is not None else "there is none"
        raise ProgramError(
            f"{file} should define a function {function}(world), but {found}. Functions in the "
            f"file: {', '.join(names) or 'none'}. Name one as {file}:FUNCTION."
        )
    return Program(target, f"{file}:{function}")


def _split(spec: str) -> tuple[str, str]:
    file, colon, function = spec.rpartition(":")
    if colon and all(part.isidentifier() for part in function.split(".")):
        return file, function
    return spec, DEFAULT_FUNCTION


def _module_name(path: Path) -> str:
    """The name that `import` would give, unless a module has it: then one of its own."""
    known = sys.modules.get(path.stem)
    if known is None or getattr(known, "__file__", None) == str(path):
        return path.stem
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _load_module(name: str, file: str) -> ModuleType:
    """Import `file` afresh under `name`, with its folder on sys.path as for a script."""
    folder = str(Path(file).parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ProgramError(f"{file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with importing():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within it, files are imported for their functions: `main` must not run them."""
    global _importing
    _importing += 1
    try:
        yield
    finally:
        _importing -= 1


def is_importing() -> bool:
    """Whether a file is being imported by `load_program`, here or in an oracle process."""
    return _importing > 0


# ---- handing a program to another process
@dataclass(frozen=True)
class PortableProgram:
    """A program as another Python process finds it. Made by `portable`; picklable.

    Attributes:
        target: the function's file or module, and its name there.
        bound: encoded (args, kwargs) of a functools.partial. Read only when the file is imported:
            they may be objects of its classes.
    """

    target: Target
    bound: bytes

    def load(self, programs: Programs) -> ProgramFunction:
        """The function, imported in this process."""
        with importing():
            function = programs.function(self.target)
        args, kwargs = decode(self.bound)
        return functools.partial(function, *args, **kwargs)


def portable(program: Program) -> PortableProgram:
    """`program` for other processes.

    Raises:
        ProgramError: it is a lambda, a closure, or otherwise cannot be imported by name.
    """
    function: Any = program.function
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(function, functools.partial):
        function, args, kwargs = function.func, function.args, function.keywords
    try:
        return PortableProgram(target_of(function), encode((args, kwargs)))
    except Exception as error:
        raise ProgramError(
            f"real processes cannot be given this program: {error} functools.partial may bind "
            "arguments. Or leave real processes out with oracle=None (--oracle none): then "
            "nothing checks the eager simulation itself."
        ) from error


# ---- errors in the user's code
def user_traceback(error: BaseException) -> str:
    """The traceback of `error` without frames of torch, this package and the standard library."""
    report = traceback.TracebackException.from_exception(error)
    report.stack = _users_frames(report.stack)
    return "".join(report.format(chain=False)).rstrip()


def user_frames(error: BaseException) -> str:
    """Where in the user's code `error` was raised: the frames of `user_traceback` alone."""
    frames = _users_frames(traceback.extract_tb(error.__traceback__))
    return "".join(frames.format()).rstrip()


def _users_frames(stack: traceback.StackSummary) -> traceback.StackSummary:
    own = [frame for frame in stack if is_users(frame.filename)]
    return traceback.StackSummary.from_list(own) if own else stack


def is_users(file: str) -> bool:
    """Whether a file is the user's, or a library's that is not named here."""
    if file.startswith(_STDLIB):
        return "site-packages" in file
    return not file.startswith(_NOT_USERS)
