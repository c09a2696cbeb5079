"""The models that are timed: what one rank runs, and the same for all ranks at once by hand.

Every function takes (x, *weights) and returns a loss: a number on each rank, or of the batched form
a tensor [W]. Shards are float32, rows come first: x is [tokens, width] or [batch, tokens, width].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 32
"""Width of an attention head."""


def mlp(x: Any, w1: Any, w2: Any) -> Any:
    y = torch.relu(x @ w1) @ w2
    return (y * y).sum()


def mlp_batched(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    y = torch.bmm(torch.relu(torch.bmm(x, w1)), w2)
    return (y * y).sum((1, 2))


def pointwise(a: Any, b: Any) -> Any:
    c = (a + b) * a
    return c.relu() - b


def block(
    x: Any, g1: Any, b1: Any, qkv: Any, out: Any, g2: Any, b2: Any, up: Any, down: Any
) -> Any:
    """A pre-norm transformer layer, dropout off; weights are [in, out]."""
    batch, length, width = x.shape
    heads = (F.layer_norm(x, (width,), g1, b1) @ qkv).view(batch, length, 3, -1, HEAD)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + mixed.transpose(1, 2).reshape(batch, length, width) @ out
    y = x + F.gelu(F.layer_norm(x, (width,), g2, b2) @ up) @ down
    return (y * y).sum()


def block_batched(
    x: Tensor,
    g1: Tensor,
    b1: Tensor,
    qkv: Tensor,
    out: Tensor,
    g2: Tensor,
    b2: Tensor,
    up: Tensor,
    down: Tensor,
) -> Tensor:
    """As one would write it to run W models: batched matmuls, attention on W * batch."""
    ranks, batch, length, width = x.shape
    rows = (ranks, batch * length, -1)

    def norm(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, (width,)) * g[:, None] + b[:, None]

    x = x.reshape(rows)
    heads = torch.bmm(norm(x, g1, b1), qkv).view(ranks * batch, length, 3, -1, HEAD)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + torch.bmm(mixed.transpose(1, 2).reshape(rows), out)
    y = x + torch.bmm(F.gelu(torch.bmm(norm(x, g2, b2), up)), down)
    return (y * y).sum((1, 2))


@dataclass(frozen=True)
class Model:
    """A model in both forms.

    Attributes:
        per_rank: (x, *weights) -> loss, of one rank.
        batched: the same on tensors [W, ...] -> [W].
        shapes: of x and of every weight, on one rank.
        size: how to call the sizes.
    """

    name: str
    per_rank: Callable[..., Any]
    batched: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    size: str


def mlp_model(tokens: int, width: int, hidden: int) -> Model:
    shapes = ((tokens, width), (width, hidden), (hidden, width))
    return Model("MLP", mlp, mlp_batched, shapes, f"{tokens} x {width}, {hidden} hidden")


def block_model(batch: int, tokens: int, width: int) -> Model:
    vector = (width,)
    shapes = (
        (batch, tokens, width),
        vector,
        vector,
        (width, 3 * width),
        (width, width),
        vector,
        vector,
        (width, 4 * width),
        (4 * width, width),
    )
    size = f"{batch} x {tokens} x {width}, {width // HEAD} heads"
    return Model("block", block, block_batched, shapes, size)


SMALL_MLP = mlp_model(16, 32, 64)
SMALL_BLOCK = block_model(1, 16, 64)


def stacked_operands(model: Model, ranks: int) -> list[Tensor]:
    """x and the weights of all ranks as [W, ...], different on every rank; weights require grad."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for i, shape in enumerate(model.shapes):
        scale = 1 / math.sqrt(shape[-2]) if i and len(shape) > 1 else 1.0
        tensors.append(torch.randn(ranks, *shape, generator=generator) * scale)
    return [t.requires_grad_(i > 0) for i, t in enumerate(tensors)]


def train_step(loss_of: Callable[..., Any], operands: Any, gradient: Any = None) -> None:
    """Forward and backward; gradients are dropped."""
    loss_of(*operands).backward(gradient)
    for weight in operands[1:]:
        weight.grad = None


# ---------------------------------------------------------------- modules
class MLP(nn.Module):
    """Two linear layers without biases; weights are drawn inside whatever world there is."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def tp_mlp(
    ranks: int, width: int, hidden: int, weights: tuple[Tensor, Tensor] | None = None
) -> nn.Module:
    """The MLP over DTensors: columns of the first and rows of the second weight on each rank.

    Args:
        weights: [width, hidden] and [hidden, width]; drawn where there are none.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = MLP(width, hidden)
    if weights is not None:
        with torch.no_grad():
            for layer, weight in zip((model.up, model.down), weights):
                layer.weight.copy_(weight.t())
    return parallelize_module(model, mesh, plan)


def fsdp_mlp(ranks: int, width: int, hidden: int) -> nn.Module:
    """The MLP with sharded parameters that a parametrization makes whole (SimpleFSDP)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.nn.utils import parametrize

    from tests.parallel.data_parallel import Unshard

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
    model = MLP(width, hidden)
    for module in (model.up, model.down):
        sharded = distribute_tensor(module.weight.detach(), mesh, [Shard(0)])
        module.register_parameter("weight", nn.Parameter(sharded))
        parametrize.register_parametrization(module, "weight", Unshard("shard"), unsafe=True)
    return model


class Loss(nn.Module):
    """The sum of squares of a model's output, so that the loss is compiled with the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        return (y * y).sum()


def module_step(loss: Callable[[Any], Any], x: Any, parameters: Any) -> None:
    """Forward and backward of a `Loss` on x; gradients are dropped."""
    loss(x).backward()
    for parameter in parameters:
        parameter.grad = None


def tp_mlp_batched(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The tensor-parallel MLP by hand: x [W, tokens, width] is alike on all ranks."""
    partial = torch.bmm(torch.relu(torch.bmm(x, w1)), w2)
    y = partial.sum(0, keepdim=True).expand_as(partial)
    return (y * y).sum((1, 2))
