"""DTensor's own functions: making one, taking it apart, meshes, views, in-place ops, refusals."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor as dt
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.experimental import local_map

from .harness import draw, fill, gradients

R = Replicate()


def leaf(tensor: Any) -> Any:
    return tensor.detach().requires_grad_()


def per_rank(world: Any, *shape: int) -> Any:
    """Draws that differ on every rank."""
    return leaf(world.rank_map(lambda rank: draw(*shape, seed=rank)))


# ---------------------------------------------------------------- local tensors
def from_local(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    own, summands, copies = (per_rank(world, 3, 4) for _ in range(3))

    def step(own: Any, summands: Any, copies: Any) -> tuple[Any, ...]:
        shards = DTensor.from_local(own, mesh, [Shard(1)], run_check=False)
        total = DTensor.from_local(summands, mesh, [Partial()], run_check=False)
        same = DTensor.from_local(copies, mesh, [R], run_check=False)
        y = (shards.sin() * 2).redistribute(placements=[Shard(0)])
        z = total.redistribute(placements=[R]) * same
        return y.to_local(), z.to_local()

    y, z = world.compile(step)(own, summands, copies)
    (y.square().sum() + z.cos().sum()).backward()
    return {
        "y": y,
        "z": z,
        "own grad": own.grad,
        "summands grad": summands.grad,
        "copies grad": copies.grad,
    }


def from_local_uneven(world: Any) -> dict[str, Any]:
    """The global shape must be told where shards differ."""
    mesh = world.mesh(names="d")
    size = world.size + 2
    shards = leaf(distribute_tensor(draw(size, 3), mesh, [Shard(0)]).to_local())

    def step(shards: Any) -> tuple[Any, Any]:
        x = DTensor.from_local(
            shards, mesh, [Shard(0)], run_check=False, shape=torch.Size((size, 3)), stride=(3, 1)
        )
        return x.full_tensor(), x.exp().redistribute(placements=[Shard(1)]).to_local()

    whole, columns = world.compile(step)(shards)
    (whole.square().sum() + columns.sum()).backward()
    return {"whole": whole, "columns": columns, "grad": shards.grad}


def from_local_checked(world: Any) -> dict[str, Any]:
    """run_check=True sends rank 0's tensor to the others, as real ranks do."""
    mesh = world.mesh(names="d")
    x = world.rank_map(lambda rank: draw(3, 4, seed=rank))
    same = DTensor.from_local(x.clone(), mesh, [R], run_check=True)
    rows = DTensor.from_local(x.clone(), mesh, [Shard(0)], run_check=True)
    return {"replicated": same, "sharded": rows, "whole": rows.full_tensor()}


