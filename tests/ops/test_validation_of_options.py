"""Bad options, gate tensors and modules: the exception's type, and a message that names the argument."""

import pytest
import torch
from builders import make_parameters
from refusals import B, D, H, L, N, each_raises, everything, gate, raises, without

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector

# ---------------------------------------------------------------- options


@pytest.mark.parametrize("bad", ["published", "Paper", "", None, 3])
def test_unknown_profile(backend, batch, bad):
    calls = without(everything(*batch, profile=bad, backend=backend), "fuse")
    each_raises(calls, ValueError, "profile", "paper", "official", repr(bad))
    with raises(ValueError, "profile", "paper", "official", repr(bad)):
        S2SentSelector(D, N, profile=bad)
    with raises(ValueError, "profile", "paper", "official", repr(bad)):
        s2.gate(torch.zeros(B, D), make_parameters(N, D), num_blocks=N, profile=bad, backend=backend)


@pytest.mark.parametrize("bad", ["max", "Mean", "", 3])
def test_unknown_pooling(backend, batch, bad):
    calls = without(everything(*batch, pooling=bad, backend=backend), "fuse", "select")
    each_raises(calls, ValueError, "pooling", "mean", "cls", "last", repr(bad))
    selector = S2SentSelector(D, N, H, backend=backend)
    with raises(ValueError, "pooling", "mean", "cls", "last", repr(bad)):
        selector.pool(*batch, pooling=bad)
    with raises(ValueError, "pooling", "mean", "cls", "last", repr(bad)):
        selector.blockwise(batch.attention_mask, pooling=bad)


def test_pooling_none_is_for_squeeze_alone(backend, batch):
    for call in (
        lambda: s2.select_pool(batch.hidden_states, make_parameters(N, D), pooling=None, backend=backend),
        lambda: S2SentSelector(D, N, H, backend=backend).pool(*batch, pooling=None),
    ):
        with raises(ValueError, "pooling", "mean", "None"):
            call()


@pytest.mark.parametrize("bad", ["gelu", "Tanh", None])
def test_unknown_activation(backend, batch, bad):
    calls = without(everything(*batch, activation=bad, backend=backend), "fuse", "squeeze")
    each_raises(calls, ValueError, "activation", "tanh", "relu", repr(bad))
    with raises(ValueError, "activation", "tanh", "relu", repr(bad)):
        S2SentSelector(D, N, activation=bad)
    with raises(ValueError, "activation", "tanh", "relu", repr(bad)):
        s2.gate(torch.zeros(B, D), make_parameters(N, D), num_blocks=N, activation=bad, backend=backend)


@pytest.mark.parametrize(
    "bad, kind, words",
    [
        (torch.zeros(B, D, 1), ValueError, ("[B, D]", f"[{B}, {D}, 1]")),
        (torch.zeros(B, D, dtype=torch.float16), TypeError, ("torch.float32", "torch.float16")),
        (torch.zeros(B, D, dtype=torch.int64), TypeError, ("torch.float32", "torch.int64")),
    ],
)
def test_squeezed(backend, bad, kind, words):
    with raises(kind, "squeezed", *words):
        gate(bad, make_parameters(N, D), backend)


def test_squeezed_is_no_tensor(backend):
    with raises(TypeError, "squeezed", "tensor", "list"):
        gate([0.0], make_parameters(N, D), backend)


def test_parameters_are_no_gate_parameters(backend, batch):
    for call in (
        lambda: gate(torch.zeros(B, D), {"down_weight": 1}, backend),
        lambda: s2.select(batch.hidden_states, [torch.zeros(3)], backend=backend),
        lambda: s2.select_pool(batch.hidden_states, None, backend=backend),
    ):
        with raises(TypeError, "parameters", "GateParameters"):
            call()


def test_a_parameter_is_no_tensor(backend):
    with raises(TypeError, "up_bias", "tensor", "float"):
        gate(torch.zeros(B, D), make_parameters(N, D)._replace(up_bias=0.0), backend)
    with raises(TypeError, "down_weight", "tensor", "NoneType"):
        gate(torch.zeros(B, D), make_parameters(N, D)._replace(down_weight=None), backend)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("down_weight", [H, D + 1]),
        ("down_weight", [D]),
        ("down_bias", [H + 1]),
        ("up_weight", [N * D, H + 1]),
        ("up_weight", [N * D - 1, H]),
        ("up_bias", [N * D, 1]),
        ("norm_weight", [D]),
        ("norm_bias", [1]),
        ("running_mean", [N * D + 1]),
        ("running_var", [N, D]),
        ("block_prior", [N + 1]),
        ("block_prior", [N, 1]),
        ("gate_scale", [1]),
        ("gate_scale", [N]),
    ],
)
def test_parameters_of_the_wrong_shape(backend, batch, name, shape):
    parameters = make_parameters(N, D, H, prior=True)._replace(**{name: torch.zeros(shape)})
    for call in (
        lambda: gate(torch.zeros(B, D), parameters, backend),
        lambda: s2.select(*batch[:1], parameters, batch.attention_mask, backend=backend),
        lambda: s2.select_pool(*batch[:1], parameters, batch.attention_mask, backend=backend),
    ):
        with raises(ValueError, name, "shape", str(shape)):
            call()


