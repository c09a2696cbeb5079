"""The stacked layout: the shards of all ranks in one tensor, each op once for all of them."""

from . import run as run
