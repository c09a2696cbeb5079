"""The core on CUDA: eager, Inductor's Triton kernels against eager on every rank, random numbers.

Needs torch with CUDA, numpy, sympy and pytest only. Skips without a GPU.
"""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from localtensor_compile import LocalTensor, LocalTensorMode, rank_map, replicate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

WORLD = 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def shards(tensor):
    tensor = tensor.wait() if hasattr(tensor, "wait") else tensor
    return tensor._local_tensors


def assert_close(a, b):
    a, b = shards(a), shards(b)
    assert a.keys() == b.keys()
    for rank in a:
        assert a[rank].is_cuda
        torch.testing.assert_close(a[rank], b[rank], rtol=1e-4, atol=1e-4)


PROGRAMS = {
    "pointwise": lambda x, w: (x.sin() * 2).relu(),
    "matmul": lambda x, w: F.gelu(x @ w),
    "softmax": lambda x, w: (x @ w).softmax(-1),
    "layer norm": lambda x, w: F.layer_norm(x, (32,)),
    "reduce": lambda x, w: (x * x).sum(0) + x.mean(),
    "attention": lambda x, w: F.scaled_dot_product_attention(
        x.view(1, x.shape[0], 4, 8).transpose(1, 2),
        x.view(1, x.shape[0], 4, 8).transpose(1, 2),
        x.view(1, x.shape[0], 4, 8).transpose(1, 2),
        is_causal=True,
    ),
    "all_reduce": lambda x, w: funcol.all_reduce((x @ w).sum(0), "sum", dist.group.WORLD).relu(),
}


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_against_eager_and_plain(name, uneven):
    fn = PROGRAMS[name]
    torch._dynamo.reset()
    with LocalTensorMode(WORLD) as mode:
        results = []
        for run in (fn, torch.compile(fn, fullgraph=True)):
            x = rank_map(lambda r: draw(16 + (r if uneven else 0), 32, seed=r)).requires_grad_()
            w = rank_map(lambda r: draw(32, 64, seed=9)).requires_grad_()
            out = run(x, w)
            out = out.wait() if hasattr(out, "wait") else out
            (out * out.detach()).sum().backward()
            results.append((out.detach(), x.grad, w.grad))
        for eager, compiled in zip(*results):
            if eager is None:
                assert compiled is None or all((t == 0).all() for t in shards(compiled).values())
            else:
                assert_close(compiled, eager)
        if name != "all_reduce":
            with mode.disable():
                for rank, shard in shards(results[0][0]).items():
                    plain = fn(
                        draw(16 + (rank if uneven else 0), 32, seed=rank), draw(32, 64, seed=9)
                    )
                    torch.testing.assert_close(shard, plain, rtol=1e-4, atol=1e-4)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 30)  # which 4 ranks do not divide
        self.down = nn.Linear(30, 32)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


def test_tensor_parallel_step():
    torch._dynamo.reset()
    torch.manual_seed(0)
    reference = MLP().cuda()
    x = draw(8, 32)
    expected = reference(x)
    (expected * expected.detach()).mean().backward()
    with LocalTensorMode(WORLD) as mode:
        mesh = init_device_mesh("cuda", (WORLD,))
        with mode.disable():
            module = MLP().cuda()
            module.load_state_dict(reference.state_dict())
        plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
        module = parallelize_module(replicate(module), mesh, plan)
        out = torch.compile(module, fullgraph=True)(replicate(x))
        (out * out.detach()).mean().backward()
        out = out.wait() if hasattr(out, "wait") else out
        for shard in shards(out.detach()).values():
            torch.testing.assert_close(shard, expected.detach(), rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(module.parameters(), reference.parameters()):
            for shard in shards(mine.grad.full_tensor()).values():
                torch.testing.assert_close(shard, theirs.grad, rtol=1e-4, atol=1e-4)


def test_redistribute():
    with LocalTensorMode(WORLD):
        mesh = init_device_mesh("cuda", (WORLD,))
        x = draw(7, 5)
        d = distribute_tensor(replicate(x), mesh, [Shard(0)])
        for placement in (Shard(1), Replicate(), Shard(0)):
            d = d.redistribute(mesh, [placement])
            for shard in shards(d.full_tensor()).values():
                assert torch.equal(shard, x)


@pytest.mark.parametrize("same", [True, False])
def test_random_numbers_of_every_rank(same):
    """Rank r draws the bits that a process with its seed draws."""
    seeds = {r: 11 if same else 11 + r for r in range(WORLD)}

    def draws(x):
        return F.dropout(x, 0.5), torch.rand_like(x), torch.randn_like(x).relu()

    expected = {}
    for rank, seed in seeds.items():
        torch.cuda.manual_seed(seed)
        expected[rank] = draws(torch.ones(64, 33, device="cuda"))
    torch._dynamo.reset()
    for run in (draws, torch.compile(draws, fullgraph=True)):
        with LocalTensorMode(WORLD):
            torch.manual_seed(dist.get_rank() + 11 if not same else 11)
            x = torch.ones(64, 33, device="cuda")
            assert isinstance(x, LocalTensor)
            for k, out in enumerate(run(x)):
                for rank, shard in shards(out).items():
                    assert torch.equal(shard, expected[rank][k]), (run, k, rank)
