"""Bundles: each rank's program with its inputs and results, in a directory that others can run."""
