"""manifest.json of a bundle: what is in it, for how many ranks, and how it was made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import BundleError

FORMAT = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class Given:
    """Where an input of a program comes from.

    Attributes:
        kind: "value", item `index` of what is saved for the graph; "forward", result `index` of the
            forward that belongs to this backward.
    """

    kind: str
    index: int


@dataclass(frozen=True)
class Part:
    """A program and the ranks that run it.

    Attributes:
        program: the file.
        groups: rank -> {name of a process group in the program: its ranks}.
        inputs: for each input of the program, in order.
    """

    program: str
    ranks: tuple[int, ...]
    groups: dict[int, dict[str, tuple[int, ...]]]
    inputs: tuple[Given, ...]


@dataclass(frozen=True)
class Graph:
    """One graph that all ranks run.

    Attributes:
        title: as `CapturedGraphs.titles` has it.
        forward: of a backward, the title of its forward.
    """

    title: str
    forward: str | None
    parts: tuple[Part, ...]

    def part(self, rank: int) -> Part:
        """What a rank runs."""
        return next(part for part in self.parts if rank in part.ranks)


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        torch: the version that made it.
        values: rank -> file with what its programs were given, and what they returned.
        files: file -> sha256 of its content.
    """

    world_size: int
    torch: str
    localtensor_compile: str
    device: str
    graphs: tuple[Graph, ...]
    values: dict[int, str]
    files: dict[str, str] = field(default_factory=dict)

    def groups(self) -> list[tuple[int, ...]]:
        """The process groups of all programs."""
        return sorted(set(self._groups()))

    def _groups(self) -> Iterator[tuple[int, ...]]:
        for graph in self.graphs:
            for part in graph.parts:
                for named in part.groups.values():
                    yield from named.values()

    def text(self) -> str:
        """As JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(directory: Path) -> Manifest:
    """The manifest of a bundle, whose files are all there and unchanged.

    Raises:
        BundleError: something is missing, altered, or of another format.
    """
    path = directory / FILE
    if not path.is_file():
        raise BundleError(
            f"{directory} is no bundle: it has no {FILE}. Write one with save_bundle, or with "
            "`localtensor graph FILE --save-bundle DIR`."
        )
    try:
        found = json.loads(path.read_text())
        version = found.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BundleError(f"{path} cannot be read: {error!r}. Save the bundle again.") from error
    if version != FORMAT:
        raise BundleError(
            f"{path} has format {version}, but this version of localtensor_compile reads format "
            f"{FORMAT}. Save the bundle again."
        )
    try:
        manifest = _manifest(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path} cannot be read: {error!r}. Save the bundle again.") from error
    _require_files(directory, manifest)
    return manifest


def _manifest(found: dict[str, Any]) -> Manifest:
    graphs = tuple(
        Graph(g["title"], g["forward"], tuple(_part(p) for p in g["parts"]))
        for g in found["graphs"]
    )
    values = {int(rank): str(file) for rank, file in found["values"].items()}
    ranks = list(range(found["world_size"]))
    if sorted(values) != ranks or any(
        sorted(r for part in graph.parts for r in part.ranks) != ranks for graph in graphs
    ):
        raise ValueError(f"not every one of the {len(ranks)} ranks has its programs and values")
    used = {*values.values(), *(p.program for g in graphs for p in g.parts)}
    if used != set(found["files"]):
        raise ValueError("the list of files is not that of the programs and values")
    return Manifest(**{**found, "graphs": graphs, "values": values})


def _part(found: dict[str, Any]) -> Part:
    groups = {
        int(rank): {name: tuple(ranks) for name, ranks in named.items()}
        for rank, named in found["groups"].items()
    }
    inputs = tuple(Given(g["kind"], g["index"]) for g in found["inputs"])
    return Part(found["program"], tuple(found["ranks"]), groups, inputs)


def _require_files(directory: Path, manifest: Manifest) -> None:
    missing = [file for file in manifest.files if not (directory / file).is_file()]
    if missing:
        raise BundleError(
            f"{directory} is not complete: {', '.join(missing)} missing. Copy or save the bundle "
            "again."
        )
    altered = [f for f, digest in manifest.files.items() if sha256(directory / f) != digest]
    if altered:
        raise BundleError(
            f"{directory} was altered: {', '.join(altered)} is not what was saved. Copy or save "
            "the bundle again."
        )
