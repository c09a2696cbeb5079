"""The private torch names that the lower layers need, each imported here and nowhere else.

What has to be *patched* in torch lives in world/torch_hooks.py; this module only reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily as unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor as AsyncCollectiveTensor,
)
from torch.fx.experimental._constant_symnode import ConstantIntNode as ConstantIntNode

try:  # keeps a wrapper's constructor callable in exported programs; absent in some versions
    from torch._export.wrappers import (
        mark_subclass_constructor_exportable_experimental as mark_constructor_exportable,
    )
except ImportError:  # pragma: no cover - depends on the torch version

    def mark_constructor_exportable(constructor: Any) -> Any:
        return constructor


VERSION: tuple[int, int] = tuple(int(v) for v in torch.__version__.split(".")[:2])  # type: ignore[assignment]
MIN_VERSION, MAX_VERSION = (2, 11), (2, 15)

disable_dynamo = torch._disable_dynamo

_DispatchModeKey = torch._C._TorchDispatchModeKey


def fake_mode_active() -> bool:
    """Whether a FakeTensorMode is on the dispatch mode stack (or temporarily unset by torch)."""
    return torch._C._get_dispatch_mode(_DispatchModeKey.FAKE) is not None


def tracing_active() -> bool:
    """Whether values are being traced: a fake, functional or proxy mode is on the stack."""
    get = torch._C._get_dispatch_mode
    return (
        get(_DispatchModeKey.FAKE) is not None
        or get(_DispatchModeKey.FUNCTIONAL) is not None
        or get(_DispatchModeKey.PROXY) is not None
    )


def current_fake_mode() -> Any:
    """The fake tensor mode of the trace in progress, or None."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode()


def proxy_mode() -> Any:
    """The proxy tensor mode (make_fx) in progress, or None."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode()
