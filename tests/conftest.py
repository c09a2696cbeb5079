"""Every test starts from the same random state, whichever tests ran before it in its process."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
