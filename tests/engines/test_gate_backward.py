"""gate_backward and gate_pool_backward as ops: df, dp and every parameter's gradient from do and p, or from dg."""

import pytest
import torch
from builders import NAN, lay_out, make_gradient, table
from harness import BACKEND, BF16, F16, F32, assert_as_close, make_parameters, randn

from s2sent_kernels import GateParameters
from s2sent_kernels.engines.triton import config

GRADIENTS = [name for name in GateParameters._fields if not name.startswith("running")]
OPS = ["gate_backward", "gate_pool_backward"]


def inputs_of(name, B, N, D, parameters, dtype=F32, gradient="random"):
    """The op's tensors: dg or do, f, and p."""
    f, p = randn(B, D, seed=11), randn(B, N, D, seed=12)
    like = p if name == "gate_backward" else f.to(dtype)
    given = make_gradient(like, gradient, 1)
    return (given, f) if name == "gate_backward" else (given, f, p)


def call(name, tensors, parameters, activation="tanh", eps=1e-6, backend=BACKEND):
    """The gradients by name."""
    found = getattr(torch.ops.s2sent, name)(*tensors, *parameters, activation, eps, backend)
    names = [n for n in GRADIENTS if getattr(parameters, n) is not None]
    first = ["f"] if name == "gate_backward" else ["p", "f"]
    assert len(found) == len(first) + len(names)
    return dict(zip(first + names, found, strict=True))


def jitter(t, seed):
    return None if t is None else (t.double() * (1 + 0.01 * randn(*t.shape, seed=seed).double())).to(t.dtype)


def double(t):
    return None if t is None else t.double()


def check(name, tensors, parameters, activation="tanh", eps=1e-6, draws=3):
    """Assert the policy of ``assert_as_close`` for the op on BACKEND."""
    actual = call(name, tensors, parameters, activation, eps)
    pairs = []
    for draw in range(1 + draws):
        moved, w = list(tensors), parameters
        if draw:
            moved[1:] = [jitter(t, draw) for t in tensors[1:]]
            w = GateParameters(*(jitter(t, draw) for t in parameters))
        same = call(name, moved, w, activation, eps, "reference")
        truth = call(name, [double(t) for t in moved], GateParameters(*map(double, w)), activation, eps, "reference")
        pairs.append((same, truth))
    for key, found in actual.items():
        assert found.is_contiguous()
        first, *others = [(same[key], truth[key]) for same, truth in pairs]
        assert_as_close(found, *first, key, others)
    return actual


# Pairwise: every pair of values of two columns other than B and D occurs in some row.
# N, H, B, D, norm, prior (repeated over the blocks), activation, the parameters' dtype, do's dtype
CASES = [
    (1, 1, 17, 24, True, (50.0, -50.0), "relu", F32, F32),
    (1, 64, 3, 40, False, None, "tanh", BF16, F16),
    (1, 17, 1, 66, True, (0.5, -1.0, 3.0), "tanh", torch.float64, F32),
    (2, 8, 33, 24, True, None, "tanh", F32, F16),
    (2, 17, 3, 40, False, (0.5, -1.0, 3.0), "relu", F16, F32),
    (2, 1, 17, 24, False, (0.5, -1.0, 3.0), "tanh", BF16, F32),
    (3, 4, 17, 66, True, (50.0, -50.0), "tanh", F16, F16),
    (3, 65, 1, 24, False, None, "relu", F32, F32),
    (3, 17, 33, 8, True, (0.5, -1.0, 3.0), "relu", BF16, F16),
    (7, 5, 17, 40, True, (0.5, -1.0, 3.0), "tanh", F32, F32),
    (7, 64, 3, 24, False, (50.0, -50.0), "relu", torch.float64, F16),
    (7, 8, 33, 12, True, None, "relu", F16, F32),
    (12, 20, 1, 24, True, (3.0, 0.0), "tanh", F32, F16),
]


@pytest.mark.parametrize("name", OPS)
@table("N, H, B, D, norm, prior, activation, dtype, grad_dtype", CASES)
def test_gradients(name, N, H, B, D, norm, prior, activation, dtype, grad_dtype):
    parameters = make_parameters(N, D, H, dtype, norm=norm, prior=prior)
    check(name, inputs_of(name, B, N, D, parameters, grad_dtype), parameters, activation)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "N, B, D, norm, prior", [(3, 5, 40, True, None), (6, 33, 12, False, (0.5, -1.0)), (1, 3, 24, True, (3.0,))]
)
@pytest.mark.parametrize("scale", [4.0, -3.0, 0.0, 50.0])
def test_gradients_with_a_gate_scale(name, N, B, D, norm, prior, scale):
    parameters = make_parameters(N, D, 5, norm=norm, prior=prior, scale=scale)
    found = check(name, inputs_of(name, B, N, D, parameters), parameters)
    assert found["gate_scale"].shape == () and (N == 1 or found["gate_scale"] != 0)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("gradient", ["strided", "expanded"])
