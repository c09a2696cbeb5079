"""What AOTAutograd must learn about LocalTensors: aliases, mutated inputs and missing gradients.

It replays conjugate views only for plain tensors, and takes for granted that the gradient of a
mutated input, or of an output that the loss does not use, is one plain tensor of zeros.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..errors import PlainTensorError
from ..stacked.layout import can_join, expanded, join
from ..values.int_node import make_int
from ..values.rank_node import is_ranked
from ..values.stack import ShardsOfStack, StackedRanks, stack_of
from ..values.tensor import LocalTensor, _wrap, _wrap_stacked
from .settled_sizes import counted, traced_as_counted
from .split_graphs import returning_subclasses


def _same_bits(out: Tensor, target: Tensor) -> Tensor:
    """`out`, which has the memory of `target`, with its conjugate and negative bits too."""
    if out.is_complex() and out.is_conj() != target.is_conj():
        out = out.conj()
    return out if out.is_neg() == target.is_neg() else torch._neg_view(out)


class _InStorageOf:
    """A LocalTensor output as gen_alias_from_base looks at it: as part of its base's storage.

    Since torch 2.14 that adds the base's offset where the two have different storages, which
    wrappers always have: here each rank's shards tell.
    """

    def __init__(self, base: LocalTensor, target: LocalTensor) -> None:
        self._base_tensor, self._target = base, target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def untyped_storage(self) -> Any:
        return self._base_tensor.untyped_storage()

    def stride(self) -> tuple[Any, ...]:
        """Inductor strides empty tensors as it likes: there those of the other ranks will do."""
        shards = self._target._local_tensors
        if type(shards) is ShardsOfStack:
            return self._target.stride()
        filled = next((t for t in shards.values() if t.numel()), None)
        if filled is None:
            return self._target.stride()
        strides = {r: (t if t.numel() else filled).stride() for r, t in shards.items()}
        dims = range(self._target.dim())
        return tuple(make_int({r: s[d] for r, s in strides.items()}) for d in dims)

    def storage_offset(self) -> Any:
        bases = self._base_tensor._local_tensors
        rows = stack_of(bases)
        if rows is not None:
            return self._offset_in_stack(rows)
        offsets = {}
        for rank, shard in self._target._local_tensors.items():
            base, offset = bases[rank], shard.storage_offset()
            if base.untyped_storage()._cdata != shard.untyped_storage()._cdata:
                offset = base.storage_offset() + offset
            offsets[rank] = offset
        return make_int(offsets)

    def _offset_in_stack(self, rows: Tensor) -> Any:
        """As a stacked LocalTensor counts: from the row of each rank, plus the first row's."""
        target = self._target._local_tensors
        stack = stack_of(target)
        if stack is None or stack.stride(0) != rows.stride(0):
            step = rows.stride(0)
            shards = enumerate(target.items())
            return make_int({r: t.storage_offset() - i * step for i, (r, t) in shards})
        offset = stack.storage_offset()
        if rows.untyped_storage()._cdata != stack.untyped_storage()._cdata:
            offset = rows.storage_offset() + offset
        return offset


def _replicated_tangent(tangent: Tensor, meta: Any) -> LocalTensor:
    """A plain gradient stands for the same gradient on every rank.

    Raises:
        PlainTensorError: the output has another shape on some rank.
    """
    # None is a symbol that all ranks share, -1 a size per rank.
    expected = tuple(meta.outer_size)
    if len(expected) != tangent.dim() or any(
        size is not None and size != got for size, got in zip(expected, tangent.shape)
    ):
        raise PlainTensorError(
            f"the gradient of a LocalTensor output of ranks {list(meta.meta)} is a plain "
            f"tensor of shape {tuple(tangent.shape)}, which is not the shape of the output on "
            "every rank. Pass a LocalTensor as gradient, e.g. from torch.ones_like(output)."
        )
    if type(meta.meta) is StackedRanks:
        ranks = tuple(meta.meta)
        return _wrap_stacked(expanded(tangent.detach(), len(ranks)), ranks)
    return _wrap({r: tangent.detach().clone() for r in meta.meta})


def _own_wrapper(tangent: LocalTensor, meta: Any) -> LocalTensor:
    """The gradient in the layout of the output, as a wrapper that AOTAutograd may write into."""
    shards = tangent._local_tensors
    if type(meta.meta) is StackedRanks:
        if type(shards) is not ShardsOfStack and can_join(tangent):
            tangent = join(tangent, "the gradient of a compiled function")
        return _wrap(tangent._local_tensors)
    return _wrap(dict(shards))


