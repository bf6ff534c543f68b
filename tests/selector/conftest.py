"""The batch of small.py's selector, and where the corner cases and the derivatives run: see corners.py."""

import pytest
from builders import make_batch, through_ops
from corners import Place
from small import B, D, L, N

import s2sent_kernels as s2


@pytest.fixture(params=["reference", "op"] + ["native"] * s2.backends()["native"].usable)
def place(request, monkeypatch):
    if request.param == "op":
        return Place("op", through_ops(monkeypatch), "cpu")
    return Place(request.param, request.param, "cpu")


@pytest.fixture
def batch():
    return make_batch(N, B, L, D)
