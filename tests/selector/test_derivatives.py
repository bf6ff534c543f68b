"""Second derivatives and forward mode, on every backend (see corners.py): an op raises; where plain PyTorch computes, its
derivatives of every order are there and must be right, also under torch.func. A derivative is never silently zero."""

import copy

import pytest
import torch
from builders import assert_close, kept, make_parameters
from corners import B, D, H, M, N, batch_for, call, modes, paths, profiles, selector_for

import s2sent_kernels as s2


def refused():
    """The package's own words, or those with which PyTorch refuses forward mode through an op that has a backward."""
    return pytest.raises(NotImplementedError, match=r"second derivatives|forward-mode derivatives|jvp")


OPS = ["squeeze", "squeeze, no pooling", "gate", "fuse", "select", "select_pool"]
FUNCTIONS = ["squeeze", "gate", "fuse", "select", "select_pool"]


def op_and_inputs(place, name, requires_grad):
    """A public op as a function of the tensors that it has gradients for."""
    hidden_states, mask, tensors, rebuild, f, g = differentiable(place, requires_grad)
    backend, ops = place.backend, torch.ops.s2sent
    return {
        "squeeze": (lambda *u: ops.squeeze(u, mask, None, M, "paper", "mean", backend), hidden_states),
        "squeeze, no pooling": (lambda *u: ops.squeeze(u, mask, None, M, "paper", None, backend)[0], hidden_states),
        "gate": (lambda f, *t: ops.gate(f, *rebuild(t), N, "tanh", 1e-6, backend), [f, *tensors]),
        "fuse": (lambda g, *u: ops.fuse(u, mask, None, g, backend), [g, *hidden_states]),
        "select": (
            lambda *a: ops.select(a[:N], mask, None, *rebuild(a[N:]), M, "tanh", 1e-6, backend)[0],
            [*hidden_states, *tensors],
        ),
        "select_pool": (
            lambda *a: ops.select_pool(a[:N], mask, None, *rebuild(a[N:]), M, "mean", "tanh", 1e-6, backend)[0],
            [*hidden_states, *tensors],
        ),
    }[name]


def function_and_inputs(place, name, requires_grad, training, dtype=torch.float32):
    hidden_states, mask, tensors, rebuild, f, g = differentiable(place, requires_grad, dtype)
    both = {"backend": place.backend, "training": training}
    return {
        "squeeze": (lambda *u: s2.squeeze(u, mask, pooling="mean", backend=place.backend), hidden_states),
        "gate": (lambda f, *t: s2.gate(f, rebuild(t), num_blocks=N, **both), [f, *tensors]),
        "fuse": (lambda g, *u: s2.fuse(u, g, mask, backend=place.backend), [g, *hidden_states]),
        "select": (lambda *a: s2.select(a[:N], rebuild(a[N:]), mask, **both), [*hidden_states, *tensors]),
        "select_pool": (lambda *a: s2.select_pool(a[:N], rebuild(a[N:]), mask, **both), [*hidden_states, *tensors]),
    }[name]


def differentiable(place, requires_grad, dtype=torch.float32):
    hidden_states, mask = batch_for(place, dtype=dtype, requires_grad=requires_grad)
    parameters = make_parameters(N, D, H, dtype, requires_grad=requires_grad, device=place.device)
    torch.manual_seed(0)
    f = torch.randn(B, D, dtype=dtype, device=place.device, requires_grad=requires_grad)
    g = torch.rand(B, N, D, dtype=dtype, device=place.device, requires_grad=requires_grad)
    tensors, rebuild = kept(parameters)
    return hidden_states, mask, tensors, rebuild, f, g


def differentiate_twice(function, inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(sum((out**2).sum() for out in outputs), inputs, create_graph=True)
    return torch.autograd.grad(sum(grad.sum() for grad in grads), inputs, allow_unused=True)


@pytest.mark.parametrize("name", OPS)
def test_ops_refuse_second_derivatives(place, name):
    function, inputs = op_and_inputs(place, name, True)
    with refused():
        differentiate_twice(function, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
@modes
def test_second_derivatives_of_functions(place, name, training):
    plain = place.name == "reference" or (name == "gate" and training)
    if plain and not place.computes_float64:
        pytest.skip("plain PyTorch, but not in float64, which gradgradcheck needs")
    function, inputs = function_and_inputs(place, name, True, training, torch.float64 if plain else torch.float32)
    if plain:
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)
    else:
        with refused():
            differentiate_twice(function, inputs)


@paths
@profiles
@modes
def test_second_derivatives_of_the_selector(place, path, profile, training):
    plain = place.name == "reference"
    selector = selector_for(place, profile).train(training)
    hidden_states, mask = batch_for(place, dtype=torch.float64 if plain else torch.float32, requires_grad=True)

    def function(*inputs):  # the parameters are inputs as well
        return call(selector, inputs[:N], mask, path)

    if plain:
        assert torch.autograd.gradgradcheck(function, hidden_states, fast_mode=True, atol=1e-4)
    else:
        with refused():
            differentiate_twice(function, [*hidden_states, selector.down.weight, selector.up.bias])


def dual_level(function, inputs, tangents):
    with torch.autograd.forward_ad.dual_level():
        out = function(*map(torch.autograd.forward_ad.make_dual, inputs, tangents))
        out = out if isinstance(out, tuple) else (out,)
        return [torch.autograd.forward_ad.unpack_dual(t).tangent for t in out]


def func_jvp(function, inputs, tangents):
    out = torch.func.jvp(function, tuple(inputs), tuple(tangents))[1]
    return out if isinstance(out, tuple) else (out,)


forwards = pytest.mark.parametrize("forward", [dual_level, func_jvp])


def one_tangent_each(inputs):
    """For each input, tangents that are zero for all others."""
    for index in range(len(inputs)):
        yield [torch.ones_like(t) if i == index else torch.zeros_like(t) for i, t in enumerate(inputs)]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPS)
