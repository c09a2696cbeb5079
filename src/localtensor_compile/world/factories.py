"""Tensor factories per rank: torch.zeros and its siblings make a LocalTensor inside a world.

A torch function mode, because Dynamo traces those, and because nothing below it wraps: what
AOTAutograd, Inductor or an op's own implementation allocates stays plain. Functions that get a
per-rank number pass through here too, on their way to rank_numbers.py. How each factory makes its
shards is in factory_builders.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import own_frame_never_compiled
from ..collectives.plain import FUNCTIONAL
from ..collectives.plain import functional as plain_collective
from ..dispatch.random_factories import PLAIN_DRAWS, draws_for_plain, plain_draw
from ..dispatch.shortcuts import SHORTCUTS, run_shortcut
from ..errors import PlainTensorError, UnsupportedError
from ..values.stack import StackedRanks
from ..values.tensor import LocalTensor
from .factory_builders import BUILDERS, Ranks, build, without_grad
from .random_checks import DRAWING_INSIDE
from .rank_numbers import (
    BY_INDEX,
    MAY_HOLD_NUMBERS,
    call_with_numbers,
    holds_rank_number,
    is_plain,
    name_of,
    rank_numbers_in_index,
)
from .state import local_tensor_mode
from .torch_hooks.factories import (
    NUMPY_ARRAY,
    TracedCall,
    decided_while_tracing,
    default_device,
    in_transform,
    made_by_dynamo,
    redispatch,
)


class FactoryMode(TorchFunctionMode):
    """Makes factories per rank while `mode` is enabled and the innermost world of its thread.

    A factory makes a shard of its own for each rank; sizes, bounds and values may be per-rank
    numbers. What takes a tensor follows that tensor: `zeros_like(plain)`, `plain.new_zeros(2)` and
    `plain.clone()` stay plain, and a plain tensor stands for the same value on every rank.

    - `torch.tensor(plain)` copies to every rank. `torch.as_tensor(plain)` is `plain` itself, as it
      always is. `as_tensor` and `asarray` of a NumPy array copy to every rank: the one memory of
      the array cannot be that of several shards.
    - `torch.from_numpy`, `frombuffer`, `from_dlpack`, the deprecated `torch.range` and the legacy
      constructors `torch.Tensor(...)`, `torch.FloatTensor(...)` cannot be overridden and stay
      plain.
    - Sparse tensors stay plain.
    - Factories that torch's own machinery calls (compiler, optimizers, meshes) stay plain.

    Args:
        mode: has `ranks`, a set of ints, and `_disable`, a bool that is read at each call.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.mode = mode
        self.ranks: Ranks = tuple(sorted(mode.ranks))
        self.stacked: bool = mode.stacked

    # torch calls it from frames that Dynamo left to Python, as from forward of a module whose
    # hooks it skips: its own frame would become a graph of one op.
    @own_frame_never_compiled
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        if torch.compiler.is_dynamo_compiling():
            if func is Tensor.unflatten:  # calls super(), which Dynamo cannot trace in a mode
                func = torch.unflatten
            name = _rewritten(func, args, kwargs)
            if name is None:
                return func(*args, **kwargs)
            device = default_device()
            if self.mode._disable:
                return as_written(name, args, kwargs, device)
            result = on_ranks(name, self.ranks, args, kwargs, device, self.stacked)
            # Dynamo breaks the graph at a new leaf, here as in torch's own factories.
            return result.requires_grad_() if kwargs.get("requires_grad") else result
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        for arg in args:
            if arg.__class__ in MAY_HOLD_NUMBERS and holds_rank_number(arg):
                return call_with_numbers(func, args, kwargs)
        if kwargs:
            for arg in kwargs.values():
                if arg.__class__ in MAY_HOLD_NUMBERS and holds_rank_number(arg):
                    return call_with_numbers(func, args, kwargs)
        return func(*args, **kwargs)


