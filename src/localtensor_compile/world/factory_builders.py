"""How each factory makes a shard per rank. FactoryMode decides when; random ones are elsewhere.

A builder gets the torch function, the ranks and the call's arguments, in which numbers and tensors
may be per rank. It runs with the function mode off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import tracing_active
from ..dispatch.random_factories import refuse_in_vmap
from ..dispatch.random_ops import RANDOM_FACTORIES, random_factory
from ..errors import UnsupportedError
from ..stacked.layout import can_join, expanded, is_stacked, join
from ..stacked.outs import apart, put
from ..values.ranked import pick_tree
from ..values.stack import StackedRanks
from ..values.tensor import LocalTensor, _checked_shards, _wrap, _wrap_stacked
from .rank_numbers import (
    MAY_HOLD_NUMBERS,
    holds_rank_number,
    is_plain,
    name_of,
    plain_write,
    tensor_on_rank,
)
from .torch_hooks.factories import in_transform, outside_transforms

Ranks = tuple[int, ...]
Builder = Callable[[Any, Ranks, tuple[Any, ...], dict[str, Any]], Any]
"""builder(torch function, ranks, args, kwargs): a LocalTensor, or what the function gives."""


def build(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a factory of BUILDERS on all ranks, which are StackedRanks for a stacked result."""
    result = _built(func, ranks, args, kwargs)
    if type(ranks) is StackedRanks and type(result) is LocalTensor and can_join(result):
        stacked = join(result, name_of(func))
        # Inside of grad or vmap not even requires_grad_(False) may be called.
        return stacked.requires_grad_() if result.requires_grad else stacked
    return result


