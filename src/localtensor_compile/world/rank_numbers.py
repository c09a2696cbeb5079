"""Torch functions that get a number per rank: an index, a bound, a size, a factor.

With a LocalTensor at hand most of them run once per rank by themselves. Here are those that do
not: indexing (torch's C++ asks for one Python int), splits into per-rank lengths, and functions of
plain tensors, which nothing would run per rank (`plain * rank_number` would silently use a
placeholder instead of the number).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch.utils import _pytree as pytree

from .._torch import FakeTensor, FunctionalTensor, tracing_active
from ..errors import LocalTensorError, PlainTensorError, UnsupportedError, per_rank_text
from ..stacked.numbers import number_values, stacked_number
from ..values.rank_node import LocalNode, is_ranked, value_on_rank
from ..values.ranked import per_rank_values, pick, ranks_of
from ..values.stack import stack_of
from ..values.tensor import LocalTensor, _wrap

MAY_HOLD_NUMBERS = frozenset({SymInt, SymFloat, SymBool, slice, tuple, list, torch.Size})
"""Types of arguments in which `holds_rank_number` looks for a per-rank number."""

_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor, FunctionalTensor})


def is_plain(value: Any) -> bool:
    """Whether `value` is a tensor that is the same on every rank."""
    return type(value) in _PLAIN


def holds_rank_number(value: Any) -> bool:
    """Whether a value of one of the types in MAY_HOLD_NUMBERS is or contains a per-rank number."""
    kind = value.__class__
    if kind is SymInt or kind is SymFloat or kind is SymBool:
        return isinstance(value.node, LocalNode)
    if kind is slice:
        return is_ranked(value.start) or is_ranked(value.stop) or is_ranked(value.step)
    for item in value:
        if item.__class__ in MAY_HOLD_NUMBERS and holds_rank_number(item):
            return True
    return False


def call_with_numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a torch function that has a per-rank number among its arguments.

    Plain tensors stand for the same tensor on every rank: where there is no LocalTensor, the
    function runs on LocalTensors of copies of them, so that the result never shares memory with
    a plain tensor.

    Raises:
        PlainTensorError: the function would write into a plain tensor.
        UnsupportedError: torch takes only one Python number there.
    """
    by_index = BY_INDEX.get(func)
    if by_index is not None:
        return by_index(func, args, kwargs)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not tensors or not all(is_plain(t) for t in tensors):
        return _call(func, args, kwargs)
    if writes(func, kwargs):
        raise plain_write(func, args, kwargs, tensors[0])
    ranks = _ranks(args, kwargs)
    copies: list[LocalTensor] = []

    def on_ranks(value: Any) -> Any:
        if not is_plain(value) or per_rank_values(value) is not None:
            return value
        copies.append(replicated(value, ranks))
        return copies[-1]

    args, kwargs = pytree.tree_map(on_ranks, (args, kwargs))
    versions = None if tracing_active() else _versions(copies)
    result = _call(func, args, kwargs)
    if versions is not None and _versions(copies) != versions:
        raise plain_write(func, args, kwargs, tensors[0])
    return result


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return func(*args, **kwargs)
    except LocalTensorError:
        raise
    except (TypeError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, TypeError) or "concrete integers" in text:
            raise UnsupportedError(
                f"{name_of(func)} does not take a number that differs between ranks: "
                f"{_numbers_text(args, kwargs)}. Run it once per rank with rank_map, tensor_map or "
                f"@maybe_run_for_local_tensor. torch said: {text.splitlines()[0]}"
            ) from error
        raise


def _numbers_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    numbers = [v for v in pytree.tree_leaves((args, kwargs)) if is_ranked(v)]
    return " and ".join(per_rank_text(n.node._values) for n in numbers[:3])


def _ranks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    leaves = pytree.tree_leaves((args, kwargs))
    for leaf in leaves:
        if isinstance(leaf, slice):
            leaves += [leaf.start, leaf.stop, leaf.step]
    return ranks_of(leaves) or ()


def _versions(tensors: list[LocalTensor]) -> list[int]:
    return [s._version for t in tensors for s in t._local_tensors.values()]


def name_of(func: Any) -> str:
    """The dotted name of a torch function, from `torch.` on."""
    return torch.overrides.resolve_name(func) or f"{func.__module__}.{func.__qualname__}"


def writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a torch function writes into its tensors, by torch's naming rules."""
    name = getattr(func, "__name__", "")
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("__setitem__", "__set__")
        or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
        or kwargs.get("out") is not None
        or bool(kwargs.get("inplace"))
    )


