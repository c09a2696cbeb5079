"""docs/scoreboard.md: the results as Markdown. Pure: records in, text out."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .attribution import FAULTS
from .repro import HEADER, repro
from .store import Record
from .verdicts import CLOSE, EQUAL, FAILS, NONE, RANDOM, WRONG

PARTS = ("forward", "backward")
_COLUMNS = ("even", "uneven")

_HEADER = """\
# The compiled DTensor scoreboard

Every op of torch's OpInfo database on DTensors: eager, compiled with aot_eager and with Inductor,
forward and backward, even and uneven shards, on simulated ranks, compared on every rank with the
unsharded op on plain tensors. Written by `localtensor scoreboard --report docs/scoreboard.md`
with torch {torch}; do not edit.

## What was run

- Each op with one dtype: float32, else the first of int64, bool, complex64, float64, float16 that
  it has.
- Sample inputs are those of the database, with its sizes set to {even} and to {uneven}:
  the first {samples} of different kind for each. Shards are *even* where the number of ranks
  divides every sharded dimension; among the uneven are dimensions smaller than the number of
  ranks, so that ranks hold nothing.
- Shardings on a one-dimensional mesh, the first {shardings} per sample: each dimension of the
  first tensor with tensors of its shape sharded alike, each tensor alone, mixtures, nothing
  sharded.
- Eager runs every case. Per op, number of ranks and set of sizes,
  {compiled}, all in one
  `torch.compile(fullgraph=True, dynamic=False)`, so that a graph break is a failure. The whole
  tensor is gathered in the compiled function. Once a case has timed out on its own, no more of
  its op are compiled.
- Gradients of all inputs for fixed random output gradients.

To run it again: `localtensor scoreboard`. It goes on where a run was stopped; `--ops REGEX`,
`--world-size`, `--backend`, `--shard i/n` and `--jobs N` choose what runs, `--help` says the
rest.

## How to read it

A cell holds the forward, then the backward, each with the number of cases:

| | |
|---|---|
| `4=` | equal bit for bit on every rank |
| `4~1e-06` | within tolerance; the largest difference, rounded up to a power of ten |
| `4?` | a random op: shape and dtype are right |
| `4 wrong`, `4 fails` | see the failures of that op below |
| `-` | no case: no gradient, not run since eager fails, or no such case |

Tolerance: that of torch.testing, or 1e-5 of the largest value (float32), since sums over shards
have another order.

