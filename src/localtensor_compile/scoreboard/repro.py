"""The few lines that show a case: what a reader can paste into a program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import ops
from .store import Record

HEADER = """\
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import localtensor_compile as lt

# On real ranks, the same without `with`: torchrun --nproc-per-node {world_size} FILE
with lt.LocalTensorMode({world_size}):
    mesh = init_device_mesh("cpu", ({world_size},))
    R, S = [Replicate()], lambda dim: [Shard(dim)]
    shard = lambda x, placements: distribute_tensor(x, mesh, placements)
    ...  # a line of the table, for "compiled" inside a function that torch.compile is given"""
# Integer and boolean values are written out up to this many: they are indices, and matter.
_WRITTEN = 12


def repro(record: Record, case: Record) -> str:
    """One expression: the op on distributed tensors."""
    plan = record["plan"]
    sample = ops.samples(record["op"], case["sizes"], plan["samples"])[case["sample"]]
    texts = iter(
        f"shard({_tensor(t)}, {'R' if dim is None else f'S({dim})'})"
        for t, dim in zip(sample.tensors, case["sharding"])
    )

    def text(value: Any) -> Any:
        return _Text(next(texts) if isinstance(value, Tensor) else _plain(value))

    args, kwargs = pytree.tree_map(text, (sample.args, sample.kwargs))
    written = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
    return f"{_name(record['op'])}({', '.join(written)})"


class _Text:
    """Shows as its text inside the repr of tuples and lists."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _name(op: str) -> str:
    """`torch.add`, or how to find the function in torch's op database."""
    name = ops.database()[op].name
    target: Any = torch
    for part in name.split("."):
        target = getattr(target, part, None)
    if callable(target) and not ops.database()[op].variant_test_name:
        return f"torch.{name}"
    if hasattr(torch.Tensor, name) and not ops.database()[op].variant_test_name:
        return f"torch.Tensor.{name}"
    return f'op("{op}")'


def _tensor(tensor: Tensor) -> str:
    exact = not (tensor.is_floating_point() or tensor.is_complex())
    if exact and tensor.numel() <= _WRITTEN:
        if tensor.numel() == 0:
            return f"torch.empty({tuple(tensor.shape)}, dtype={tensor.dtype})"
        return f"torch.tensor({tensor.tolist()})"
    if exact:
        return f"torch.ones({tuple(tensor.shape)}, dtype={tensor.dtype})"
    dtype = "" if tensor.dtype == torch.float32 else f", dtype={tensor.dtype}"
    grad = ", requires_grad=True" if tensor.requires_grad else ""
    return f"torch.randn({tuple(tensor.shape)}{dtype}{grad})"


def _plain(value: Any) -> str:
    return getattr(value, "__name__", repr(value)) if callable(value) else repr(value)
