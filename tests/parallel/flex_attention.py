"""torch's context parallelism of flex attention: queries stay, keys and values are gathered."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor.experimental._attention import (
    _context_parallel_shard,
    _ContextParallel,
    _HeadTailLoadBalancer,
    context_parallel_unshard,
)
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .harness import draw

BLOCK = 128  # create_cp_block_mask wants whole blocks on every rank


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (q >= kv) & (q - kv < 96)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, block_mask: Any = None) -> Any:
        return flex_attention(q, k, v, block_mask=block_mask)


def attention(
    world: Any, mask: str = "causal", balanced: bool = False, compiled: bool = False
) -> dict[str, Any]:
    """Each rank's part of the sequence. (Flex attention has no backward on CPU.)"""
    mesh = world.mesh(names="cp")
    length = 2 * BLOCK * world.size
    mask_mod = {"causal": causal, "window": window}[mask]
    block_mask = create_block_mask(mask_mod, 1, 1, length, length, device="cpu")
    q, k, v = (draw(1, 2, length, 16, seed=i) for i in range(3))
    balancer = _HeadTailLoadBalancer(length, world.size, "cpu") if balanced else None
    q, k, v, block_mask = _context_parallel_shard(
        mesh, [q, k, v, block_mask], [2, 2, 2, 2], load_balancer=balancer
    )
    model = parallelize_module(
        Attention(), mesh, _ContextParallel(2, _ContextParallel.AttentionType.FLEX)
    )
    if compiled:
        model = world.compile(model)
    out = model(q, k, v, block_mask=block_mask)
    whole = context_parallel_unshard(mesh, [out], [2], balancer)[0]
    blocks = {"full": block_mask.full_kv_num_blocks, "some": block_mask.kv_num_blocks}
    return {"out": out, "whole": whole, **blocks}