# ---------------------------------------------------------------- handlers of eager calls
def _factory(mode: FactoryMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    caller: Any = sys._getframe(1)
    while caller.f_code.co_name == "__torch_function__":  # ours, or that of a mode above ours
        caller = caller.f_back
    if (
        mode.mode._disable
        or mode.mode is not local_tensor_mode()
        or _is_internal(caller.f_globals.get("__name__"))
        # This is how Dynamo's own bytecode hands a NumPy array to a compiled graph.
        or (func is torch.as_tensor and _is_numpy(args) and made_by_dynamo(caller.f_code))
    ):
        return func(*args, **kwargs)
    return build(func, StackedRanks(mode.ranks) if mode.stacked else mode.ranks, args, kwargs)


def _is_numpy(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], (numpy.ndarray, numpy.generic))


def _shortcut(mode: FactoryMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return NotImplemented if kwargs else run_shortcut(func, args)


def _index(mode: FactoryMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    index = rank_numbers_in_index(args[1])
    if holds_rank_number((index, *args[2:])):
        return call_with_numbers(func, (args[0], index, *args[2:]), kwargs)
    with_dimension = _condition_as_dimension(args[0], args[1])
    if with_dimension is not None:
        return func(*with_dimension, *args[2:], **kwargs)
    return func(*args, **kwargs)


def _condition_as_dimension(tensor: Tensor, index: Any) -> tuple[Tensor, Any] | None:
    """(tensor, index) with a bool of each rank in the index as a mask of a dimension of one.

    torch asks a 0-dim bool tensor for its value, of which there is only one; a mask stays a tensor.
    """
    parts = index if isinstance(index, tuple) else (index,)
    for place, part in enumerate(parts):
        if isinstance(part, LocalTensor) and part.dtype == torch.bool and part.ndim == 0:
            masked = (*parts[:place], part.unsqueeze(0), *parts[place + 1 :])
            return tensor.unsqueeze(place), masked
        if part.__class__ is not slice:  # what other indices do to dimensions is torch's business
            return None
    return None


def _draw(mode: FactoryMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if holds_rank_number((*args, *kwargs.values())):
        return call_with_numbers(func, args, kwargs)
    if mode.mode._disable or mode.mode is not local_tensor_mode():
        return func(*args, **kwargs)
    return plain_draw(func, mode.ranks, args, kwargs)


def _collective(mode: FactoryMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The simulated process group moves no data: plain tensors must not reach it."""
    if mode.mode._disable or mode.mode is not local_tensor_mode() or not _all_plain(args):
        return func(*args, **kwargs)
    return plain_collective(func, args)


def _set_data(mode: FactoryMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, value = args
    if isinstance(value, LocalTensor) and not isinstance(target, LocalTensor):
        raise PlainTensorError(
            "tensor.data = ... would put the values of several ranks into one plain tensor of "
            f"shape {tuple(target.shape)}: only one rank's value could stay. Make the target a "
            "LocalTensor first, with rank_map or replicate."
        )
    return func(*args, **kwargs)


def _all_plain(values: Any) -> bool:
    tensors = [t for t in torch.utils._pytree.tree_leaves(values) if isinstance(t, Tensor)]
    return bool(tensors) and all(is_plain(t) for t in tensors)


def _reentered(mode: FactoryMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function in Python that calls factories: torch runs it with the mode off, this does not."""
    if redispatch is None:
        if func in DRAWING_INSIDE or in_transform():
            raise UnsupportedError(
                f"{name_of(func)} may draw random numbers, which this version of torch does "
                "not let localtensor_compile do once per rank. Use torch 2.13 or newer, or call it "
                "inside rank_map or tensor_map."
            )
        return func(*args, **kwargs)
    with mode:
        return redispatch(func, (), args, kwargs)


# ---------------------------------------------------------------- while Dynamo traces
def _decide(call: TracedCall) -> str | None:
    """The name of a call that becomes one opaque node, or None for a call left as it is."""
    func, args, kwargs = call.func, call.args, call.kwargs
    try:
        factory = func in BUILDERS
    except TypeError:  # not hashable
        return None
    if factory:
        if kwargs.get("out") is not None or _is_internal(call.caller):
            return None
        if func in (torch.as_tensor, torch.asarray) and NUMPY_ARRAY in (*args, *kwargs.values()):
            return "torch.tensor"  # an array of NumPy is already a plain tensor in the graph
        return name_of(func)
    if func in PLAIN_DRAWS and draws_for_plain(func, args, kwargs):
        return name_of(func)
    if func in FUNCTIONAL:
        name = str(func).rpartition(".")[2]
        return f"torch.ops._c10d_functional.{name}" if _all_plain(args) else None
    values = (*args, *kwargs.values())
    if not any(v.__class__ in MAY_HOLD_NUMBERS and holds_rank_number(v) for v in values):
        return None
    if func in BY_INDEX:
        return name_of(func)
    return name_of(func) if _all_plain(values) else None


_rewritten = decided_while_tracing(_decide)


@torch.compiler.allow_in_graph
def on_ranks(
    name: str,
    ranks: Ranks,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: Any,
    stacked: bool = False,
) -> Any:
    """The torch function called `name` on all ranks: one node in Dynamo's graph.

    AOTAutograd traces through it and sees one aten op per rank. The function mode is off inside,
    also where the node itself runs (backend="eager"), so that nothing is wrapped twice.
    """
    func = _function(name)
    with torch._C.DisableTorchFunction():
        if func not in BUILDERS:
            if func in FUNCTIONAL:
                return plain_collective(func, args)
            if func in PLAIN_DRAWS and not holds_rank_number((*args, *kwargs.values())):
                return plain_draw(func, ranks, args, kwargs)
            return call_with_numbers(func, args, kwargs)
        kwargs, _ = without_grad(_with_device(kwargs, device))
        return build(func, StackedRanks(ranks) if stacked else ranks, args, kwargs)


@torch.compiler.allow_in_graph
def as_written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], device: Any) -> Any:
    """The same for a factory in a region where the simulation is disabled: a plain tensor."""
    func = _function(name)
    with torch._C.DisableTorchFunction():
        return func(*args, **(_with_device(kwargs, device) if func in BUILDERS else kwargs))


def _function(name: str) -> Any:
    return attrgetter(name.removeprefix("torch."))(torch)


def _with_device(kwargs: dict[str, Any], device: Any) -> dict[str, Any]:
    if device is None or kwargs.get("device") is not None:
        return kwargs
    return {**kwargs, "device": device}


# ---------------------------------------------------------------- who calls
# Parts of torch whose factories are their own business: what they allocate is the same on all
# ranks, or is given to code that knows nothing of ranks. torch.optim is here because its step
# counters are the same on all ranks and serve plain parameters too; Dynamo runs an optimizer's
# initialization outside of every mode, so this is also what happens when a step is compiled.
_INTERNAL = (
    "localtensor_compile",
    "torch._decomp",
    "torch._dynamo",
    "torch._export",
    "torch._functorch",
    "torch._higher_order_ops",
    "torch._inductor",
    "torch._library",
    "torch._meta_registrations",
    "torch._numpy",
    "torch._prims",
    "torch._prims_common",
    "torch._refs",
    "torch._subclasses",
    "torch._tensor_str",
    "torch._utils",
    "torch.compiler",
    "torch.cuda",
    "torch.distributed._local_tensor",
    "torch.distributed.device_mesh",
    "torch.distributed.tensor._op_schema",
    "torch.distributed.tensor._sharding_prop",
    "torch.export",
    "torch.fx",
    "torch.optim",
    "torch.serialization",
    "torch.testing._comparison",
    "triton",
)
_internal: dict[str, bool] = {"torch": True}


def _is_internal(module: str | None) -> bool:
    if module is None:
        return False
    found = _internal.get(module)
    if found is None:
        found = any(module == name or module.startswith(name + ".") for name in _INTERNAL)
        _internal[module] = found
    return found


# A handler that returns NotImplemented leaves the call to go on as any other.
_HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(SHORTCUTS, _shortcut),
    **dict.fromkeys(BUILDERS, _factory),
    **dict.fromkeys(PLAIN_DRAWS, _draw),
    **dict.fromkeys(FUNCTIONAL, _collective),
    Tensor.data.__set__: _set_data,
    **dict.fromkeys((Tensor.__getitem__, Tensor.__setitem__), _index),
    **dict.fromkeys(
        (
            F.embedding_bag,
            F.fractional_max_pool2d,
            F.fractional_max_pool2d_with_indices,
            F.fractional_max_pool3d,
            F.fractional_max_pool3d_with_indices,
            F.gumbel_softmax,
            F.multi_head_attention_forward,
            torch.lobpcg,
            torch.nn.init.kaiming_uniform_,
            torch.pca_lowrank,
            torch.svd_lowrank,
        ),
        _reentered,
    ),
}
