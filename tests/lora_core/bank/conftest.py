"""A mixed batch."""

import pytest
import torch
from mixed_banks import ROWS
from torch import Tensor


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 101, (len(ROWS), 7), generator=torch.Generator().manual_seed(8))
