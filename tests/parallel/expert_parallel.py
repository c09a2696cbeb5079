"""Mixture of experts: every rank holds some experts, tokens travel to them and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import draw, gradients

DIM = 6


class Experts(nn.Module):
    """Top-1 routing; how many tokens a rank sends to another one comes from the data.

    Shazeer et al., Outrageously Large Neural Networks, 2017, with one expert per token.
    """

    def __init__(self, world: Any, local_experts: int) -> None:
        super().__init__()
        self.world_size, self.local_experts = world.size, local_experts
        total = world.size * local_experts
        self.router = nn.Parameter(draw(DIM, total, seed=100).to(world.device))
        own = world.rank_map(lambda r: draw(local_experts, DIM, DIM, seed=200 + r))
        self.weight = nn.Parameter(own)

    def forward(self, x: Tensor) -> Tensor:
        group = dist.group.WORLD
        probabilities = (x @ self.router).softmax(-1)
        score, expert = probabilities.max(-1)
        order = expert.argsort(stable=True)
        counts = F.one_hot(expert, self.world_size * self.local_experts).sum(0)
        theirs = funcol.all_to_all_single(counts, None, None, group)
        theirs = funcol.wait_tensor(theirs).view(self.world_size, self.local_experts)
        sent = counts.view(self.world_size, -1).sum(1).tolist()
        received = theirs.sum(1).tolist()
        arrived = funcol.all_to_all_single_autograd(x[order], received, sent, group)
        arrived = funcol.wait_tensor(arrived)
        # Tokens lie by sender and then by expert.
        which = torch.arange(self.local_experts).repeat(self.world_size)
        which = which.repeat_interleave(theirs.flatten(), output_size=arrived.shape[0])
        done = torch.zeros_like(arrived)
        for i in range(self.local_experts):
            chosen = (which == i).unsqueeze(1)
            done = torch.where(chosen, F.silu(arrived @ self.weight[i]), done)
        back = funcol.all_to_all_single_autograd(done, sent, received, group)
        back = funcol.wait_tensor(back)
        out = torch.zeros_like(x).index_copy(0, order, back)
        return out * score.unsqueeze(1)


def mixture_of_experts(
    world: Any, local_experts: int = 2, tokens: int = 8, uneven: bool = False, skewed: bool = False
) -> dict[str, Any]:
    """Two batches through one compiled model: the second is routed in another way.

    `uneven`: rank r has tokens + r tokens. `skewed`: all tokens want expert 0, others get none.
    """
    model = Experts(world, local_experts)
    if skewed:
        with torch.no_grad():
            model.router[:, 0] = 0
            model.router[:, 1:] = -1
    step = world.compile(model)
    results: dict[str, Any] = {}
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for batch in range(2):
            x = world.rank_map(
                lambda r: draw(tokens + r * uneven, DIM, seed=10 * batch + r).abs()
            ).requires_grad_()
            model.zero_grad()
            out = step(x)
            out.square().sum().backward()
            results |= {f"out {batch}": out, f"grad x {batch}": x.grad}
            results |= gradients(model, f"grad {batch}")
    return results


class BadSplits(nn.Module):
    """Every rank expects what it sends, which differs from what the others send it."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        splits = counts.tolist()
        out = funcol.all_to_all_single(x, splits, splits, dist.group.WORLD)
        return funcol.wait_tensor(out)


def splits_that_disagree(world: Any) -> dict[str, Any]:
    x = draw(world.size, 3)
    ranks = range(world.size)
    counts = world.rank_map(lambda r: torch.tensor([world.size * (i == 0) for i in ranks]))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        return {"out": world.compile(BadSplits())(x, counts)}
