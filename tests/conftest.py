"""Every test starts from the same random state, whichever tests ran before it in its process."""

import pytest
import torch

# Also where the package is on the path without being installed.
pytest_plugins = ["localtensor_compile.pytest_plugin", "pytester"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
