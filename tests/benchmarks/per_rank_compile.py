"""Compiling in the per-rank layout against torch's own LocalTensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .compile_time import compile_seconds
from .models import SMALL_BLOCK, SMALL_MLP
from .plot import Plot
from .report import Bound, Section, figure, milliseconds, ratio
from .timing import Timed, medians, single
from .worlds import LOOP, OWN, PER_RANK, compiled, loop, ours, own, process_group

RANKS = (2, 8, 32, 64)
BOUNDED, LEAST = 32, 2.0


def run(quick: bool) -> Section:
    worlds = (2,) if quick else RANKS
    models = (SMALL_MLP,) if quick else (SMALL_MLP, SMALL_BLOCK)
    rows, bounds = [], []
    curves: dict[str, dict[int, float]] = {}
    for model in models:
        calls: dict[str, Callable[..., Timed]] = {
            PER_RANK: partial(ours, model, layout=PER_RANK),
            OWN: partial(own, model, inside=False),
        }
        for contestant in calls.values():
            compile_seconds(contestant, 2, "aot_eager")
        for ranks in worlds:
            if model is SMALL_BLOCK and ranks > BOUNDED:
                continue
            found = single(
                {k: partial(compile_seconds, c, ranks, "aot_eager") for k, c in calls.items()},
                1 if quick else 5,
            )
            mine, theirs = found[PER_RANK], found[OWN]
            for key, seconds in found.items():
                curves.setdefault(f"{model.name}, {key}", {})[ranks] = seconds
            rows.append([model.name, str(ranks), f"{figure(mine)} s", ratio(theirs / mine)])
            if ranks == BOUNDED:
                bounds.append(Bound(f"{model.name}: W = {ranks}", theirs / mine, at_least=LEAST))
    step_rows = [] if quick else compiled_steps()
    return Section(
        "per_rank_compile",
        "Compiling in the per-rank layout",
        "Seconds of the first step with backend aot_eager, forward and backward; caches off. "
        "torch's own is compiled outside its mode: inside, its graph has W * W nodes. Ratios say "
        f"how many times longer torch's own takes. {' '.join(step_rows)}",
        ("program", "W", "per_rank", OWN),
        rows,
        bounds,
        Plot("First step, aot_eager", "seconds", curves),
    )


def compiled_steps() -> list[str]:
    """A sentence per number of ranks: the Inductor step against a loop over compiled ranks."""
    sentences = []
    for ranks in (2, 8, 32):
        torch._dynamo.reset()
        make = compiled("inductor")
        with process_group(ranks):
            found = medians(
                {
                    PER_RANK: ours(SMALL_MLP, ranks, PER_RANK, make),
                    LOOP: loop(SMALL_MLP, ranks, make),
                }
            )
        sentences.append(
            f"An Inductor step of the MLP at W = {ranks} takes {milliseconds(found[PER_RANK])}, a "
            f"loop that calls one rank's compiled step {ratio(found[LOOP] / found[PER_RANK])} that."
        )
    return sentences
