"""The native engine's plan: training and backward passes in one op each have the bits of the engine's functions, refuse what
the kernels do not read, and raise for what does not fit."""

import pytest
import torch
from builders import lay_out
from harness import BACKEND, BF16, DEVICE, F16, F32, HIDDEN_DTYPES, assert_as_close, make_batch, make_parameters, randn
from torch import nn
from torch.nn import functional

from s2sent_kernels.engines.native import engine, limits
from s2sent_kernels.formula.call import POOLINGS, Batch, BatchStatistics, Gating, HiddenGradients, Layout, Reading

pytestmark = pytest.mark.skipif(BACKEND != "native" or not limits.status().usable, reason="of the native engine alone")
N, B, L, D, H = 3, 4, 6, 24, 5
MOMENTUM = 0.3
GATING = Gating("tanh", 1e-5, momentum=MOMENTUM)


class Case:
    """A batch, its gate, and the plan of both."""

    def __init__(self, mask="right", dtype=F32, pooling="mean", norm=True, prior=(0.5, -1.0), scale=None, sentences=B):
        made = make_batch(N, sentences, L, D, dtype, mask)
        where = made.where
        self.batch = Batch(made.hidden_states, where.get("attention_mask"), where.get("cu_seqlens"))
        self.reading = Reading(2, pooling=pooling)
        self.parameters = make_parameters(N, D, H, norm=norm, prior=prior, scale=scale)
        self.prepared = engine.prepare(self.parameters, N, self.reading, GATING)
        self.grad_output = randn(sentences, D, seed=7, dtype=dtype)
        self.grad_fused = randn(*self.batch.shape, seed=8, dtype=dtype)

    def forward(self):
        return engine.select_pool(self.batch, self.reading, self.parameters, GATING)

    def in_training(self):
        return self.prepared.select_pool_in_training(*self.batch, self.reading.pooling, MOMENTUM)

    def backward(self, needed=(True,) * N, statistics=None, **changes):
        """The plan's. ``changes``: other tensors, another layout or pooling."""
        _, squeezed, pooled = self.forward()
        arguments = {
            "grad_output": self.grad_output,
            "squeezed": squeezed,
            "pooled": pooled,
            "statistics": statistics,
            "layout": self.batch.layout,
            "pooling": self.reading.pooling,
            "needed": needed,
        }
        return self.prepared.select_pool_backward(**(arguments | changes))

    def backward_of_tokens(self, needed=(True,) * N, **changes):
        _, squeezed, gates = engine.select(self.batch, self.reading, self.parameters, GATING)
        arguments = {"grad_fused": self.grad_fused, "squeezed": squeezed, "gates": gates, "batch": self.batch}
        return self.prepared.select_backward(**(arguments | {"needed": needed} | changes))


def assert_same(found, hidden, grads):
    expected = [*hidden, *grads]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None or one.numel() == 0
        else:
            assert one.dtype == other.dtype and torch.equal(one, other)


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("mask, pooling", [("none", "mean"), ("holes", "last"), ("packed", "cls")])
@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
def test_the_pooled_backward_has_the_engines_bits(dtype, mask, pooling, needed):
    case = Case(mask, dtype, pooling)
    _, squeezed, pooled = case.forward()
    grad_pooled, grad, grads = engine.gate_pool_backward(case.grad_output, squeezed, pooled, case.parameters, GATING)
    of_hidden = HiddenGradients(grad, grad_pooled)
    hidden = engine.squeeze_backward(of_hidden, case.batch.layout, needed, case.reading)
    assert_same(case.backward(needed), hidden, grads)


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (False, False, False)])
@pytest.mark.parametrize("mask", ["none", "holes", "packed"])
@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
def test_the_backward_of_tokens_has_the_engines_bits(dtype, mask, needed):
    case = Case(mask, dtype, pooling=None)
    _, squeezed, gates = engine.select(case.batch, case.reading, case.parameters, GATING)
    grad, grads = engine.gate_backward(
        engine.fuse_backward(case.grad_fused, case.batch), squeezed, case.parameters, GATING
    )
    of_hidden = HiddenGradients(grad, None, case.grad_fused, gates)
    hidden = engine.squeeze_backward(of_hidden, case.batch.layout, needed, case.reading)
    assert_same(case.backward_of_tokens(needed), hidden, grads)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mask", ["none", "right", "packed"])
