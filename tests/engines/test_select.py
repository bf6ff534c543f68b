"""The whole selector on the engine under test: outputs, every gradient, and torch.library.opcheck of every public op."""

import copy

import pytest
import torch
from builders import table
from harness import (
    BACKEND,
    DEVICE,
    F16,
    F32,
    SIZE,
    check,
    make_batch,
    make_parameters,
    make_selector,
    pack,
    randn,
    run,
)

from s2sent_kernels.formula.call import POOLINGS

PATHS = (None, *POOLINGS)  # None is the token output
D = SIZE


def selector_of(selector, where, pooling):
    """The selector as ``check`` calls it: hidden states u0, u1, ... and the parameters by their names."""

    def function(backend, inputs):
        twin = copy.deepcopy(selector)
        twin.backend = backend
        hidden = [t for name, t in inputs.items() if name.startswith("u") and name[1:].isdigit()]
        if hidden[0].dtype == torch.float64:
            twin.double()
        for name, _ in list(twin.named_parameters()):
            module, _, attribute = name.rpartition(".")
            delattr(twin.get_submodule(module), attribute)
            setattr(twin.get_submodule(module), attribute, inputs[name])
        return {"output": run(twin, hidden, where, pooling)}

    return function


def inputs_of(selector, batch):
    hidden = {f"u{n}": u for n, u in enumerate(batch.hidden_states)}
    return hidden | {name: p.detach() for name, p in selector.named_parameters()}


# Pairwise: every pair of values of two columns occurs in some row.
# N, M, D, L, mask, norm, prior, activation, pooling, training, dtype, output gradient
CASES = [
    (1, 1, 24, 1, "holes", False, False, "tanh", "cls", False, F16, "random"),
    (1, 1, 24, 5, "right", False, True, "relu", "mean", True, F32, "strided"),
    (1, 2, 40, 33, "left", False, False, "tanh", "last", True, F32, "strided"),
    (1, 3, 66, 5, "mixed", True, True, "relu", "mean", False, F32, "expanded"),
    (1, 3, 66, 5, "packed", False, False, "relu", None, True, F16, "random"),
    (1, 3, 66, 33, "none", True, True, "relu", None, True, F16, "random"),
    (2, 1, 24, 1, "mixed", True, False, "tanh", None, True, F32, "random"),
    (2, 1, 24, 33, "packed", True, False, "relu", "last", False, F16, "strided"),
    (2, 2, 40, 5, "holes", False, True, "relu", "last", False, F32, "strided"),
    (2, 2, 40, 33, "right", True, True, "tanh", "cls", False, F16, "expanded"),
    (2, 3, 66, 1, "none", False, False, "tanh", "mean", False, F32, "strided"),
    (2, 3, 66, 33, "left", False, False, "relu", "last", True, F16, "strided"),
    (3, 1, 24, 1, "right", True, True, "relu", "last", True, F32, "strided"),
    (3, 1, 24, 5, "none", True, False, "tanh", "last", True, F32, "expanded"),
    (3, 2, 40, 1, "left", True, False, "tanh", None, False, F16, "random"),
    (3, 2, 40, 33, "packed", False, False, "tanh", "cls", True, F32, "expanded"),
    (3, 2, 40, 33, "holes", True, True, "relu", None, True, F32, "expanded"),
    (3, 2, 40, 33, "mixed", True, True, "tanh", "cls", False, F32, "strided"),
    (3, 3, 66, 5, "packed", False, False, "tanh", None, False, F16, "strided"),
    (3, 3, 66, 5, "right", False, False, "tanh", "mean", False, F32, "random"),
    (7, 1, 24, 33, "left", True, False, "tanh", "mean", True, F32, "expanded"),
    (7, 2, 40, 1, "packed", False, True, "relu", "mean", True, F16, "random"),
    (7, 2, 40, 1, "right", False, True, "tanh", None, False, F16, "expanded"),
    (7, 2, 40, 5, "mixed", False, False, "relu", "last", True, F16, "random"),
    (7, 2, 40, 5, "none", False, True, "relu", "cls", False, F16, "expanded"),
    (7, 3, 66, 5, "left", False, True, "relu", "cls", False, F16, "strided"),
    (7, 3, 66, 5, "holes", False, True, "relu", "mean", True, F32, "random"),
]


