"""Plain tensors that become DTensors: memory of its own for every rank, shared as it was.

On real ranks a Replicate DTensor has the memory of the tensor that it was made of, and two
DTensors made of tied weights are tied. A plain tensor is the memory of one process: here it is
copied for every rank, once per world, so that DTensors made of the same memory share theirs. What
is written to the plain tensor afterwards counts when it is distributed again.
"""

from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from ..values.tensor import LocalTensor, _wrap


class PlainReplicas:
    """The copies that one world made, by the memory that they are of."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self._ranks = ranks
        # Of a storage: a weak reference, its bytes when last seen, and each rank's copy.
        self._known: dict[int, tuple[StorageWeakRef, Tensor, dict[int, Tensor]]] = {}

    def of(self, tensor: Tensor) -> LocalTensor:
        """`tensor`, a plain one, on every rank."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            tensor = tensor.detach()
            if tensor.is_meta:
                return _wrap({r: torch.empty_like(tensor) for r in self._ranks})
            copies = self._copies(tensor.untyped_storage())
            return _wrap({r: _in(copies[r].untyped_storage(), tensor) for r in self._ranks})

    def forget(self) -> None:
        """Nothing was copied yet."""
        self._known.clear()

    def _copies(self, storage: UntypedStorage) -> dict[int, Tensor]:
        for key in [k for k, (known, _, _) in self._known.items() if known.expired()]:
            del self._known[key]
        now = _bytes(storage)
        if storage._cdata not in self._known:
            copies = {r: now.clone() for r in self._ranks}
            self._known[storage._cdata] = (StorageWeakRef(storage), now.clone(), copies)
            return copies
        _, seen, copies = self._known[storage._cdata]
        if not torch.equal(seen, now):
            for copy in (seen, *copies.values()):
                copy.copy_(now)
        return copies


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _in(storage: UntypedStorage, like: Tensor) -> Tensor:
    """A tensor laid out as `like` in other memory."""
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    result = empty.set_(storage, like.storage_offset(), like.size(), like.stride())
    result = result.conj() if like.is_conj() else result
    return torch._neg_view(result) if like.is_neg() else result