@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
def test_training_has_the_engines_bits(dtype, mask, pooling):
    case, other = Case(mask, dtype, pooling), Case(mask, dtype, pooling)
    output, squeezed, pooled, *statistics = case.in_training()
    expected = engine.select_pool_in_training(other.batch, other.reading, other.parameters, GATING)
    assert_same([output, squeezed, pooled, *statistics], expected[:3], expected[3])
    assert_same(case.parameters, (), other.parameters)

    grad_pooled, grad, grads = engine.gate_in_training_backward(
        case.grad_output, squeezed, pooled, expected[3], case.parameters, GATING
    )
    of_hidden = HiddenGradients(grad, grad_pooled)
    hidden = engine.squeeze_backward(of_hidden, case.batch.layout, (True,) * N, case.reading)
    assert_same(case.backward(statistics=BatchStatistics(*statistics)), hidden, grads)


@pytest.mark.parametrize(
    "norm, prior, scale", [(False, None, None), (False, (0.5,), 4.0), (True, None, None), (True, None, -60.0)]
)
def test_gates_of_other_tensors(norm, prior, scale):
    case = Case(norm=norm, prior=prior, scale=scale)
    _, squeezed, pooled = case.forward()
    grad_pooled, grad, grads = engine.gate_pool_backward(case.grad_output, squeezed, pooled, case.parameters, GATING)
    hidden = engine.squeeze_backward(HiddenGradients(grad, grad_pooled), case.batch.layout, (True,) * N, case.reading)
    assert_same(case.backward(), hidden, grads)


def test_an_empty_batch():
    case = Case("none", sentences=0)
    found = case.backward()
    assert [list(grad.shape) for grad in found[:N]] == [[0, L, D]] * N
    assert all(not grad.any() for grad in found)


# ---------------------------------------------------------------- running statistics


@pytest.mark.parametrize("sentences", [2, 40])
def test_running_statistics_are_torchs(sentences):
    """Of nn.BatchNorm1d over the same z, over three steps."""
    case = Case("none", sentences=sentences)
    norms = [nn.BatchNorm1d(N * D, 1e-5, MOMENTUM, dtype=dtype, device=DEVICE) for dtype in (F32, torch.float64)]
    for norm in norms:
        norm.load_state_dict({**norm.state_dict(), **_of_the_norm(case.parameters)})
    for _ in range(3):
        _, squeezed, *_ = case.in_training()
        for norm in norms:
            dtype = norm.weight.dtype
            w = case.parameters.each(lambda t, dtype=dtype: t.to(dtype))
            bottleneck = functional.linear(squeezed.to(dtype), w.down_weight, w.down_bias).tanh()
            norm(functional.linear(bottleneck, w.up_weight, w.up_bias))
    for name in ("running_mean", "running_var"):
        assert_as_close(getattr(case.parameters, name), *(getattr(norm, name) for norm in norms), name)


def _of_the_norm(parameters):
    return {name: getattr(parameters, name) for name in ("running_mean", "running_var")}


def test_a_frozen_gate_in_training_moves_only_the_running_statistics():
    case = Case(scale=4.0)
    before = case.parameters.each(torch.clone)
    case.in_training()
    for name, one, other in zip(before._fields, before, case.parameters, strict=True):
        assert torch.equal(one, other) != name.startswith("running"), name


# ---------------------------------------------------------------- refusals


def strided(tensor):
    return lay_out(tensor, "column")