def _count_mutated_shards(outer: Any, inner: Any) -> None:
    """Make the metadata of the shards count the forward outputs that there really are.

    An input that requires grad and is written in place is an output of the forward graph, and so
    are its shards. Their own metadata takes the write for one inside the graph, since shards do
    not require grad: then strides and reusable buffers would be those of other saved tensors.
    """
    from torch._functorch._aot_autograd.subclass_utils import (
        compute_inner_mutated_inp_indices_from_subclass_meta as mutated_indices,
    )

    indices = mutated_indices(outer, inner)
    missing = len(indices) - inner.num_mutated_inp_runtime_indices
    inner.mutated_inp_runtime_indices = indices
    inner.num_mutated_inp_runtime_indices += missing
    inner.num_forward_returns += missing
    inner.num_forward += missing


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) in torch's AOTAutograd."""
    import torch._functorch._aot_autograd.collect_metadata_analysis as metadata
    import torch._functorch._aot_autograd.graph_capture as graph_capture
    import torch._functorch._aot_autograd.runtime_wrappers as runtime_wrappers
    import torch._functorch._aot_autograd.subclass_utils as subclass_utils
    import torch._functorch.aot_autograd as aot_autograd
    import torch._functorch.config as functorch_config

    gen_alias = runtime_wrappers.gen_alias_from_base

    @functools.wraps(gen_alias)
    def gen_alias_from_base(base: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(target, LocalTensor) and isinstance(base, LocalTensor)):
            return gen_alias(base, target, *args, **kwargs)
        out = gen_alias(base, _InStorageOf(base, target), *args, **kwargs)
        return _same_bits(out, target)

    collect = aot_autograd.run_functionalized_fw_and_collect_metadata

    @functools.wraps(collect)
    def collect_metadata(*args: Any, **kwargs: Any) -> Any:
        inner = collect(*args, **kwargs)

        @functools.wraps(inner)
        def run(*flat_args: Any) -> Any:
            if not any(isinstance(a, LocalTensor) for a in flat_args):
                return inner(*flat_args)
            # The gradient of a mutated LocalTensor is traced as a LocalTensor.
            name = "disable_guess_zero_tangent_for_mutated_input_subclass"
            with functorch_config.patch({name: True}):
                return inner(*flat_args)

        return run

    transform = metadata.transform_subclass

    @functools.wraps(transform)
    def transform_subclass(t: Any, callback: Any, *args: Any, **kwargs: Any) -> Any:
        if type(t) is not LocalTensor:
            return transform(t, callback, *args, **kwargs)
        # torch compares strides then; those of an empty shard may change when it is viewed.
        attributes, context = t.__tensor_flatten__()
        inner = {name: callback(name, getattr(t, name)) for name in attributes}
        return LocalTensor.__tensor_unflatten__(inner, context, t.size(), t.stride())

    dispatch = graph_capture.aot_dispatch_subclass

    @functools.wraps(dispatch)
    def aot_dispatch_subclass(*args: Any, **kwargs: Any) -> Any:
        outputs = kwargs["meta"].subclass_fw_graph_out_meta
        with counted(outputs):
            result = dispatch(*args, **kwargs)
        if result.maybe_subclass_meta is None:
            return result
        if kwargs["is_joint_structure"]:
            _count_mutated_shards(kwargs["meta"], result.maybe_subclass_meta.fw_metadata)
        trace = traced_as_counted(result.plain_tensor_trace_fn, outputs)
        return result._replace(plain_tensor_trace_fn=trace)

    autograd = runtime_wrappers.AOTDispatchAutograd
    process = autograd.process_runtime_tangent

    @functools.wraps(process)
    def process_runtime_tangent(x: Any, meta: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(meta, "original_subclass_type", None) is LocalTensor and type(x) is Tensor:
            x = _replicated_tangent(x, meta)
        elif type(x) is LocalTensor:
            # AOTAutograd replaces shards whose strides are not the traced ones; the caller's stay.
            x = _own_wrapper(x, meta)
        return process(x, meta, *args, **kwargs)

    found = []
    match_attr = getattr(subclass_utils, "_find_attr_matching_outer_metadata", None)
    if match_attr is not None:  # since torch 2.14

        @functools.wraps(match_attr)
        def find_attr(a: Any, *args: Any, **kwargs: Any) -> Any:
            # No shard has the per-rank size of the whole, and asking would make ranks' sizes equal.
            if isinstance(a, LocalTensor) and any(map(is_ranked, (*a._size, *a._stride))):
                return None
            return match_attr(a, *args, **kwargs)

        found.append((subclass_utils, "_find_attr_matching_outer_metadata", find_attr))

    first_call = runtime_wrappers.FakifiedOutWrapper
    return [
        *found,
        (first_call, "post_compile", returning_subclasses(first_call.post_compile)),
        (runtime_wrappers, "gen_alias_from_base", gen_alias_from_base),
        (metadata, "transform_subclass", transform_subclass),
        (aot_autograd, "run_functionalized_fw_and_collect_metadata", collect_metadata),
        (graph_capture, "aot_dispatch_subclass", aot_dispatch_subclass),
        (autograd, "process_runtime_tangent", staticmethod(process_runtime_tangent)),
    ]