def test_gradients_of_any_strides(name, gradient):
    parameters = make_parameters(3, 40, 4, prior=(0.5, -1.0))
    given, *rest = inputs_of(name, 3, 3, 40, parameters, gradient=gradient)
    assert not given.is_contiguous()
    check(name, (given, *(lay_out(t, "column") for t in rest)), parameters)


@pytest.mark.parametrize("name", OPS)
def test_parameters_of_any_strides_and_each_in_a_dtype_of_its_own(name):
    dtypes = (BF16, F32, F16, torch.float64, F32, F16, torch.float64, F32, BF16, F16)
    parameters = make_parameters(2, 24, 4, prior=(1.0, -1.0), scale=4.0)
    parameters = GateParameters(*(t.to(dtype) for t, dtype in zip(parameters, dtypes, strict=True)))
    strided = GateParameters(*(torch.stack([t, t * NAN], dim=-1)[..., 0] for t in parameters))
    tensors = inputs_of(name, 3, 2, 24, parameters)
    one, other = check(name, tensors, parameters), call(name, tensors, strided)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one["down_weight"].dtype == BF16 and one["up_bias"].dtype == torch.float64


@pytest.mark.parametrize("name", OPS)
def test_a_norm_weight_of_zero(name):
    """The norm's gradients do not pass through its weight."""
    parameters = make_parameters(2, 24, 4, prior=(1.0, -1.0))
    parameters.norm_weight[::3] = 0
    found = check(name, inputs_of(name, 5, 2, 24, parameters), parameters, eps=0.5)
    assert found["norm_weight"].all() and not found["up_weight"][::3].any()


@pytest.mark.parametrize("name", OPS)
def test_statistics_far_from_zero(name):
    """z - mean cancels, in the kernels no more than in PyTorch."""
    parameters = make_parameters(2, 24, 4)
    parameters = parameters._replace(running_mean=parameters.running_mean + 30, up_bias=parameters.up_bias + 30)
    check(name, inputs_of(name, 17, 2, 24, parameters), parameters)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("N, H", [(2, config.MAX_BOTTLENECK + 1), (40, 4)])
def test_gates_that_the_kernels_do_not_hold(name, N, H):
    assert config.gate_backward(N, H) is None
    parameters = make_parameters(N, 8, H, prior=(0.5, -1.0), scale=4.0)
    check(name, inputs_of(name, 3, N, 8, parameters), parameters)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("prior, scale", [(None, None), ((0.5,), None), (None, 4.0)])
def test_an_empty_batch(name, prior, scale):
    parameters = make_parameters(2, 24, 4, BF16, prior=prior, scale=scale)
    tensors = inputs_of(name, 0, 2, 24, parameters)
    found, expected = (call(name, tensors, parameters, backend=backend) for backend in (BACKEND, "reference"))
    for key in expected:
        assert found[key].shape == expected[key].shape and found[key].dtype == expected[key].dtype
        assert not found[key].any()


@pytest.mark.parametrize("what", ["f", "gradient", "p"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("name", OPS)
def test_nan_stays_in_its_sentence(name, value, what):
    parameters = make_parameters(3, 24, 4, prior=(0.5, -1.0))
    tensors = list(inputs_of(name, 4, 3, 24, parameters))
    place = {"gradient": 0, "f": 1, "p": 2}[what]
    if place == len(tensors):
        pytest.skip("reads no p")
    clean = call(name, tensors, parameters)
    tensors[place] = tensors[place].clone()
    tensors[place][1].view(-1)[-1] = value
    found, expected = (call(name, tensors, parameters, backend=backend) for backend in (BACKEND, "reference"))
    for key in found:
        assert torch.equal(found[key].isnan(), expected[key].isnan()), key
    for key in set(found) & {"f", "p"}:
        assert torch.equal(found[key][[0, 2, 3]], clean[key][[0, 2, 3]])


@pytest.mark.parametrize("what", ["up_bias", "running_var", "block_prior", "down_weight"])
@pytest.mark.parametrize("name", OPS)
def test_nan_in_a_parameter_goes_where_the_formula_takes_it(name, what):
    parameters = make_parameters(3, 24, 4, prior=(0.5, -1.0))
    getattr(parameters, what).view(-1)[-1] = NAN
    tensors = inputs_of(name, 3, 3, 24, parameters)
    found, expected = (call(name, tensors, parameters, backend=backend) for backend in (BACKEND, "reference"))
    for key in found:
        assert torch.equal(found[key].isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_raise(name):
    parameters = make_parameters(2, 8, 4)
    tensors = [t.requires_grad_() for t in inputs_of(name, 2, 2, 8, parameters)]
    with pytest.raises(NotImplementedError, match="second derivatives"):
        call(name, tensors, parameters)["f"].sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_tensors_of_another_shape_are_refused(name):
    parameters = make_parameters(2, 8, 4)
    given, *rest = inputs_of(name, 2, 2, 8, parameters)
    with pytest.raises(ValueError, match=r"grad_(gates|output): expected shape"):
        call(name, (given[:1], *rest), parameters)
