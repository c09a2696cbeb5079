"""Measures one op in one world: all its cases on every engine, with verdicts and faults."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from . import attribution, engines, ops, shardings
from .cases import Case, cases_of
from .engines import Result, Results
from .verdicts import FAILS, Verdict, is_right, judge

T = TypeVar("T")
BACKENDS = ("eager", "aot_eager", "inductor")


@dataclass(frozen=True)
class Plan:
    """How much is measured. A part of every record, since results of two plans do not mix.

    Attributes:
        samples: sample inputs per op and set of sizes.
        shardings: shardings per sample.
        compiled: cases per op, world and set of sizes that are compiled, by backend.
    """

    backends: tuple[str, ...] = BACKENDS
    samples: int = 2
    shardings: int = 3
    compiled: Mapping[str, int] = field(default_factory=lambda: {"aot_eager": 2, "inductor": 1})

    def as_json(self) -> dict[str, Any]:
        sizes = [[name, *sorted(values.items())] for name, values in ops.SIZES.items()]
        return json.loads(json.dumps({**asdict(self), "sizes": sizes}))


@dataclass
class Steps:
    """Names each step before it runs, so that whoever watches knows where a process hangs.

    Args:
        started: called with the step's name.
        lost: steps that ended an earlier process, by name, and how.
    """

    started: Callable[[str], None]
    lost: Mapping[str, str]

    def run(self, name: str, step: Callable[[], T], failed: Callable[[str], T]) -> T:
        """step(), or failed(text) for a step that may not run again."""
        if name in self.lost:
            return failed(self.lost[name])
        self.started(name)
        return step()


@dataclass
class _Measured:
    """One case on its way."""

    case: Case
    expected: Result
    random: bool
    verdicts: dict[str, tuple[Verdict, Verdict]] = field(default_factory=dict)

    def right(self, backend: str) -> bool:
        return backend in self.verdicts and all(v.right for v in self.verdicts[backend])


def measure(op: str, world_size: int, plan: Plan, steps: Steps) -> dict[str, Any]:
    """The record of an op in a world, ready for JSON."""
    start = time.perf_counter()
    dtype = ops.dtype_of(op)
    record = {
        "op": op,
        "world_size": world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "plan": plan.as_json(),
    }
    measured, reason = _expected(op, plan) if dtype is not None else ([], "no dtype on CPU")
    if measured:
        _eager(measured, world_size, steps)
        for backend in plan.backends:
            if backend != "eager":
                _compiled(measured, world_size, backend, plan.compiled[backend], steps)
    else:
        record["reason"] = reason
    record["cases"] = [_as_json(m, world_size) for m in measured]
    record["seconds"] = round(time.perf_counter() - start, 2)
    return record


def label(case: Case) -> str:
    """`even 0 S(0) R`: names a case among those of its op."""
    return f"{case.sizes} {case.sample} {shardings.text(case.sharding)}"


def _expected(op: str, plan: Plan) -> tuple[list[_Measured], str]:
    """The cases that can be measured, or why there are none."""
    cases, why = [], "no sample input of strided tensors"
    for sizes in ops.SIZES:
        try:
            cases += cases_of(op, sizes, plan.samples, plan.shardings)
        except Exception as error:  # torch's sample functions do not all take all sizes
            why = f"no sample inputs: {engines.describe(error)}"
    if not cases:
        return [], why
    with_tensors = [case for case in cases if case.sharding]
    if not with_tensors:
        return [], "takes no tensor: DTensor has no part in it"
    first = engines.plain(with_tensors)
    good = [(case, result) for case, result in zip(with_tensors, first) if result.error is None]
    random = ops.is_uninitialised(op)
    for seed in (2, 3):  # a few integers may be drawn twice alike
        again = engines.plain([case for case, _ in good], seed=seed)
        random = random or not all(is_right({0: b}, a) for (_, a), b in zip(good, again))
    found = [_Measured(case, result, random) for case, result in good]
    return found, f"the unsharded op fails: {first[0].error}"


# ---------------------------------------------------------------- engines
def _eager(measured: Sequence[_Measured], world_size: int, steps: Steps) -> None:
    wrong: list[tuple[_Measured, Results]] = []
    for m in measured:
        found = _alone(m.case, f"eager {label(m.case)}", world_size, None, steps)
        m.verdicts["eager"] = judge(found, m.expected, m.random)
        if not m.right("eager"):
            wrong.append((m, found))
    # Ranks that wait for each other cost the whole patience: of the cases that fail with one
    # text, the first runs on its own, and the others only if it came to an end.
    first: dict[str, tuple[_Measured, Results]] = {}
    others = []
    for m, found in wrong:
        text = _text(m.verdicts["eager"])
        if text and text in first:
            others.append((m, found))
        else:
            first[text or label(m.case)] = (m, found)
    on_ranks = _on_real_ranks([m.case for m, _ in first.values()], world_size, "first", steps)
    divided = {}
    for (text, (m, found)), real in zip(first.items(), on_ranks):
        fault, evidence = attribution.eager_fault(found, real, m.expected, m.random)
        _blame(m.verdicts["eager"], fault, evidence)
        if engines.is_divided(real):
            divided[text] = fault, evidence
    rest = []
    for m, found in others:
        text = _text(m.verdicts["eager"])
        if text in divided:
            _blame(m.verdicts["eager"], *divided[text])
        else:
            rest.append((m, found))
    on_ranks = _on_real_ranks([m.case for m, _ in rest], world_size, "rest", steps)
    for (m, found), real in zip(rest, on_ranks):
        fault, evidence = attribution.eager_fault(found, real, m.expected, m.random)
        _blame(m.verdicts["eager"], fault, evidence)


def _on_real_ranks(
    cases: Sequence[Case], world_size: int, which: str, steps: Steps
) -> list[Results]:
    if not cases:
        return []
    return steps.run(
        f"eager on real ranks, {which}",
        lambda: engines.real(cases, world_size, None, together=which == "rest"),
        lambda text: [{0: Result(error=text)} for _ in cases],
    )


def _text(verdicts: tuple[Verdict, Verdict]) -> str:
    """How a case fails, without the numbers in it; empty for a wrong value."""
    texts = (re.sub(r"\d+", "N", v.reason or "") for v in verdicts if v.kind == FAILS)
    return " ".join(texts)


def _compiled(
    measured: Sequence[_Measured], world_size: int, backend: str, limit: int, steps: Steps
) -> None:
    chosen = []
    for sizes in ops.SIZES:
        usable = [m for m in measured if m.case.sizes == sizes and m.right("eager")]
        chosen += usable[:limit]
    if not chosen:
        return
    together = steps.run(
        f"{backend} all",
        lambda: engines.simulated([m.case for m in chosen], world_size, backend),
        lambda text: [{0: Result(error=text)} for _ in chosen],
    )
    blamed: dict[str, tuple[str, str]] = {}
    slow = False
    for m, found in zip(chosen, together):
        if slow:
            return  # the op's other cases would take as long, and the table says `-`
        name = f"{backend} {label(m.case)}"
        if len(chosen) > 1 and not is_right(found, m.expected, m.random):
            found = _alone(m.case, name, world_size, backend, steps)
            slow = name in steps.lost
        verdicts = m.verdicts[backend] = judge(found, m.expected, m.random)
        if m.right(backend):
            continue
        if verdicts[0].kind == FAILS and m.expected.backward is not None:
            # Compiling traces both: the forward may be right on its own.
            forward = _alone(m.case, f"{name} forward", world_size, backend, steps, grad=False)
            on_its_own = judge(forward, m.expected, m.random)[0]
            if on_its_own.right:
                verdicts = m.verdicts[backend] = on_its_own, verdicts[0]
        # One cause makes many cases of an op fail with one text: the first is run without us.
        key = _text(verdicts)
        if not key or key not in blamed:
            blamed[key] = _without_us(m, found, name, world_size, backend, steps)
        _blame(verdicts, *blamed[key])


def _alone(
    case: Case, name: str, world_size: int, backend: str | None, steps: Steps, grad: bool = True
) -> Results:
    return steps.run(
        name,
        lambda: engines.simulated([case], world_size, backend, grad=grad)[0],
        lambda text: {0: Result(error=text)},
    )


def _without_us(
    m: _Measured, found: Results, name: str, world_size: int, backend: str, steps: Steps
) -> tuple[str, str]:
    def plain(case: Case, backend: str | None) -> Result:
        return steps.run(
            f"{name}, unsharded with {backend}",
            lambda: engines.plain([case], backend)[0],
            lambda text: Result(error=text),
        )

    def real(case: Case, backend: str | None) -> Results:
        return steps.run(
            f"{name}, on real ranks",
            lambda: engines.real([case], world_size, backend)[0],
            lambda text: {0: Result(error=text)},
        )

    return attribution.compiled_fault(
        m.case,
        backend,
        found,
        m.expected,
        m.random,
        plain=plain,
        real=real,
        lower_is_right=m.right("aot_eager"),
    )


def _blame(verdicts: tuple[Verdict, Verdict], fault: str, evidence: str) -> None:
    for verdict in verdicts:
        if not verdict.right:
            verdict.fault = fault
            verdict.reason = f"{verdict.reason} [{evidence}]"


def _as_json(m: _Measured, world_size: int) -> dict[str, Any]:
    tensors = m.case.load().tensors
    shapes = [list(t.shape) for t in tensors]
    uneven = shardings.is_uneven([tuple(s) for s in shapes], m.case.sharding, world_size)
    return {
        "sizes": m.case.sizes,
        "sample": m.case.sample,
        "sharding": list(m.case.sharding),
        "shapes": shapes,
        "uneven": uneven,
        "results": {b: [v.as_json() for v in pair] for b, pair in m.verdicts.items()},
    }