Whose *fault* a failure is was measured, by running the same case without this package. An eager
case ran on real gloo ranks: *DTensor* where they fail, hang or get the same wrong value. A case
that only the compiled run gets wrong was compiled as the unsharded op on plain tensors
(*torch.compile* where Dynamo or AOTAutograd fails on it, *Inductor* where only Inductor does),
then on real gloo ranks (*DTensor*, or *Inductor* if aot_eager is right, where that fails too).
Whatever is right without this package is *ours*.
"""


@dataclass
class _Failures:
    """The cases of one op that fail alike."""

    fault: str
    ops: list[str] = field(default_factory=list)
    cases: int = 0
    example: tuple[Record, Record] | None = None


def table(records: Sequence[Record], order: Iterable[str], sizes: dict[str, dict[str, int]]) -> str:
    """The whole file."""
    place = {name: i for i, name in enumerate(order)}
    records = sorted(records, key=lambda r: (r["world_size"], place.get(r["op"], -1)))
    worlds = sorted({r["world_size"] for r in records})
    backends = records[0]["plan"]["backends"] if records else ["eager"]
    parts = [_header(records[0], sizes) if records else "", _summary(records, backends)]
    for world in worlds:
        of_world = [r for r in records if r["world_size"] == world]
        parts.append(_world(world, of_world, backends))
    parts.append(_failures(records, worlds))
    parts.append(_not_run(records))
    return "\n".join(parts)


def row(record: Record, backends: Sequence[str]) -> str:
    """The line of an op in the table of its world."""
    cells = [f"`{record['op']}`", record["dtype"]]
    for backend in backends:
        cells += [cell(record, backend, kind) for kind in _COLUMNS]
    return f"| {' | '.join(cells)} |"


def cell(record: Record, backend: str, kind: str) -> str:
    """`4= ; 3= 1~1e-06`: forward and backward of the even or the uneven cases."""
    cases = [c for c in record["cases"] if c["uneven"] == (kind == "uneven")]
    pairs = [c["results"][backend] for c in cases if backend in c["results"]]
    texts = [_counts([pair[part] for pair in pairs]) for part in range(len(PARTS))]
    return "-" if texts == ["-", "-"] else " ; ".join(texts)


def _counts(verdicts: Sequence[Record]) -> str:
    counts = Counter(v["kind"] for v in verdicts)
    parts = []
    if counts[EQUAL]:
        parts.append(f"{counts[EQUAL]}=")
    if counts[CLOSE]:
        largest = max(v["error"] for v in verdicts if v["kind"] == CLOSE)
        parts.append(f"{counts[CLOSE]}~{_rounded(largest)}")
    if counts[RANDOM]:
        parts.append(f"{counts[RANDOM]}?")
    for kind in (WRONG, FAILS):
        if counts[kind]:
            parts.append(f"{counts[kind]} {kind}")
    return " ".join(parts) or "-"


def _rounded(error: float) -> str:
    if error == 0 or not math.isfinite(error):
        return f"{error:g}"
    return f"1e{math.ceil(math.log10(error)):+03d}"


def _header(record: Record, sizes: dict[str, dict[str, int]]) -> str:
    def listed(values: dict[str, int]) -> str:
        return ", ".join(str(v) for v in sorted(set(values.values())))

    plan = record["plan"]
    compiled = " and ".join(
        f"{plan['compiled'][b]} cases with {b}" for b in plan["backends"] if b != "eager"
    )
    return _HEADER.format(
        torch=record.get("torch", "?"),
        even=listed(sizes["even"]),
        uneven=listed(sizes["uneven"]),
        samples=plan["samples"],
        shardings=plan["shardings"],
        compiled=f"{compiled} are compiled, the first that are right in eager"
        if compiled
        else "nothing is compiled",
    )


# ---------------------------------------------------------------- sections
def _summary(records: Sequence[Record], backends: Sequence[str]) -> str:
    lines = [
        "## Summary",
        "",
        "Cases, forward and backward counted on their own.",
        "",
        "| ranks | backend | ops | bit-equal | close | random | wrong | fails | "
        + " | ".join(f"fault: {f}" for f in FAULTS)
        + " |",
        "|---" * (8 + len(FAULTS)) + "|",
    ]
    for world in sorted({r["world_size"] for r in records}):
        for backend in backends:
            verdicts = [
                v
                for r in records
                if r["world_size"] == world
                for c in r["cases"]
                for v in c["results"].get(backend, ())
                if v["kind"] != NONE
            ]
            ops = sum(
                any(backend in c["results"] for c in r["cases"])
                for r in records
                if r["world_size"] == world
            )
            kinds = Counter(v["kind"] for v in verdicts)
            faults = Counter(v.get("fault") for v in verdicts)
            counts = [kinds[k] for k in (EQUAL, CLOSE, RANDOM, WRONG, FAILS)]
            numbers = [ops, *counts, *(faults[f] for f in FAULTS)]
            lines.append(f"| {world} | {backend} | {' | '.join(map(str, numbers))} |")
    return "\n".join([*lines, ""])


def _world(world: int, records: Sequence[Record], backends: Sequence[str]) -> str:
    heads = [f"{b}, {kind}" for b in backends for kind in _COLUMNS]
    lines = [f"## {world} ranks", "", f"| op | dtype | {' | '.join(heads)} |"]
    lines.append("|---" * (2 + len(heads)) + "|")
    lines += [row(record, backends) for record in records if record["cases"]]
    return "\n".join([*lines, ""])


def _failures(records: Sequence[Record], worlds: Sequence[int]) -> str:
    lines = [
        "## Failures",
        "",
        "By fault, then by what was seen; numbers in the texts are those of the first case. Each",
        "has one case that shows it, which runs after these lines (`op(NAME)` is the function of",
        "that name in torch's `op_db`):",
        "",
        "```python",
        HEADER.format(world_size=max(worlds, default=2)),
        "```",
        "",
    ]
    found = _grouped(records)
    for fault in FAULTS:
        groups = {key: g for key, g in found.items() if g.fault == fault}
        lines += [f"### {fault}", ""]
        if not groups:
            lines += ["None.", ""]
            continue
        lines += ["| seen | ops | cases | one of them |", "|---|---|---|---|"]
        for (_, where, _), group in sorted(groups.items(), key=lambda g: -g[1].cases):
            lines.append(_failure(where, group))
        lines.append("")
    return "\n".join(lines)


def _grouped(records: Sequence[Record]) -> dict[tuple[str, str, str], _Failures]:
    found: dict[tuple[str, str, str], _Failures] = {}
    for record in records:
        for case in record["cases"]:
            for backend, verdicts in case["results"].items():
                for part, verdict in zip(PARTS, verdicts):
                    if verdict["kind"] not in (WRONG, FAILS):
                        continue
                    fault = verdict.get("fault", "")
                    where = f"{backend} {part} {verdict['kind']}"
                    text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", verdict.get("reason", ""))
                    group = found.setdefault((fault, where, text), _Failures(fault))
                    group.cases += 1
                    if record["op"] not in group.ops:
                        group.ops.append(record["op"])
                    if group.example is None:
                        group.example = record, {**case, "reason": verdict.get("reason", "")}
    return found


def _failure(where: str, group: _Failures) -> str:
    if group.example is None:
        raise ValueError("a group of failures without a case")
    record, case = group.example
    ops = ", ".join(f"`{name}`" for name in group.ops)
    show = f"{record['world_size']} ranks: `{repro(record, case)}`"
    return (
        "| "
        + " | ".join(map(_escaped, (f"{where}: {case['reason']}", ops, str(group.cases), show)))
        + " |"
    )


def _not_run(records: Sequence[Record]) -> str:
    reasons: dict[str, list[str]] = defaultdict(list)
    for record in records:
        if not record["cases"] and record["op"] not in reasons[record["reason"]]:
            reasons[record["reason"]].append(record["op"])
    lines = ["## Not measured", "", "| why | ops |", "|---|---|"]
    for reason, ops in reasons.items():
        lines.append(f"| {_escaped(reason)} | {', '.join(f'`{name}`' for name in ops)} |")
    return "\n".join([*lines, ""] if reasons else [*lines[:2], "None.", ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
