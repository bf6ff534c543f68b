"""Bad input: the exception's type, and a message that names the argument, what was expected and what came."""

import re
import subprocess
import sys

import pytest
import torch
from builders import make_batch, make_parameters, pack, through_ops

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector
from s2sent_kernels import backend as backend_module

N, B, L, D, H = 3, 4, 5, 12, 5


@pytest.fixture(params=["reference", "op"])
def backend(request, monkeypatch):
    return "reference" if request.param == "reference" else through_ops(monkeypatch)


@pytest.fixture
def batch():
    return make_batch(N, B, L, D, torch.float32, "right")


def raises(kind, *words):
    """``kind`` itself and no subclass; every word stands in the message."""
    pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(kind, match=re.compile(r"\A" + pattern, re.DOTALL), check=lambda error: type(error) is kind)


def everything(hidden_states, mask=None, *, frequencies=4, profile="paper", pooling="mean", backend, **options):
    """The public functions that take a batch, each a call; with the arguments that it knows."""
    width = 12 if not len(hidden_states) or not isinstance(hidden_states[0], torch.Tensor) else 0
    width = width or (hidden_states[0].shape[-1] if hidden_states[0].dim() else 1)
    parameters = make_parameters(max(len(hidden_states), 1), max(width, 1), H, torch.float32)
    gates = torch.rand(B, len(hidden_states), width)
    whole = {"frequencies": frequencies, "profile": profile, "backend": backend, **options}
    return {
        "squeeze": lambda: s2.squeeze(hidden_states, mask, pooling=pooling, **whole),
        "select": lambda: s2.select(hidden_states, parameters, mask, **whole),
        "select_pool": lambda: s2.select_pool(hidden_states, parameters, mask, pooling=pooling, **whole),
        "fuse": lambda: s2.fuse(hidden_states, gates, mask, backend=backend, **options),
    }


def each_raises(calls, kind, *words):
    for name, call in calls.items():
        with raises(kind, *words):
            call()
            pytest.fail(f"{name} raised nothing")


def without(calls, *names):
    return {name: call for name, call in calls.items() if name not in names}


# ---------------------------------------------------------------- hidden states


def test_good_input_passes(backend, batch):
    for call in everything(*batch, backend=backend).values():
        call()


@pytest.mark.parametrize("value", [torch.zeros(3, B, L, D), None, 3, "abc", iter([])])
def test_hidden_states_is_no_sequence(backend, value):
    if isinstance(value, str):
        return each_raises_type(value, "hidden_states", backend)
    parameters = make_parameters(N, D, H, torch.float32)
    for call in (
        lambda: s2.squeeze(value, backend=backend),
        lambda: s2.fuse(value, torch.rand(B, N, D), backend=backend),
        lambda: s2.select(value, parameters, backend=backend),
        lambda: s2.select_pool(value, parameters, backend=backend),
        lambda: S2SentSelector(D, N)(value),
        lambda: S2SentSelector(D, N).pool(value),
        lambda: S2SentSelector(D, N).gates(value),
    ):
        with raises(TypeError, "hidden_states", "sequence", type(value).__name__):
            call()


def each_raises_type(value, name, backend):
    with raises(TypeError, name, "tensor", type(value).__name__):
        s2.squeeze(value, backend=backend)


def test_a_hidden_state_is_no_tensor(backend, batch):
    hidden_states, mask = batch
    bad = [hidden_states[0], [1.0], hidden_states[2]]
    each_raises(everything(bad, mask, backend=backend), TypeError, "hidden_states[1]", "tensor", "list")


def test_no_hidden_states(backend):
    each_raises(everything([], backend=backend), ValueError, "hidden_states", "at least one", "none")


def test_tuples_are_sequences(backend, batch):
    hidden_states, mask = batch
    f, _ = s2.squeeze(tuple(hidden_states), mask, backend=backend)
    assert torch.equal(f, s2.squeeze(hidden_states, mask, backend=backend)[0])


