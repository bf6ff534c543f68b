"""The gate with batch statistics: g or o, the statistics, the running ones, and every gradient."""

import pytest
import torch
from builders import NAN, lay_out, make_gradient, table
from harness import BACKEND, BF16, DEVICE, F16, F32, HIDDEN_DTYPES, assert_as_close, make_batch, make_parameters, randn

from s2sent_kernels import GateParameters
from s2sent_kernels.engines.choice import engine_of
from s2sent_kernels.engines.triton import config
from s2sent_kernels.formula.call import Batch, BatchStatistics, Gating, Reading

STATISTICS = ("running_mean", "running_var")


def training(activation="tanh", momentum=0.3, eps=1e-6):
    return Gating(activation, eps, training=True, momentum=momentum)


def inputs_of(B, N, D, with_p, dtype=F32, gradient="random"):
    """f, p or None, and do in ``dtype``, or without p dg."""
    f, p = randn(B, D, seed=11), randn(B, N, D, seed=12)
    like = f.to(dtype) if with_p else p
    return f, p if with_p else None, make_gradient(like, gradient, 1)


def call(f, p, grad, parameters, gating, backend=BACKEND):
    """Outputs, statistics and gradients by name. The running statistics are copied first."""
    parameters = parameters._replace(
        **{name: getattr(parameters, name).clone(memory_format=torch.preserve_format) for name in STATISTICS}
    )
    engine = engine_of(backend)
    output, statistics = engine.gate_in_training(f, p, parameters, gating, grad.dtype)
    if backend == BACKEND:
        rstd = statistics.rstd
        assert statistics.mean.dtype == rstd.dtype == F32 and rstd.shape == parameters.running_var.shape
    dp, df, grads = engine.gate_in_training_backward(grad, f, p, statistics, parameters, gating)
    found = {"output": output} | statistics._asdict() | {name: getattr(parameters, name) for name in STATISTICS}
    found |= {"gradient of p": dp, "gradient of f": df}
    found |= {f"gradient of {name}": grad for name, grad in grads._asdict().items()}
    return {name: t for name, t in found.items() if t is not None}


def jitter(t, seed):
    return None if t is None else (t.double() * (1 + 0.01 * randn(*t.shape, seed=seed).double())).to(t.dtype)


def double(t):
    return None if t is None else t.double()


def check(inputs, parameters, gating, draws=3):
    """Assert the policy of ``assert_as_close``, dtypes of parameters' gradients aside: the reference leaves them in float32."""
    actual = call(*inputs, parameters, gating)
    pairs = []
    for draw in range(1 + draws):
        (f, p, grad), w = inputs, parameters
        if draw:
            f, p, w = jitter(f, draw), jitter(p, draw), GateParameters(*(jitter(t, draw) for t in parameters))
        same = call(f, p, grad, w, gating, "reference")
        truth = call(double(f), double(p), double(grad), w.each(torch.Tensor.double), gating, "reference")
        pairs.append((same, truth))
    assert actual.keys() == pairs[0][0].keys()
    for key, found in actual.items():
        first, *others = [(same[key].to(found.dtype), truth[key]) for same, truth in pairs]
        assert_as_close(found, *first, key, others)
    return actual


# Pairwise: every pair of values of two columns other than B and D occurs in some row.
# N, H, B, D, prior (repeated over the blocks), activation, the parameters' dtype, do's dtype
CASES = [
    (2, 5, 2, 24, None, "tanh", F32, F32),
    (2, 64, 3, 40, (0.5, -1.0, 3.0), "tanh", F16, F16),
    (2, 17, 17, 66, (20.0, -20.0), "relu", torch.float64, F32),
    (2, 4, 40, 8, None, "relu", F32, F16),
    (3, 5, 17, 24, (0.5, -1.0, 3.0), "tanh", F32, F16),
    (3, 64, 40, 24, None, "tanh", F32, F32),
    (3, 17, 2, 40, (0.5, -1.0, 3.0), "tanh", F32, F16),
    (3, 4, 3, 66, (50.0, -50.0), "relu", F32, F32),
    (6, 5, 40, 12, (50.0, -50.0), "relu", F16, F32),
    (6, 64, 17, 8, None, "tanh", torch.float64, F16),
    (6, 17, 3, 24, None, "relu", F32, F32),
    (6, 4, 2, 24, (0.5, -1.0, 3.0), "tanh", F16, F16),
]


