"""torch.rand and its siblings at the Python level: a LocalTensor with a shard drawn per rank.

Also draws for plain tensors, which all ranks share: those are possible only while all ranks would
draw the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._torch import (
    FakeTensor,
    FunctionalTensor,
    tracing_active,
    unbatched,
    vmap_randomness,
)
from ..errors import PlainTensorError, UnsupportedError
from ..values.ranked import per_rank_values, pick_tree
from ..values.stack import StackedRanks
from ..values.tensor import LocalTensor, _checked_shards, _wrap
from . import whole_draws
from .draws import Draw, traced_generator_error
from .generators import CPU, current, is_default
from .random_nodes import NODES, RANDPERM, Node
from .stacked_nodes import stacked_factory

aten = torch.ops.aten
Ranks = tuple[int, ...]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def random_factory(func: Any, ranks: Collection[int], args: Args, kwargs: Kwargs) -> Any:
    """Call a function of RANDOM_FACTORIES once per rank, with that rank's generator.

    Sizes and bounds may be per-rank numbers. While a graph is traced, it gets one
    localtensor_random node. With a tensor among the arguments (torch.normal(mean, std)) the
    function follows that tensor: per rank for LocalTensors, see `plain_draw` for plain ones.

    Returns:
        A LocalTensor of `ranks`.

    Raises:
        PlainTensorError: `out=` is a plain tensor.
        UnsupportedError: while a graph is traced: generator=, requires_grad=True, out=,
            pin_memory=True, or a layout other than strided. Inside vmap(randomness="different").
    """
    out = kwargs.get("out")
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a is not out]
    if tensors:
        return plain_draw(func, ranks, args, kwargs)
    if out is not None and not isinstance(out, LocalTensor):
        raise PlainTensorError(
            f"torch.{func.__name__} inside LocalTensorMode draws for every rank, but out= is one "
            "plain tensor. Leave out= away, or pass a LocalTensor."
        )
    refuse_in_vmap(func)
    stacked = type(ranks) is StackedRanks
    ranks = tuple(sorted(ranks))
    whole = whole_draws.active()
    if whole is not None:  # torch.distributed.tensor.rand and randn
        return whole.keep_pieces(lambda: random_factory(func, ranks, (whole.shape,), kwargs))
    if tracing_active():
        return _traced(func, ranks, args, kwargs, stacked)
    return _eager(func, ranks, args, kwargs)


def refuse_in_vmap(func: Any) -> None:
    """Raise where torch.vmap would draw for each example: a factory has no mapped tensor.

    Raises:
        UnsupportedError: inside vmap, unless its randomness is "same" (one draw for all examples).
    """
    randomness = vmap_randomness()
    if randomness not in (None, "same"):
        raise UnsupportedError(
            f"torch.{func.__name__} inside torch.vmap(randomness={randomness!r}) cannot draw per "
            "rank. Use torch.rand_like, randn_like or randint_like of a mapped tensor with "
            "randomness='different', pass randomness='same', or draw outside of vmap."
        )


def _eager(func: Any, ranks: Ranks, args: Args, kwargs: Kwargs) -> LocalTensor:
    kwargs = dict(kwargs)
    generator = kwargs.pop("generator", None)
    requires_grad = bool(kwargs.pop("requires_grad", False))
    device = kwargs.get("device")
    if device is None:
        out = kwargs.get("out")
        device = torch.get_default_device() if out is None else out.device
        if out is None:
            # The function modes that would fill it in do not see the calls below.
            kwargs["device"] = device
    draw = _DRAWS[func]
    shards = {}
    varies = _holds_rank_number((*args, *kwargs.values()))
    turns = None if generator is not None else draw.direct(ranks, torch.device(device))
    with (
        torch._C.DisableTorchFunction(),
        contextlib.nullcontext(turns)
        if turns is not None
        else draw.turns(ranks, torch.device(device), generator) as turns,
    ):
        for r in ranks:
            a, k = pick_tree((args, kwargs), r) if varies else (args, kwargs)
            shards[r] = draw.call(*a, **k, generator=turns[r])
    out = kwargs.get("out")
    if out is not None:
        out._sync_meta()
        return out
    return _wrap(_checked_shards(shards), requires_grad)


def _holds_rank_number(values: Any) -> bool:
    return any(
        _holds_rank_number(v) if isinstance(v, (tuple, list)) else per_rank_values(v) is not None
        for v in values
        if v.__class__ is not int
    )


def _traced(func: Any, ranks: Ranks, args: Args, kwargs: Kwargs, stacked: bool) -> LocalTensor:
    kwargs = dict(kwargs)
    name = f"torch.{func.__name__}"
    generator = kwargs.pop("generator", None)
    if generator is not None and not is_default(generator):
        raise traced_generator_error(name)
    for option, allowed in _TRACED_OPTIONS.items():
        given = kwargs.pop(option, None)
        if given not in allowed:
            raise UnsupportedError(
                f"{name} got {option}={given} inside a compiled or traced function, where ranks "
                f"cannot draw that way. Make the tensor outside of it, or leave {option} away."
            )
    device = kwargs.pop("device", None)
    device = torch.get_default_device() if device is None else torch.device(device)
    dtype = kwargs.pop("dtype", None)
    node, size, values, default_dtype = _FORMS[func](*args, **kwargs)
    if stacked:
        shards = stacked_factory(node, ranks, size, dtype or default_dtype, device, values)
        if shards is not None:
            return _wrap(shards)
    sizes = [pick_tree(list(size), r) for r in ranks]
    drawn = node.emit_fill(ranks, sizes, None, dtype or default_dtype, device, values)
    return _wrap(dict(zip(ranks, drawn)))


_TRACED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "out": (None,),
    "requires_grad": (None, False),
    "pin_memory": (None, False),
    "layout": (None, torch.strided),
    "names": (None,),
}

# ---- the arguments of each factory: what to fill with, the size, the fill's arguments, the dtype
Form = tuple[Node, Any, tuple[Any, ...], torch.dtype]


def _sizes(args: Args) -> Any:
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


def _rand(*args: Any, size: Any = None) -> Form:
    sizes = _sizes(args) if size is None else size
    return NODES[aten.uniform_.default], sizes, (0.0, 1.0), torch.get_default_dtype()


def _randn(*args: Any, size: Any = None) -> Form:
    sizes = _sizes(args) if size is None else size
    return NODES[aten.normal_.default], sizes, (0.0, 1.0), torch.get_default_dtype()


def _randint(*args: Any, **kwargs: Any) -> Form:
    # randint(high, size) and randint(low, high, size), each argument also by name
    given = len(args) + len(kwargs)
    names = ("low", "high", "size") if given == 3 else ("high", "size")
    bound = dict(zip(names, args), **kwargs)
    fill = NODES[getattr(aten.random_, "from")]
    return fill, bound["size"], (bound.get("low", 0), bound["high"]), torch.int64


def _normal(mean: Any, std: Any, size: Any) -> Form:
    return NODES[aten.normal_.default], size, (mean, std), torch.get_default_dtype()


def _randperm(n: Any) -> Form:
    return RANDPERM, (n,), (), torch.int64


_FORMS: dict[Any, Callable[..., Form]] = {
    torch.rand: _rand,
    torch.randn: _randn,
    torch.randint: _randint,
    torch.randperm: _randperm,
    torch.normal: _normal,
}
RANDOM_FACTORIES: frozenset[Any] = frozenset(_FORMS)
"""The torch functions that make random tensors from sizes."""

_DRAWS = {func: Draw(func) for func in _FORMS}


# ---- draws for plain tensors
def plain_draw(func: Any, ranks: Collection[int], args: Args, kwargs: Kwargs) -> Any:
    """Call a function of PLAIN_DRAWS (or torch.normal) that may have only plain tensors.

    With a LocalTensor among the arguments, or where nothing is drawn (dropout in eval mode), it
    is just called. Otherwise the result is plain, all ranks draw the same bits and all their
    generators advance.

    Raises:
        PlainTensorError: the ranks would draw different bits, or a graph is being traced.
        UnsupportedError: inside vmap, a function of which torch makes one draw for all ranks.
    """
    if not draws_for_plain(func, args, kwargs):
        return func(*args, **kwargs)
    what = getattr(func, "__name__", str(func))
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if any(isinstance(unbatched(t), LocalTensor) for t in tensors):
        raise UnsupportedError(
            f"{what} inside torch.vmap(randomness={vmap_randomness()!r}) cannot draw per rank: "
            "torch itself draws there, once for all ranks. Multiply by torch.bernoulli of a mapped "
            "tensor, use torch.rand_like or randn_like, or draw outside of vmap."
        )
    if tracing_active():
        raise PlainTensorError(
            f"{what} would draw random numbers for a plain tensor inside a compiled or traced "
            "function: once for all ranks, where each rank draws its own. Make the tensor inside "
            "LocalTensorMode, with rank_map or with replicate(), so that it has a shard per rank."
        )
    world = current()
    generator = kwargs.get("generator")
    if world is None or (generator is not None and not is_default(generator)):
        return func(*args, **kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
    device = kwargs.get("device") or (tensors[0].device if tensors else CPU)
    with world.as_one(what, torch.device(device)):
        return func(*args, **kwargs)


def draws_for_plain(func: Any, args: Args, kwargs: Mapping[str, Any]) -> bool:
    """Whether this call draws random numbers into a plain tensor, once for all ranks.

    True only for functions in PLAIN_DRAWS and RANDOM_FACTORIES that get no LocalTensor, and for
    those that torch.vmap rewrites to draw into a plain tensor; False for a dropout that is off.
    Tensor subclasses that may hold LocalTensors (DTensor) count as LocalTensors.
    """
    randomness = vmap_randomness()
    if randomness is None and args and type(args[0]) is LocalTensor:
        return False  # the most frequent case
    off = PLAIN_DRAWS.get(func)
    if (off is None and func not in RANDOM_FACTORIES) or (off and off(*args, **kwargs)):
        return False
    tensors = [t for t in pytree.tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor)]
    if all(type(unbatched(t)) in _PLAIN_TYPES for t in tensors):
        return True
    if randomness is None:
        return False
    # Found by comparing every function with plain torch.
    return off in (_dropout_off, _attention_off) or (
        randomness == "same" and (func.__name__.endswith("_") or func is torch.native_dropout)
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor, FunctionalTensor)


def _never(*args: Any, **kwargs: Any) -> bool:
    return False


def _dropout_off(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any
) -> bool:
    return not training or p == 0


def _native_off(input: Any, p: float, train: bool | None) -> bool:
    return train is False


def _attention_off(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> bool:
    return dropout_p == 0


def _rrelu_off(
    input: Any, lower: Any = 0, upper: Any = 0, training: bool = False, *_: Any, **__: Any
) -> bool:
    return not training


F = torch.nn.functional
PLAIN_DRAWS: dict[Any, Callable[..., bool]] = {
    **dict.fromkeys(
        (
            torch.Tensor.bernoulli,
            torch.Tensor.bernoulli_,
            torch.Tensor.cauchy_,
            torch.Tensor.exponential_,
            torch.Tensor.geometric_,
            torch.Tensor.log_normal_,
            torch.Tensor.multinomial,
            torch.Tensor.normal_,
            torch.Tensor.random_,
            torch.Tensor.uniform_,
            torch.bernoulli,
            torch.binomial,
            torch.multinomial,
            torch.poisson,
            torch.rand_like,
            torch.randint_like,
            torch.randn_like,
            torch._standard_gamma,
            torch._sample_dirichlet,
        ),
        _never,
    ),
    **dict.fromkeys(
        (
            F.alpha_dropout,
            F.dropout,
            F.dropout1d,
            F.dropout2d,
            F.dropout3d,
            F.feature_alpha_dropout,
            torch.alpha_dropout,
            torch.alpha_dropout_,
            torch.dropout,
            torch.dropout_,
            torch.feature_alpha_dropout,
            torch.feature_alpha_dropout_,
            torch.feature_dropout,
            torch.feature_dropout_,
        ),
        _dropout_off,
    ),
    torch.native_dropout: _native_off,
    F.scaled_dot_product_attention: _attention_off,
    F.rrelu: _rrelu_off,
    torch.rrelu: _rrelu_off,
    torch.rrelu_: _rrelu_off,
}
"""Torch functions that draw for the tensors they get -> whether a call with these arguments does
not (dropout in eval mode)."""
