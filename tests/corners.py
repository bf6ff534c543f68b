"""The selector, its batches and its calls in the tables of corner cases and of derivatives.

The tests lie in tests/selector and have a fixture ``place``: tests/selector runs them on the reference, the ops and the native
backend on the CPU, tests/engines on the engine under test. The tensors are float32, or of a dtype that every backend
supports, except where float64 is what a test is about.
"""

import contextlib
from typing import NamedTuple

import builders
import pytest
import torch
from builders import make_gradient

from s2sent_kernels.engines.triton.limits import triton_interprets
from s2sent_kernels.formula.call import DTYPES, KERNEL_DTYPES, POOLINGS

PATHS = (None, *POOLINGS)  # None: the fused tokens
N, B, L, D, H, M = 3, 6, 7, 16, 5, 4
CLOSE = 1e-5
INTERPRETED = triton_interprets()
if INTERPRETED:  # tens of milliseconds per program: the smallest sizes that hold every case
    N, B, L, D, H, M = 2, 4, 5, 8, 3, 2
    PATHS = (None, "mean")

paths = pytest.mark.parametrize("path", PATHS)
every_path = pytest.mark.parametrize("path", (None, *POOLINGS))
profiles = pytest.mark.parametrize("profile", ["paper", "official"])
modes = pytest.mark.parametrize("training", [False, True])


class Place(NamedTuple):
    name: str  # "reference", "op" (torch.ops.s2sent.* over the reference), "native" or "triton"
    backend: str  # what to pass
    device: str

    @property
    def computes_float64(self) -> bool:
        return self.name in ("reference", "op")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return DTYPES if self.computes_float64 else KERNEL_DTYPES


def selector_for(place, profile="paper", **options):
    return builders.make_selector(
        N, D, M, H=H, dtype=torch.float32, device=place.device, profile=profile, backend=place.backend, **options
    )


def batch_for(place, mask="right", dtype=torch.float32, **options):
    """Drawn lengths. With the interpreter's few tokens fixed ones, so that no sentence is shorter than f has frequencies."""
    return builders.make_batch(N, B, L, D, dtype, mask, device=place.device, drawn_lengths=not INTERPRETED, **options)


def call(selector, hidden_states, mask=None, path=None, **options):
    if path is None:
        return selector(hidden_states, mask, **options)
    return selector.pool(hidden_states, mask, pooling=path, **options)


def gradients(selector, hidden_states, mask, path, forward_context=None):
    """The output and the gradients of the hidden states and of the parameters."""
    hidden_states = [u.detach().clone().requires_grad_() for u in hidden_states]
    selector.zero_grad()
    with forward_context or contextlib.nullcontext():
        out = call(selector, hidden_states, mask, path)
    out.backward(make_gradient(out))
    return out.detach(), [u.grad for u in hidden_states], [p.grad for p in selector.parameters()]