@pytest.mark.parametrize("with_p", [False, True], ids=["g", "o"])
@table("N, H, B, D, prior, activation, dtype, grad_dtype", CASES)
def test_the_gate_and_its_gradients(N, H, B, D, prior, activation, dtype, grad_dtype, with_p):
    parameters = make_parameters(N, D, H, dtype, prior=prior)
    check(inputs_of(B, N, D, with_p, grad_dtype), parameters, training(activation))


@pytest.mark.parametrize("with_p", [False, True], ids=["g", "o"])
@pytest.mark.parametrize("N, B, D, prior", [(3, 5, 40, None), (6, 33, 12, (0.5, -1.0))])
@pytest.mark.parametrize("scale", [4.0, -3.0, 0.0, 50.0])
def test_with_a_gate_scale(N, B, D, prior, scale, with_p):
    parameters = make_parameters(N, D, 5, prior=prior, scale=scale)
    found = check(inputs_of(B, N, D, with_p), parameters, training())
    assert found["gradient of gate_scale"].shape == ()


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_running_statistics_at_the_ends(momentum):
    parameters = make_parameters(2, 24, 4)
    inputs = inputs_of(5, 2, 24, True)
    found = call(*inputs, parameters, training(momentum=momentum))
    if momentum == 0:
        assert all(torch.equal(found[name], getattr(parameters, name)) for name in STATISTICS)
    else:
        assert torch.equal(found["running_mean"], found["mean"])
    check(inputs, parameters, training(momentum=momentum))


def test_the_running_statistics_in_place_of_any_strides_and_dtype():
    parameters = make_parameters(2, 24, 4)
    strided = {
        name: torch.stack([getattr(parameters, name), torch.zeros(48, device=DEVICE)], dim=1).to(F16)[:, 0]
        for name in STATISTICS
    }
    kept = parameters._replace(**strided)
    expected = parameters._replace(**{name: t.float() for name, t in strided.items()})
    f, p, _ = inputs_of(5, 2, 24, True)
    addresses = [t.data_ptr() for t in strided.values()]
    for one in (kept, expected):
        engine_of(BACKEND).gate_in_training(f, p, one, training(), F32)
    for name, address in zip(STATISTICS, addresses, strict=True):
        assert getattr(kept, name).data_ptr() == address
        assert torch.equal(getattr(kept, name), getattr(expected, name).to(F16))


@pytest.mark.parametrize("gradient", ["strided", "expanded"])
@pytest.mark.parametrize("with_p", [False, True], ids=["g", "o"])
def test_tensors_of_any_strides(with_p, gradient):
    f, p, grad = inputs_of(5, 3, 40, with_p, gradient=gradient)
    assert not grad.is_contiguous()
    inputs = lay_out(f, "column"), p if p is None else lay_out(p, "column"), grad
    check(inputs, make_parameters(3, 40, 4, prior=(0.5, -1.0)), training())


def test_parameters_of_any_strides_and_each_in_a_dtype_of_its_own():
    dtypes = (BF16, F32, F16, torch.float64, F32, F16, F32, F32, BF16, F16)
    parameters = make_parameters(2, 24, 4, prior=(1.0, -1.0), scale=4.0)
    parameters = GateParameters(*(t.to(dtype) for t, dtype in zip(parameters, dtypes, strict=True)))
    strided = GateParameters(*(torch.stack([t, t * NAN], dim=-1)[..., 0] for t in parameters))
    inputs = inputs_of(3, 2, 24, True)
    one, other = (call(*inputs, w, training()) for w in (parameters, strided))
    for key in one:
        torch.testing.assert_close(one[key], other[key])
    check(inputs, parameters, training())


def test_a_norm_weight_of_zero():
    """The norm's gradients do not pass through its weight."""
    parameters = make_parameters(2, 24, 4)
    parameters.norm_weight[::3] = 0
    found = check(inputs_of(5, 2, 24, True), parameters, training(eps=0.5))
    assert found["gradient of norm_weight"].all() and not found["gradient of up_weight"][::3].any()


@pytest.mark.parametrize("B", [2, 17])
def test_columns_far_from_zero(B):
    """z - mean cancels, in the kernels no more than in PyTorch."""
    parameters = make_parameters(2, 24, 4)
    parameters = parameters._replace(up_bias=parameters.up_bias + 30, down_bias=parameters.down_bias + 1)
    check(inputs_of(B, 2, 24, True), parameters, training())


