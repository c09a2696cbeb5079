"""What factories need from torch's private parts: answers for Dynamo, and torch.load.

Dynamo traces the function mode's Python for every op. A question whose answer depends on what the
traced values are (a per-rank number? a plain tensor?) is not traced but answered here, once, from
Dynamo's own records.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch.utils._device import DeviceContext

from ..._torch import VERSION
from ...errors import UnsupportedError
from ..state import enabled_local_tensor_mode

NUMPY_ARRAY = object()
"""Stands for a NumPy array among the arguments of a TracedCall."""


@dataclass(frozen=True)
class TracedCall:
    """A torch function call as Dynamo sees it: fake tensors and symbolic numbers as arguments.

    `caller` is the module of the code that makes the call. Arguments that are neither tensors nor
    numbers nor sequences of those are None.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    caller: str | None


def decided_while_tracing(
    decide: Callable[[TracedCall], str | None],
) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], str | None]:
    """A function (func, args, kwargs) -> decide(call) that traced code may call.

    The answer is a constant of the traced frame. Outside of Dynamo's tracing it answers None.
    """

    def question(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return None

    def answer(_: Any, tx: Any, func: Any, args: Any, kwargs: Any) -> Any:
        frame = tx
        while frame.f_code.co_name == "__torch_function__" and frame.parent is not None:
            frame = frame.parent
        caller = frame.f_globals.get("__name__")
        call = TracedCall(_python(func), _example(args), _examples_by_name(kwargs), caller)
        return _constant(tx, decide(call))

    return _answered(question, answer)


def _default_device() -> torch.device | None:
    """The device of torch.set_default_device or `with torch.device(...)` while Dynamo traces."""
    return None


def _traced_default_device(_: Any, tx: Any) -> Any:
    for variable in tx.symbolic_torch_function_state.mode_stack:
        mode = variable.realize()
        if not isinstance(mode.value, DeviceContext):
            if mode.value is None:  # how Dynamo marks a device context that the frame itself made
                raise UnsupportedError(
                    "torch.set_default_device inside a compiled function has no effect on "
                    "factories per rank. Call it before the compiled function, or pass device=."
                )
            continue
        from torch._dynamo.variables.base import VariableTracker

        get = VariableTracker.build(tx, getattr)
        return get.call_function(tx, [mode, _constant(tx, "device")], {})
    return _constant(tx, None)


def _constant(tx: Any, value: Any) -> Any:
    from torch._dynamo.variables.base import VariableTracker

    return VariableTracker.build(tx, value)


def _answered(question: Any, answer: Callable[..., Any]) -> Any:
    """Make Dynamo call `answer(variable, tx, *variables)` where traced code calls `question`."""
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    question = torch.compiler.allow_in_graph(question)
    # A table from functions to handlers that is built once; ours is the only entry we touch.
    TorchInGraphFunctionVariable._get_handlers()[question] = answer
    return question


def _python(variable: Any) -> Any:
    """The function that a Dynamo variable stands for, or None."""
    try:
        return variable.as_python_constant()
    except NotImplementedError:  # Dynamo's "this is not a constant"
        return None


def _example(variable: Any) -> Any:
    from torch._dynamo import variables

    variable = variable.realize()
    if isinstance(variable, variables.SymNodeVariable):
        return variable.sym_num
    if isinstance(variable, variables.NumpyNdarrayVariable):
        return NUMPY_ARRAY
    if isinstance(variable, variables.TensorVariable):
        return variable.as_proxy().node.meta.get("example_value")
    if isinstance(variable, variables.SliceVariable):
        return slice(*(_example(v) for v in variable.items))
    if isinstance(variable, variables.BaseListVariable):
        return tuple(_example(v) for v in variable.items)
    if isinstance(variable, variables.ConstantVariable):
        return variable.value
    return None


def _examples_by_name(kwargs: Any) -> dict[str, Any]:
    return {key.vt.as_python_constant(): _example(v) for key, v in kwargs.realize().items.items()}


def made_by_dynamo(code: CodeType) -> bool:
    """Whether `code` is bytecode that Dynamo generated for a frame."""
    from torch._dynamo.convert_frame import output_codes

    return code in output_codes


def in_transform() -> bool:
    """Whether torch.func transforms (grad, vmap) are running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def outside_transforms() -> AbstractContextManager[Any]:
    """Context manager: torch.func transforms do not see what happens inside."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


# Calls a Python-level torch function past its own check for function modes; since torch 2.13.
redispatch: Callable[..., Any] | None = getattr(torch.overrides, "redispatch_function", None)
default_device = _answered(_default_device, _traced_default_device)


# Dynamo would record these as they are; outside of it, the factories in them pass through the mode.
PYTHON_FACTORIES = {getattr(torch.signal.windows, name) for name in torch.signal.windows.__all__}
# Dynamo does not show these to a function mode either; outside of it, the functions of
# torch.nn.functional that call them pass through the mode.
_NN_FUNCTIONS = {f for f in vars(torch._C._nn).values() if callable(f)}


def replacements() -> Iterator[tuple[Any, str, Any]]:
    import torch._dynamo.variables.torch as dynamo_torch
    import torch._inductor.config

    from .. import factories, per_rank_code
    from ..factory_builders import BUILDERS
    from ..loading import load_per_rank

    yield torch, "load", load_per_rank(torch.load)
    known = dynamo_torch.get_overridable_functions
    shown = known() | PYTHON_FACTORIES | _NN_FUNCTIONS
    if VERSION < (2, 13):  # which shows only some factories
        shown |= set(BUILDERS)

    @functools.wraps(known, updated=())
    def get_overridable_functions() -> Any:
        return known() if enabled_local_tensor_mode() is None else shown

    yield dynamo_torch, "get_overridable_functions", get_overridable_functions
    # AOTAutograd may cache graphs with our nodes: they depend on nothing but their arguments.
    cacheable = torch._inductor.config.unsafe_marked_cacheable_functions
    for node in (
        factories.on_ranks,
        factories.as_written,
        per_rank_code._split,
        per_rank_code._join,
    ):
        yield cacheable, f"{node.__module__}.{node.__name__}", _sources_fingerprint()
    yield from _higher_order_operators()


@functools.cache
def _sources_fingerprint() -> str:
    """Changes when the code that such a node runs changes."""
    from ...dispatch import random_factories
    from .. import factories, per_rank_code, rank_numbers

    modules = (factories, per_rank_code, rank_numbers, random_factories)
    sources = "".join(inspect.getsource(m) for m in modules)
    return hashlib.sha256(sources.encode()).hexdigest()


def _higher_order_operators() -> Iterator[tuple[Any, str, Any]]:
    """Dynamo takes the function mode off the stack while it traces a higher order operator with
    the functions in it (checkpoint, cond); factories in those belong to the mode too."""
    import torch._dynamo.variables.torch_function as dynamo_modes
    from torch._dynamo.variables.higher_order_ops import TorchHigherOrderOperatorVariable

    from ..factories import FactoryMode

    original = dynamo_modes.dispatch_torch_function

    @functools.wraps(original)
    def dispatch_torch_function(tx: Any, fn: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(fn, TorchHigherOrderOperatorVariable):
            modes = [m.realize().value for m in tx.symbolic_torch_function_state.mode_stack]
            if modes and all(isinstance(m, (FactoryMode, DeviceContext)) for m in modes):
                return fn._call_function(tx, args, kwargs)
        return original(tx, fn, args, kwargs)

    yield dynamo_modes, "dispatch_torch_function", dispatch_torch_function
