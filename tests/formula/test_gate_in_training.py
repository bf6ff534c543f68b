"""The gate with batch statistics as the plain engine computes it: autograd through ``functional.gate`` is the truth."""

import pytest
import torch
from builders import assert_close, kept, make_gradient, make_parameters, randn

from s2sent_kernels import functional
from s2sent_kernels.engines import plain
from s2sent_kernels.formula.call import ACTIVATIONS, Gating

N, D, H = 3, 8, 5


def training(momentum=0.3, activation="tanh", eps=1e-6):
    return Gating(activation, eps, training=True, momentum=momentum)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("prior", [None, (0.5, -1.0, 3.0)])
@pytest.mark.parametrize("with_p", [False, True])
@pytest.mark.parametrize("B", [2, 7])
def test_gradients_are_autograds(B, with_p, prior, activation):
    tensors, rebuild = kept(make_parameters(N, D, H, prior=prior, requires_grad=True))
    f = randn(B, D, seed=11).requires_grad_()
    p = randn(B, N, D, seed=12).requires_grad_() if with_p else None
    gating = training(activation=activation, eps=0.1)
    g = functional.gate(f, rebuild(tensors), num_blocks=N, activation=activation, eps=0.1, training=True)
    output = g if p is None else (g * p).sum(1)
    given = make_gradient(output)
    expected = torch.autograd.grad(output, [*([] if p is None else [p]), f, *tensors], given)
    with torch.no_grad():
        parameters = rebuild(tensors)
        actual, statistics = plain.gate_in_training(f, p, parameters, gating, torch.float64)
        assert_close(actual, output.detach())
        before = parameters.running_var.clone()
        dp, df, grads = plain.gate_in_training_backward(given, f, p, statistics, parameters, gating)
    assert torch.equal(before, parameters.running_var)  # a backward pass updates nothing
    found = [*([] if p is None else [dp]), df, *(t for t in grads if t is not None)]
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(one, other, 1e-12, f"gradient {index}")


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_statistics_are_torchs(momentum):
    parameters, norm = make_parameters(N, D, H), torch.nn.BatchNorm1d(N * D, momentum=momentum).double()
    norm.running_mean.copy_(parameters.running_mean)
    norm.running_var.copy_(parameters.running_var)
    f = randn(5, D, seed=11)
    z = torch.tanh(f @ parameters.down_weight.T + parameters.down_bias) @ parameters.up_weight.T + parameters.up_bias
    norm(z)
    _, statistics = plain.gate_in_training(f, None, parameters, training(momentum), torch.float64)
    assert_close(statistics.mean, z.mean(0))
    assert_close(statistics.rstd, (z.var(0, correction=0) + 1e-6).rsqrt())
    assert_close(parameters.running_mean, norm.running_mean)
    assert_close(parameters.running_var, norm.running_var)


def test_running_statistics_keep_their_dtype():
    parameters = make_parameters(N, D, H, torch.float32)
    coarse = parameters._replace(
        running_mean=parameters.running_mean.bfloat16(), running_var=parameters.running_var.bfloat16()
    )
    expected = coarse._replace(running_mean=coarse.running_mean.float(), running_var=coarse.running_var.float())
    for one in (coarse, expected):
        plain.gate_in_training(randn(5, D, seed=11, dtype=torch.float32), None, one, training(), torch.float32)
    assert torch.equal(coarse.running_mean, expected.running_mean.bfloat16())
    assert torch.equal(coarse.running_var, expected.running_var.bfloat16())


def test_an_empty_batch():
    parameters = make_parameters(N, D, H)
    before = parameters.running_mean.clone()
    f, p = randn(0, D, seed=11), randn(0, N, D, seed=12)
    o, statistics = plain.gate_in_training(f, p, parameters, training(), torch.float64)
    dp, df, grads = plain.gate_in_training_backward(o, f, p, statistics, parameters, training())
    assert o.shape == (0, D) and dp.shape == p.shape and df.shape == f.shape
    assert torch.equal(before, parameters.running_mean)
    assert not any(t.any() for t in grads if t is not None)
