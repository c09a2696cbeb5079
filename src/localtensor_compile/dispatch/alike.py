"""While a graph is traced: one rank's op for all ranks whose shards are alike.

Functionalization, the fake kernel and the recording of a node take most of the time that tracing
takes. Where the shards of all ranks have one size and stride, and an op makes a new tensor, the
first rank's op goes that way, and the others get copies of its node and of its fake result. The
graph is the one that tracing each rank would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch_tracing as tracing
from ..values.stack import ShardsOfStack


class _Switch:
    on = True


switch = _Switch()
"""Off: each rank is traced by itself, as the tests compare."""

_NOT_ALIKE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout)


def can_share(func: Any) -> bool:
    """Whether the op gives one new tensor that depends on its operands' metadata only."""
    return (
        func.namespace == "aten"
        and torch.Tag.nondeterministic_seeded not in func.tags
        and not any(tag in func.tags for tag in _NOT_ALIKE)
        and not func._can_decompose()
    )


def results(
    call: Any,
    ranks: Sequence[int],
    ranked: Sequence[tuple[int, Mapping[int, Any]]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[int, Tensor] | None:
    """{rank: result} of an op that `can_share`, or None where each rank has to be traced.

    Args:
        ranked: the positions of the arguments that differ per rank, and their values.
    """
    operands = [_fakes(values) for _, values in ranked]
    if not switch.on or any(o is None for o in operands) or not _static(ranked, args, kwargs):
        return None
    mode = tracing.proxy_mode()
    columns: list[list[Any]] = []
    if mode is not None:
        for fakes in operands:
            nodes = [tracing.node_of(f, mode) for f in fakes]  # type: ignore[union-attr]
            if any(n is None for n in nodes):
                return None
            columns.append(nodes)
        if not _one_mapping(columns):
            return None
        last = tracing.last_node(mode)
    base = list(args)
    for i, values in ranked:
        base[i] = next(iter(values.values()))
    first = call(*base, **kwargs)
    made = tracing.fake_of(first) if isinstance(first, Tensor) else None
    recorded = tracing.nodes_since(last, mode) if mode is not None else []
    shared = made is not None and _owns_its_memory(made)
    if mode is not None:
        shared = shared and len(recorded) == 1 and tracing.node_of(made, mode) is recorded[0]  # type: ignore[arg-type]
    out = {}
    for k, rank in enumerate(ranks):
        if k == 0:
            out[rank] = first
        elif shared:
            fake = tracing.another(made)  # type: ignore[arg-type]
            if mode is not None:
                mapping = {c[0]: c[k] for c in columns}
                tracing.copy_node(recorded[0], mapping, fake, mode)
            out[rank] = tracing.as_traced(fake, first)
        else:
            for i, values in ranked:
                base[i] = values[rank]
            out[rank] = call(*base, **kwargs)
    return out


def _fakes(values: Mapping[int, Any]) -> list[Any] | None:
    """The fake tensors behind the shards, if they are alike."""
    if type(values) is ShardsOfStack:
        return None
    items = list(values.values())
    first = items[0]
    if not isinstance(first, Tensor):
        return None
    kind, like = type(first), _metadata(first)
    fakes: list[Any] = []
    for t in items:
        if type(t) is not kind or _metadata(t) != like:
            return None
        fake = tracing.fake_of(t)
        if fake is None:
            return None
        fakes.append(fake)
    if not all(type(n) is int for n in (*first.shape, *first.stride(), first.storage_offset())):
        return None
    return fakes


def _metadata(t: Tensor) -> tuple[Any, ...]:
    return (t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, t.is_conj(), t.is_neg())


def _static(ranked: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether all other arguments are numbers and the like, which no node stands for."""
    per_rank = {i for i, _ in ranked}
    others = [a for i, a in enumerate(args) if i not in per_rank]
    return all(map(_plain, others)) and all(map(_plain, kwargs.values()))


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return type(value) in _PLAIN or isinstance(value, torch.memory_format)


def _one_mapping(columns: Sequence[Sequence[Any]]) -> bool:
    """Whether operands that are one tensor on the first rank are one on every rank."""
    seen: dict[Any, Sequence[Any]] = {}
    return all(seen.setdefault(c[0], c) == c for c in columns)


def _owns_its_memory(fake: Any) -> bool:
    sizes = (*fake.shape, *fake.stride(), fake.storage_offset())
    return (
        all(type(n) is int for n in sizes)
        and fake.storage_offset() == 0
        and fake.layout is torch.strided
        and not fake.is_conj()
        and not fake.is_neg()
    )