@forwards
def test_ops_refuse_forward_mode(place, name, requires_grad, forward):
    function, inputs = op_and_inputs(place, name, requires_grad)
    for tangents in one_tangent_each(inputs):
        with refused():
            forward(function, inputs, tangents)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_ops_refuse_a_lone_tangent(place, name, requires_grad):
    """One input alone is dual, whichever it is."""
    function, inputs = op_and_inputs(place, name, requires_grad)
    for index in range(len(inputs)):
        with torch.autograd.forward_ad.dual_level():
            dual = list(inputs)
            dual[index] = torch.autograd.forward_ad.make_dual(inputs[index], torch.ones_like(inputs[index]))
            with refused():
                function(*dual)


@pytest.mark.parametrize("name", FUNCTIONS)
@forwards
@modes
def test_forward_mode_of_functions(place, name, training, forward):
    """Raises, or is the derivative: never zeros."""
    dtype = torch.float64 if place.computes_float64 else torch.float32
    if name == "gate" and training and not place.computes_float64:
        pytest.skip("plain PyTorch, but not in float64, which the finite differences need")
    function, inputs = function_and_inputs(place, name, False, training, dtype)
    count = 0
    for index, tangents in enumerate(one_tangent_each(inputs)):
        try:
            actual = forward(function, inputs, tangents)
        except NotImplementedError as error:
            assert "forward-mode" in str(error)
            count += 1
            continue
        step = 1e-3 if dtype == torch.float64 else 1e-2
        pairs = list(zip(inputs, tangents, strict=True))
        ahead, behind = (function(*(t + signed * tangent for t, tangent in pairs)) for signed in (step, -step))
        if isinstance(ahead, tuple):
            ahead, behind = ahead[0], behind[0]
        expected = (ahead - behind) / (2 * step)
        error = (actual[0] - expected).abs().max()
        assert error <= 1e-2 * expected.abs().max() + 1e-9, f"tangent of input {index}"
    if place.name == "reference":
        assert count == 0
    elif not training:
        assert count == len(inputs)


def assert_as_in_reverse(forward, function, inputs, tangents):
    (actual,) = forward(function, inputs, tangents)
    _, expected = torch.autograd.functional.jvp(function, tuple(inputs), tuple(tangents))
    assert expected.abs().max() > 0
    assert_close(actual, expected, 1e-10)


@paths
@profiles
@modes
@forwards
def test_forward_mode_of_the_selector(place, path, profile, training, forward):
    """Plain PyTorch has the derivative, which the one of reverse mode has to agree with; all else refuses."""
    selector = selector_for(place, profile).train(training)
    plain = place.name == "reference"
    hidden_states, mask = batch_for(place, dtype=torch.float64 if plain else torch.float32)

    def function(*inputs):
        return call(copy.deepcopy(selector), inputs, mask, path)  # in training each call moves the running statistics

    for tangents in one_tangent_each(hidden_states):
        if not plain:
            with refused():
                forward(function, hidden_states, tangents)
            continue
        assert_as_in_reverse(forward, function, hidden_states, tangents)


