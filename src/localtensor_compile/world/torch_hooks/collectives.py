"""Collectives whose Python knows one rank only: roots, plain tensors, splits, permutations.

Collectives on LocalTensors need no replacement otherwise: they reach the op table through
`LocalTensor.__torch_dispatch__`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.distributed_c10d as c10d
import torch.distributed.nn.functional as dist_nn
from torch.distributed.tensor import _collective_utils, placement_types

from ...collectives import plain
from ...compile.dynamo_support import rank_constant
from ...values.rank_node import is_ranked
from ...values.tensor import LocalTensor
from ..state import enabled_local_tensor_mode
from .distributed import group_ranks, pretend_rank, simulated_ranks, when_enabled

Replacement = tuple[Any, str, Any]


def replacements() -> Iterator[Replacement]:
    yield from _roots()
    yield from _mesh_roots()
    yield from _differentiable_roots()
    yield from _plain_collectives()
    yield from _splits()
    yield from _permutations()


# ---------------------------------------------------------------- rooted collectives
def _roots() -> Iterator[Replacement]:
    """dist.scatter and dist.gather refuse a list on any rank but the root: act as the root."""
    for name, root_name, group_root_name in (
        ("scatter", "src", "group_src"),
        ("gather", "dst", "group_dst"),
    ):
        original = getattr(c10d, name)
        signature = inspect.signature(original)

        def replacement(
            original: Any,
            mode: Any,
            *args: Any,
            _signature: inspect.Signature = signature,
            _root: str = root_name,
            _group_root: str = group_root_name,
            **kwargs: Any,
        ) -> Any:
            given = _signature.bind(*args, **kwargs).arguments
            group_root = given.get(_group_root)
            if group_root is None:
                group = given.get("group") or dist.group.WORLD
                root = given.get(_root)
                if isinstance(root, int):
                    group_root = dist.get_group_rank(group, root)
                else:
                    group_root = 0
            with pretend_rank(group_root):
                return original(*args, **kwargs)

        wrapped = when_enabled(original, replacement)
        yield c10d, name, wrapped
        yield dist, name, wrapped


def _mesh_roots() -> Iterator[Replacement]:
    """DTensor's scatter, which asks whether it is the source before it calls dist.scatter."""
    original = _collective_utils.mesh_scatter

    def mesh_scatter(
        original: Any,
        mode: Any,
        output: Any,
        scatter_list: Any,
        mesh: Any,
        mesh_dim: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        root = dist.get_global_rank(mesh.get_group(mesh_dim), kwargs.get("group_src", 0))
        with pretend_rank(root):
            return original(output, scatter_list, mesh, mesh_dim, *args, **kwargs)

    wrapped = when_enabled(original, mesh_scatter)
    yield _collective_utils, "mesh_scatter", wrapped
    yield placement_types, "mesh_scatter", wrapped


def _differentiable_roots() -> Iterator[Replacement]:
    """torch.distributed.nn: the functions that compare their rank with the root's."""
    for function in (dist_nn._Gather, dist_nn._Scatter):
        original = function.forward

        def forward(original: Any, mode: Any, ctx: Any, root: int, *args: Any) -> Any:
            with pretend_rank(root):
                return original(ctx, root, *args)

        yield function, "forward", staticmethod(when_enabled(original, forward))

    def backward(original: Any, mode: Any, ctx: Any, grad: Any) -> Any:
        """Of a broadcast: only the root's input took part."""
        reduced = dist_nn._Reduce.apply(ctx.src, dist.ReduceOp.SUM, ctx.group, grad)
        own = dict(zip(*group_ranks(ctx.group or dist.group.WORLD)))
        at_root = mode.tensor_map(reduced, lambda r, t: t if own[r] == ctx.src else t.zero_())
        return None, None, at_root

    broadcast = dist_nn._Broadcast
    yield broadcast, "backward", staticmethod(when_enabled(broadcast.backward, backward))


# ---------------------------------------------------------------- plain tensors
def _plain_collectives() -> Iterator[Replacement]:
    """The simulated group moves no data: a collective on plain tensors is done or refused here."""
    group_class = dist.ProcessGroup
    for name in plain.METHODS:
        original = getattr(group_class, name, None)
        if original is None:  # not in every supported version
            continue

        def method(
            self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any
        ) -> Any:
            if enabled_local_tensor_mode() is None or not _is_simulated(self):
                return _original(self, *args, **kwargs)
            if plain.has_local_tensor(args, kwargs):
                return _original(self, *args, **kwargs)
            return plain.collective(_name, self, args, kwargs)

        yield group_class, name, functools.wraps(original)(method)


def _is_simulated(group: Any) -> bool:
    return "fake" in str(group.name()) or "fake" in str(c10d._world.pg_backend_config.get(group))


# ---------------------------------------------------------------- splits
def _splits() -> Iterator[Replacement]:
    """pybind wants plain ints as splits: per-rank splits take the functional way."""

    def all_to_all_single(
        original: Any,
        mode: Any,
        output: Any,
        input: Any,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        sizes = [*(output_split_sizes or ()), *(input_split_sizes or ())]
        if not any(is_ranked(s) or isinstance(s, LocalTensor) for s in sizes):
            return original(output, input, output_split_sizes, input_split_sizes, group, async_op)
        group = dist.group.WORLD if group is None else group
        with torch.no_grad():
            result = funcol.all_to_all_single(input, output_split_sizes, input_split_sizes, group)
            output.copy_(funcol.wait_tensor(result))
        if not async_op:
            return None
        from ..._torch import finished_work

        return finished_work([output])

    wrapped = when_enabled(c10d.all_to_all_single, all_to_all_single)
    yield c10d, "all_to_all_single", wrapped
    yield dist, "all_to_all_single", wrapped


# ---------------------------------------------------------------- permutations
def _permutations() -> Iterator[Replacement]:
    """funcol.permute_tensor branches on the rank to fill its splits: fill them per rank."""
    original = funcol.permute_tensor

    @functools.wraps(original)
    def permute_tensor(self: Any, src_dst: list[int], group: Any, tag: str = "") -> Any:
        if simulated_ranks() is None:
            return original(self, src_dst, group, tag)
        ranks, given, taken = _permutation(tuple(src_dst), group, tag)
        rows = self.numel()
        output_splits = [rank_constant(ranks, flags) * rows for flags in taken]
        input_splits = [rank_constant(ranks, flags) * rows for flags in given]
        return funcol.all_to_all_single(self, output_splits, input_splits, group, tag)

    yield funcol, "permute_tensor", permute_tensor


@torch._dynamo.assume_constant_result
def _permutation(src_dst: tuple[int, ...], group: Any, tag: str) -> Any:
    """The mode's ranks; for each member of a group who gives to it, and who takes from it (0/1)."""
    expanded, members, size = funcol._expand_group(group, tag)
    group = c10d._find_or_create_pg_by_ranks_and_tag(expanded, members, size)
    ranks, own = group_ranks(group)
    given = [tuple(int(r >= 0 and src_dst[r] == member) for r in own) for member in range(size)]
    taken = [tuple(int(src_dst[member] == r) for r in own) for member in range(size)]
    return ranks, given, taken
