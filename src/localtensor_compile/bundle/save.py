"""`save_bundle`: the programs of all ranks in a directory, with their inputs and results."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..capture.graphs import CapturedGraphs
from ..capture.programs import FlatGraph
from ..capture.record import BACKWARD, FORWARD, JOINT, Recorded
from ..check.text import plural
from ..compile.fx_graphs import leaves, output_node, placeholders
from . import manifest
from .errors import BundleError
from .exported import exported
from .manifest import Given, Graph, Manifest, Part, sha256
from .portable import PortableProgram, group_names, is_value, portable


def save_bundle(graphs: CapturedGraphs, directory: str | Path) -> Path:
    """Write what each rank runs into a directory, for `localtensor replay` and torchrun.

    It holds one program per distinct rank (torch.export's .pt2), what each rank's programs were
    given and returned when they were captured, and `manifest.json`. A bundle that is there already
    is replaced once the new one is complete.

    Args:
        graphs: of capture(..., values=True).
        directory: made if it is not there.

    Returns:
        The directory.

    Raises:
        BundleError: captured without values, a program with graph breaks, a backward that did not
            run, or a directory that holds something else.
        ExtractError: an op that no single rank can run.
    """
    directory = Path(directory)
    _require_whole(graphs)
    _require_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(directory) as place:
        _Bundle(graphs, place).write()
    return directory


def _require_whole(graphs: CapturedGraphs) -> None:
    if graphs.graph_breaks:
        why = "; ".join(reason.splitlines()[0] for reason in graphs.graph_breaks)
        count = plural(sum(graphs.graph_breaks.values()), "graph break")
        raise BundleError(
            f"the program is not captured whole: {count} ({why}), and the code between is in no "
            "graph. Hand world.compile only what compiles whole; torch.compile(fullgraph=True) "
            "says where it does not."
        )
    for frame in graphs._frames:
        if FORWARD not in frame.calls:
            raise BundleError(
                "the graphs were captured without what they are given. Capture them with "
                "capture(..., values=True)."
            )
        if JOINT in frame.graphs and BACKWARD not in frame.calls:
            raise BundleError(
                "a graph with gradients was captured, but its backward did not run: there is "
                "nothing to give it. Call backward() in the program, or compile under "
                "torch.no_grad()."
            )


def _require_free(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir() or (any(directory.iterdir()) and not _is_bundle(directory)):
        raise BundleError(
            f"{directory} is there already and is no bundle. Nothing was written: name another "
            "directory."
        )


def _is_bundle(directory: Path) -> bool:
    return (directory / manifest.FILE).is_file()


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A directory that takes the place of `directory` if nothing goes wrong."""
    place = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield place
        if directory.exists():
            shutil.rmtree(directory)
        place.rename(directory)
    finally:
        shutil.rmtree(place, ignore_errors=True)


@dataclass
class _RankGraph:
    """A graph of one rank, with what it is given and what it returns."""

    program: PortableProgram
    inputs: tuple[Given, ...]
    values: dict[str, Any]


class _Bundle:
    def __init__(self, graphs: CapturedGraphs, place: Path) -> None:
        self.graphs, self.place = graphs, place
        self.files: dict[str, str] = {}
        self.saved: dict[str, str] = {}  # fingerprint -> file

    def write(self) -> None:
        size = self.graphs.world_size
        values: dict[int, dict[str, Any]] = {rank: {} for rank in range(size)}
        found: list[Graph] = []
        for number, (frame, flat) in enumerate(zip(self.graphs._frames, self.graphs._flat)):
            suffix = self.graphs._suffix(number)
            of_ranks = {
                r: _rank_graphs(self.graphs.rank(r), frame, flat, r, suffix) for r in values
            }
            for title in of_ranks[0]:
                each = {rank: graphs[title] for rank, graphs in of_ranks.items()}
                for rank, graph in each.items():
                    values[rank][title] = graph.values
                forward = f"{FORWARD}{suffix}" if title.startswith(BACKWARD) else None
                found.append(Graph(title, forward, tuple(self._parts(title, each))))
        files = {rank: self._save_values(rank, held) for rank, held in values.items()}
        made = Manifest(
            world_size=size,
            torch=torch.__version__.partition("+")[0],
            localtensor_compile=version("localtensor_compile"),
            device=self.graphs.device,
            graphs=tuple(found),
            values=files,
            files=dict(sorted(self.files.items())),
        )
        (self.place / manifest.FILE).write_text(made.text())

    def _parts(self, title: str, each: dict[int, _RankGraph]) -> Iterator[Part]:
        alike: dict[tuple[str, tuple[Given, ...]], list[int]] = {}
        for rank, graph in each.items():
            alike.setdefault((graph.program.fingerprint, graph.inputs), []).append(rank)
        for (_, inputs), ranks in alike.items():
            file = self._save_program(title, each[ranks[0]].program)
            groups = {r: dict(zip(group_names(), each[r].program.groups)) for r in ranks}
            yield Part(file, tuple(ranks), groups, inputs)

    def _save_program(self, title: str, program: PortableProgram) -> str:
        if program.fingerprint not in self.saved:
            name = f"{title.replace(' ', '-')}-{program.fingerprint[:12]}.pt2"
            path = self.place / "programs" / name
            path.parent.mkdir(exist_ok=True)
            torch.export.save(exported(program), path)
            self.saved[program.fingerprint] = self._kept(path)
        return self.saved[program.fingerprint]

    def _save_values(self, rank: int, values: dict[str, Any]) -> str:
        path = self.place / "values" / f"rank{rank}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(values, path)
        return self._kept(path)

    def _kept(self, path: Path) -> str:
        name = path.relative_to(self.place).as_posix()
        self.files[name] = sha256(path)
        return name


def _rank_graphs(
    modules: Any, frame: Recorded, flat: FlatGraph, rank: int, suffix: str
) -> dict[str, _RankGraph]:
    """Title -> the forward, and the backward if there is one, of a rank."""
    own = [known.rank in (rank, None) for known in flat.outputs]
    returned: dict[str, list[Any]] = {}
    count = frame.forward_outputs if JOINT in frame.graphs else len(own)
    for stage, part in ((FORWARD, slice(0, count)), (BACKWARD, slice(count, None))):
        call = frame.calls.get(stage)
        if call is not None:
            returned[stage] = [v for v, mine in zip(call.returned, own[part]) if mine]
    found = {}
    forward: tuple[fx.GraphModule, PortableProgram] | None = None
    for stage in returned:
        module = modules[f"{stage}{suffix}"]
        program = portable(module)
        call = frame.calls[stage]
        given: list[Any] = []
        changed: dict[int, Tensor] = {}
        inputs = []
        nodes = placeholders(module)
        for index, position in enumerate(program.inputs):
            node = nodes[position]
            name = node.meta["flat_name"]
            if stage == BACKWARD and node.meta.get("input_kind") != "tangent":
                inputs.append(Given("forward", _saved(node, forward)))
                continue
            inputs.append(Given("value", len(given)))
            given.append(call.given[name])
            if name in call.changed:
                changed[index] = call.changed[name]
        results = {
            index: returned[stage][position]
            for index, position in enumerate(program.outputs)
            if position < len(returned[stage]) and is_value(returned[stage][position])
        }
        values = {
            "given": given,
            "returned": results,
            "changed": changed,
            "generator": call.generators.get(rank),
        }
        found[f"{stage}{suffix}"] = _RankGraph(program, tuple(inputs), values)
        forward = module, program
    return found


def _saved(node: fx.Node, forward: Any) -> int:
    """Which result of the forward a backward's input is."""
    module, program = forward
    names = [getattr(v, "name", None) for v in leaves(output_node(module).args[0])]
    return int(program.outputs.index(names.index(node.name)))
