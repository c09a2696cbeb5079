"""Collectives on the shards of all ranks: groups, reduction orders, custom ops, c10d entry points."""
