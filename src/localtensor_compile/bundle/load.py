"""A bundle on disk, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from . import manifest
from .errors import BundleError


class Bundle:
    """What `save_bundle` wrote. Made by `load_bundle`.

    Attributes:
        directory: where it is.
        manifest: what is in it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._values: dict[int, dict[str, Any]] = {}
        self.manifest = manifest.read(directory)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.manifest.world_size

    def program(self, title: str, rank: int) -> ExportedProgram:
        """What a rank runs of the graph of that title, on groups `group0`, ...

        A new one for each call: who runs it may change its graph.
        """
        graph = next(g for g in self.manifest.graphs if g.title == title)
        return torch.export.load(self.directory / graph.part(rank).program)

    def values(self, rank: int) -> dict[str, Any]:
        """Title -> what a rank's program was given, and what it returned."""
        if rank not in self._values:
            path = self.directory / self.manifest.values[rank]
            self._values[rank] = torch.load(path, weights_only=True)
        return self._values[rank]


def load_bundle(directory: str | Path, *, any_torch: bool = False) -> Bundle:
    """Read a bundle, after checking that all its files are what was saved.

    Args:
        any_torch: also one that another version of torch has saved.

    Raises:
        BundleError: no bundle, one with files missing or altered, or of another torch.
    """
    bundle = Bundle(Path(directory))
    here = torch.__version__.partition("+")[0]
    if bundle.manifest.torch != here and not any_torch:
        raise BundleError(
            f"{directory} was saved with torch {bundle.manifest.torch}, but this is torch {here}, "
            "whose kernels may compute other bits. Save the bundle again, or read it with "
            "any_torch=True (`--any-torch`)."
        )
    return bundle