@table("N, M, D, L, mask, norm, prior, activation, pooling, training, dtype, gradient", CASES)
def test_selector(N, M, D, L, mask, norm, prior, activation, pooling, training, dtype, gradient):
    selector = make_selector(
        N, D, M, gate_norm="batch" if norm else None, block_prior=prior, activation=activation
    ).train(training)
    batch = make_batch(N, 6 if training and norm else 3, L, D, dtype, mask)
    found = check(selector_of(selector, batch.where, pooling), inputs_of(selector, batch), gradient)
    assert found["output"].dtype == dtype
    if pooling is None:
        assert not found["output"][~batch.real].any()
    for n in range(N):
        assert not found[f"gradient of u{n}"][~batch.real].any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooling", [None, "mean", "gates"])
def test_official_selector(pooling, training):
    selector = make_selector(2, 24, 2, profile="official").train(training)
    batch = make_batch(2, 5, 5, 24, mask="mixed")
    check(selector_of(selector, batch.where, pooling), inputs_of(selector, batch))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooling", [None, "mean", "gates"])
@pytest.mark.parametrize("prior", [False, True])
def test_selector_with_a_gate_scale(prior, pooling, training):
    selector = make_selector(4, 24, 3, block_prior=prior, gate_scale=1.0).train(training)
    batch = make_batch(4, 6, 5, 24, F16, mask="holes")
    found = check(selector_of(selector, batch.where, pooling), inputs_of(selector, batch))
    assert found["gradient of gate_scale"] != 0


@pytest.mark.parametrize("training", [False, True])
def test_gates(training):
    selector = make_selector(4, 24, 3, block_prior=True).train(training)
    batch = make_batch(4, 6, 5, 24, F16, mask="holes")
    found = check(selector_of(selector, batch.where, "gates"), inputs_of(selector, batch))
    assert found["output"].dtype == F32


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_a_hooked_part_is_called(pooling):
    """With a hook the gate is computed by calling its parts as modules."""
    selector = make_selector(2, 24, 3, block_prior=True)
    batch = make_batch(2, 3, 5, 24, mask="holes")
    selector.backend = BACKEND
    plain = run(selector, batch.hidden_states, batch.where, pooling)
    calls = []
    selector.up.register_forward_hook(lambda *arguments: calls.append(arguments))
    found = check(selector_of(selector, batch.where, pooling), inputs_of(selector, batch))
    assert calls
    torch.testing.assert_close(found["output"], plain)


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_only_some_inputs_need_a_gradient(pooling):
    selector = make_selector(3, block_prior=True)
    batch = make_batch(3, 2, 5, D, mask="right")
    inputs = inputs_of(selector, batch)
    check(selector_of(selector, batch.where, pooling), inputs, frozen=("u0", "u2", "up.weight"))
    check(selector_of(selector, batch.where, pooling), inputs, frozen=("u0", "u1", "u2"))
    check(selector_of(selector, batch.where, pooling), inputs, frozen=set(inputs) - {"u1"})


@pytest.mark.parametrize("profile, training", [("paper", False), ("paper", True), ("official", True)])
def test_batch_norm_is_updated_as_on_the_reference(profile, training):
    batch = make_batch(3, 5, 2, D, mask="mixed")
    states = []
    for backend in (BACKEND, "reference"):
        selector = make_selector(profile=profile).train(training)
        selector.backend = backend
        selector.pool(batch.hidden_states, **batch.where)
        selector(batch.hidden_states, **batch.where)
        states.append(selector.norm.state_dict())
    assert states[0]["num_batches_tracked"] == states[1]["num_batches_tracked"] == 2 * training
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(states[0][name], states[1][name])
        assert training != torch.equal(states[0][name], getattr(make_selector().norm, name))


@pytest.mark.parametrize("pooling", [None, "mean", "gates"])
def test_float64_is_refused(pooling):
    selector = make_selector(backend=BACKEND).double()
    with pytest.raises(ValueError, match=r"backend.*float64"):
        run(selector, make_batch(3, 2, 5, D, torch.float64).hidden_states, {}, pooling)


# ---------------------------------------------------------------- ops


