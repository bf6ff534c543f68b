"""The selector's BatchNorm: batch statistics, running statistics, and norms of other kinds."""

import pytest
import torch
from builders import assert_close
from small import B, D, H, M, N, equal, outputs, trained
from torch import nn

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector

# ---------------------------------------------------------------- batch statistics


def norm_by_hand(selector, batch, steps=1):
    """torch runs the parts one after another."""
    f, _ = s2.squeeze(*batch, frequencies=M, profile=selector.profile)
    for _ in range(steps):
        selector.norm(selector.up(torch.tanh(selector.down(f))))


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("path", ["forward", "pool", "gates"])
@pytest.mark.parametrize("profile", ["paper", "official"])
def test_running_statistics_are_torchs(momentum, path, profile, batch):
    selector, other = trained(profile=profile).train(), trained(profile=profile).train()
    selector.norm.momentum = other.norm.momentum = momentum
    for _ in range(3):
        getattr(selector, path)(*batch)
        norm_by_hand(other, batch)
    for name, value in selector.norm.named_buffers():
        assert_close(value, getattr(other.norm, name), 1e-12, name)
    assert selector.norm.num_batches_tracked == 3


def test_gates_in_training_are_of_the_batchs_statistics(batch):
    selector = trained().train()
    gates = selector.gates(*batch)
    f, _ = s2.squeeze(*batch, frequencies=M)
    z = selector.norm(selector.up(torch.tanh(selector.down(f))))
    expected = torch.softmax(torch.sigmoid(z).unflatten(1, (N, D)), dim=1)
    assert_close(gates, expected, 1e-12)


@pytest.mark.parametrize("path", ["forward", "pool", "gates"])
def test_a_frozen_norm_in_training(path, batch):
    """selector.train() with norm.eval(): the running statistics are used and not updated."""
    selector = trained()
    expected = getattr(selector, path)(*batch)
    selector.train()
    selector.norm.eval()
    before = {name: value.clone() for name, value in selector.named_buffers()}
    assert torch.equal(getattr(selector, path)(*batch), expected)
    assert equal(before.values(), dict(selector.named_buffers()).values())


@pytest.mark.parametrize("path", ["forward", "pool"])
@pytest.mark.parametrize("training", [False, True])
def test_a_norm_without_running_statistics(path, training, batch):
    """track_running_stats=False: the batch's own in either mode, as in torch."""
    selector = trained().train(training)
    selector.norm = nn.BatchNorm1d(N * D, eps=1e-6, track_running_stats=False).double().train(training)
    f, p = s2.squeeze(*batch, frequencies=M, pooling="mean")
    z = selector.norm(selector.up(torch.tanh(selector.down(f))))
    g = torch.softmax(torch.sigmoid(z).unflatten(1, (N, D)), dim=1)
    expected = (g * p).sum(1) if path == "pool" else s2.fuse(batch.hidden_states, g, batch.attention_mask)
    assert_close(getattr(selector, path)(*batch), expected, 1e-12)


def test_a_norm_that_is_not_affine(batch):
    selector = trained()
    expected = trained()
    with torch.no_grad():
        expected.norm.weight.fill_(1)
        expected.norm.bias.zero_()
    plain = nn.BatchNorm1d(N * D, eps=1e-6, affine=False).double().eval()
    plain.running_mean.copy_(selector.norm.running_mean)
    plain.running_var.copy_(selector.norm.running_var)
    selector.norm = plain
    for a, e in zip(outputs(selector, batch), outputs(expected, batch), strict=True):
        assert_close(a, e, 1e-12)


def test_another_eps(batch):
    selector = trained()
    selector.norm.eps = 0.3
    f, _ = s2.squeeze(*batch, frequencies=M)
    z = selector.norm(selector.up(torch.tanh(selector.down(f))))
    assert_close(selector.gates(*batch), torch.softmax(torch.sigmoid(z).unflatten(1, (N, D)), dim=1), 1e-12)
    _, p = s2.squeeze(*batch, frequencies=M, pooling="mean")
    assert_close(selector.pool(*batch), (selector.gates(*batch) * p).sum(1), 1e-12)


def test_a_step_of_an_optimizer(batch):
    torch.manual_seed(0)
    selector = S2SentSelector(D, N, H, M, block_prior=True, gate_scale=4.0).double().train()
    optimizer = torch.optim.AdamW(selector.parameters(), lr=1e-2)
    target = torch.randn(B, D, dtype=torch.float64)
    losses = []
    for _ in range(20):
        loss = (selector.pool(*batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in selector.parameters())
    assert losses[-1] < losses[0]