def grad_placements(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    x = leaf(distribute_tensor(draw(7, 4), mesh, [Shard(0)]))
    w = leaf(distribute_tensor(draw(4, 4, seed=1), mesh, [R]))
    scale = world.rank_map(lambda rank: torch.tensor(rank + 1.0))

    def step(x: Any, w: Any, scale: Any) -> tuple[Any, ...]:
        # What each rank computes with its own rows adds up to the gradient of w.
        local_w = w.to_local(grad_placements=[Partial()])
        local = x.to_local() @ local_w * scale
        whole = (x * 2).full_tensor(grad_placements=[Partial()]) * scale
        return local, whole

    local, whole = world.compile(step)(x, w, scale)
    (local.sum() + whole.square().sum()).backward()
    return {"local": local, "whole": whole, "x grad": x.grad, "w grad": w.grad.full_tensor()}


def sources(world: Any) -> dict[str, Any]:
    """distribute_tensor of tensors that differ per rank: the source rank's counts, or each own."""
    mesh = world.mesh(names="d")
    x = world.rank_map(lambda rank: draw(5, 4, seed=rank))
    found = {}
    for source in (0, 1, None):
        for placement in (Shard(0), Shard(-1), R):
            got = distribute_tensor(x, mesh, [placement], src_data_rank=source)
            found[f"{placement} from {source}"] = got
    return found


def chunk_lists(world: Any) -> dict[str, Any]:
    """Where each rank's piece lies in the whole, as checkpoints ask."""
    mesh = world.mesh((2, world.size // 2), ("a", "b"))
    found: dict[str, Any] = {}
    for placements in ([Shard(0), Shard(1)], [Shard(0), Shard(0)], [R, Shard(1)], [R, R]):
        (chunk,) = distribute_tensor(draw(7, 5), mesh, placements).__create_chunk_list__()
        for name, sizes in (("offsets", chunk.offsets), ("sizes", chunk.sizes)):
            for d, n in enumerate(sizes):
                found[f"{placements} {name} {d}"] = n
    return found


# ---------------------------------------------------------------- functions of local tensors
def mapped(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    x = leaf(distribute_tensor(draw(6, 8), mesh, [Shard(1)]))
    w = leaf(distribute_tensor(draw(8, 3, seed=1), mesh, [Shard(0)]))
    rows = leaf(distribute_tensor(draw(7, 3, seed=2), mesh, [R]))

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def softmax(rows: Tensor, scale: float) -> Tensor:
        return rows.softmax(-1) * scale

    summed = local_map(
        multiply,
        out_placements=[Partial()],
        in_placements=([Shard(1)], [Shard(0)]),
        device_mesh=mesh,
    )
    by_rows = local_map(
        softmax,
        out_placements=[Shard(0)],
        in_placements=([Shard(0)], None),
        device_mesh=mesh,
        redistribute_inputs=True,
    )

    def step(x: Any, w: Any, rows: Any) -> tuple[Any, Any]:
        return summed(x, w).full_tensor(), by_rows(rows, 3.0).to_local()

    product, shares = world.compile(step)(x, w, rows)
    (product.square().sum() + shares.square().sum()).backward()
    return {
        "product": product,
        "shares": shares,
        "x": x.grad,
        "w": w.grad,
        "rows": rows.grad.full_tensor(),
    }


class Affine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 4))
        self.register_buffer("shift", torch.arange(1.0, width + 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.weight.t() + self.shift)


def module(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    affine = fill(Affine(world.size + 1))

    def shard(name: str, module: nn.Module, mesh: Any) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter, mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(sharded))

    affine = distribute_module(
        affine,
        mesh,
        partition_fn=shard,
        input_fn=lambda m, inputs, mesh: (DTensor.from_local(inputs[0], mesh, [R]),),
        output_fn=lambda m, output, mesh: output.redistribute(placements=[R]).to_local(),
    )
    out = world.compile(affine)(draw(3, 4, seed=5))
    out.square().sum().backward()
    return {"out": out, **gradients(affine)}


def factories(world: Any) -> dict[str, Any]:
    """Not compiled: Dynamo cannot trace them on real ranks either."""
    mesh = world.mesh((2, world.size // 2), ("a", "b"))
    found = {}
    for name, placements in (
        ("rows", [Shard(0), R]),
        ("blocks", [Shard(0), Shard(1)]),
        ("twice", [Shard(0), Shard(0)]),
        ("same", [R, R]),
    ):
        kw = {"device_mesh": mesh, "placements": placements}
        found[f"zeros {name}"] = dt.zeros(7, 5, **kw) + 1
        found[f"ones {name}"] = dt.ones((5, 3), dtype=torch.float64, **kw)
        found[f"full {name}"] = dt.full((2, 9), 2.5, **kw)
        found[f"empty {name}"] = dt.empty((6, 2), **kw).fill_(1)
    return found


def compiled_factory(world: Any) -> dict[str, Any]:
    mesh = world.mesh()
    step = world.compile(lambda: dt.zeros(4, device_mesh=mesh, placements=[Shard(0)]) + 1)
    return {"out": step()}


# ---------------------------------------------------------------- meshes
def submeshes(world: Any) -> dict[str, Any]:
    """A tensor per row of the mesh, and tensors on slices and flattened dimensions of it."""
    mesh = world.mesh((2, 2, world.size // 4), ("pp", "dp", "tp"))
    parts = (("tp",), ("dp",), ("dp", "tp"), ("pp", "tp"), ("pp", "dp", "tp"))
    inputs = {}
    for i, names in enumerate(parts):
        part = mesh[names]
        inputs[names] = distribute_tensor(
            draw(5, 6, seed=i), part, [Shard(0)] + [R] * (part.ndim - 1)
        )

    def step(inputs: Any) -> dict[str, Any]:
        found = {}
        for names, rows in inputs.items():
            last = rows.redistribute(placements=[R] * (len(names) - 1) + [Shard(1)])
            found[f"{names}"] = last.to_local()
            found[f"{names} sum"] = (rows * 2).sum().full_tensor()
        return found

    found = world.compile(step)(inputs)
    for names in (("tp",), ("dp", "tp")):
        found[f"{names} rank"] = mesh[names].get_local_rank(0)
    return found


def flattened(world: Any) -> dict[str, Any]:
    mesh = world.mesh((2, world.size // 2), ("dp", "tp"))
    flat = mesh._flatten("all")
    x = leaf(distribute_tensor(draw(world.size + 3, 2), flat, [Shard(0)]))

    def step(x: Any) -> Any:
        return (x * 3).full_tensor()

    out = world.compile(step)(x)
    out.square().sum().backward()
    return {
        "out": out,
        "grad": x.grad,
        "rank": flat.get_local_rank(),
        "same": torch.tensor(mesh["all"] == flat),
    }


def from_group(world: Any) -> dict[str, Any]:
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu", mesh_dim_names=("all",))
    x = leaf(distribute_tensor(draw(5, 3), mesh, [Shard(0)]))
    out = world.compile(lambda x: (x @ x.t().redistribute(placements=[R])).full_tensor())(x)
    out.sin().sum().backward()
    return {"out": out, "grad": x.grad, "rank": mesh.get_local_rank("all")}


def overlapped(world: Any) -> dict[str, Any]:
    """async_op=True: the results are waited for where they are used."""
    mesh = world.mesh(names="d")
    x = leaf(distribute_tensor(draw(7, 6), mesh, [Shard(0)]))

    def step(x: Any) -> tuple[Any, Any]:
        whole = x.redistribute(placements=[R], async_op=True)
        columns = (x * 2).redistribute(placements=[Shard(1)], async_op=True)
        return whole.sin().to_local(), columns.to_local() + 1

    whole, columns = world.compile(step)(x)
    (whole.square().sum() + columns.square().sum()).backward()
    return {"whole": whole, "columns": columns, "grad": x.grad}


def other_dtypes(world: Any) -> dict[str, Any]:
    """Collectives in another dtype than the tensor's."""
    mesh = world.mesh(names="d")
    x = leaf(distribute_tensor(draw(6, 4), mesh, [Shard(0)]))

    def step(x: Any) -> Any:
        whole = x.redistribute(
            placements=[R], forward_dtype=torch.bfloat16, backward_dtype=torch.float64
        )
        return whole.to_local(grad_placements=[Partial()])

    out = world.compile(step)(x)
    (out.float() * draw(6, 4, seed=2)).sum().backward()
    return {"out": out, "grad": x.grad}


# ---------------------------------------------------------------- values
def scalars(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    x = distribute_tensor(draw(7, 4), mesh, [Shard(0)])
    y = x.redistribute(placements=[Shard(1)])
    return {
        "equal": torch.equal(x, x.clone()),
        "not equal": torch.equal(x, x + 1),
        "item": x.sum().full_tensor().item(),
        "norm": torch.linalg.vector_norm(y).full_tensor().item(),
        "max": x.max().full_tensor().item(),
        "any": bool((x > 2).any().full_tensor()),
        "float": float(x.mean().full_tensor()),
        "numel": x.numel(),
    }


def views(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    n = world.size
    rows = leaf(distribute_tensor(draw(2 * n, 3, 4), mesh, [Shard(0)]))
    inner = leaf(distribute_tensor(draw(3, 4 * n, seed=1), mesh, [Shard(1)]))
    odd = leaf(distribute_tensor(draw(n + 1, 3, 2, seed=2), mesh, [Shard(0)]))

    def step(rows: Any, inner: Any, odd: Any) -> dict[str, Any]:
        found = {
            "flatten": rows.flatten(),
            "flatten inner": rows.flatten(1),
            "view": rows.view(2 * n * 3, 4),
            "permute": rows.permute(2, 0, 1),
            "unflatten": inner.unflatten(1, (n, 4)),
            "unsqueeze": inner.unsqueeze(0),
            "reshape": inner.view(3, n, 2, 2),
            "transpose": inner.t(),
            "expand": inner.unsqueeze(0).expand(2, 3, 4 * n),
            "select": inner.select(0, 1),
            "slice": rows[:, 1:],
            "chunk": rows.detach().chunk(2, dim=-1)[1],
            "odd flatten": odd.flatten(1),
            "odd permute": odd.permute(1, 0, 2),
            "cat": torch.cat([odd, odd], dim=1),
            "stack": torch.stack([inner, inner]),
            "index": odd[:, 1],
        }
        return {name: (value * 2).to_local() for name, value in found.items()}

    found = world.compile(step)(rows, inner, odd)
    sum(v.sin().sum() for v in found.values()).backward()
    grads = {"rows grad": rows.grad, "inner grad": inner.grad, "odd grad": odd.grad}
    return {**found, **grads}


def in_place(world: Any) -> dict[str, Any]:
    mesh = world.mesh(names="d")
    x = leaf(distribute_tensor(draw(7, 4), mesh, [Shard(0)]))
    state = distribute_tensor(draw(7, 4, seed=1), mesh, [Shard(0)])

    def step(x: Any, state: Any) -> Any:
        y = x.clone()
        y.mul_(2).add_(state, alpha=0.5)
        y[:, 1:3].zero_()
        state.lerp_(x.detach(), 0.25)
        state.clamp_(min=-0.5)
        y.masked_fill_(state > 0.5, 3.0)
        return y.to_local()

    y = world.compile(step)(x, state)
    y.square().sum().backward()
    return {"y": y, "state": state, "grad": x.grad}


def masked(world: Any, to: str) -> dict[str, Any]:
    """The rows of a sharded embedding are a _MaskPartial until they are reduced."""
    mesh = world.mesh(names="d")
    weight = leaf(distribute_tensor(draw(10, 6), mesh, [Shard(0)]))
    tokens = distribute_tensor(torch.arange(14).reshape(2, 7) * 3 % 10, mesh, [R])
    target = {"replicate": R, "rows": Shard(0), "columns": Shard(-1), "tokens": Shard(1)}[to]

    def step(weight: Any, tokens: Any) -> Any:
        rows = F.embedding(tokens, weight)
        return rows.redistribute(placements=[target]).to_local()

    out = world.compile(step)(weight, tokens)
    (out * out.detach()).sum().backward()
    return {"out": out, "grad": weight.grad}


# ---------------------------------------------------------------- what DTensor refuses
def close(world: Any) -> dict[str, Any]:
    x = distribute_tensor(draw(4, 4), world.mesh(), [Shard(0)])
    return {"out": torch.allclose(x, x)}


def grad_of_chunk(world: Any) -> dict[str, Any]:
    """DTensor cannot concatenate the gradient of one chunk with zeros for the others."""
    x = leaf(distribute_tensor(draw(4, 4), world.mesh(), [Shard(0)]))
    world.compile(lambda x: x.chunk(2, dim=1)[1] * 2)(x).to_local().sum().backward()
    return {"grad": x.grad}


def plain_operand(world: Any) -> dict[str, Any]:
    x = distribute_tensor(draw(4, 4), world.mesh(), [Shard(0)])
    return {"out": world.compile(lambda x, y: x + y)(x, draw(4, 4, seed=1))}


def other_mesh(world: Any) -> dict[str, Any]:
    whole = world.mesh((2, world.size // 2), ("a", "b"))
    x = distribute_tensor(draw(4, 4), whole["a"], [Shard(0)])
    y = distribute_tensor(draw(4, 4), whole["b"], [Shard(0)])
    return {"out": world.compile(lambda x, y: x + y)(x, y)}


def dim_too_large(world: Any) -> dict[str, Any]:
    return {"x": distribute_tensor(draw(4, 4), world.mesh(), [Shard(2)])}


def to_partial(world: Any) -> dict[str, Any]:
    x = distribute_tensor(draw(4, 4), world.mesh(), [Shard(0)])
    return {"x": world.compile(lambda x: x.redistribute(placements=[Partial()]))(x)}


def wrong_count(world: Any) -> dict[str, Any]:
    return {"x": distribute_tensor(draw(4, 4), world.mesh(), [Shard(0), R])}


def two_partials(world: Any) -> dict[str, Any]:
    mesh = world.mesh((2, world.size // 2), ("a", "b"))
    x = DTensor.from_local(draw(4), mesh, [Partial("sum"), Partial("max")], run_check=False)
    return {"x": x.full_tensor()}


def shape_alone(world: Any) -> dict[str, Any]:
    x = DTensor.from_local(draw(4), world.mesh(), [Shard(0)], shape=torch.Size((8,)))
    return {"x": x.full_tensor()}


def split_of_shards(world: Any) -> dict[str, Any]:
    """A view that would cut through shards."""
    x = distribute_tensor(draw(3, 4), world.mesh(), [Shard(1)])
    return {"x": world.compile(lambda x: x.view(12))(x)}


def item_of_partial(world: Any) -> dict[str, Any]:
    """DTensor does not reduce before item(): every real rank gets its own addend."""
    x = distribute_tensor(draw(4, 4), world.mesh(), [Shard(0)])
    return {"item": x.sum().item()}
