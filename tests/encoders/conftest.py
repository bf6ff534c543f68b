"""Fixtures of the tests with encoders."""

import pytest

from s2sent_kernels import consumers


@pytest.fixture
def streamed(monkeypatch):
    """No hidden state is small enough to be kept."""
    monkeypatch.setattr(consumers, "KEPT_SHARE", 0)


@pytest.fixture(params=["kept", "streamed"])
def kept_or_streamed(request, monkeypatch):
    if request.param == "streamed":
        monkeypatch.setattr(consumers, "KEPT_SHARE", 0)
    return request.param
