"""What a script prints in processes whose sets and dicts of strings have other orders."""

import os
import subprocess
import sys


def printed(script, seeds):
    """The texts of fresh processes, one with each PYTHONHASHSEED."""
    return {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in seeds
    }