REFUSED = {
    "gradient of other strides": lambda case: case.backward(grad_output=strided(case.grad_output)),
    "expanded gradient": lambda case: case.backward(grad_output=case.grad_output[:1].expand(B, D)),
    "gradient of a dtype that no kernel reads": lambda case: case.backward(grad_output=case.grad_output.double()),
    "mask of a dtype that no kernel reads": lambda case: case.backward(
        layout=case.batch.layout._replace(attention_mask=case.batch.attention_mask.double())
    ),
    "mask of another shape": lambda case: case.backward(
        layout=case.batch.layout._replace(attention_mask=case.batch.attention_mask[:, 1:].contiguous())
    ),
    "shape of another rank": lambda case: case.backward(layout=case.batch.layout._replace(shape=[B * L, D])),
    "negative shape": lambda case: case.backward(layout=case.batch.layout._replace(shape=[B, -L, D])),
    "another hidden size": lambda case: case.backward(layout=case.batch.layout._replace(shape=[B, L, D + 1])),
    "tokens' gradient of other strides": lambda case: case.backward_of_tokens(grad_fused=strided(case.grad_fused)),
    "tokens' gradient of another dtype": lambda case: case.backward_of_tokens(grad_fused=case.grad_fused.to(F16)),
    "tokens' gradient of another shape": lambda case: case.backward_of_tokens(grad_fused=case.grad_fused[:, 1:]),
    "another number of hidden states": lambda case: case.backward_of_tokens(
        batch=case.batch._replace(hidden_states=case.batch.hidden_states[:2])
    ),
    "training, of another number": lambda case: case.prepared.select_pool_in_training(
        case.batch.hidden_states[:2], None, None, "mean", MOMENTUM
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_kernels_do_not_read_is_refused(what):
    assert REFUSED[what](Case()) == []


@pytest.mark.parametrize("options", [{"norm": False}, {"sentences": 1}])
def test_a_batch_without_statistics_is_refused(options):
    case = Case("none", **options)
    before = case.parameters.each(torch.clone)
    assert case.in_training() == []
    assert_same(case.parameters, (), before)


def test_parameters_of_another_dtype_are_refused():
    case = Case()
    case.prepared = engine.prepare(case.parameters.each(lambda t: t.to(BF16)), N, case.reading, GATING)
    assert case.backward() == case.backward_of_tokens() == case.in_training() == []


@pytest.mark.skipif(DEVICE.type == "cuda", reason="values on a GPU are not looked at")
@pytest.mark.parametrize("ends", [[0, 3, 2], [1, 3, 4], [0, 2, 99]])
def test_wrong_ends_are_refused(ends):
    case = Case("packed")
    cu_seqlens = torch.tensor([*ends, case.batch.shape[0], case.batch.shape[0]], dtype=torch.int32)
    assert case.backward(layout=case.batch.layout._replace(cu_seqlens=cu_seqlens)) == []


def statistics_of(*sizes):
    return BatchStatistics(*(torch.ones(size, device=DEVICE) for size in sizes))


WRONG = {
    "gradient": lambda case: case.backward(grad_output=case.grad_output[1:]),
    "f": lambda case: case.backward(squeezed=torch.zeros(B, D + 1, device=DEVICE)),
    "f of another dtype": lambda case: case.backward(squeezed=torch.zeros(B, D, dtype=F16, device=DEVICE)),
    "p": lambda case: case.backward(pooled=torch.zeros(B, N, D - 1, device=DEVICE)),
    "statistics": lambda case: case.backward(statistics=statistics_of(N * D, N * D - 1)),
    "half of the statistics": lambda case: case.backward(statistics=(torch.ones(N * D, device=DEVICE), None)),
    "number of those needed": lambda case: case.backward(needed=(True,) * (N + 1)),
    "fewer sentences": lambda case: case.backward(layout=Layout([B - 1, L, D], F32, DEVICE, None, None)),
    "g": lambda case: case.backward_of_tokens(gates=torch.zeros(B, N + 1, D, device=DEVICE)),
    "tokens' f": lambda case: case.backward_of_tokens(squeezed=torch.zeros(B, 0, device=DEVICE)),
    "number of those needed of tokens": lambda case: case.backward_of_tokens(needed=()),
    "statistics without a norm": lambda case: Case(norm=False).backward(statistics=statistics_of(N * D, N * D)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_raises(what):
    with pytest.raises(RuntimeError, match="s2sent_native"):
        WRONG[what](Case())


def test_a_plan_that_is_gone_is_refused():
    case = Case()
    case.prepared._owner = None
    assert case.backward() == case.backward_of_tokens() == case.in_training() == []
