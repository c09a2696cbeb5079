"""Replaying a bundle on real ranks."""

from __future__ import annotations

from typing import Any

from localtensor_compile.bundle.load import load_bundle
from localtensor_compile.replay.real import replay_on_this_rank


def replay(directory: str) -> list[Any]:
    return replay_on_this_rank(load_bundle(directory))
