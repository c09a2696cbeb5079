"""DeviceMesh coordinates and ranks of every simulated rank at once.

Computed from the layout of the mesh in plain Python, keyed by value: a mesh is often built again,
and no tensor op may run while a FakeTensorMode is active.
"""

from __future__ import annotations

from typing import Any

import torch

from .._torch import current_fake_mode, mesh_rank_grids
from ..errors import WorldError
from ..values.int_node import make_int
from .state import acting, enabled_local_tensor_mode

_coordinates: dict[tuple[Any, ...], list[dict[int, int]]] = {}


def per_rank_int(values: dict[int, int]) -> Any:
    """{rank: int} as an int or per-rank SymInt that fits what is being traced."""
    return make_int(values, traced=current_fake_mode() is not None)


def coordinates(mesh: Any, ranks: tuple[int, ...]) -> list[dict[int, int]] | None:
    """For each mesh dimension {rank: coordinate}, or None where no rank is part of the mesh.

    Raises:
        WorldError: only some of the ranks are part of the mesh.
    """
    grids = mesh_rank_grids(mesh)
    key = (grids, ranks)
    found = _coordinates.get(key)
    if found is None:
        shape, members = grids
        place = {r: i for grid in members for i, r in enumerate(grid)}
        inside = [r for r in ranks if r in place]
        if not inside:
            return None
        if len(inside) < len(ranks):
            outside = [r for r in ranks if r not in place]
            raise WorldError(
                f"ranks {outside} are not part of the DeviceMesh of ranks {sorted(place)}. On real "
                "processes get_coordinate() is None there and the program goes another way: run "
                f"the part that uses this mesh under LocalTensorMode({set(inside)})."
            )
        found = [{} for _ in shape]
        for r in ranks:
            index = place[r]
            for d in reversed(range(len(shape))):
                index, found[d][r] = divmod(index, shape[d])
        _coordinates[key] = found
    return found


def _ranks() -> tuple[int, ...]:
    if acting.rank is not None:
        return (acting.rank,)
    mode = enabled_local_tensor_mode()
    if mode is None:
        raise WorldError("a per-rank mesh coordinate was asked for outside LocalTensorMode.")
    return mode._sorted_ranks


class MeshMethods:
    """Replacements of DeviceMesh methods; installed by torch_hooks while a mode is active."""

    def get_coordinate(self) -> Any:
        found = coordinates(self, _ranks())
        return None if found is None else tuple(per_rank_int(c) for c in found)

    def _sym_get_coordinate(self, index: int) -> Any:
        found = coordinates(self, _ranks())
        if found is None:
            raise WorldError("no simulated rank is part of this DeviceMesh.")
        return per_rank_int(found[index])

    def _is_current_rank_part_of_mesh(self) -> bool:
        return coordinates(self, _ranks()) is not None

    def get_rank(self) -> Any:
        return per_rank_int({r: r for r in _ranks()})

    def get_local_rank(self, mesh_dim: int | str | None = None) -> Any:
        mesh: Any = self
        if mesh_dim is None:
            if mesh.ndim > 1:
                raise RuntimeError(
                    f"Found the DeviceMesh have {mesh.ndim} dimensions",
                    "Optional kwarg `mesh_dim` needs to be specified when device_mesh.ndim > 1.",
                )
            mesh_dim = 0
        elif isinstance(mesh_dim, str):
            names = mesh.mesh_dim_names or ()
            if mesh_dim not in names:
                raise KeyError(f"mesh_dim {mesh_dim!r} is not one of {tuple(names)}")
            mesh_dim = names.index(mesh_dim)
        return self._sym_get_coordinate(mesh_dim)


def plain_mesh_args(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """DeviceMesh.__init__'s arguments with rank tensors that factories made per rank unwrapped."""
    from ..values.tensor import LocalTensor

    def plain(value: Any) -> Any:
        return value.reconcile() if isinstance(value, LocalTensor) else value

    with torch._C.DisableTorchFunction():
        return tuple(plain(a) for a in args), {k: plain(v) for k, v in kwargs.items()}