def plain_write(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor
) -> PlainTensorError:
    """The error for a call that would write into the plain tensor `target`."""
    return PlainTensorError(
        f"{name_of(func)} would write with the per-rank number "
        f"{_numbers_text(args, kwargs)} into a plain tensor of shape {tuple(target.shape)}: only "
        "one rank's value could stay. Make the target a LocalTensor: create it inside "
        "LocalTensorMode, or with localtensor_compile.replicate(tensor)."
    )


# ---------------------------------------------------------------- plain tensors on all ranks
class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: tuple[int, ...], share: bool) -> LocalTensor:
        return _shards_of(tensor, ranks, share)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, None, None]:
        return grad, None, None


def _shards_of(tensor: Tensor, ranks: tuple[int, ...], share: bool) -> LocalTensor:
    tensor = tensor.detach()
    return _wrap({r: tensor.detach() if share else tensor.clone() for r in ranks})


def replicated(tensor: Tensor, ranks: tuple[int, ...], share: bool = False) -> LocalTensor:
    """The LocalTensor whose shards are copies of a plain tensor, differentiable.

    The gradient that reaches the plain tensor is a LocalTensor: each rank's own.

    Args:
        tensor: a plain tensor.
        ranks: the ranks, in order.
        share: use the tensor's own memory as every shard. The caller must copy what it returns.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Replicate.apply(tensor, ranks, share)
    return _shards_of(tensor, ranks, share)


# ---------------------------------------------------------------- x[...]
def _get_item(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor, index = args
    if not is_plain(tensor):
        return _indexed(*_selected(tensor, index))
    shared = replicated(tensor, _ranks(args, kwargs), share=True)
    return _indexed(*_selected(shared, index)).clone()


def _set_item(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensor, index, value = args
    if is_plain(tensor):
        raise plain_write(func, args, kwargs, tensor)
    tensor, rest = _selected(tensor, index)
    if is_ranked(value):
        value = tensor_of_numbers(value, dtype=tensor.dtype, device=tensor.device)
    tensor[rest or ...] = value


def _indexed(tensor: Tensor, rest: tuple[Any, ...]) -> Tensor:
    return tensor[rest] if rest else tensor


def _selected(tensor: Tensor, index: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """`tensor.select` for each per-rank int in `index`, and the index that remains to apply.

    torch treats an int in an index as a select of its dimension, whatever stands beside it.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    ellipsis_width = tensor.dim() - sum(_dims_taken(i) for i in items)
    rest: list[Any] = []
    dim = 0
    for item in items:
        if is_ranked(item):
            tensor = tensor.select(dim, item)
            continue
        if item is None:  # in torch's order, so that the strides of the new dimension are torch's
            tensor = tensor.unsqueeze(dim)
            item = slice(None)
        if isinstance(item, list) and holds_rank_number(item):
            item = tensor_of_numbers(item, device=tensor.device)
        rest.append(item)
        dim += ellipsis_width if item is Ellipsis else _dims_taken(item)
    return tensor, tuple(rest)


def rank_numbers_in_index(index: Any) -> Any:
    """`index` with each 0-dim LocalTensor of ints as a per-rank number.

    torch reads a 0-dim tensor in an index as one Python int.
    """
    if isinstance(index, LocalTensor):
        integral = index.dim() == 0 and not (
            index.is_floating_point() or index.is_complex() or index.dtype in _MASKS
        )
        return index.item() if integral and not tracing_active() else index
    if type(index) is tuple and any(type(i) is LocalTensor for i in index):
        return tuple(rank_numbers_in_index(i) for i in index)
    return index


_MASKS = (torch.bool, torch.uint8)


