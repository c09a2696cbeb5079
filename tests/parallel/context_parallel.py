"""Context parallelism: every rank holds a part of the sequence of queries, keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from .harness import draw, fill, gradients

HEADS, HEAD_DIM = 2, 4


class RingShift(torch.autograd.Function):
    """Gives the tensor to the next rank of the ring; the gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return permuted(x, [*range(1, size), 0], group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = [ctx.size - 1, *range(ctx.size - 1)]
        return permuted(grad, back, ctx.group), None, None


def permuted(x: Tensor, destinations: list[int], group: Any) -> Tensor:
    flat = funcol.permute_tensor(x.flatten(), destinations, group)
    return funcol.wait_tensor(flat).view(x.shape)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mesh: Any, causal: bool) -> Tensor:
    """Blockwise softmax(q k^T) v: keys and values travel around, partial results are merged.

    Liu et al., Ring Attention with Blockwise Transformers, 2023.
    """
    group, size, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    length = q.shape[-2]
    rows = torch.arange(length)
    out = torch.zeros_like(q)
    total = torch.full(q.shape[:-1], -math.inf).unsqueeze(-1)
    packed = torch.cat([k, v], -1)
    for step in range(size):
        k, v = packed.chunk(2, -1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            owner = (rank - step) % size
            seen = (rows + rank * length)[:, None] >= (rows + owner * length)[None, :]
            scores = scores.masked_fill(~seen, -1e9)
        part_total = scores.logsumexp(-1, keepdim=True)
        part = scores.softmax(-1) @ v
        merged = torch.logaddexp(total, part_total)
        out = out * (total - merged).exp() + part * (part_total - merged).exp()
        total = merged
        if step + 1 < size:
            packed = RingShift.apply(packed, group, size)
    return out


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, mesh: Any, causal: bool) -> Tensor:
    """Queries stay, keys and values of all ranks are gathered."""
    group, rank = mesh.get_group(), mesh.get_local_rank()
    k = funcol.all_gather_tensor_autograd(k.contiguous(), 2, group)
    v = funcol.all_gather_tensor_autograd(v.contiguous(), 2, group)
    mask = None
    if causal:
        rows = torch.arange(q.shape[-2]) + rank * q.shape[-2]
        mask = rows[:, None] >= torch.arange(k.shape[-2])[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    def __init__(self, mesh: Any, attend: Any, causal: bool) -> None:
        super().__init__()
        self.mesh, self.attend, self.causal = mesh, attend, causal
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        return self.attend(q, k, v, self.mesh, self.causal).transpose(1, 2).flatten(2)


def attention(world: Any, form: str = "ring", causal: bool = True) -> dict[str, Any]:
    mesh = world.mesh(names="cp")
    attend = {"ring": ring_attention, "all-gather": gathered_attention}[form]
    model = fill(Attention(mesh, attend, causal))
    x = distribute_tensor(draw(2, 3 * world.size, HEADS * HEAD_DIM, seed=7), mesh, [Shard(1)])
    out = world.compile(model)(x.to_local())
    out.square().sum().backward()
    return {"out": out, **gradients(model)}


def torch_context_parallel(world: Any, backend: str = "FLASH_ATTENTION") -> dict[str, Any]:
    """torch's own context_parallel: CUDA kernels only."""
    mesh = world.mesh(names="cp")
    q, k, v = (draw(1, HEADS, 4 * world.size, HEAD_DIM, seed=i) for i in range(3))
    with context_parallel(mesh, buffers=(q, k, v), buffer_seq_dims=(2, 2, 2)):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return {"out": out}


def rank_in_ring(world: Any) -> dict[str, Any]:
    """Which rank's keys a rank holds after each step."""
    mesh = world.mesh(names="cp")
    value = torch.tensor([dist.get_rank()])
    size = mesh.size()
    found = {}
    for step in range(size):
        found[f"step {step}"] = value
        value = RingShift.apply(value, mesh.get_group(), size)
    return found
