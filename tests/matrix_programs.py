"""Programs for tests/test_matrix.py. In a file of their own: real processes import them."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def program(world, *, forget_average=False, drop=0.0):
    """A two layer MLP: batch over "dp", columns over "tp"; 10 does not divide by 4."""
    dp, tp = world.degree("dp"), world.degree("tp")
    mesh = world.mesh((dp, tp), ("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    x = torch.randn(8, 6)
    if tp > 1:
        plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
    if dp > 1:
        x = distribute_tensor(x, mesh["dp"], [Shard(0)]).to_local()
    loss = world.compile(model)(x).square().mean() + drop * tp
    loss.backward()
    results = {"count": 3}
    for name, p in model.named_parameters():
        grad = p.grad
        if dp > 1 and not forget_average:
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            dist.all_reduce(local, group=mesh["dp"].get_group())
            local /= dp
        results[name] = grad
    if dp == 1:
        results["loss"] = loss
    else:
        whole = DTensor.from_local(loss.detach().reshape(1), mesh["dp"], [Shard(0)])
        results["loss"] = whole.full_tensor().mean()
    return results


def forgets_to_average(world):
    return program(world, forget_average=True)


def depends_on_degree(world):
    return program(world, drop=1e-3)


def never_asks(world):
    return {"x": world.compile(lambda x: x + 1)(torch.ones(2))}


def fails_sharded(world):
    if world.degree("tp") > 1:
        raise ValueError("as planned")
    return {"x": world.compile(lambda x: x + 1)(torch.ones(2))}


def fails_alone(world):
    if world.degree("tp") == 1:
        raise ValueError("as planned")
    return {"x": torch.ones(1)}


def other_outputs(world):
    tp = world.degree("tp")
    x = world.compile(lambda x: x + 1)(torch.ones(2))
    sharded = distribute_tensor(torch.ones(4), world.mesh((tp,), ("tp",)), [Replicate()])
    return {"shape": torch.ones(tp), "dtype": x.double() if tp > 1 else x} | (
        {"new": sharded} if tp > 1 else {"old": x}
    )
