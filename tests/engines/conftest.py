"""Skips what cannot run in this process, and the fixtures of every engine's tests. See harness.py."""

import functools
import os
from pathlib import Path

import pytest
import torch
from builders import NAN
from corners import Place
from harness import BACKEND, DEVICE

from s2sent_kernels import backends

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()


def pytest_collection_modifyitems(items):
    usable, reason = backends()[BACKEND]
    if usable:
        return
    skip = pytest.mark.skip(reason=f"{BACKEND}: {reason} (TRITON_INTERPRET=1, set before the start, needs no GPU)")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh floating memory is NaN, so that an output element that no kernel writes is seen. ``monkeypatch.undo()`` lifts
    it."""

    def poisoned(create):
        @functools.wraps(create)
        def wrapper(*args, **kwargs):
            fresh = create(*args, **kwargs)
            if fresh.is_floating_point():
                with torch.no_grad():
                    fresh.fill_(NAN)
            return fresh

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(params=[BACKEND])
def place():
    """For the selector's corner cases: the engine under test."""
    return Place(BACKEND, BACKEND, DEVICE.type)