def _examples():
    """op -> (arguments, places of the tensors that may need a gradient)."""
    hidden = make_batch(2, 2, 3, 8).hidden_states
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]], device=DEVICE)
    packed, cu_seqlens = [u.flatten(0, 1) for u in hidden], torch.tensor([0, 2, 6], dtype=torch.int32, device=DEVICE)
    f, dg, dp = randn(2, 8, seed=1), randn(2, 2, 8, seed=2), randn(2, 2, 8, seed=3)
    v, shape = randn(2, 3, 8, seed=4), [2, 3, 8]
    full, bare = make_parameters(2, 8, 3, prior=(1.0, -1.0), scale=4.0), make_parameters(2, 8, 3, norm=False)[:-1]
    options = (2, "tanh", 1e-6, BACKEND)
    back = (shape, F32, DEVICE, [True, False], mask, None, 2, "paper")
    return {
        "squeeze": [
            (hidden, mask, None, 2, "paper", "mean", BACKEND),
            (packed, None, cu_seqlens, 2, "paper", None, BACKEND),
        ],
        "gate": [(f, *full, *options), (f, *bare, *options)],
        "fuse": [(hidden, mask, None, dg, BACKEND), (packed, None, cu_seqlens, dg, BACKEND)],
        "select_pool": [(hidden, mask, None, *full, 2, "mean", "tanh", 1e-6, BACKEND)],
        "select": [(packed, None, cu_seqlens, *bare, 2, "relu", 1e-6, BACKEND)],
        "squeeze_backward": [(f, dp, None, None, *back, "mean", BACKEND), (f, None, v, dg, *back, None, BACKEND)],
        "gate_backward": [(dg, f, *full, *options[1:]), (dg, f, *bare, "relu", 1e-6, BACKEND)],
        "gate_pool_backward": [(f, f, dp, *full, *options[1:]), (f, f, dp, *bare, "relu", 1e-6, BACKEND)],
        "fuse_backward": [(v, hidden, mask, None, BACKEND)],
        "squeeze_block": [(hidden[0], 0, 2, f[:, None].clone(), dp, mask, None, 2, "paper", "mean", BACKEND)],
    }


NAMES = [
    "squeeze",
    "gate",
    "fuse",
    "select_pool",
    "select",
    "squeeze_block",
    "squeeze_backward",
    "gate_backward",
    "gate_pool_backward",
    "fuse_backward",
]


def test_every_op_has_an_example():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "s2sent::" in name}
    assert names == set(NAMES) == set(_examples())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, requires_grad):
    if requires_grad and (name.endswith("backward") or name == "squeeze_block"):
        pytest.skip("has no derivative")

    def leaf(value, place):
        if isinstance(value, list):
            return [leaf(one, place) for one in value]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            statistics = name != "fuse" and place in (7, 8, 9, 10) and value.dim() == 1 and (value > 0).all()
            return value.detach().clone().requires_grad_(requires_grad and not statistics)
        return value

    for arguments in _examples()[name]:
        arguments = tuple(leaf(value, place) for place, value in enumerate(arguments))
        op = getattr(torch.ops.s2sent, name)
        of_all = "scaled" in op.overloads() and len(arguments) == len(op.scaled._schema.arguments)
        torch.library.opcheck(op.scaled if of_all else op.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_the_graph_is_whole(pooling, training, dynamic):
    """torch.compile(fullgraph=True), forward and backward, with the kernels inside (here without Inductor)."""
    torch._dynamo.reset()
    batch = make_batch(2, 3, 4, 8, mask="right")
    hidden = [u.requires_grad_() for u in batch.hidden_states]
    results = []
    for compiled in (False, True):
        selector = make_selector(2, 8, 2, block_prior=True, backend=BACKEND).train(training)
        function = selector if pooling is None else selector.pool
        if compiled:
            function = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        output = function(hidden, **batch.where)
        results.append([output, *torch.autograd.grad(output.square().sum(), [*hidden, *selector.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", [None, "mean"])
def test_cu_seqlens_of_any_strides(path):
    selector = make_selector(2, 32, 1, backend=BACKEND)
    packed, where = pack(make_batch(2, 3, 5, 32).hidden_states, [3, 0, 5])
    strided = torch.stack([where["cu_seqlens"], torch.full_like(where["cu_seqlens"], 7)], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(run(selector, packed, {"cu_seqlens": strided}, path), run(selector, packed, where, path))