@modes
@forwards
def test_forward_mode_by_the_parameters(place, training, forward):
    """The gate's own tensors may be dual too, as under torch.func.functional_call."""
    if place.name != "reference":
        pytest.skip("ops refuse, above")
    selector = selector_for(place, block_prior=True, gate_scale=4.0).double().train(training)
    hidden_states, mask = batch_for(place, dtype=torch.float64)
    names = [name for name, _ in selector.named_parameters()]
    values = [parameter.detach().clone() for parameter in selector.parameters()]
    tangents = [torch.randn_like(value) for value in values]

    def function(*parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(copy.deepcopy(selector), state, (hidden_states, mask))

    assert_as_in_reverse(forward, function, values, tangents)


@forwards
def test_forward_mode_of_blockwise_pooling(place, forward):
    """It keeps no graph for reverse mode, and must not lose a tangent silently."""
    selector = selector_for(place)
    plain = place.computes_float64  # it runs no op where plain PyTorch is the engine
    hidden_states, mask = batch_for(place, dtype=torch.float64 if plain else torch.float32)

    def function(*inputs):
        stream = selector.blockwise(mask)
        for block, hidden_state in enumerate(inputs):
            stream.add(block, hidden_state)
        return stream.result()

    for tangents in one_tangent_each(hidden_states):
        if not plain:
            with refused():
                forward(function, hidden_states, tangents)
            continue
        (actual,) = forward(function, hidden_states, tangents)
        steps = [
            function(*(u + step * tangent for u, tangent in zip(hidden_states, tangents, strict=True)))
            for step in (1e-4, -1e-4)
        ]
        assert_close(actual, (steps[0] - steps[1]) / 2e-4, 1e-7)


# ---------------------------------------------------------------- torch.func


def transformed(function, kind):
    """A function of one tensor under one of torch.func's transforms."""

    def loss(u):
        return function(u).square().sum()

    return {
        "grad": torch.func.grad(loss),
        "vjp": lambda u: torch.func.vjp(loss, u)[1](torch.ones((), device=u.device))[0],
        "vmap": lambda u: torch.func.vmap(function)(torch.stack([u, 2 * u])),
        "vmap of grad": lambda u: torch.func.vmap(torch.func.grad(loss))(torch.stack([u, 2 * u])),
    }[kind]


def expected(function, kind, u):
    """The same without torch.func."""
    inputs = [u, 2 * u] if "vmap" in kind else [u]
    found = []
    for one in inputs:
        one = one.detach().requires_grad_()
        out = function(one)
        found.append(out if kind == "vmap" else torch.autograd.grad(out.square().sum(), one)[0])
    return torch.stack(found) if "vmap" in kind else found[0]


@pytest.mark.parametrize("kind", ["grad", "vjp", "vmap", "vmap of grad"])
@pytest.mark.parametrize("name", [*FUNCTIONS, "selector", "selector.pool", "selector.gates", "official"])
def test_transforms_of_torch_func(place, name, kind):
    """Plain PyTorch has them, and as torch.autograd.grad; all else refuses in words that say so."""
    hidden_states, mask = batch_for(place)
    parameters = make_parameters(N, D, H, torch.float32, device=place.device)
    f, g = torch.ones(B, D, device=place.device), torch.ones(B, N, D, device=place.device)
    selector, official = selector_for(place), selector_for(place, "official")
    options = {"backend": place.backend}
    function, u = {
        "squeeze": (lambda u: s2.squeeze([u, *hidden_states[1:]], mask, frequencies=M, **options)[0], hidden_states[0]),
        "gate": (lambda f: s2.gate(f, parameters, num_blocks=N, **options), f),
        "fuse": (lambda g: s2.fuse(hidden_states, g, mask, **options), g),
        "select": (
            lambda u: s2.select([u, *hidden_states[1:]], parameters, mask, frequencies=M, **options),
            hidden_states[0],
        ),
        "select_pool": (
            lambda b: s2.select_pool(hidden_states, parameters._replace(up_bias=b), mask, frequencies=M, **options),
            parameters.up_bias,
        ),
        "selector": (lambda u: selector([u, *hidden_states[1:]], mask), hidden_states[0]),
        "selector.pool": (lambda u: selector.pool([u, *hidden_states[1:]], mask), hidden_states[0]),
        "selector.gates": (lambda u: selector.gates([u, *hidden_states[1:]], mask), hidden_states[0]),
        "official": (lambda u: official([u, *hidden_states[1:]], mask), hidden_states[0]),
    }[name]
    if place.name != "reference" and (name, kind) != ("gate", "vmap"):
        with pytest.raises(NotImplementedError, match=r"torch.func.grad, vmap, jvp .* backend='reference' alone"):
            transformed(function, kind)(u)
        return
    assert_close(transformed(function, kind)(u), expected(function, kind, u), 1e-5)


@modes
def test_transforms_of_the_parameters(place, training):
    """As torch.func.functional_call is used, with copies of the buffers, which a call in training updates."""
    selector = selector_for(place).train(training)
    hidden_states, mask = batch_for(place)
    state = {name: parameter.detach() for name, parameter in selector.named_parameters()}

    def loss(state):
        buffers = {name: buffer.clone() for name, buffer in selector.named_buffers()}
        return torch.func.functional_call(selector, (state, buffers), (hidden_states, mask)).square().sum()

    if place.name != "reference":
        with pytest.raises(NotImplementedError, match=r"torch.func.grad, vmap, jvp .* backend='reference' alone"):
            torch.func.grad(loss)(state)
        return
    found = torch.func.grad(loss)(state)
    wanted = torch.autograd.grad(selector(hidden_states, mask).square().sum(), list(selector.parameters()))
    scale = max(
        1.0, found["up.weight"].abs().max().item()
    )  # in front of a batch norm up.bias has gradient 0 but for rounding
    for (name, one), other in zip(found.items(), wanted, strict=True):
        assert_close(one, other, 1e-5 * scale, name)
