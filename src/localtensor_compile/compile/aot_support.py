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
from ..values.tensor import LocalTensor, _wrap


def _same_bits(out: Tensor, target: Tensor) -> Tensor:
    """`out`, which has the memory of `target`, with its conjugate and negative bits too."""
    if out.is_complex() and out.is_conj() != target.is_conj():
        out = out.conj()
    return out if out.is_neg() == target.is_neg() else torch._neg_view(out)


def _replicated_tangent(tangent: Tensor, meta: Any) -> LocalTensor:
    """A plain gradient stands for the same gradient on every rank.

    Raises:
        PlainTensorError: the output has another shape on some rank.
    """
    expected = [s if type(s) is int and s >= 0 else None for s in meta.outer_size]
    if len(expected) != tangent.dim() or any(
        size is None or size != got for size, got in zip(expected, tangent.shape)
    ):
        raise PlainTensorError(
            f"the gradient of a LocalTensor output of ranks {list(meta.meta)} is a plain "
            f"tensor of shape {tuple(tangent.shape)}, which is not the shape of the output on "
            "every rank. Pass a LocalTensor as gradient, e.g. from torch.ones_like(output)."
        )
    return _wrap({r: tangent.detach().clone() for r in meta.meta})


def replacements() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) in torch's AOTAutograd."""
    import torch._functorch._aot_autograd.graph_capture_wrappers as graph_capture_wrappers
    import torch._functorch._aot_autograd.runtime_wrappers as runtime_wrappers
    import torch._functorch.aot_autograd as aot_autograd
    import torch._functorch.config as functorch_config

    gen_alias = runtime_wrappers.gen_alias_from_base

    @functools.wraps(gen_alias)
    def gen_alias_from_base(base: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        out = gen_alias(base, target, *args, **kwargs)
        return _same_bits(out, target) if isinstance(target, LocalTensor) else out

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

    autograd = runtime_wrappers.AOTDispatchAutograd
    process = autograd.process_runtime_tangent

    @functools.wraps(process)
    def process_runtime_tangent(x: Any, meta: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(meta, "original_subclass_type", None) is LocalTensor and type(x) is Tensor:
            x = _replicated_tangent(x, meta)
        return process(x, meta, *args, **kwargs)

    return [
        (runtime_wrappers, "gen_alias_from_base", gen_alias_from_base),
        (aot_autograd, "run_functionalized_fw_and_collect_metadata", collect_metadata),
        (runtime_wrappers, "run_functionalized_fw_and_collect_metadata", collect_metadata),
        (graph_capture_wrappers, "run_functionalized_fw_and_collect_metadata", collect_metadata),
        (autograd, "process_runtime_tangent", staticmethod(process_runtime_tangent)),
    ]
