"""gate: g, and the gradients of f and of every parameter."""

import pytest
import torch
from builders import NAN, table
from harness import BACKEND, BF16, DEVICE, F16, F32, check, make_parameters, randn

from s2sent_kernels import GateParameters, functional

STATISTICS = ("running_mean", "running_var")  # get no gradient

# Pairwise: every pair of values of two columns occurs in some row.
# N, H, B, D, norm, prior (repeated over the blocks), activation, the parameters' dtype
CASES = [
    (1, 1, 17, 24, True, (50.0, -50.0), "relu", F32),
    (1, 17, 3, 24, True, (50.0, -50.0), "relu", F16),
    (1, 64, 3, 40, False, (50.0, -50.0), "tanh", BF16),
    (1, 4, 1, 66, True, None, "tanh", torch.float64),
    (1, 8, 17, 66, True, (0.5, -1.0, 3.0), "tanh", F16),
    (1, 64, 1, 66, True, (0.5, -1.0, 3.0), "relu", BF16),
    (2, 4, 3, 24, True, (0.5, -1.0, 3.0), "relu", torch.float64),
    (2, 1, 3, 24, False, (50.0, -50.0), "tanh", torch.float64),
    (2, 8, 1, 40, False, None, "tanh", F16),
    (2, 17, 17, 66, True, (50.0, -50.0), "relu", BF16),
    (2, 64, 17, 66, False, None, "tanh", F32),
    (3, 64, 1, 24, True, (50.0, -50.0), "relu", F16),
    (3, 8, 3, 24, False, (0.5, -1.0, 3.0), "tanh", BF16),
    (3, 1, 17, 40, False, (0.5, -1.0, 3.0), "tanh", F16),
    (3, 4, 17, 40, True, (0.5, -1.0, 3.0), "tanh", BF16),
    (3, 8, 17, 40, False, (50.0, -50.0), "relu", torch.float64),
    (3, 17, 3, 66, False, None, "relu", torch.float64),
    (3, 4, 1, 66, False, None, "relu", F32),
    (7, 8, 3, 24, False, None, "relu", F32),
    (7, 4, 3, 24, False, (50.0, -50.0), "tanh", F16),
    (7, 17, 1, 40, True, (0.5, -1.0, 3.0), "tanh", F32),
    (7, 64, 17, 40, False, (50.0, -50.0), "relu", torch.float64),
    (7, 1, 1, 66, False, None, "tanh", BF16),
]


def gate_of(N, activation="tanh", eps=1e-6, gate_function=functional.gate):
    """gate as ``check`` calls it. In the float64 run the parameters are float64 too."""

    def function(backend, inputs):
        f, parameters = inputs["f"], GateParameters(*(inputs[name] for name in GateParameters._fields))
        return {"g": gate_function(f, parameters, num_blocks=N, activation=activation, eps=eps, backend=backend)}

    return function


def inputs_of(B, D, parameters):
    return {"f": randn(B, D, seed=11)} | parameters._asdict()


@table("N, H, B, D, norm, prior, activation, dtype", CASES)
def test_gate(N, H, B, D, norm, prior, activation, dtype):
    parameters = make_parameters(N, D, H, dtype, norm=norm, prior=prior)
    found = check(gate_of(N, activation), inputs_of(B, D, parameters), frozen=STATISTICS)
    assert found["g"].dtype == F32
    assert (found["g"] >= 0).all() and (found["g"].sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("gradient", ["strided", "expanded"])
def test_gradients_of_any_strides(gradient):
    parameters = make_parameters(3, 40, 4, prior=(0.5, -1.0))
    check(gate_of(3), inputs_of(3, 40, parameters), gradient, STATISTICS)


def test_every_parameter_in_a_dtype_of_its_own():
    dtypes = (BF16, F32, F16, torch.float64, F32, F16, torch.float64, F32, BF16, F16)
    parameters = make_parameters(2, 24, 4, prior=(1.0, -1.0), scale=4.0)
    parameters = GateParameters(*(t.to(dtype) for t, dtype in zip(parameters, dtypes, strict=True)))
    found = check(gate_of(2), inputs_of(3, 24, parameters), frozen=STATISTICS)
    assert found["gradient of down_weight"].dtype == BF16 and found["gradient of up_bias"].dtype == torch.float64


def test_parameters_of_any_strides():
    """Transposed weights, and vectors that are every second element of a larger one."""
    parameters = make_parameters(2, 24, 4, prior=(1.0, -1.0), scale=4.0)
    strided = GateParameters(*(torch.stack([t, t * NAN], dim=-1)[..., 0] for t in parameters))
    strided = strided._replace(down_weight=parameters.down_weight.T.contiguous().T)
    assert not any(t.is_contiguous() for t in strided if t.dim())
    f = randn(24, 3, seed=11).T
    one, other = (functional.gate(f, p, num_blocks=2, backend=BACKEND) for p in (strided, parameters))
    assert torch.equal(one, other)


def test_eps():
    check(gate_of(2, eps=0.5), inputs_of(3, 24, make_parameters(2, 24, 4)), frozen=STATISTICS)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.5, 0.7, 3.0, 30.0, 1e4])
