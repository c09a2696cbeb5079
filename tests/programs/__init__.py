"""The list of small programs that LocalTensor is held against, and how they are run."""

from . import basics as basics
from . import collectives as collectives
from . import control as control
from . import layers as layers
from . import modules as modules
from . import ranks as ranks
from . import sizes as sizes
from . import views as views
from .harness import PROGRAMS as PROGRAMS
