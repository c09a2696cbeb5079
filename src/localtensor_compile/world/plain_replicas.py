"""Plain tensors that become DTensors: memory of its own for every rank, shared as it was.

On real ranks a Replicate DTensor has the memory of the tensor that it was made of, and two
DTensors made of tied weights are tied. A plain tensor is the memory of one process: here it is
copied for every rank, once per world, so that DTensors made of the same memory share theirs. What
is written to the plain tensor afterwards counts when it is distributed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from ..stacked.layout import expanded
from ..values.tensor import LocalTensor, _wrap, _wrap_stacked


class PlainReplicas:
    """The copies that one world made, by the memory that they are of."""

    def __init__(self, ranks: tuple[int, ...], stacked: bool = False) -> None:
        self._ranks = ranks
        self._stacked = stacked
        # Of a storage: a weak reference, its bytes when last seen, and the ranks' copies.
        self._known: dict[int, tuple[StorageWeakRef, Tensor, Any]] = {}

    def of(self, tensor: Tensor) -> LocalTensor:
        """`tensor`, a plain one, on every rank."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            tensor = tensor.detach()
            if tensor.is_meta:
                if self._stacked:
                    return _wrap_stacked(expanded(tensor, len(self._ranks)), self._ranks)
                return _wrap({r: torch.empty_like(tensor) for r in self._ranks})
            copies = self._copies(tensor.untyped_storage())
            if self._stacked:
                return _wrap_stacked(_rows_in(copies, tensor), self._ranks)
            return _wrap({r: _in(copies[r].untyped_storage(), tensor) for r in self._ranks})

    def forget(self) -> None:
        """Nothing was copied yet."""
        self._known.clear()

    def _copies(self, storage: UntypedStorage) -> Any:
        """{rank: bytes}, or in the stacked layout bytes [ranks, pitch]."""
        for key in [k for k, (known, _, _) in self._known.items() if known.expired()]:
            del self._known[key]
        now = _bytes(storage)
        if storage._cdata not in self._known:
            copies = self._new_copies(now)
            self._known[storage._cdata] = (StorageWeakRef(storage), now.clone(), copies)
            return copies
        _, seen, copies = self._known[storage._cdata]
        if not torch.equal(seen, now):
            seen.copy_(now)
            for copy in [copies[:, : now.numel()]] if self._stacked else copies.values():
                copy.copy_(now)
        return copies

    def _new_copies(self, now: Tensor) -> Any:
        if not self._stacked:
            return {r: now.clone() for r in self._ranks}
        pitch = -(-now.numel() // _ALIGNED) * _ALIGNED
        copies = now.new_zeros((len(self._ranks), pitch))
        copies[:, : now.numel()].copy_(now)
        return copies


_ALIGNED = 16  # bytes: a multiple of the size of every dtype


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _in(storage: UntypedStorage, like: Tensor) -> Tensor:
    """A tensor laid out as `like` in other memory."""
    return _laid_out(storage, like, like.size(), like.stride())


def _rows_in(copies: Tensor, like: Tensor) -> Tensor:
    """A stack whose rows are laid out as `like` in the rows of `copies`, which are bytes."""
    pitch = copies.shape[1] // like.element_size()
    size = torch.Size((copies.shape[0], *like.shape))
    return _laid_out(copies.untyped_storage(), like, size, (pitch, *like.stride()))


def _laid_out(
    storage: UntypedStorage, like: Tensor, size: torch.Size, stride: tuple[int, ...]
) -> Tensor:
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    result = empty.set_(storage, like.storage_offset(), size, stride)
    result = result.conj() if like.is_conj() else result
    return torch._neg_view(result) if like.is_neg() else result
