"""What the tests of bad input share: calls of every function, and assertions on an exception and its message."""

import re

import pytest
import torch
from builders import make_parameters

import s2sent_kernels as s2

N, B, L, D, H = 3, 4, 5, 12, 5


def raises(kind, *words):
    """``kind`` itself and no subclass, with every word in the message."""
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(kind, match=re.compile(r"\A" + pattern, re.DOTALL), check=lambda error: type(error) is kind)


def everything(hidden_states, mask=None, *, frequencies=4, profile="paper", pooling="mean", backend, **options):
    """Calls by name of the public functions that have a batch, each with the arguments that the function has."""
    width = 12 if not len(hidden_states) or not isinstance(hidden_states[0], torch.Tensor) else 0
    width = width or (hidden_states[0].shape[-1] if hidden_states[0].dim() else 1)
    parameters = make_parameters(max(len(hidden_states), 1), max(width, 1), H, torch.float32)
    gates = torch.rand(B, len(hidden_states), width)
    whole = {"frequencies": frequencies, "profile": profile, "backend": backend, **options}
    return {
        "squeeze": lambda: s2.squeeze(hidden_states, mask, pooling=pooling, **whole),
        "select": lambda: s2.select(hidden_states, parameters, mask, **whole),
        "select_pool": lambda: s2.select_pool(hidden_states, parameters, mask, pooling=pooling, **whole),
        "fuse": lambda: s2.fuse(hidden_states, gates, mask, backend=backend, **options),
    }


def each_raises(calls, kind, *words):
    for name, call in calls.items():
        with raises(kind, *words):
            call()
            pytest.fail(f"{name} raised nothing")


def without(calls, *names):
    return {name: call for name, call in calls.items() if name not in names}


# ---------------------------------------------------------------- the gate's tensors


def gate(squeezed, parameters, backend="reference", num_blocks=N):
    return s2.gate(squeezed, parameters, num_blocks=num_blocks, backend=backend)
