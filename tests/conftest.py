"""For all tests but those of tests/engines: plain PyTorch, and the ops over it."""

import os

import pytest
import torch
from builders import through_ops

if os.environ.get("S2SENT_TEST_BACKEND") != "native":  # it has its own threads, which the tests shall see
    torch.set_num_threads(1)  # the tensors are tiny, and under pytest -n the workers would compete for the cores


@pytest.fixture(params=["reference", "op"])
def backend(request, monkeypatch):
    """The ``backend`` to pass. "op": through torch.ops.s2sent.* over the reference."""
    return "reference" if request.param == "reference" else through_ops(monkeypatch)
