"""Graphs that DDPOptimizer splits at the buckets of DistributedDataParallel.

It compiles part after part, and learns what a part gives to the next one from its first call, which
returns what was traced. For outputs that are subclasses torch returns their inner tensors there, so
that the next part would be compiled for the shard of one rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def returning_subclasses(original: Callable[..., Any]) -> Callable[..., Any]:
    """`FakifiedOutWrapper.post_compile` for graphs with outputs that are subclasses."""
    from torch._functorch._aot_autograd.schemas import SubclassCreationMeta
    from torch._functorch._aot_autograd.subclass_utils import wrap_tensor_subclasses

    @functools.wraps(original)
    def post_compile(self: Any, compiled: Any, config: Any, *, runtime_metadata: Any) -> Any:
        metas = runtime_metadata.subclass_fw_graph_out_meta
        subclasses = [m for m in metas if isinstance(m, SubclassCreationMeta)]
        if self.needs_post_compile and subclasses:
            inner = self._compute_output_meta_with_inductor_strides()
            outputs = sum(m.arg_count for m in subclasses) + len(metas) - len(subclasses)
            self.out_metas = wrap_tensor_subclasses(
                inner,
                subclass_metas=metas,
                num_fw_outs_saved_for_bw=len(inner) - outputs,
                included_subclass_symints=True,
            )
            self.fwd_output_strides = []  # they are in out_metas now
        return original(self, compiled, config, runtime_metadata=runtime_metadata)

    return post_compile
