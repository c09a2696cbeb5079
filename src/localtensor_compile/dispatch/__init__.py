"""One aten op on all ranks."""

from . import per_rank as per_rank
from . import random_factories as random_factories
from . import random_ops as random_ops