@pytest.mark.parametrize("other, expected, came", [
    (torch.zeros(B, L + 1, D), f"[{B}, {L}, {D}]", f"[{B}, {L + 1}, {D}]"),
    (torch.zeros(B, L, D, dtype=torch.float16), "torch.float32", "torch.float16"),
    (torch.zeros(B, L, D, device="meta"), "cpu", "meta"),
    (torch.zeros(B, D), f"[{B}, {L}, {D}]", f"[{B}, {D}]"),
])  # fmt: skip
def test_hidden_states_disagree(backend, batch, other, expected, came):
    bad = [batch.hidden_states[0], batch.hidden_states[1], other]
    each_raises(everything(bad, backend=backend), ValueError, "hidden_states[2]", expected, came)


@pytest.mark.parametrize("shape", [(B, L, D, 1), (D,), ()])
def test_hidden_states_of_the_wrong_rank(backend, shape):
    bad = [torch.zeros(shape)] * N
    each_raises(everything(bad, backend=backend), ValueError, "hidden_states[0]", "[B, L, D]", str(list(shape)))


def test_packed_hidden_states_without_cu_seqlens(backend):
    each_raises(
        everything([torch.zeros(7, D)] * N, backend=backend), ValueError, "hidden_states[0]", "cu_seqlens", f"[7, {D}]"
    )