def test_columns_that_do_not_vary():
    """A bottleneck of zeros: eps alone keeps rstd finite."""
    parameters = make_parameters(2, 24, 4)
    parameters = parameters._replace(down_bias=parameters.down_bias - 1e3)
    found = call(*inputs_of(5, 2, 24, True), parameters, training("relu"))
    torch.testing.assert_close(found["mean"], parameters.up_bias)
    assert (found["rstd"] - 1e3).abs().max() < 1
    assert all(t.isfinite().all() for t in found.values()) and not found["gradient of f"].any()


@pytest.mark.parametrize("with_p", [False, True], ids=["g", "o"])
@pytest.mark.parametrize("B", [3, 17])
@pytest.mark.parametrize("N, H", [(2, config.MAX_BOTTLENECK + 1), (40, 4)])
def test_gates_that_the_kernels_do_not_hold(N, H, B, with_p, request):
    if (BACKEND, DEVICE.type, B, N, with_p) == ("native", "cuda", 3, 2, False):
        # z in training is float32 there, and the norm of three sentences enlarges its rounding: seen at 1.2 of the bound.
        request.applymarker(pytest.mark.xfail(strict=True))
    check(inputs_of(B, N, 8, with_p), make_parameters(N, 8, H, prior=(0.5, -1.0)), training())


@pytest.mark.parametrize("with_p", [False, True], ids=["g", "o"])
def test_an_empty_batch(with_p):
    parameters = make_parameters(2, 24, 4, prior=(0.5,))
    found, expected = (
        call(*inputs_of(0, 2, 24, with_p), parameters, training(), backend) for backend in (BACKEND, "reference")
    )
    for key in expected:
        assert found[key].shape == expected[key].shape
        assert torch.equal(found[key], expected[key].to(found[key].dtype))


@pytest.mark.parametrize("what", ["f", "p", "gradient"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_nan_goes_where_the_formula_takes_it(activation, value, what):
    """Of f into all sentences of a column, through the statistics; of p and do in the backward pass only."""
    parameters = make_parameters(3, 24, 4, prior=(0.5, -1.0))
    inputs = [t.clone() for t in inputs_of(4, 3, 24, True)]
    inputs[("f", "p", "gradient").index(what)][1].view(-1)[-1] = value
    found, expected = (call(*inputs, parameters, training(activation), backend) for backend in (BACKEND, "reference"))
    for key in found:
        assert torch.equal(found[key].isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("what", ["up_bias", "running_var", "block_prior", "down_weight", "norm_weight"])
def test_nan_in_a_parameter_goes_where_the_formula_takes_it(what):
    parameters = make_parameters(3, 24, 4, prior=(0.5, -1.0))
    getattr(parameters, what).view(-1)[-1] = NAN
    inputs = inputs_of(4, 3, 24, True)
    found, expected = (call(*inputs, parameters, training(), backend) for backend in (BACKEND, "reference"))
    for key in found:
        assert torch.equal(found[key].isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("H, B", [(4, 150), (130, 33), (200, 20)])
def test_more_sentences_than_a_program_takes_at_once(H, B):
    check(inputs_of(B, 2, 12, True), make_parameters(2, 12, H, prior=(0.5, -1.0)), training(), draws=1)


@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
def test_select_pool_in_training(dtype):
    """The same f and p as ``select_pool``, and o as from these."""
    batch, reading = make_batch(3, 5, 7, 24, dtype, mask="right"), Reading(2, pooling="mean")
    batch, engine = Batch(batch.hidden_states, batch.attention_mask), engine_of(BACKEND)
    found, again = make_parameters(3, 24, 4, prior=(0.5, -1.0)), make_parameters(3, 24, 4, prior=(0.5, -1.0))
    o, f, p, statistics = engine.select_pool_in_training(batch, reading, found, training())
    assert isinstance(statistics, BatchStatistics) and o.dtype == dtype and o.shape == f.shape
    _, *expected = engine.select_pool(batch, reading, found, Gating())
    assert torch.equal(f, expected[0]) and torch.equal(p, expected[1])
    from_these, others = engine.gate_in_training(f, p, again, training(), dtype)
    for one, other in zip((o, *statistics, found.running_mean), (from_these, *others, again.running_mean), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if one.dtype == BF16 else 1e-3, atol=1e-4)
