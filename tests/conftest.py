"""Threads, and the backends "reference" and "op" as a fixture."""

import os

import pytest
import torch
from builders import through_ops

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network, or waits for one
if os.environ.get("S2SENT_TEST_BACKEND") != "native":  # it divides work among threads itself
    torch.set_num_threads(1)  # the tensors are tiny, and under pytest -n the workers would compete for the cores


@pytest.fixture(params=["reference", "op"])
def backend(request, monkeypatch):
    """The ``backend`` to pass. "op": through torch.ops.s2sent.* over the reference."""
    return "reference" if request.param == "reference" else through_ops(monkeypatch)
