"""strict=True: whether Dynamo can trace a model, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class _Traced(BaseException):
    """Dynamo has traced the model: its graph is about to run, and must not."""


def require_traceable(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> None:
    """Raise what Dynamo raises unless it can trace the model whole.

    The graph that is exported is traced through Python, with strict=True as without: Dynamo only
    says whether something in the code depends on what tracing through Python does not see.
    """

    def backend(graph: Any, inputs: Any) -> Any:
        def stop(*_: Any) -> Any:
            raise _Traced

        return stop

    # A frame of our own, which alone is forgotten: the user may have compiled the model's.
    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    dynamic = dynamic_shapes is not None
    try:
        torch.compile(call, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    except _Traced:
        pass
    finally:
        torch._dynamo.reset_code(call.__code__)
