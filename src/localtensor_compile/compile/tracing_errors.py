"""What torch shows of a program that it compiles: our errors as they are, and the user's lines.

Dynamo puts most exceptions into one of its own (TorchRuntimeError, BackendCompilerFailed,
InternalTorchDynamoError, Unsupported), so that the same mistake would be another type of exception
in compiled code than in eager code. Ours are taken out again. Neither errors nor the stack traces
of graph nodes show frames of this package, which Dynamo traces through on its way.
"""

from __future__ import annotations

import functools
import glob
import inspect
import os
import traceback
from typing import Any

from ..errors import LocalTensorError


def _ours(error: BaseException) -> LocalTensorError | None:
    """The error of ours that `error` is or was made of."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, LocalTensorError):
            return one
        seen.add(id(one))
        waiting += [getattr(one, "inner_exception", None), one.__cause__, one.__context__]
    return None


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_USER_CODE = "\n\nfrom user code:\n"


def _with_user_line(error: LocalTensorError, outer: BaseException) -> LocalTensorError:
    """`error`, whose text names the user's line that torch was compiling, where it is known."""
    stack = getattr(outer, "real_stack", None) or getattr(error, "real_stack", None)
    if stack:
        text = str(error).partition("\nfrom user code:")[0].rstrip()
        lines = traceback.format_list([f for f in stack if not f.filename.startswith(_PACKAGE)])
        error.args = (f"{text}{_USER_CODE}{''.join(lines)}",)
    return error


def forget_files() -> None:
    """symbolic_shapes keeps what guards.uninteresting_files returned the first time."""
    from torch.fx.experimental import symbolic_shapes

    symbolic_shapes.uninteresting_files.cache_clear()


def _with_our_files(uninteresting_files: Any) -> Any:
    """The files whose frames torch leaves out of stack traces."""

    @functools.cache
    def files() -> set[str]:
        ours = glob.glob(f"{glob.escape(_PACKAGE)}**/*.py", recursive=True)
        return uninteresting_files() | set(ours)

    return functools.wraps(uninteresting_files)(files)


def replacements() -> list[tuple[Any, Any, Any]]:
    """(owner, name, replacement) in torch's Dynamo."""
    import torch._dynamo.convert_frame as convert_frame
    import torch._dynamo.guards as guards
    from torch._dynamo.exc import Unsupported

    original = convert_frame._compile
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compile_frame(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except Exception as error:
            ours = _ours(error)
            if ours is None:
                raise
            one_graph = signature.bind(*args, **kwargs).arguments.get("one_graph", True)
            if isinstance(error, Unsupported) and not one_graph:
                raise  # the frame then runs in eager, which raises it again if it must
            raise _with_user_line(ours, error) from None

    return [
        (convert_frame, "_compile", compile_frame),
        (guards, "uninteresting_files", _with_our_files(guards.uninteresting_files)),
    ]
