"""Tensor and sequence parallelism, loss parallelism."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from .harness import draw, fill, gradients

DIM, VOCABULARY = 8, 11


class MLP(nn.Module):
    def __init__(self, dim: int = DIM, hidden: int = 12) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def mlp(world: Any, hidden: int = 12) -> dict[str, Any]:
    mesh = world.mesh(names="tp")
    model = fill(MLP(hidden=hidden))
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    out = world.compile(model)(draw(4, DIM, seed=9))
    out.square().sum().backward()
    return {"out": out, **gradients(model)}


def mlp_local(world: Any, hidden: int = 12) -> dict[str, Any]:
    """As most plans are written: local tensors between the modules."""
    mesh = world.mesh(names="tp")
    model = fill(MLP(hidden=hidden))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    out = world.compile(model)(draw(4, DIM, seed=9))
    out.square().sum().backward()
    return {"out": out, **gradients(model)}


def mlp_sequence_parallel(world: Any, length: int = 7) -> dict[str, Any]:
    """Activations sharded on the sequence outside, output sharded on it again."""
    mesh = world.mesh(names="tp")
    model = fill(MLP(hidden=12))
    plan = {
        "": PrepareModuleInput(
            input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),), use_local_output=False
        ),
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    x = distribute_tensor(draw(length, DIM, seed=9), mesh, [Shard(0)]).requires_grad_()
    out = world.compile(model)(x)
    out.full_tensor().square().sum().backward()
    return {"out": out, "grad x": x.grad, **gradients(model)}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.o = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, norm: type[nn.Module], checkpointed: bool) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = norm(dim), norm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = MLP(dim, 2 * heads)
        self.checkpointed = checkpointed

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class Transformer(nn.Module):
    """Two layers, as in torch's tutorial of sequence parallelism."""

    def __init__(self, heads: int, tied: bool, norm: type[nn.Module], checkpointed: bool) -> None:
        super().__init__()
        dim = 4 * heads
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, norm, checkpointed) for _ in range(2))
        self.norm = norm(dim)
        self.output = nn.Linear(dim, VOCABULARY, bias=False)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


def parallel_transformer(mesh: Any, model: nn.Module, *, loss: bool, head: str) -> nn.Module:
    """Sequence parallel outside attention and MLP, tensor parallel in them."""
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": SequenceParallel(),
                "mlp_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
                ),
                **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
                "attention.o": RowwiseParallel(output_layouts=Shard(1)),
                "mlp": PrepareModuleInput(
                    input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
                ),
                "mlp.up": ColwiseParallel(),
                "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
    output = ColwiseParallel if head == "colwise" else RowwiseParallel
    inside = {"input_layouts": Shard(1)} if head == "colwise" else {}
    outside = {"output_layouts": Shard(-1) if loss else Replicate(), "use_local_output": not loss}
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": output(**inside, **outside),
    }
    return parallelize_module(model, mesh, plan)


def transformer(
    world: Any,
    *,
    batch: int = 2,
    per_rank: int = 3,
    loss: bool = True,
    tied: bool = False,
    norm: str = "LayerNorm",
    checkpointed: bool = False,
    optimizer: str = "sgd",
    clip: float | None = None,
    steps: int = 2,
) -> dict[str, Any]:
    """Trains; the vocabulary does not divide by the world size."""
    mesh = world.mesh(names="tp")
    heads = 2 * world.size
    model = fill(Transformer(heads, tied, getattr(nn, norm), checkpointed))
    parallel_transformer(mesh, model, loss=loss, head="colwise")
    step = world.compile(model)
    optimize = OPTIMIZERS[optimizer](model.parameters())
    length = per_rank * world.size
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCABULARY, (batch, length + 1), generator=generator)
    results: dict[str, Any] = {}
    for i in range(steps):
        optimize.zero_grad()
        with loss_parallel() if loss else contextlib.nullcontext():
            logits = step(tokens[:, :-1])
            value = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            value.backward()
        if clip is not None:
            norm_found = nn.utils.clip_grad_norm_(model.parameters(), clip)
            results[f"norm {i}"] = norm_found
        if i == 0:
            results |= gradients(model)
        optimize.step()
        results[f"loss {i}"] = value
    return results | {name: p.detach() for name, p in model.named_parameters()}


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def cross_entropy(world: Any, **options: Any) -> dict[str, Any]:
    """loss_parallel around a compiled function: the log-softmax stays sharded on the classes."""
    mesh = world.mesh(names="tp")
    logits = distribute_tensor(draw(6, VOCABULARY), mesh, [Shard(1)]).requires_grad_()
    ignored = options.get("ignore_index", -100)
    target = torch.tensor([0, 3, 10, 7, ignored, 5])
    if options.pop("weight", False):
        options["weight"] = draw(VOCABULARY, seed=4).abs()

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target, **options)

    with loss_parallel():
        value = world.compile(loss)(logits)
        (value.sum() if value.ndim else value).backward()
    return {"loss": value, "grad": logits.grad}


