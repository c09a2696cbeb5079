"""The tensor-parallel MLP on JAX's simulated host devices; run by a Python that has jax.

python jax_mlp.py W TOKENS WIDTH HIDDEN: compiles forward and backward, prints a line of JSON
(seconds of compiling, the loss, squared norms of the gradients, the version of jax), and then, for
every line "N" that it reads, runs N steps and prints the seconds of one. Imports nothing but jax
and the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main(ranks: int, tokens: int, width: int, hidden: int) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={ranks}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(jax.devices()[:ranks], ("tp",))
    whole, columns, rows = PartitionSpec(), PartitionSpec(None, "tp"), PartitionSpec("tp", None)

    def forward(x: Any, w1: Any, w2: Any) -> Any:
        return jax.lax.psum(jax.nn.relu(x @ w1) @ w2, "tp")

    on_ranks = jax.shard_map(forward, mesh=mesh, in_specs=(whole, columns, rows), out_specs=whole)

    def loss(weights: Any, x: Any) -> Any:
        y = on_ranks(x, *weights)
        return (y * y).sum()

    def put(array: Any, spec: Any) -> Any:
        return jax.device_put(array, NamedSharding(mesh, spec))

    # Sines: both contestants compute on the same numbers without sharing a generator.
    def wave(n: int, m: int, seed: int) -> Any:
        return jnp.sin(jnp.arange(n * m, dtype=jnp.float32) * 0.7 + seed).reshape(n, m) / n**0.5

    x = put(wave(tokens, width, 1), whole)
    weights = put(wave(width, hidden, 2), columns), put(wave(hidden, width, 3), rows)
    step = jax.jit(jax.value_and_grad(loss))
    begin = time.perf_counter()
    value, gradients = jax.block_until_ready(step(weights, x))
    seconds = time.perf_counter() - begin
    norms = [float((g * g).sum()) for g in gradients]
    first = {"compile": seconds, "loss": float(value), "norms": norms, "jax": jax.__version__}
    print(json.dumps(first), flush=True)
    for line in sys.stdin:
        count = int(line)
        begin = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(step(weights, x))
        print((time.perf_counter() - begin) / count, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
