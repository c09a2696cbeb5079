"""Collectives on the shards of all ranks: groups, reduction orders, ops, entry points."""
