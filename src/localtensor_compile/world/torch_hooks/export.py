"""torch.export.export inside a mode: the program of all ranks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from ..state import enabled_local_tensor_mode

Replacement = tuple[Any, str, Any]


def replacements() -> Iterator[Replacement]:
    import torch.export._trace as trace  # torch.export.export looks it up when it is called

    yield trace, "_export", _of_all_ranks(trace._export)


def _of_all_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def export(*args: Any, **kwargs: Any) -> Any:
        from ...export.flat import PlainModule
        from ...export.programs import export_ranked

        given = signature.bind(*args, **kwargs).arguments
        if enabled_local_tensor_mode() is None or isinstance(given["mod"], PlainModule):
            return original(*args, **kwargs)
        return export_ranked(
            given["mod"],
            given["args"],
            given.get("kwargs"),
            dynamic_shapes=given.get("dynamic_shapes"),
            strict=given.get("strict", False),
            preserve_module_call_signature=given.get("preserve_module_call_signature", ()),
        )

    return export
