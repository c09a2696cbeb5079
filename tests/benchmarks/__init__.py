"""Benchmarks: `python -m tests.benchmarks`."""

import os

# Threads of OpenMP that spin at barriers wait for each other's time slices as soon as anything else
# runs: a step of 2.4 ms on two threads took 155 ms on a busy machine, 9 ms with this. Read when
# torch is loaded, which is after this package.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
