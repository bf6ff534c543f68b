"""Sums over a sentence's tokens in float32 round hardly more than PyTorch's own. One running sum over 2,048 tokens would have
several times PyTorch's error, and twice as much where it has 256 terms."""

import pytest
import torch
from harness import BACKEND, F32, randn

from s2sent_kernels import functional

SENTENCES, TOKENS, SIZE, DRAWS = 2, 2048, 16, 3
LIMIT = 1.5  # of PyTorch's error, as in bench/accuracy.py


def hidden_state(kind, seed):
    u = randn(SENTENCES, TOKENS, SIZE, seed=seed)
    return u if kind == "ordinary" else u[:, :1] * (1 + 0.01 * u)  # so that roundings add up


def pooled(u, seed):
    """p, by the backend and by PyTorch, and the truth."""
    _, p = functional.squeeze([u], pooling="mean", frequencies=1, backend=BACKEND)
    return p[:, 0], u.mean(1), u.double().mean(1)


def gates_gradient(u, seed):
    """dg, likewise."""
    dv = randn(SENTENCES, TOKENS, SIZE, seed=100 + seed)
    dg = torch.ops.s2sent.fuse_backward(dv, [u], None, None, BACKEND)
    return dg[:, 0], (dv * u).sum(1), (dv.double() * u.double()).sum(1)


@pytest.mark.parametrize("kind", ["ordinary", "similar tokens"])
@pytest.mark.parametrize("results", [pooled, gates_gradient])
def test_their_error(results, kind):
    error = yardstick = rounding = 0.0
    for seed in range(DRAWS):
        ours, eager, truth = results(hidden_state(kind, seed), seed)
        error += (ours.double() - truth).square().sum().item()
        yardstick += (eager.double() - truth).square().sum().item()
        rounding += (torch.finfo(F32).eps / 2) ** 2 * truth.square().sum().item()
    few = 1 + 4 / (DRAWS * SENTENCES * SIZE)  # the mean of few errors is noisy
    assert error <= LIMIT**2 * few * max(yardstick, rounding), (error / max(yardstick, rounding)) ** 0.5
