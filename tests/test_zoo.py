"""Golden graphs of small programs of every parallelism, in graphs/zoo."""

import functools
import os
import subprocess
import sys

import pytest
import torch

import localtensor_compile as lt
from tests.parallel import (
    context_parallel,
    data_parallel,
    dynamic_rows,
    expert_parallel,
    fsdp,
    tensor_parallel,
)

# name: (program, ranks, arguments)
ZOO = {
    "tp_mlp": (tensor_parallel.mlp, 4, {"hidden": 8}),
    "tp_mlp_uneven": (tensor_parallel.mlp, 3, {"hidden": 7}),
    "sequence_parallel_uneven": (tensor_parallel.mlp_sequence_parallel, 2, {}),
    "tp_transformer": (tensor_parallel.transformer, 2, {}),
    "loss_parallel": (tensor_parallel.cross_entropy, 3, {}),
    "vocab_parallel_embedding": (tensor_parallel.embedding, 2, {}),
    "embedding_with_empty_shards": (tensor_parallel.embedding, 4, {"output": "sequence"}),
    "simple_fsdp": (data_parallel.simple_fsdp, 3, {}),
    "fsdp_over_tp": (fsdp.tensor_parallel_blocks, 4, {}),
    "dp_and_tp": (tensor_parallel.data_and_tensor, 4, {"dp": 2}),
    "moe_all_to_all": (expert_parallel.mixture_of_experts, 2, {"local_experts": 1}),
    "ring_attention": (context_parallel.attention, 2, {"form": "ring", "causal": True}),
    "dynamic_tp_mlp": (dynamic_rows.mlp, 3, {"hidden": 7}),
    "dynamic_rows": (dynamic_rows.uneven, 3, {}),
    "dynamic_resharding": (dynamic_rows.resharded, 3, {}),
    "gathered_attention": (context_parallel.attention, 3, {"form": "all-gather", "causal": False}),
}


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch's partitioner cut other graphs (docs/design.md)"
)
@pytest.mark.parametrize("name", ZOO)
def test_golden(name, golden):
    program, world_size, arguments = ZOO[name]
    golden(lt.capture(functools.partial(program, **arguments), world_size), name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_goldens_in_a_fresh_process(seed):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", f"{__file__}::test_golden"],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and f"{len(ZOO)} passed" in done.stdout, done.stdout