def test_padded_hidden_states_with_cu_seqlens(backend, batch):
    calls = everything(batch.hidden_states, backend=backend, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
    each_raises(calls, ValueError, "hidden_states[0]", "[T, D]", f"[{B}, {L}, {D}]")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_hidden_states_that_are_not_floating(backend, dtype):
    bad = [torch.zeros(B, L, D, dtype=dtype)] * N
    each_raises(everything(bad, backend=backend), TypeError, "hidden_states[0]", "floating", str(dtype))


def test_no_features(backend):
    bad = [torch.zeros(B, L, 0)] * N
    each_raises(everything(bad, frequencies=1, backend=backend), ValueError, "hidden", "positive", "0")


# ---------------------------------------------------------------- frequencies


def test_hidden_size_not_divisible(backend, batch):
    calls = without(everything(*batch, frequencies=5, backend=backend), "fuse")
    each_raises(calls, ValueError, "frequencies", "divisible", "12", "5")
    with raises(ValueError, "frequencies", "divisible", "12", "5"):
        S2SentSelector(12, N, frequencies=5)


def test_more_components_than_blocks_have(backend):
    hidden_states, _ = make_batch(2, B, L, 15, torch.float32, "none")
    each_raises(without(everything(hidden_states, frequencies=15, backend=backend), "fuse"), ValueError,
                "frequencies", "N = 2", "14", "M = 15")  # fmt: skip
    with raises(ValueError, "frequencies", "N = 2", "14", "M = 15"):
        S2SentSelector(15, 2, frequencies=15)
    with raises(ValueError, "frequencies", "32", "M = 33"):
        S2SentSelector(33, 12, frequencies=33)


@pytest.mark.parametrize("frequencies", [3, 5, 6, 12, 32])
def test_official_components(backend, frequencies):
    hidden_states, _ = make_batch(N, B, L, 480, torch.float32, "none")
    calls = everything(hidden_states, frequencies=frequencies, profile="official", backend=backend)
    words = ("frequencies", "official", "(1, 2, 4, 8, 16)", str(frequencies))
    each_raises(without(calls, "fuse"), ValueError, *words)
    with raises(ValueError, "frequencies", "official", "(1, 2, 4, 8, 16)", str(frequencies)):
        S2SentSelector(480, N, frequencies=frequencies, profile="official")


@pytest.mark.parametrize("frequencies", [0, -1])
def test_frequencies_that_are_not_positive(backend, batch, frequencies):
    each_raises(without(everything(*batch, frequencies=frequencies, backend=backend), "fuse"), ValueError,
                "frequencies", str(frequencies))  # fmt: skip


@pytest.mark.parametrize("frequencies", [1.0, "4", None, True])
def test_frequencies_of_the_wrong_type(batch, frequencies):
    each_raises(without(everything(*batch, frequencies=frequencies, backend="reference"), "fuse"), TypeError,
                "frequencies", "integer", type(frequencies).__name__)  # fmt: skip
    with raises(TypeError, "frequencies", "integer", type(frequencies).__name__):
        S2SentSelector(D, N, frequencies=frequencies)


# ---------------------------------------------------------------- mask


@pytest.mark.parametrize("shape", [(B, L + 1), (B, L, 1), (B + 1, L), (L,), (B, 1)])
def test_mask_of_the_wrong_shape(backend, batch, shape):
    calls = everything(batch.hidden_states, torch.ones(shape), backend=backend)
    each_raises(calls, ValueError, "attention_mask", f"[{B}, {L}]", str(list(shape)))


def test_mask_of_the_wrong_type(backend, batch):
    calls = everything(batch.hidden_states, [[1] * L] * B, backend=backend)
    each_raises(calls, TypeError, "attention_mask", "tensor", "list")
    calls = everything(batch.hidden_states, torch.ones(B, L, dtype=torch.complex64), backend=backend)
    each_raises(calls, TypeError, "attention_mask", "bool", "complex64")


def test_mask_on_another_device(backend, batch):
    calls = everything(batch.hidden_states, torch.ones(B, L, device="meta"), backend=backend)
    each_raises(calls, ValueError, "attention_mask", "cpu", "meta")


def test_mask_and_cu_seqlens(backend, batch):
    packed, cu_seqlens = pack(*batch)
    calls = everything(packed, batch.attention_mask, cu_seqlens=cu_seqlens, backend=backend)
    each_raises(calls, ValueError, "attention_mask", "cu_seqlens", "both")


# ---------------------------------------------------------------- cu_seqlens


@pytest.mark.parametrize("values, words", [
    ([1, 5, 20], ("start at 0", "1")),
    ([0, 12, 7, 20], ("not to decrease", "12 then 7")),
    ([0, 5, 19], ("end at T = 20", "19")),
    ([0, 5, 21], ("end at T = 20", "21")),
    ([0], ("end at T = 20", "0")),
    ([-1, 20], ("start at 0", "-1")),
])  # fmt: skip
def test_contents_of_cu_seqlens(backend, values, words):
    packed = [torch.randn(20, D) for _ in range(N)]
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    calls = everything(packed, cu_seqlens=cu_seqlens, backend=backend)
    if len(values) != B + 1:
        calls.pop("fuse")
    each_raises(calls, ValueError, "cu_seqlens", *words)
    gates = torch.rand(len(values) - 1, N, D)
    with raises(ValueError, "cu_seqlens", *words):
        s2.fuse(packed, gates, cu_seqlens=cu_seqlens, backend=backend)
    selector = S2SentSelector(D, N, H, backend=backend).eval()
    for call in (selector, selector.pool, selector.gates):
        with raises(ValueError, "cu_seqlens", *words):
            call(packed, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("values, words", [([1, 20], ("start at 0",)), ([0, 21], ("end at T = 20",))])
def test_contents_of_cu_seqlens_inside_the_ops(values, words):
    packed, ops = [torch.randn(20, D) for _ in range(N)], torch.ops.s2sent
    cu_seqlens = torch.tensor(values, dtype=torch.int32)
    parameters = make_parameters(N, D, H, torch.float32)
    for call in (
        lambda: ops.squeeze(packed, None, cu_seqlens, 4, "paper", None, "reference"),
        lambda: ops.fuse(packed, None, cu_seqlens, torch.rand(1, N, D), "reference"),
        lambda: ops.select(packed, None, cu_seqlens, *parameters, 4, "tanh", 1e-6, "reference"),
        lambda: ops.select_pool(packed, None, cu_seqlens, *parameters, 4, "mean", "tanh", 1e-6, "reference"),
    ):
        with raises(ValueError, "cu_seqlens", *words):
            call()


@pytest.mark.parametrize("bad, kind, words", [
    ([0, 20], TypeError, ("tensor", "list")),
    (torch.tensor([0, 20]), TypeError, ("torch.int32", "torch.int64")),
    (torch.tensor([0.0, 20.0]), TypeError, ("torch.int32", "torch.float32")),
    (torch.tensor([[0, 20]], dtype=torch.int32), ValueError, ("[B + 1]", "[1, 2]")),
    (torch.tensor([], dtype=torch.int32), ValueError, ("[B + 1]", "[0]")),
    (torch.tensor([0, 20], dtype=torch.int32, device="meta"), ValueError, ("cpu", "meta")),
])  # fmt: skip
def test_cu_seqlens_of_the_wrong_kind(backend, bad, kind, words):
    packed = [torch.randn(20, D) for _ in range(N)]
    each_raises(everything(packed, cu_seqlens=bad, backend=backend), kind, "cu_seqlens", *words)


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


# ---------------------------------------------------------------- the gate's tensors


def gate(squeezed, parameters, backend="reference", num_blocks=N):
    return s2.gate(squeezed, parameters, num_blocks=num_blocks, backend=backend)


@pytest.mark.parametrize("bad, kind, words", [
    (torch.zeros(B, D, 1), ValueError, ("[B, D]", f"[{B}, {D}, 1]")),
    (torch.zeros(B, D, dtype=torch.float16), TypeError, ("torch.float32", "torch.float16")),
    (torch.zeros(B, D, dtype=torch.int64), TypeError, ("torch.float32", "torch.int64")),
])  # fmt: skip
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


@pytest.mark.parametrize("name, shape", [
    ("down_weight", [H, D + 1]), ("down_weight", [D]), ("down_bias", [H + 1]), ("up_weight", [N * D, H + 1]),
    ("up_weight", [N * D - 1, H]), ("up_bias", [N * D, 1]), ("norm_weight", [D]), ("norm_bias", [1]),
    ("running_mean", [N * D + 1]), ("running_var", [N, D]), ("block_prior", [N + 1]), ("block_prior", [N, 1]),
])  # fmt: skip
def test_parameters_of_the_wrong_shape(backend, batch, name, shape):
    parameters = make_parameters(N, D, H, prior=True)._replace(**{name: torch.zeros(shape)})
    for call in (
        lambda: gate(torch.zeros(B, D), parameters, backend),
        lambda: s2.select(*batch[:1], parameters, batch.attention_mask, backend=backend),
        lambda: s2.select_pool(*batch[:1], parameters, batch.attention_mask, backend=backend),
    ):
        with raises(ValueError, name, "shape", str(shape)):
            call()


@pytest.mark.parametrize("name", ["down_weight", "up_bias", "running_var", "block_prior"])
def test_parameters_of_the_wrong_dtype_or_device(backend, name):
    good = make_parameters(N, D, H, prior=True)
    with raises(TypeError, name, "floating", "torch.int64"):
        gate(torch.zeros(B, D), good._replace(**{name: getattr(good, name).long()}), backend)
    with raises(ValueError, name, "cpu", "meta"):
        gate(torch.zeros(B, D), good._replace(**{name: getattr(good, name).to("meta")}), backend)


@pytest.mark.parametrize("name", ["norm_weight", "norm_bias", "running_mean", "running_var"])
def test_half_a_norm(backend, name):
    with raises(ValueError, name, "all four"):
        gate(torch.zeros(B, D), make_parameters(N, D)._replace(**{name: None}), backend)


def test_official_has_no_prior(backend, batch):
    parameters = make_parameters(N, D, prior=True)
    for call in (
        lambda: s2.gate(torch.zeros(B, D), parameters, num_blocks=N, profile="official", backend=backend),
        lambda: s2.select(batch.hidden_states, parameters, profile="official", backend=backend),
        lambda: s2.select_pool(batch.hidden_states, parameters, profile="official", backend=backend),
        lambda: S2SentSelector(D, N, profile="official", block_prior=True),
    ):
        with raises(ValueError, "block_prior", "official"):
            call()


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


# ---------------------------------------------------------------- backends


def test_backends_says_what_is_usable():
    status = s2.backends()
    assert list(status) == ["reference", "triton", "native"]
    assert status["reference"].usable
    for name, entry in status.items():
        assert isinstance(entry, s2.BackendStatus), name
        assert isinstance(entry.usable, bool) and entry.reason


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("S2SENT_BACKEND", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is usable here")
def test_triton_without_a_gpu_says_why(no_interpreter):
    status = s2.backends()["triton"]
    assert not status.usable
    assert "CUDA" in status.reason or "not installed" in status.reason


def test_a_named_backend_that_is_not_usable_raises(no_interpreter, monkeypatch, batch):
    """CPU tensors and no interpreter: Triton cannot, whether or not there is a GPU."""
    each_raises(everything(*batch, backend="triton"), ValueError, "backend", "triton")
    monkeypatch.setattr(backend_module, "_native_status", lambda: s2.BackendStatus(False, "is not built"))
    each_raises(everything(*batch, backend="native"), ValueError, "backend", "native", "not built")
    for backend in ("triton", "native"):
        with raises(ValueError, "backend", backend):
            gate(torch.zeros(B, D), make_parameters(N, D), backend)
        selector = S2SentSelector(D, N, H, backend=backend).eval()  # named for another machine, perhaps
        for call in (selector, selector.pool, selector.gates):
            with raises(ValueError, "backend", backend):
                call(*batch)
        with raises(ValueError, "backend", backend):
            torch.ops.s2sent.squeeze(batch.hidden_states, None, None, 4, "paper", None, backend)


def test_auto_on_the_cpu_is_the_reference_without_the_extension(no_interpreter, monkeypatch, batch, recwarn):
    monkeypatch.setattr(backend_module, "_native_status", lambda: s2.BackendStatus(False, "is not built"))
    assert backend_module.choose("auto", torch.device("cpu"), torch.float32) == "reference"
    a, _ = s2.squeeze(*batch)
    b, _ = s2.squeeze(*batch, backend="reference")
    assert torch.equal(a, b)
    assert not recwarn.list


def test_the_variable_replaces_auto(no_interpreter, monkeypatch, batch):
    monkeypatch.setattr(backend_module, "_native_status", lambda: s2.BackendStatus(False, "is not built"))
    monkeypatch.setenv("S2SENT_BACKEND", "native")
    each_raises(everything(*batch, backend="auto"), ValueError, "native", "not built")
    with raises(ValueError, "native", "not built"):
        S2SentSelector(D, N, H).eval().pool(*batch)
    monkeypatch.setenv("S2SENT_BACKEND", "reference")
    expected, _ = s2.squeeze(*batch, backend="reference")
    assert torch.equal(s2.squeeze(*batch)[0], expected)
    monkeypatch.setenv("S2SENT_BACKEND", "auto")
    assert torch.equal(s2.squeeze(*batch)[0], expected)


def test_the_variable_replaces_auto_only(no_interpreter, monkeypatch, batch):
    monkeypatch.setenv("S2SENT_BACKEND", "native")
    for call in everything(*batch, backend="reference").values():
        call()
    S2SentSelector(D, N, H, backend="reference").eval().pool(*batch)


@pytest.mark.parametrize("value", ["cuda", "Reference"])
def test_a_bad_variable(no_interpreter, monkeypatch, batch, value):
    monkeypatch.setenv("S2SENT_BACKEND", value)
    each_raises(everything(*batch, backend="auto"), ValueError, "S2SENT_BACKEND", "reference", "triton", repr(value))
    s2.squeeze(*batch, backend="reference")


def test_importing_needs_torch_alone():
    """Neither Triton nor CUDA nor anything optional is loaded by the import."""
    code = (
        "import sys, torch; before = set(sys.modules); import s2sent_kernels; new = set(sys.modules) - before; "
        "assert not torch.cuda.is_initialized(); "
        "print(*sorted(new & {'triton', 'transformers', 'matplotlib', 'safetensors', 'torch._dynamo'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
