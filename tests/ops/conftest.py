"""The batch that the tests of bad input change."""

import pytest
import torch
from builders import make_batch
from refusals import B, D, L, N


@pytest.fixture
def batch():
    return make_batch(N, B, L, D, torch.float32, "right")
