"""A byte-level language model, sharded by tensor and sequence parallelism, trained for three steps.

Ordinary torch: the model is a plain nn.Module, the sharding is torch's `parallelize_module`, and
nothing below knows whether its ranks are simulated or real. One file, three engines:

    localtensor check docs/examples/tp_transformer.py --nproc-per-node 4    all engines, compared
    python docs/examples/tp_transformer.py                                  the same, 4 ranks
    torchrun --nproc-per-node 4 docs/examples/tp_transformer.py             real processes
    localtensor matrix docs/examples/tp_transformer.py --dp 1,2 --tp 1,2,4  against one rank

Two sizes do not divide by 4 on purpose, so ranks hold different amounts of work: the vocabulary
(256 bytes and one begin-of-text symbol: 65, 65, 65 and 62 rows) and the width of the MLP
(1022: 256, 256, 256 and 254 columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import localtensor_compile as lt

BEGIN = 256  # the symbol before the first byte of a text
VOCABULARY = 257


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training run. `heads` and `length` divide by the world size."""

    layers: int = 4
    dim: int = 256
    heads: int = 8
    hidden: int = 1022
    batch: int = 2
    length: int = 64
    steps: int = 3
    learning_rate: float = 0.1


class Attention(nn.Module):
    """Causal self-attention; under tensor parallelism on the heads of one rank.

    The columns of `qkv` are ordered by head, so that cutting them into ranks cuts between heads.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, 3, self.head_dim)
        q, k, v = heads.transpose(1, 2).unbind(3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The MLP of a layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Decoder-only language model: tokens and targets [batch, length] to the mean cross-entropy
    in nats per byte, and the logits [batch, length, VOCABULARY] without gradient."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.positions = nn.Embedding(config.length, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.positions(positions.expand_as(tokens))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), logits.detach()


def parallelize(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Shard the weights over `mesh`, and activations between layers over the sequence.

    Between attention and MLP every rank holds a part of the sequence; an all-gather goes before
    each of them and a reduce-scatter after. The MLP hands a DTensor from `up` to `down`, because
    only a DTensor knows that an uneven width adds up to 1022.
    """
    sequence = Shard(1)
    parallelize_module(
        model,
        mesh,
        {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence),
            "positions": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=sequence, output_layouts=Replicate()),
        },
    )
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(sequence,), desired_input_layouts=(Replicate(),)
                ),
                "attention.qkv": ColwiseParallel(),
                "attention.out": RowwiseParallel(output_layouts=sequence),
                "mlp_norm": SequenceParallel(),
                "mlp": PrepareModuleInput(
                    input_layouts=(sequence,), desired_input_layouts=(Replicate(),)
                ),
                "mlp.up": ColwiseParallel(use_local_output=False),
                "mlp.down": RowwiseParallel(output_layouts=sequence),
            },
        )
    return model


def read_text() -> bytes:
    """The project's own documentation, as bytes."""
    docs = Path(__file__).resolve().parents[1]
    files = [*docs.parent.glob("README.md"), *sorted(docs.glob("*.md"))]
    return b"\n".join(file.read_bytes() for file in files)


def batches(config: Config, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(tokens, targets) of each step, both [batch, length]: windows spread evenly over the text."""
    text = [BEGIN, *read_text()]
    windows = config.steps * config.batch
    stride = (len(text) - config.length - 1) // windows
    cut = [text[i * stride : i * stride + config.length + 1] for i in range(windows)]
    data = torch.tensor(cut, device=device).view(config.steps, config.batch, config.length + 1)
    return [(step[:, :-1], step[:, 1:]) for step in data]


def average(value: Tensor, mesh: DeviceMesh) -> None:
    """The mean over the ranks of `mesh`, in place; of a DTensor, of its shard."""
    local = value.to_local() if isinstance(value, DTensor) else value
    dist.all_reduce(local, group=mesh.get_group())
    local.div_(mesh.size())


def program(world: lt.World, config: Config = Config()) -> dict[str, Tensor]:
    """Train, and return what every rank has to agree on between engines.

    Each of the "dp" groups of ranks takes its part of the batch, and gradients are averaged over
    them; within a group the model is sharded. On one rank it is the plain model.
    """
    model = Transformer(config).to(world.device)
    dp, tp = world.degree("dp"), world.degree("tp")
    mesh = world.mesh((dp, tp), ("dp", "tp"))
    if tp > 1:
        parallelize(model, mesh["tp"])
    forward = world.compile(model)
    # Not Adam: dividing by the root of a tiny second moment turns a rounding difference between
    # engines, which is legitimate, into a difference of a whole step.
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.learning_rate, momentum=0.9, nesterov=True
    )
    results: dict[str, Tensor] = {}
    for step, (tokens, targets) in enumerate(batches(config, world.device)):
        optimizer.zero_grad()
        if dp > 1:
            tokens, targets = (
                distribute_tensor(t, mesh["dp"], [Shard(0)]).to_local() for t in (tokens, targets)
            )
        loss, logits = forward(tokens, targets)
        loss.backward()
        loss = loss.detach()
        if dp > 1:
            for value in (loss, *(p.grad for p in model.parameters())):
                average(value, mesh["dp"])
        optimizer.step()
        results[f"loss.{step}"] = loss
    if dp > 1:
        logits = DTensor.from_local(logits, mesh["dp"], [Shard(0)])
    results["logits"] = logits
    for name, parameter in model.named_parameters():
        if name.startswith(("embedding", "blocks.0", "norm", "head")):
            results[f"grad.{name}"] = parameter.grad
            results[name] = parameter
    return results


if __name__ == "__main__":
    lt.main(program)
