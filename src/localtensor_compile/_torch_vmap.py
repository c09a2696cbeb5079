"""vmap below __torch_dispatch__: the private names of torch.func that the stacked layout uses.

torch runs __torch_dispatch__ with every dispatch key above Python switched off, those of vmap
included. `one_level` switches exactly these on again, for one op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_functorch: Any = torch._C._functorch
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
for _name in (
    "FuncTorchVmapMode",
    "FuncTorchDynamicLayerFrontMode",
    "FuncTorchDynamicLayerBackMode",
    "FuncTorchBatchedDecomposition",
):
    _KEYS = _KEYS.add(torch._C._dispatch_key_parse(_name))

_RULES = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "CompositeImplicitAutograd")


def has_rule(func: Any) -> bool:
    """Whether vmap knows the op: a batching rule, or a decomposition into other ops."""
    name = func.name()
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _RULES)


class one_level:
    """Context manager: a level of vmap over `size` entries, with its slow fallback refused.

    That fallback runs the op once per entry. Here an op that needs it raises RuntimeError.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> int:
        self.keys = torch._C._ForceDispatchKeyGuard(
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set() - _KEYS,
        )
        self.keys.__enter__()
        self.fallback = _functorch._is_vmap_fallback_enabled()
        _functorch._set_vmap_fallback_enabled(False)
        return _functorch._vmap_increment_nesting(self.size, "error")

    def __exit__(self, *exc: Any) -> None:
        _functorch._vmap_decrement_nesting()
        _functorch._set_vmap_fallback_enabled(self.fallback)
        self.keys.__exit__(None, None, None)


def batch(stack: Tensor, level: int) -> Tensor:
    """The stack as a tensor whose first dimension vmap handles."""
    return _functorch._add_batch_dim(stack, 0, level)


def unbatch(tensor: Tensor, level: int, size: int) -> tuple[Tensor, bool]:
    """[size, ...] of what vmap gave, and whether its entries are memory of their own each.

    A result that does not depend on the entries comes back expanded.
    """
    own = _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == level
    return _functorch._remove_batch_dim(tensor, level, size, 0), own


FALLBACK_REFUSED = "fallback"
"""In the message of the RuntimeError with which vmap says that only its slow fallback is left."""
