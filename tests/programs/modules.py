"""nn.Module with parameters and buffers, optimizers, whole training steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .harness import program


class Linear(nn.Module):
    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class MLP(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = Linear(up), Linear(down)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def _module(name: str, setup: Any, inputs: dict[str, str], **options: Any) -> None:
    program(None, name=name, inputs=inputs, setup=setup, **options)(None)


EVEN = {"x": "n 4", "w": "6 4, param", "b": "6, param"}
UNEVEN = {"x": "n 4", "w": "e 4, param", "b": "e, param"}
_module("module_even", Linear, EVEN)
_module("module_uneven_parameters", Linear, UNEVEN)
_module("module_empty_parameters", Linear, {"x": "5 4", "w": "n 4, param", "b": "n, param"})
_module("module_mlp_uneven_hidden", MLP, {"x": "k 4", "up": "e 4, param", "down": "4 e, param"})


class TiedWeights(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.embedding = nn.Parameter(weight)
        self.head = self.embedding

    def forward(self, i):
        return F.linear(F.embedding(i, self.embedding), self.head)


_module("module_tied_weights", TiedWeights, {"i": "k, i64 <5", "w": "5 4, param"})


class FrozenBase(nn.Module):
    def __init__(self, base, adapter):
        super().__init__()
        self.base = nn.Parameter(base, requires_grad=False)
        self.adapter = nn.Parameter(adapter)

    def forward(self, x):
        return F.linear(x, self.base + self.adapter)


_module("module_frozen_parameter", FrozenBase, {"x": "k 4", "w": "6 4, param", "a": "6 4, param"})


class RunningMean(nn.Module):
    def __init__(self, mean, count):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("count", count)

    def forward(self, x):
        self.count += 1
        self.mean.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return x - self.mean


_module("module_buffers_in_place", RunningMean, {"x": "k 4", "m": "4, param", "c": "1, i64 param"})


class BatchNorm(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.norm.weight, self.norm.bias = nn.Parameter(weight), nn.Parameter(bias)
        # A buffer per rank, as a module that is made inside a world has.
        self.norm.running_mean = torch.zeros_like(weight)
        self.norm.running_var = torch.ones_like(weight)
        self.norm.num_batches_tracked = torch.zeros_like(weight[0], dtype=torch.long)

    def forward(self, x):
        return self.norm(x)


_module("module_batch_norm", BatchNorm, {"x": "k 4", "w": "4, param", "b": "4, param"})


class Residual(nn.Module):
    def __init__(self, up, down, scale):
        super().__init__()
        self.blocks = nn.ModuleList([MLP(up, down), MLP(up * 2, down)])
        self.scale = nn.ParameterList([scale])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(F.layer_norm(x, (4,), self.scale[0]))
        return x


_module(
    "module_residual_blocks",
    Residual,
    {"x": "k 4", "up": "e 4, param", "down": "4 e, param", "s": "4, param"},
)


class Hooked(Linear):
    def __init__(self, weight):
        super().__init__(weight)
        self.register_forward_hook(lambda module, args, output: output * 2)


_module("module_with_forward_hook", Hooked, {"x": "k 4", "w": "e 4, param"})


# ---------------------------------------------------------------- training steps
class TrainStep:
    """Forward, backward and optimizer in one function, which is compiled whole."""

    def __init__(self, make_optimizer, up, down):
        self.model = MLP(up, down)
        self.optimizer = make_optimizer(self.model.parameters())

    def step(self, x, target):
        loss = F.mse_loss(self.model(x), target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def state(self):
        found = dict(self.model.named_parameters())
        for i, slots in enumerate(self.optimizer.state.values()):
            found |= {f"{k}.{i}": v for k, v in slots.items() if isinstance(v, torch.Tensor)}
        return found


def _training(name: str, optimizer: Any, up: str, down: str, **options: Any) -> None:
    program(
        None,
        name=name,
        inputs={
            "x": "k 4, nograd",
            "target": "k 4, nograd",
            "up": f"{up}, param",
            "down": f"{down}, param",
        },
        setup=lambda up, down: TrainStep(optimizer, up, down),
        config={"trace_autograd_ops": True},
        **options,
    )(None)


_training("train_sgd", lambda p: torch.optim.SGD(p, 0.1), "6 4", "4 6")
_training("train_sgd_uneven", lambda p: torch.optim.SGD(p, 0.1), "e 4", "4 e")
_training(
    "train_sgd_momentum_uneven",
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "e 4",
    "4 e",
)
_training("train_adam", lambda p: torch.optim.Adam(p, 0.01), "6 4", "4 6")
_training(
    "train_adam_foreach_uneven",
    lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "e 4",
    "4 e",
)
_training(
    "train_adamw_not_foreach_uneven",
    lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "e 4",
    "4 e",
)
_training(
    "train_adam_fused_uneven",
    lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "e 4",
    "4 e",
)


class ClippedStep(TrainStep):
    def step(self, x, target):
        loss = F.mse_loss(self.model(x), target)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm


program(
    None,
    name="train_with_clipping",
    inputs={
        "x": "k 4, nograd",
        "target": "k 4, nograd",
        "up": "e 4, param",
        "down": "4 e, param",
    },
    setup=lambda up, down: ClippedStep(lambda p: torch.optim.SGD(p, 0.1), up, down),
    config={"trace_autograd_ops": True},
)(None)


class OptimizerOnly:
    """Only `optimizer.step` is compiled: gradients come from outside."""

    def __init__(self, weight):
        self.weight = nn.Parameter(weight)
        self.optimizer = torch.optim.AdamW([self.weight], 0.1, foreach=True)

    def step(self, grad):
        self.weight.grad = grad
        self.optimizer.step()

    def state(self):
        return {"weight": self.weight} | {
            k: v
            for k, v in self.optimizer.state[self.weight].items()
            if isinstance(v, torch.Tensor)
        }


program(
    None,
    name="optimizer_step_alone",
    inputs={"grad": "e 4, nograd", "w": "e 4, param"},
    setup=OptimizerOnly,
)(None)


@program(x="k 4", up="e 4", down="4 e")
def functional_call(x, up, down):
    return torch.func.functional_call(_STATELESS, {"up.weight": up, "down.weight": down}, (x,))


with torch.device("meta"):
    _STATELESS = MLP(torch.empty(6, 4), torch.empty(4, 6))
