"""One aten op on all ranks."""

from . import per_rank as per_rank
