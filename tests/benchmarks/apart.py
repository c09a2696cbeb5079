"""A measurement in a process of its own: peak memory, and compiling without a past."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_apart(module: str, *arguments: object, env: Mapping[str, str] = {}) -> Any:
    """What `python -m tests.benchmarks.MODULE ARGUMENTS` prints as JSON on its last line.

    Raises:
        RuntimeError: it failed; with what it wrote to stderr.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