def _dims_taken(item: Any) -> int:
    """How many dimensions of the indexed tensor an item of an index stands for."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, list) and not holds_rank_number(item):
        item = torch.tensor(item)
    if isinstance(item, Tensor) and item.dtype in _MASKS:
        return item.dim()
    return 1


# ---------------------------------------------------------------- numbers to tensors
def tensor_of_numbers(
    data: Any, dtype: torch.dtype | None = None, device: Any = None
) -> LocalTensor:
    """torch.tensor(data) of a number or nested list of numbers, some of which are per rank."""
    ranks = ranks_of(data) or ()
    return _wrap({r: tensor_on_rank(data, r, dtype, device) for r in ranks})


def tensor_on_rank(data: Any, rank: int, dtype: torch.dtype | None, device: Any) -> Tensor:
    """torch.tensor(data) with the numbers and shards that `rank` has in a nested list."""
    leaves, spec = pytree.tree_flatten(data)
    leaves = [pick(leaf, rank) for leaf in leaves]
    symbolic = any(isinstance(leaf, (SymInt, SymFloat, SymBool)) for leaf in leaves)
    tensors = tracing_active() and any(isinstance(leaf, Tensor) for leaf in leaves)
    if not symbolic and not tensors:
        data = pytree.tree_unflatten(leaves, spec)
        return torch.tensor(data, dtype=dtype, device=device)
    # torch.tensor would make a constant of a symbol: stack scalars, which stay symbolic.
    if dtype is None:
        dtype = _dtype_of(leaves)
    scalars = [
        v.detach().to(dtype=dtype, device=device)
        if isinstance(v, Tensor)
        else torch.scalar_tensor(v, dtype=dtype, device=device)
        for v in leaves
    ]
    return _stacked(pytree.tree_unflatten(scalars, spec))


def _stacked(nested: Any) -> Tensor:
    if isinstance(nested, Tensor):
        return nested
    return torch.stack([_stacked(item) for item in nested])


def _dtype_of(leaves: list[Any]) -> torch.dtype:
    """The dtype that torch.tensor infers from numbers and tensors."""
    found = [v.dtype for v in leaves if isinstance(v, Tensor)]
    if any(isinstance(v, (float, SymFloat)) for v in leaves):
        found.append(torch.get_default_dtype())
    elif any(isinstance(v, (int, SymInt)) and not isinstance(v, bool) for v in leaves):
        found.append(torch.int64)
    elif any(isinstance(v, (bool, SymBool)) for v in leaves):
        found.append(torch.bool)
    result = found[0]
    for dtype in found[1:]:
        result = torch.promote_types(result, dtype)
    return result


# ---------------------------------------------------------------- split
def _split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _split_list(*args, **kwargs)


def _split_list(tensor: Tensor, split_size: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    """Into per-rank lengths by `narrow`: backward of split itself wants one length for all."""
    if split_size is None:
        (split_size,) = kwargs.values()  # split_sizes=, split_size_or_sections=
    if not isinstance(split_size, (list, tuple)):
        return tensor.split(split_size, dim)
    plain = is_plain(tensor)
    if plain:
        tensor = replicated(tensor, ranks_of(split_size) or (), share=True)
    _check_lengths(tensor, split_size, dim)
    parts, start = [], 0
    for length in split_size:
        part = tensor.narrow(dim, start, length)
        parts.append(part.clone() if plain else part)
        start = start + length
    return tuple(parts)


def _check_lengths(tensor: Tensor, lengths: Any, dim: int) -> None:
    length = tensor.shape[dim]
    wrong = {}
    for r in ranks_of(lengths) or ():
        parts = [value_on_rank(n, r) for n in lengths]
        if not sum(parts) == value_on_rank(length, r) or any(n < 0 for n in parts):
            wrong[r] = f"{' + '.join(map(str, parts))} of {value_on_rank(length, r)}"
    if wrong:
        raise LocalTensorError(
            f"split lengths must not be negative and add up to the length of dimension {dim} on "
            f"every rank, but they are {per_rank_text(wrong)}."
        )


# ---------------------------------------------------------------- where
_WHERE = ("condition", "input", "other")


def _where(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With the number as a tensor: torch's C++ makes one of it, and asks for one Python number."""
    names = _WHERE if func is torch.where else ("input", "condition", "other")
    given = dict(zip(names, args)) | {("input" if k == "self" else k): v for k, v in kwargs.items()}
    if not {"input", "other"} <= given.keys() or not isinstance(given["condition"], Tensor):
        return _call(func, args, kwargs)
    dtype = torch.result_type(*(_example(given[name]) for name in ("input", "other")))
    for name in ("input", "other"):
        if is_ranked(given[name]):
            given[name] = _scalar(given[name], given.values(), given["condition"]).to(dtype)
    operands = [given.pop(name) for name in _WHERE]
    return torch.where(*operands, **given)


def _example(value: Any) -> Any:
    """A number of the type of a per-rank number; others as they are."""
    if not is_ranked(value):
        return value
    return 0 if type(value) is SymInt else 0.0 if type(value) is SymFloat else False


def _scalar(number: Any, beside: Iterable[Any], like: Tensor) -> LocalTensor:
    """A per-rank number as a tensor without dimensions, stacked if a tensor `beside` it is."""
    dtype = {SymInt: torch.int64, SymFloat: torch.float64, SymBool: torch.bool}[type(number)]
    for value in beside:
        stack = stack_of(value._local_tensors) if type(value) is LocalTensor else None
        if stack is None:
            continue
        ranks = tuple(value._local_tensors)
        values = number_values(number, ranks)
        if values is not None:
            return stacked_number(values, ranks, dtype, like.device)
    return tensor_of_numbers(number, dtype=dtype, device=like.device)


BY_INDEX: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    Tensor.__getitem__: _get_item,
    Tensor.__setitem__: _set_item,
    Tensor.split: _split,
    torch.split: _split,
    Tensor.split_with_sizes: _split,
    torch.split_with_sizes: _split,
    Tensor.where: _where,
    torch.where: _where,
}
"""Functions with a way of their own to take per-rank numbers, called when they get some."""
