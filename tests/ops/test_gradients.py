"""Gradients: gradcheck of the reference and of the ops over it, and every gradient of an op against the reference."""

import pytest
import torch
from builders import (
    GRADIENTS,
    LAYOUTS,
    assert_close,
    kept,
    make_batch,
    make_gradient,
    make_parameters,
    pack,
    table,
    through_ops,
)

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector
from s2sent_kernels.formula.call import ACTIVATIONS, POOLINGS

# ---------------------------------------------------------------- gradients of the reference


def small(N=2, requires_grad=True):
    hidden_states, mask = make_batch(N, 4, 4, 4, mask="mixed", requires_grad=requires_grad)
    return hidden_states, mask


@pytest.mark.parametrize("profile, M", [("paper", 1), ("paper", 4), ("official", 2)])
@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_gradcheck_squeeze(backend, profile, M, pooling):
    hidden_states, mask = small()

    def function(*hidden_states):
        f, p = s2.squeeze(hidden_states, mask, frequencies=M, profile=profile, pooling=pooling, backend=backend)
        return f if p is None else (f, p)

    assert torch.autograd.gradcheck(function, hidden_states)


@pytest.mark.parametrize("training", [False, True])
@table(
    "profile, norm, prior, scale",
    [
        ("paper", True, False, None),
        ("paper", False, True, 3.0),
        ("paper", True, True, None),
        ("paper", True, False, -2.0),
        ("official", True, False, None),
    ],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_gate(backend, activation, profile, norm, prior, scale, training):
    tensors, rebuild = kept(make_parameters(2, 4, 3, norm=norm, prior=prior, scale=scale, requires_grad=True))
    f = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def function(f, *tensors):
        return s2.gate(
            f,
            rebuild(tensors),
            num_blocks=2,
            activation=activation,
            profile=profile,
            training=training,
            backend=backend,
        )

    assert torch.autograd.gradcheck(function, [f, *tensors])


def test_gradcheck_fuse(backend):
    hidden_states, mask = small()
    gates = torch.rand(4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g, *u: s2.fuse(u, g, mask, backend=backend), [gates, *hidden_states])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_gradcheck_select(backend, pooling, profile, training):
    hidden_states, mask = small()
    scale = 2.0 if profile == "paper" else None
    tensors, rebuild = kept(make_parameters(2, 4, 3, prior=profile == "paper", scale=scale, requires_grad=True))
    options = {"frequencies": 2, "profile": profile, "training": training, "backend": backend}

    def function(*inputs):
        parameters = rebuild(inputs[2:])
        if pooling is None:
            return s2.select(inputs[:2], parameters, mask, **options)
        return s2.select_pool(inputs[:2], parameters, mask, pooling=pooling, **options)

    assert torch.autograd.gradcheck(function, [*hidden_states, *tensors])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_gradcheck_selector(backend, pooling, training, packed):
    torch.manual_seed(0)
    selector = S2SentSelector(4, 2, 3, 2, block_prior=True, gate_scale=3.0, backend=backend).double().train(training)
    hidden_states, mask = small(requires_grad=False)
    where = {"attention_mask": mask}
    if packed:
        hidden_states, cu_seqlens = pack(hidden_states, mask)
        where = {"cu_seqlens": cu_seqlens}
    hidden_states = [u.requires_grad_() for u in hidden_states]

    def function(*inputs):  # the parameters are varied in place
        u = inputs[:2]
        return selector(u, **where) if pooling is None else selector.pool(u, pooling=pooling, **where)

    assert torch.autograd.gradcheck(function, [*hidden_states, *selector.parameters()])


# ---------------------------------------------------------------- the ops and the reference: every gradient


def run(function, inputs, gradients):
    """Outputs, and the gradient of every input that requires one, None for the others."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for tensor in inputs:
        tensor.grad = None
    pairs = [(out, grad) for out, grad in zip(outputs, gradients(outputs), strict=True) if grad is not None]
    torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
    return outputs, [tensor.grad for tensor in inputs]


def compare(by_op, by_reference, inputs, kind="random", used=(True, True, True)):
    def gradients(outputs):
        pairs = zip(outputs, used, strict=False)  # squeeze has fewer outputs
        return [make_gradient(out, kind, seed=index) if use else None for index, (out, use) in enumerate(pairs)]

    expected, expected_grads = run(by_reference, inputs, gradients)
    actual, actual_grads = run(by_op, inputs, gradients)
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, e, 1e-12, f"output {index}")
    for index, (a, e) in enumerate(zip(actual_grads, expected_grads, strict=True)):
        assert (a is None) == (e is None) == (not inputs[index].requires_grad), f"input {index}"
        if a is not None:
            assert_close(a, e, 1e-12, f"gradient of input {index}")


# which inputs require a gradient
NEEDED = {
    "all": lambda u, p: [*u, *p],
    "some hidden states": lambda u, p: [u[1], *p],
    "hidden states": lambda u, p: [*u],
    "parameters": lambda u, p: [*p],
    "one hidden state": lambda u, p: [u[0]],
}
needed = pytest.mark.parametrize("need", NEEDED)
kinds = pytest.mark.parametrize("kind", GRADIENTS)
masks = pytest.mark.parametrize("mask", ["none", "mixed", "packed"])


def inputs_for(mask, need, N=3, D=8, norm=True, prior=True, layout="contiguous"):
    hidden_states, attention_mask = make_batch(N, 6, 5, D, mask="mixed" if mask == "packed" else mask, layout=layout)
    cu_seqlens = None
    if mask == "packed":
        hidden_states, cu_seqlens = pack(hidden_states, attention_mask)
        attention_mask = None
    tensors, rebuild = kept(make_parameters(N, D, norm=norm, prior=prior))
    for tensor in NEEDED[need](hidden_states, tensors):
        tensor.requires_grad_()
    return hidden_states, attention_mask, cu_seqlens, tensors, rebuild


@masks
@kinds
@pytest.mark.parametrize("need", ["hidden states", "some hidden states"])
@pytest.mark.parametrize(
    "pooling, used",
    [
        (None, (True,)),
        ("mean", (True, True)),
        ("cls", (True, True)),
        ("last", (True, False)),
        ("mean", (False, True)),
    ],
)
def test_squeeze_op(mask, kind, need, pooling, used):
    hidden_states, attention_mask, cu_seqlens, _, _ = inputs_for(mask, need)

    def by_op(*u):
        f, p = torch.ops.s2sent.squeeze(u, attention_mask, cu_seqlens, 4, "paper", pooling, "reference")
        return f if pooling is None else (f, p)

    def by_reference(*u):
        f, p = s2.squeeze(u, attention_mask, cu_seqlens=cu_seqlens, pooling=pooling, backend="reference")
        return f if p is None else (f, p)

    compare(by_op, by_reference, hidden_states, kind, used)


@pytest.mark.parametrize("mask", ["none", "mixed"])
@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_official_squeeze_op(mask, pooling):
    hidden_states, attention_mask, _, _, _ = inputs_for(mask, "hidden states")

    def by_op(*u):
        f, p = torch.ops.s2sent.squeeze(u, attention_mask, None, 4, "official", pooling, "reference")
        return f if pooling is None else (f, p)

    def by_reference(*u):
        f, p = s2.squeeze(u, attention_mask, profile="official", pooling=pooling, backend="reference")
        return f if p is None else (f, p)

    compare(by_op, by_reference, hidden_states)


@kinds
@pytest.mark.parametrize("norm, prior", [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("needs", ["f", "parameters", "both"])
def test_gate_op(kind, norm, prior, activation, needs):
    tensors, rebuild = kept(make_parameters(3, 8, norm=norm, prior=prior, requires_grad=needs != "f"))
    f = torch.randn(5, 8, dtype=torch.float64).requires_grad_(needs != "parameters")

    def by_op(f, *tensors):
        return torch.ops.s2sent.gate(f, *rebuild(tensors), 3, activation, 1e-6, "reference")

    def by_reference(f, *tensors):
        return s2.gate(f, rebuild(tensors), num_blocks=3, activation=activation, backend="reference")

    compare(by_op, by_reference, [f, *tensors], kind)


@masks
@kinds
@pytest.mark.parametrize("need", ["all", "some hidden states", "parameters"])  # here: the gates are the parameter
def test_fuse_op(mask, kind, need):
    hidden_states, attention_mask, cu_seqlens, _, _ = inputs_for(mask, "all")
    gates = torch.rand(6, 3, 8, dtype=torch.float64)
    for tensor in hidden_states:
        tensor.requires_grad_(False)
    for tensor in NEEDED[need](hidden_states, [gates]):
        tensor.requires_grad_()

    def by_op(g, *u):
        return torch.ops.s2sent.fuse(u, attention_mask, cu_seqlens, g, "reference")

    def by_reference(g, *u):
        return s2.fuse(u, g, attention_mask, cu_seqlens=cu_seqlens, backend="reference")

    compare(by_op, by_reference, [gates, *hidden_states], kind)


def stages(u, parameters, attention_mask, cu_seqlens, pooling):
    """(o, f, p) or (v, f, g) from the reference's three stages."""
    f, p = s2.squeeze(u, attention_mask, cu_seqlens=cu_seqlens, pooling=pooling, backend="reference")
    g = s2.gate(f, parameters, num_blocks=len(u), backend="reference")
    if pooling is None:
        return s2.fuse(u, g, attention_mask, cu_seqlens=cu_seqlens, backend="reference"), f, g
    return (g * p).sum(1), f, p


@masks
@kinds
@needed
@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_select_ops(mask, kind, need, pooling):
    hidden_states, attention_mask, cu_seqlens, tensors, rebuild = inputs_for(mask, need)
    batch = (attention_mask, cu_seqlens)

    def by_op(*inputs):
        u, parameters = inputs[:3], rebuild(inputs[3:])
        if pooling is None:
            return torch.ops.s2sent.select(u, *batch, *parameters, 4, "tanh", 1e-6, "reference")[0]
        return torch.ops.s2sent.select_pool(u, *batch, *parameters, 4, pooling, "tanh", 1e-6, "reference")[0]

    def by_reference(*inputs):
        u, parameters = inputs[:3], rebuild(inputs[3:])
        if pooling is None:
            return s2.select(u, parameters, batch[0], cu_seqlens=batch[1], backend="reference")
        return s2.select_pool(u, parameters, batch[0], cu_seqlens=batch[1], pooling=pooling, backend="reference")

    compare(by_op, by_reference, [*hidden_states, *tensors], kind)


@pytest.mark.parametrize("need", ["all", "some hidden states", "hidden states"])
@pytest.mark.parametrize("pooling", [None, "mean", "last"])
@pytest.mark.parametrize(
    "used", [(True, True, True), (True, False, True), (False, True, True), (False, True, False), (False, False, True)]
)
def test_every_output_of_the_select_ops_has_a_gradient(need, pooling, used):
    """A loss may read f, p and g too."""
    hidden_states, attention_mask, _, tensors, rebuild = inputs_for("mixed", need)

    def by_op(*inputs):
        u, parameters = inputs[:3], rebuild(inputs[3:])
        if pooling is None:
            return torch.ops.s2sent.select(u, attention_mask, None, *parameters, 4, "tanh", 1e-6, "reference")
        return torch.ops.s2sent.select_pool(u, attention_mask, None, *parameters, 4, pooling, "tanh", 1e-6, "reference")

    def by_reference(*inputs):
        return stages(inputs[:3], rebuild(inputs[3:]), attention_mask, None, pooling)

    def gradients(outputs):
        pairs = zip(outputs, used, strict=True)
        return [make_gradient(out, seed=index) if use else None for index, (out, use) in enumerate(pairs)]

    inputs = [*hidden_states, *tensors]
    expected, expected_grads = run(by_reference, inputs, gradients)
    actual, actual_grads = run(by_op, inputs, gradients)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)
    for index, (a, e, tensor) in enumerate(zip(actual_grads, expected_grads, inputs, strict=True)):
        assert tensor.requires_grad or a is None
        zeros = torch.zeros_like(tensor)
        assert_close(zeros if a is None else a, zeros if e is None else e, 1e-12, f"gradient of input {index}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_select_ops_under_any_strides(layout, pooling):
    hidden_states, attention_mask, _, tensors, rebuild = inputs_for("mixed", "all", layout=layout)

    def by_op(*inputs):
        u, parameters = inputs[:3], rebuild(inputs[3:])
        if pooling is None:
            return torch.ops.s2sent.select(u, attention_mask, None, *parameters, 4, "tanh", 1e-6, "reference")[0]
        return torch.ops.s2sent.select_pool(
            u, attention_mask, None, *parameters, 4, pooling, "tanh", 1e-6, "reference"
        )[0]

    def by_reference(*inputs):
        return stages(inputs[:3], rebuild(inputs[3:]), attention_mask, None, pooling)[0]

    compare(by_op, by_reference, [*hidden_states, *tensors])


@needed
@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_selector_through_the_ops(need, profile, training, pooling, monkeypatch):
    """The module, with ordinary parts between squeeze and fuse in training and in profile official."""
    torch.manual_seed(0)
    N, D = 3, 8
    selector = S2SentSelector(D, N, 5, 4, profile=profile, backend="reference").double().train(training)
    with torch.no_grad():
        selector.norm.weight.uniform_(0.5, 2)
        selector.norm.running_var.uniform_(0.5, 2)
    state = {name: value.clone() for name, value in selector.state_dict().items()}
    selector.requires_grad_(False)
    hidden_states, mask = make_batch(N, 6, 5, D)
    parameters = list(selector.parameters())
    for tensor in NEEDED[need](hidden_states, parameters):
        tensor.requires_grad_()

    def function(*inputs):
        return selector(inputs[:N], mask) if pooling is None else selector.pool(inputs[:N], mask, pooling=pooling)

    def gradients(outputs):
        return [make_gradient(outputs[0], "strided")]

    inputs = [*hidden_states, *parameters]
    expected, expected_grads = run(function, inputs, gradients)
    buffers = {name: value.clone() for name, value in selector.named_buffers()}
    selector.load_state_dict(state)
    selector.backend = through_ops(monkeypatch)
    actual, actual_grads = run(function, inputs, gradients)
    assert_close(actual[0], expected[0], 1e-12)
    for name, value in selector.named_buffers():
        assert torch.equal(value, buffers[name]), name
    for index, (a, e) in enumerate(zip(actual_grads, expected_grads, strict=True)):
        assert (a is None) == (e is None) == (not inputs[index].requires_grad), f"input {index}"
        if a is not None:
            assert_close(a, e, 1e-12, f"gradient of input {index}")
