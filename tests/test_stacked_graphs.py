"""Graphs of the stacked layout have the same nodes for any number of ranks."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import parametrize

import localtensor_compile as lt
from localtensor_compile.stacked import counts

FEW, SOME, MANY = 2, 8, 256


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = MLP(dim, 2 * dim)

    def forward(self, x):
        rows, length, dim = x.shape
        parts = self.qkv(self.norm(x)).view(rows, length, 3, self.heads, -1).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, dim))
        return x + self.mlp(self.norm2(F.dropout(x, 0.1, self.training)))


class Whole(nn.Module):
    def forward(self, parameter):
        return parameter.redistribute(placements=[Replicate()]).to_local()


def mlp(world):
    return MLP(4, 6), torch.randn(3, 4)


def block(world):
    return Block(8), torch.randn(2, 5, 8)


def tensor_parallel_mlp(world):
    mesh = init_device_mesh("cpu", (world,))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(MLP(4, 3 * world), mesh, plan), torch.randn(3, 4)


def simple_fsdp_mlp(world):
    mesh = init_device_mesh("cpu", (world,))
    # No size over 256: DTensor compares sizes with `is`, and slices where larger ints are equal.
    model = MLP(world, world)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(sharded))
            parametrize.register_parametrization(module, name, Whole(), unsafe=True)
    return model, torch.randn(3, world)


def nodes_of(step, *inputs):
    """The targets of the forward and the backward graph of a loss."""
    graphs = []

    def keep(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    torch.compile(step, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*inputs).backward()
    return graphs


def nodes(program, world):
    """The targets of the forward and the backward graph, and what was counted."""
    with lt.LocalTensorMode(world, layout="stacked") as mode:
        model, x = program(world)
        mode._counted = counts.snapshot()
        graphs = nodes_of(lambda x: model(x).square().sum(), x)
        stats = mode.stats()
        for parameter in model.parameters():
            grad = parameter.grad
            assert (grad.to_local() if isinstance(grad, DTensor) else grad).isfinite().all()
    return graphs, stats


PROGRAMS = [mlp, block, tensor_parallel_mlp, simple_fsdp_mlp]


@pytest.mark.parametrize("world", [SOME, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_nodes_do_not_grow(program, world):
    few, _ = nodes(program, FEW)
    many, stats = nodes(program, world)
    assert len(few) == 2
    assert many == few
    assert not stats["per_rank"]
    assert not stats["joined"]
