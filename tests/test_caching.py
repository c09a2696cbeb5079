"""torch's compile caches: hits in a second process, never a kernel of another world."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "cache_program.py"


def run(cache, world, shape, hash_seed="0"):
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONHASHSEED": hash_seed,
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(world), shape],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.xdist_group("caching")
def test_second_process_hits_and_another_world_misses(tmp_path):
    first = run(tmp_path, 4, "2,2")
    assert first["counts"]["autograd_cache_bypass"] == 0
    assert first["counts"]["fxgraph_cache_bypass"] == 0
    assert first["counts"]["autograd_cache_miss"] == 4

    second = run(tmp_path, 4, "2,2", hash_seed="7")
    assert second["counts"]["autograd_cache_hit"] == 4
    assert second["counts"]["autograd_cache_miss"] == 0
    assert second["results"] == first["results"]

    # The same graphs: their groups have the same names, but stand for other ranks.
    other = run(tmp_path, 4, "4")
    assert other["counts"]["autograd_cache_hit"] == 0
    assert other["results"][0] != first["results"][0]
    assert len({tuple(row) for row in other["results"][0]}) == 1
    assert other["results"][1] == [[float(r)] * 3 for r in range(4)]
