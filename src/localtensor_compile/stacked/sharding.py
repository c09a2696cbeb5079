"""DTensor's rank-dependent Python, done once for all ranks of stacked tensors.

DTensor runs parts of itself once per rank: which chunk of a tensor is a rank's own, whether its
shard needs padding. With stacked tensors of even shards the answer is one op, or the same on all
ranks. torch's functions are told apart by name; one that is not known here runs once per rank,
and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._torch import AsyncCollectiveTensor
from ..values.int_node import make_int
from ..values.rank_node import is_ranked
from ..values.stack import ShardsOfStack
from ..values.tensor import LocalTensor, _wrap_stacked
from . import counts

Ranks = tuple[int, ...]

# They do the same on all ranks, or leave to ops on per-rank numbers what differs.
_ALIKE = frozenset(
    {
        "Shard._custom_chunk",
        "Shard._get_shard_pad_size",
        "Shard._maybe_pad_tensor",
        "Shard._maybe_unpad_tensor",
        "Shard._maybe_unpad_tensor_with_sizes",
        "Shard._pad_for_new_shard_dim",
        "Shard._unpad_for_new_shard_dim",
        "_MaskPartial._mask_tensor",
        "compute_global_tensor_info",
        "pad_tensor",
        "unpad_tensor",
    }
)


def at_once(func: Any, ranks: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What `func`, run once per rank, gives, or NotImplemented where it must run per rank."""
    if not getattr(func, "__module__", "").startswith("torch."):
        return NotImplemented
    flat, spec = pytree.tree_flatten((tuple(args), kwargs))
    flat = [v.wait() if isinstance(v, AsyncCollectiveTensor) else v for v in flat]
    tensors = [v for v in flat if isinstance(v, LocalTensor)]
    order = tuple(sorted(ranks))
    name = func.__qualname__
    if not tensors:
        if name not in _NUMBERS:
            return NotImplemented
        return _of_numbers(func, *pytree.tree_unflatten(flat, spec))
    held = [t._local_tensors for t in tensors]
    if not all(type(h) is ShardsOfStack and h.ranks == order for h in held):
        return NotImplemented
    args, kwargs = pytree.tree_unflatten(flat, spec)
    if any(is_ranked(v) for v in flat):
        own = _BY_NAME.get(name)
        result = NotImplemented if own is None else own(func, args, kwargs)
    elif name in _ALIKE or name in _BY_NAME:
        result = func(*args, **kwargs)
    else:
        result = NotImplemented
    if result is NotImplemented:
        counts.went_per_rank(name, "this part of DTensor depends on the rank")
    return result


def _of_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of sizes: its arithmetic is per rank by itself, where shards are even."""
    flat = pytree.tree_leaves((args, kwargs))
    if any(isinstance(v, (Tensor, torch.SymInt)) and not is_ranked(v) for v in flat):
        return NotImplemented
    name = func.__qualname__
    return _NUMBERS[name](func, *args, **kwargs)


def _size_and_offset(func: Any, size: Any, parts: Any, rank: Any) -> Any:
    if type(size) is not int:
        return NotImplemented
    return func(size, parts, rank)


def _strided_size_and_offset(
    func: Any, placement: Any, size: Any, parts: Any, rank: Any, offset_mode: Any = 0
) -> Any:
    factor = placement.split_factor
    if type(size) is not int or type(factor) is not int or not size or size % (factor * parts):
        return NotImplemented
    if offset_mode == _ALL_OFFSETS:
        return NotImplemented
    first = None if offset_mode == _NO_OFFSET else rank * (size // (factor * parts))
    return size // parts, first


_ALL_OFFSETS, _NO_OFFSET = 1, 2  # of torch's _StridedShardOffsetMode


def _sizes_without_offsets(func: Any, *args: Any, **kwargs: Any) -> Any:
    skip_offset = kwargs.get("skip_offset", args[6] if len(args) > 6 else False)
    return func(*args, **kwargs) if skip_offset is True else NotImplemented


_NUMBERS: dict[str, Callable[..., Any]] = {
    "Shard.local_shard_size_and_offset": _size_and_offset,
    "_StridedShard.local_shard_size_and_offset": _strided_size_and_offset,
    "_get_shard_size_and_offsets": _sizes_without_offsets,
}


# ---------------------------------------------------------------- a chunk per rank
def _evenly(tensor: Tensor, dim: int, parts: Any) -> bool:
    if not 0 <= dim < tensor.dim():
        return False
    size = tensor.shape[dim]
    return type(size) is int and type(parts) is int and parts > 0 and size % parts == 0


def own_chunk(tensor: Tensor, dim: int, parts: int, index: Any) -> Tensor:
    """Chunk number `index`, which is per rank, of `parts` equal ones; fresh memory."""
    length = tensor.shape[dim] // parts
    if is_ranked(index):
        return torch.slice_copy(tensor, dim, index * length, index * length + length)
    return tensor.narrow(dim, index * length, length).clone()


def own_even_chunk(tensor: Tensor, dim: int, parts: int, index: Any) -> Any:
    """`own_chunk`, or NotImplemented where the chunks differ in size."""
    return own_chunk(tensor, dim, parts, index) if _evenly(tensor, dim, parts) else NotImplemented


def own_strided_chunk(tensor: Tensor, dim: int, factor: int, parts: int, index: Any) -> Tensor:
    """Of each of `factor` equal pieces chunk number `index`, joined; fresh memory."""
    cut = tensor.unflatten(dim, (factor, tensor.shape[dim] // factor))
    return own_chunk(cut, dim + 1, parts, index).flatten(dim, dim + 1)


def _select_split(func: Any, args: Any, kwargs: Any) -> Any:
    placement, tensor, parts, index = args
    if not (kwargs.get("clone", True) or kwargs.get("contiguous", True)):
        return NotImplemented  # a view is wanted
    return select(placement, tensor, parts, index)


def select(placement: Any, tensor: Tensor, parts: Any, index: Any) -> Any:
    """The rank's own shard of `tensor` under Shard or _StridedShard, where shards are even."""
    dim = placement.dim
    factor = getattr(placement, "split_factor", None)
    if factor is None:
        even = _evenly(tensor, dim, parts)
        return own_chunk(tensor, dim, parts, index) if even else NotImplemented
    if type(factor) is not int or not _evenly(tensor, dim, factor * parts):
        return NotImplemented
    return own_strided_chunk(tensor, dim, factor, parts, index)