def test_activations_of_every_size(scale):
    """tanh in both of its pieces and where they meet, sigmoid and exp where they saturate."""
    parameters = make_parameters(2, 24, 8, norm=False)
    parameters = parameters._replace(down_bias=parameters.down_bias * scale, up_bias=parameters.up_bias * scale)
    check(gate_of(2), inputs_of(3, 24, parameters) | {"f": randn(3, 24, seed=11) * scale}, gradient=None)


@pytest.mark.parametrize("N, D, norm, prior", [(3, 40, True, None), (6, 24, False, (0.5, -1.0)), (1, 24, True, (3.0,))])
@pytest.mark.parametrize("scale", [4.0, -3.0, 0.0, 40.0, 50.0])
def test_gate_scale(N, D, norm, prior, scale):
    parameters = make_parameters(N, D, 5, norm=norm, prior=prior, scale=scale)
    check(gate_of(N), inputs_of(5, D, parameters), frozen=STATISTICS)


def test_a_gate_scale_of_one_is_the_papers_formula():
    paper = make_parameters(3, 24, 4, prior=(0.5, -1.0))
    one = paper._replace(gate_scale=torch.tensor(1.0, device=DEVICE))
    f = randn(5, 24, seed=11)
    torch.testing.assert_close(*(functional.gate(f, p, num_blocks=3, backend=BACKEND) for p in (paper, one)))


@pytest.mark.parametrize("scale", [1e3, -1e3, 1e30])
def test_a_large_scale_neither_overflows_nor_underflows(scale):
    """All of the weight on the block with the largest tau e, wherever that lies in (0, 1)."""
    parameters = make_parameters(3, 24, 4, norm=False, prior=(0.5, -1.0, 0.0), scale=scale)
    f = randn(5, 24, seed=11)
    g = functional.gate(f, parameters, num_blocks=3, backend=BACKEND)
    plain = functional.gate(f, parameters._replace(block_prior=None, gate_scale=None), num_blocks=3, backend=BACKEND)
    best = (plain if scale > 0 else -plain).argmax(1)
    assert g.isfinite().all() and (g.sum(1) - 1).abs().max() < 1e-6
    assert (g.argmax(1) == best).float().mean() > 0.9 and g.amax(1).median() > 0.99


def test_a_large_prior_does_not_overflow():
    parameters = make_parameters(3, 24, 4, prior=(0.0, 2000.0, -2000.0))
    g = functional.gate(randn(2, 24, seed=11), parameters, num_blocks=3, backend=BACKEND)
    assert torch.equal(g, torch.tensor([0.0, 1.0, 0.0], device=g.device)[None, :, None].expand(2, 3, 24))


@pytest.mark.parametrize("prior, scale", [(None, None), ((0.5,), None), (None, 4.0)])
def test_an_empty_batch(prior, scale):
    parameters = make_parameters(2, 24, 4, prior=prior, scale=scale)
    found = check(gate_of(2), inputs_of(0, 24, parameters), frozen=STATISTICS)
    assert found["g"].shape == (0, 2, 24)
    assert not any(found[name].any() for name in found)


def test_a_bottleneck_wider_than_the_kernel_holds():
    from s2sent_kernels.engines.triton import config

    parameters = make_parameters(2, 24, config.MAX_BOTTLENECK + 1, prior=(0.5, -1.0), scale=4.0)
    check(gate_of(2), inputs_of(3, 24, parameters), frozen=STATISTICS)


@pytest.mark.parametrize("what", ["f", "down_weight", "block_prior", "gate_scale"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_nan_and_inf_stay_where_they_belong(value, what):
    """Of a sentence's f in that sentence; of a parameter wherever the formula takes it."""
    inputs = inputs_of(3, 24, make_parameters(2, 24, 4, norm=False, prior=(0.5, -1.0), scale=4.0))
    clean = gate_of(2)(BACKEND, inputs)["g"]
    inputs[what] = inputs[what].clone()
    inputs[what].view(-1)[-1] = value
    found, expected = (gate_of(2)(backend, inputs)["g"] for backend in (BACKEND, "reference"))
    assert torch.equal(found.isnan(), expected.isnan())
    if what == "f":
        assert torch.equal(found[:-1], clean[:-1])


def test_batch_statistics_update_the_running_ones():
    """As those of the reference; the kernels' own tests are in test_gate_training.py."""
    results = []
    for backend in (BACKEND, "reference"):
        parameters = make_parameters(2, 24, 4)
        f = randn(5, 24, seed=11)
        g = functional.gate(f, parameters, num_blocks=2, training=True, momentum=0.3, backend=backend)
        results.append((g, parameters.running_mean, parameters.running_var))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.equal(results[0][1], make_parameters(2, 24, 4).running_mean)
