"""`lt.schedule`: run a program with ranks of its own and write down what each calls."""

from __future__ import annotations

TIMEOUT = 300.0


def schedule(*a, **k):
    raise NotImplementedError