def _unpad_for_new_dim(func: Any, args: Any, kwargs: Any) -> Any:
    shape, tensor, parts, old, new, _rank = args
    if kwargs or shape[new] % parts:
        return NotImplemented
    return func(shape, tensor, parts, old, new, 0)  # which asks for the rank only to unpad `new`


def _unpad_with_sizes(func: Any, args: Any, kwargs: Any) -> Any:
    dim, tensor, sizes, _rank, make_contiguous = args
    if kwargs or any(s != sizes[0] for s in sizes):
        return NotImplemented
    return func(dim, tensor, sizes, 0, make_contiguous)


def _mask_tensor(func: Any, args: Any, kwargs: Any) -> Any:
    """The rows of an embedding that other ranks hold, and all indices as rows of one's own."""
    tensor, offset, size = args
    if is_ranked(size):
        return NotImplemented
    mask = (tensor < offset) | (tensor >= offset + size)
    return mask, (tensor - offset).masked_fill(mask, 0)


_BY_NAME: dict[str, Callable[[Any, Any, Any], Any]] = {
    "Shard._select_split_tensor": _select_split,
    "_StridedShard._select_split_tensor": _select_split,
    "Shard._unpad_for_new_shard_dim": _unpad_for_new_dim,
    "Shard._maybe_unpad_tensor_with_sizes": _unpad_with_sizes,
    "_MaskPartial._mask_tensor": _mask_tensor,
}


# ---------------------------------------------------------------- distribute_tensor
def scattered(
    placement: Any,
    tensor: Any,
    ranks: Ranks,
    coordinates: Sequence[Mapping[int, int]],
    mesh_dim: int,
    parts: int,
    source: int | None,
) -> Any:
    """Each rank's shard of the tensor of its source, or NotImplemented where shards are uneven.

    Args:
        coordinates: for each dimension of the mesh {rank: coordinate}.
        mesh_dim: the dimension of the mesh, of size `parts`, to shard over.
        source: the coordinate of the sources on it; None: each rank's own tensor counts.
    """
    own = [coordinates[mesh_dim][r] for r in ranks]
    with torch._C.DisableTorchFunction():
        if type(tensor) is Tensor:
            return _of_plain(placement, tensor, ranks, parts, own)
        held = getattr(tensor, "_local_tensors", None)
        if type(held) is not ShardsOfStack or held.ranks != ranks:
            return NotImplemented
        if source is not None:
            positions = _sources(ranks, coordinates, mesh_dim, source)
            if positions is None:
                return NotImplemented
            index = torch.tensor(positions, device=held.stack.device)
            tensor = _wrap_stacked(held.stack.index_select(0, index), ranks)
        return select(placement, tensor, parts, make_int(dict(zip(ranks, own))))


def _of_plain(placement: Any, tensor: Tensor, ranks: Ranks, parts: int, own: Sequence[int]) -> Any:
    """The shards of a tensor that all ranks share."""
    dim, factor = placement.dim, getattr(placement, "split_factor", 1)
    if type(factor) is not int or not _evenly(tensor, dim, factor * parts):
        return NotImplemented
    with torch.no_grad():
        length = tensor.shape[dim] // (factor * parts)
        cut = tensor.detach().unflatten(dim, (factor, parts, length)).movedim(dim + 1, 0)
        rows = cut.index_select(0, torch.tensor(own, device=tensor.device))
        return _wrap_stacked(rows.flatten(dim + 1, dim + 2).contiguous(), ranks)


def _sources(
    ranks: Ranks, coordinates: Sequence[Mapping[int, int]], mesh_dim: int, source: int
) -> list[int] | None:
    """For each rank the position of the rank with coordinate `source` in its group."""
    where = {tuple(c[r] for c in coordinates): i for i, r in enumerate(ranks)}
    found = []
    for r in ranks:
        place = [c[r] for c in coordinates]
        place[mesh_dim] = source
        position = where.get(tuple(place))
        if position is None:
            return None
        found.append(position)
    return found


# ---------------------------------------------------------------- another dimension
def chunked_cat(tensor: Tensor, parts: Any, narrow_dim: int, cat_dim: int) -> Any:
    """torch.cat(torch.chunk(tensor, parts, narrow_dim), cat_dim) of equal chunks, as one copy."""
    dims = tensor.dim()
    narrow_dim, cat_dim = narrow_dim % dims, cat_dim % dims
    if narrow_dim == cat_dim or not _evenly(tensor, narrow_dim, parts):
        return NotImplemented
    size = tensor.shape[cat_dim]
    cut = tensor.unflatten(narrow_dim, (parts, tensor.shape[narrow_dim] // parts))
    # The number of the chunk goes before the dimension along which they are joined.
    moved = cut.movedim(narrow_dim, cat_dim)
    shape = list(tensor.shape)
    shape[narrow_dim] //= parts
    shape[cat_dim] = parts * size
    return moved.reshape(shape)