def embedding(world: Any, style: str = "rowwise", output: str = "replicate") -> dict[str, Any]:
    """Vocabulary (rowwise, a _MaskPartial inside) or embedding dimension (colwise) in shards."""
    mesh = world.mesh(names="tp")
    model = nn.Sequential(nn.Embedding(VOCABULARY, 10, padding_idx=3))
    fill(model)
    placement = {"replicate": Replicate(), "sequence": Shard(1), "last": Shard(-1)}[output]
    plan = (
        RowwiseParallel(input_layouts=Replicate(), output_layouts=placement, use_local_output=False)
        if style == "rowwise"
        else ColwiseParallel(output_layouts=placement, use_local_output=False)
    )
    parallelize_module(model, mesh, {"0": plan})
    tokens = torch.tensor([[0, 10, 3, 5, 5], [9, 1, 2, 3, 8]])
    out = world.compile(model)(tokens)
    out.full_tensor().square().sum().backward()
    return {"out": out, **gradients(model)}


class TakesKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, scale: float, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x) * mask * scale
        return y, y + x


def prepare_inputs_and_outputs(world: Any, combined: bool = False) -> dict[str, Any]:
    """PrepareModuleInput with keywords and inputs that are left alone, PrepareModuleOutput."""
    mesh = world.mesh(names="tp")
    model = nn.ModuleDict({"inner": TakesKeywords()})
    fill(model)
    inputs: dict[str, Any] = {
        "input_layouts": (Shard(0), None),
        "desired_input_layouts": (Replicate(), None),
        "input_kwarg_layouts": {"mask": Shard(0)},
        "desired_input_kwarg_layouts": {"mask": Replicate()},
    }
    outputs: dict[str, Any] = {
        "output_layouts": (Replicate(), Replicate()),
        "desired_output_layouts": (Shard(0), Shard(1)),
        "use_local_output": False,
    }
    inner = model["inner"]
    if combined:
        style = PrepareModuleInputOutput(use_local_input=True, **inputs, **outputs)
        parallelize_module(inner, mesh, style)
    else:
        parallelize_module(inner, mesh, PrepareModuleInput(use_local_output=True, **inputs))
        parallelize_module(inner, mesh, PrepareModuleOutput(**outputs))
    rows = world.size * 2
    x = distribute_tensor(draw(rows, DIM, seed=1), mesh, [Shard(0)]).to_local()
    mask = distribute_tensor(draw(rows, 1, seed=2), mesh, [Shard(0)]).to_local()
    a, b = world.compile(inner)(x, 0.5, mask=mask)
    (a.full_tensor().sum() + b.full_tensor().square().sum()).backward()
    return {"a": a, "b": b, **gradients(model)}


def replicated_parameters(world: Any) -> dict[str, Any]:
    """Modules the plan does not name stay plain; a plan may use wildcards."""
    mesh = world.mesh(names="tp")
    model = nn.ModuleDict({f"layer{i}": MLP() for i in range(2)})
    fill(model)
    parallelize_module(model, mesh, {"layer*.up": ColwiseParallel(), "*.down": RowwiseParallel()})

    def forward(x: Tensor) -> Tensor:
        return model["layer1"](model["layer0"](x))

    out = world.compile(forward)(draw(4, DIM, seed=9))
    out.square().sum().backward()
    return {"out": out, **gradients(model)}


def data_and_tensor(world: Any, dp: int = 2) -> dict[str, Any]:
    """Replicas on one mesh dimension, each with its own batch; shards on the other."""
    mesh = world.mesh((dp, world.size // dp), ("dp", "tp"))
    model = fill(MLP(hidden=10))
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    batch = distribute_tensor(draw(6, DIM, seed=5), mesh["dp"], [Shard(0)]).to_local()
    out = world.compile(model)(batch)
    out.square().sum().backward()
    grads = {}
    for name, grad in gradients(model).items():
        whole = DTensor.from_local(grad, mesh["dp"], _partial(), run_check=False)
        grads[name] = whole.redistribute(placements=[Replicate()]).to_local()
    return {"out": out, **grads}


def _partial() -> Any:
    from torch.distributed.tensor import Partial

    return [Partial()]


# ---- what real ranks refuse
def weighted_loss_with_ignored_classes(world: Any) -> dict[str, Any]:
    return cross_entropy(world, weight=True)


def wrong_plan(world: Any) -> dict[str, Any]:
    parallelize_module(MLP(), world.mesh(names="tp"), {"up": "colwise"})
    return {}


def unsupported_module(world: Any) -> dict[str, Any]:
    parallelize_module(nn.LayerNorm(4), world.mesh(names="tp"), ColwiseParallel())
    return {}


def two_dimensional_mesh(world: Any) -> dict[str, Any]:
    mesh = world.mesh((2, world.size // 2), ("dp", "tp"))
    parallelize_module(MLP(), mesh, {"up": ColwiseParallel()})
    return {}


def wrong_number_of_layouts(world: Any) -> dict[str, Any]:
    model = TakesKeywords()
    style = PrepareModuleInput(input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),))
    parallelize_module(model, world.mesh(names="tp"), style)
    return {"out": world.compile(model)(draw(4, DIM), 1.0, mask=draw(4, 1))[0]}


def uneven_local_outputs(world: Any) -> dict[str, Any]:
    """Local tensors between modules lose the global size where ranks' shards differ."""
    return mlp_local(world, hidden=10)