def _built(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not in_transform():
        return BUILDERS[func](func, ranks, args, kwargs)
    if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
        return func(*args, **kwargs)
    if func in RANDOM_FACTORIES:
        refuse_in_vmap(func)
    # Inside of grad or vmap a factory gives a tensor of that transform, which cannot be a shard.
    with outside_transforms():
        return BUILDERS[func](func, ranks, args, kwargs)


def _each_rank(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the factory once per rank."""
    out = kwargs.get("out")
    if out is not None:
        if is_plain(out) and _holds_rank_value((args, kwargs)):
            raise plain_write(func, args, kwargs, out)
        return func(*args, **kwargs)
    kwargs, requires_grad = without_grad(kwargs)
    if not _holds_rank_value((args, kwargs)):
        if type(ranks) is StackedRanks:
            return _stacked(func, ranks, func(*args, **kwargs), requires_grad)
        return _joined(func, {r: func(*args, **kwargs) for r in ranks}, requires_grad)
    shards = {}
    for r in ranks:
        rank_args, rank_kwargs = pick_tree((args, kwargs), r)
        shards[r] = func(*rank_args, **rank_kwargs)
    return _joined(func, shards, requires_grad)


def _each_rank_of_numbers(
    func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """linspace, logspace: with a tensor as bound they are ops on that tensor."""
    if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
        return func(*args, **kwargs)
    return _each_rank(func, ranks, args, kwargs)


def _random(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    out: Any = kwargs.get("out")
    if type(out) is not LocalTensor or not is_stacked(out) or tracing_active():
        return random_factory(func, ranks, args, kwargs)
    made = apart(out)
    random_factory(func, ranks, args, {**kwargs, "out": made})
    put(name_of(func), made, out)
    return out


def _tensor(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch.tensor: always a copy."""
    data = args[0] if args else kwargs.get("data")
    if isinstance(data, Tensor):
        if not is_plain(data):
            return func(*args, **kwargs)
        kwargs, requires_grad = without_grad(kwargs)
        made = data.detach().to(kwargs.get("device"), kwargs.get("dtype"))
        if type(ranks) is StackedRanks:
            return _stacked(func, ranks, made, requires_grad)
        return _joined(func, {r: made.clone() for r in ranks}, requires_grad)
    if not _holds_rank_value(data):
        return _copies(func, ranks, args, kwargs)
    kwargs, requires_grad = without_grad(kwargs)
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    shards = {r: tensor_on_rank(data, r, dtype, device) for r in ranks}
    return _joined(func, shards, requires_grad)


def _new_tensor(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x.new_tensor(data): torch.tensor with the dtype and device of x."""
    like, *data = args
    if is_plain(like) and not _holds_rank_value((data, kwargs)):
        return func(*args, **kwargs)
    if isinstance(like, LocalTensor):
        ranks = tuple(like._local_tensors)
    kwargs = {"dtype": like.dtype, "device": like.device, **kwargs}
    return _tensor(torch.tensor, ranks, tuple(data), kwargs)


def _new(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x.new(sizes) or x.new(data), the legacy form of new_empty and new_tensor."""
    like, *data = args
    if not isinstance(like, LocalTensor):
        return func(*args, **kwargs)
    if len(data) == 1 and not isinstance(data[0], (int, torch.SymInt, torch.Size)):
        return _new_tensor(func, ranks, args, kwargs)
    return like.new_empty(*data or (0,), **kwargs)


def _as_tensor(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch.as_tensor, torch.asarray: a tensor is passed on as torch does."""
    data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
    if isinstance(data, Tensor) or kwargs.get("copy") is False:
        return func(*args, **kwargs)
    if _holds_rank_value(data):
        return _each_rank(func, ranks, args, kwargs)
    return _copies(func, ranks, args, kwargs)


def _copies(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the factory once and give each rank a copy."""
    kwargs, requires_grad = without_grad(kwargs)
    made = func(*args, **kwargs).detach()
    if type(ranks) is StackedRanks:
        return _stacked(func, ranks, made, requires_grad)
    return _joined(func, {r: made.clone() for r in ranks}, requires_grad)


def _sparse(func: Any, ranks: Ranks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sparse tensors stay plain: a LocalTensor holds dense shards."""
    if _holds_rank_value((args, kwargs)):
        raise _dense_only(func)
    return func(*args, **kwargs)


def _dense_only(func: Any) -> UnsupportedError:
    return UnsupportedError(
        f"{name_of(func)} would make a sparse tensor per rank, but a LocalTensor holds dense "
        "shards only. Build it inside tensor_map and return a dense result, or give a sparse "
        "factory the same values on all ranks."
    )


def without_grad(kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Shards never require grad: autograd works on the LocalTensor."""
    if "requires_grad" not in kwargs:
        return kwargs, False
    rest = {k: v for k, v in kwargs.items() if k != "requires_grad"}
    return rest, bool(kwargs["requires_grad"])


def _stacked(func: Any, ranks: Ranks, made: Tensor, requires_grad: bool) -> LocalTensor:
    """A copy of one tensor for each rank, in one stack."""
    if made.layout is not torch.strided:
        raise _dense_only(func)
    return _wrap_stacked(expanded(made, len(ranks)), tuple(ranks), requires_grad)


def _joined(func: Any, shards: dict[int, Tensor], requires_grad: bool) -> Any:
    if any(t.layout is not torch.strided for t in shards.values()):
        raise _dense_only(func)
    return _wrap(_checked_shards(shards), requires_grad)


def _holds_rank_value(value: Any) -> bool:
    """Whether a nested structure holds a per-rank number or a LocalTensor."""
    if isinstance(value, (list, tuple)):
        return any(_holds_rank_value(v) for v in value)
    if isinstance(value, dict):
        return any(_holds_rank_value(v) for v in value.values())
    return isinstance(value, LocalTensor) or (
        value.__class__ in MAY_HOLD_NUMBERS and holds_rank_number(value)
    )


BUILDERS: dict[Any, Builder] = {
    **dict.fromkeys(
        (
            torch.arange,
            torch.bartlett_window,
            torch.blackman_window,
            torch.empty,
            torch.empty_permuted,
            torch.empty_strided,
            torch.eye,
            torch.fft.fftfreq,
            torch.fft.rfftfreq,
            torch.full,
            torch.hamming_window,
            torch.hann_window,
            torch.kaiser_window,
            torch.ones,
            torch.scalar_tensor,
            torch.tril_indices,
            torch.triu_indices,
            torch.zeros,
        ),
        _each_rank,
    ),
    # In eager code the factories inside of these functions pass through the mode.
    **{getattr(torch.signal.windows, n): _each_rank for n in torch.signal.windows.__all__},
    **dict.fromkeys((torch.linspace, torch.logspace), _each_rank_of_numbers),
    **dict.fromkeys((torch.as_tensor, torch.asarray), _as_tensor),
    **dict.fromkeys(
        (
            torch.sparse_bsc_tensor,
            torch.sparse_bsr_tensor,
            torch.sparse_compressed_tensor,
            torch.sparse_coo_tensor,
            torch.sparse_csc_tensor,
            torch.sparse_csr_tensor,
        ),
        _sparse,
    ),
    torch.tensor: _tensor,
    Tensor.new: _new,
    Tensor.new_tensor: _new_tensor,
    **dict.fromkeys(RANDOM_FACTORIES, _random),
}
"""Every torch function that is a factory for FactoryMode."""