@pytest.mark.parametrize("name", ["down_weight", "up_bias", "running_var", "block_prior", "gate_scale"])
def test_parameters_of_the_wrong_dtype_or_device(backend, name):
    good = make_parameters(N, D, H, prior=True, scale=4.0)
    with raises(TypeError, name, "floating", "torch.int64"):
        gate(torch.zeros(B, D), good._replace(**{name: getattr(good, name).long()}), backend)
    with raises(ValueError, name, "cpu", "meta"):
        gate(torch.zeros(B, D), good._replace(**{name: getattr(good, name).to("meta")}), backend)


@pytest.mark.parametrize("name", ["norm_weight", "norm_bias", "running_mean", "running_var"])
def test_half_a_norm(backend, name):
    with raises(ValueError, name, "all four"):
        gate(torch.zeros(B, D), make_parameters(N, D)._replace(**{name: None}), backend)


@pytest.mark.parametrize("name, option", [("block_prior", True), ("gate_scale", 4.0)])
def test_official_has_no_prior_and_no_scale(backend, batch, name, option):
    parameters = make_parameters(N, D, **{name.partition("_")[2]: option})
    for call in (
        lambda: s2.gate(torch.zeros(B, D), parameters, num_blocks=N, profile="official", backend=backend),
        lambda: s2.select(batch.hidden_states, parameters, profile="official", backend=backend),
        lambda: s2.select_pool(batch.hidden_states, parameters, profile="official", backend=backend),
        lambda: S2SentSelector(D, N, profile="official", **{name: option}),
    ):
        with raises(ValueError, name, "official"):
            call()


@pytest.mark.parametrize(
    "bad, kind", [("4", TypeError), (True, TypeError), (float("nan"), ValueError), (float("inf"), ValueError)]
)
def test_where_the_gate_scale_starts(bad, kind):
    with raises(kind, "gate_scale", "number"):
        S2SentSelector(D, N, gate_scale=bad)


@pytest.mark.parametrize("bad, kind", [(0, ValueError), (-2, ValueError), (2.0, TypeError), ("3", TypeError)])
def test_num_blocks(backend, bad, kind):
    with raises(kind, "num_blocks", str(bad) if kind is ValueError else type(bad).__name__):
        gate(torch.zeros(B, D), make_parameters(N, D), backend, num_blocks=bad)


@pytest.mark.parametrize("shape", [(B, N + 1, D), (B, N, D + 1), (B + 1, N, D), (B, D)])
def test_gates_of_the_wrong_shape(backend, batch, shape):
    with raises(ValueError, "gates", f"[{B}, {N}, {D}]", str(list(shape))):
        s2.fuse(batch.hidden_states, torch.zeros(shape), backend=backend)


def test_gates_of_the_wrong_kind(backend, batch):
    with raises(TypeError, "gates", "tensor", "list"):
        s2.fuse(batch.hidden_states, [1.0], backend=backend)
    with raises(ValueError, "gates", "cpu", "meta"):
        s2.fuse(batch.hidden_states, torch.zeros(B, N, D, device="meta"), backend=backend)
    with raises(TypeError, "gates", "floating", "torch.int64"):
        s2.fuse(batch.hidden_states, torch.ones(B, N, D, dtype=torch.int64), backend=backend)


# ---------------------------------------------------------------- the module


@pytest.mark.parametrize("name", ["hidden_size", "num_blocks", "bottleneck"])
@pytest.mark.parametrize("bad, kind", [(0, ValueError), (-4, ValueError), (4.0, TypeError), (None, TypeError)])
def test_sizes_of_the_module(name, bad, kind):
    arguments = {"hidden_size": 12, "num_blocks": 3, "bottleneck": 5, name: bad}
    with raises(kind, name, str(bad) if kind is ValueError else type(bad).__name__):
        S2SentSelector(**arguments)


@pytest.mark.parametrize("bad", ["layer", "None", True])
def test_gate_norm(bad):
    with raises(ValueError, "gate_norm", "batch", "None", repr(bad)):
        S2SentSelector(D, N, gate_norm=bad)


@pytest.mark.parametrize("bad", ["cuda", "", None, "Triton"])
def test_unknown_backend(batch, bad):
    each_raises(
        everything(*batch, backend=bad), ValueError, "backend", "auto", "reference", "triton", "native", repr(bad)
    )
    with raises(ValueError, "backend", "auto", "reference", "triton", "native", repr(bad)):
        S2SentSelector(D, N, backend=bad)
    with raises(ValueError, "backend", "auto", "reference", "triton", "native", repr(bad)):
        gate(torch.zeros(B, D), make_parameters(N, D), bad)


@pytest.mark.parametrize("path", ["forward", "pool", "gates"])
def test_the_module_counts_its_blocks(batch, path):
    selector = S2SentSelector(D, N + 1, H)
    with raises(ValueError, "hidden_states", f"{N + 1}", f"{N}"):
        getattr(selector, path)(*batch)
    narrow = S2SentSelector(D - 4, N, H)
    with raises(ValueError, "hidden_states", f"{D - 4}", f"{D}"):
        getattr(narrow, path)(*batch)
    with raises(ValueError, "attention_mask", f"[{B}, {L}]", f"[{B}, {L + 1}]"):
        getattr(S2SentSelector(D, N, H), path)(batch.hidden_states, torch.ones(B, L + 1))


def test_the_module_is_elsewhere(batch):
    with raises(ValueError, "down_weight", "cpu", "meta"):
        S2SentSelector(D, N, H).to("meta").eval()(*batch)
