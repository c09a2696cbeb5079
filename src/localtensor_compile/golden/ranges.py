"""Ranks, and values that differ between ranks, as short text: `0-2,5`, `{0-2: 43, 3: 42}`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping


def rank_set(ranks: Iterable[int]) -> str:
    """`0-2,5`; with a step, `0-6:2`."""
    left = sorted(ranks)
    parts = []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        run = [left[0]]
        for rank in left[1:]:
            if rank - run[-1] == step:
                run.append(rank)
        if step > 1 and len(run) < 3:  # two ranks are no pattern
            run, step = run[:1], 1
        last = run[-1]
        parts.append(
            str(last) if len(run) == 1 else f"{run[0]}-{last}" + (f":{step}" if step > 1 else "")
        )
        taken = set(run)
        left = [r for r in left if r not in taken]
    return ",".join(parts)


def parse_ranks(text: str) -> tuple[int, ...]:
    """The ranks of a `rank_set`.

    Raises:
        ValueError: any other text.
    """
    found: list[int] = []
    for part in text.split(","):
        span, _, step = part.partition(":")
        first, dash, last = span.partition("-")
        found += range(int(first), int(last if dash else first) + 1, int(step or 1))
    return tuple(sorted(found))


def varying_text(values: Mapping[int, str]) -> str:
    """One text where all ranks have the same, else `{ranks: text, ...}`.

    Numbers that grow by one amount from rank to rank, as offsets do, are a formula: `{4*rank}`,
    `split[{rank}]`.
    """
    ranks: dict[str, list[int]] = {}
    for rank, text in values.items():
        ranks.setdefault(text, []).append(rank)
    if len(ranks) == 1:
        return next(iter(ranks))
    if len(ranks) == len(values):
        parts = {rank: _NUMBER.split(text) for rank, text in values.items()}
        formula = _with_formula(parts)
        if formula is not None:
            return formula
    return "{" + ", ".join(f"{rank_set(r)}: {text}" for text, r in ranks.items()) + "}"


_NUMBER = re.compile(r"((?<![\w.])\d+(?![\w.]))")


def _with_formula(parts: Mapping[int, list[str]]) -> str | None:
    """The texts as one where they differ in one number, and that has a formula."""
    first = next(iter(parts.values()))
    if any(len(p) != len(first) for p in parts.values()):
        return None
    differ = [i for i in range(len(first)) if len({p[i] for p in parts.values()}) > 1]
    if len(differ) != 1:
        return None
    formula = _formula({rank: p[differ[0]] for rank, p in parts.items()})
    if formula is None:
        return None
    return "".join([*first[: differ[0]], f"{{{formula}}}", *first[differ[0] + 1 :]])


def _formula(values: Mapping[int, str]) -> str | None:
    numbers: dict[int, int] = {}
    for rank, text in values.items():
        if not text.isdecimal():
            return None
        numbers[rank] = int(text)
    ranks = sorted(numbers)
    step, rest = divmod(numbers[ranks[-1]] - numbers[ranks[0]], ranks[-1] - ranks[0])
    start = numbers[ranks[0]] - step * ranks[0]
    if rest or step < 1 or any(numbers[r] != start + step * r for r in ranks):
        return None
    product = "rank" if step == 1 else f"{step}*rank"
    return product if start == 0 else f"{product} {'+' if start > 0 else '-'} {abs(start)}"


_FORMULA = re.compile(r"(?:(\d+)\*)?rank(?: ([+-]) (\d+))?")


def at_rank(text: str, rank: int) -> str:
    """What a text with `varying_text`s in it says for one rank.

    Raises:
        ValueError: braces that `varying_text` does not make.
    """
    out, i = "", 0
    while i < len(text):
        if text[i] != "{":
            out += text[i]
            i += 1
            continue
        end = _closing(text, i)
        out += _one(text[i + 1 : end], rank)
        i = end + 1
    return out


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "{[(") - (text[i] in "}])")
        if depth == 0:
            return i
    raise ValueError(text)


def _one(inside: str, rank: int) -> str:
    formula = _FORMULA.fullmatch(inside)
    if formula:
        factor, sign, start = formula.groups()
        return str(int(factor or 1) * rank + int(start or 0) * (-1 if sign == "-" else 1))
    for item in split_at(inside, ", "):
        ranks, _, value = item.partition(": ")
        if rank in parse_ranks(ranks):
            return at_rank(value, rank)
    return "nothing"


def split_at(text: str, separator: str) -> list[str]:
    """The parts between separators that are in no bracket or string."""
    parts, depth, start, quote = [], 0, 0, ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote and text[i - 1] != "\\" else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(separator, i):
            parts.append(text[start:i])
            start = i + len(separator)
    return [*parts, text[start:]] if text else []
