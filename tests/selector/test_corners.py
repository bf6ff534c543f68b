"""Each row of the specification's table of corner cases.

Every test runs on every entry of BACKENDS. The tensors are float32, or of a dtype that every backend takes, except
where float64 is what a test is about.
"""

import contextlib
from typing import NamedTuple

import pytest
import torch
from builders import assert_close, make_batch, make_gradient, make_parameters, pack, through_ops

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector

# "op": torch.ops.s2sent.* over the reference
BACKENDS = ["reference", "op"] + ["native"] * s2.backends()["native"].usable
DTYPES = {  # on the backends that compute float64
    "reference": [torch.float32, torch.float16, torch.bfloat16, torch.float64],
    "op": [torch.float32, torch.float16, torch.bfloat16, torch.float64],
}
POOLINGS = ("mean", "cls", "last")
PATHS = (None, *POOLINGS)  # None: the token output
N, B, L, D, H, M = 3, 6, 7, 16, 5, 4
CLOSE = 1e-5


class Place(NamedTuple):
    name: str  # of BACKENDS
    backend: str  # what to ask for
    device: str


@pytest.fixture(params=BACKENDS)
def place(request, monkeypatch):
    name = request.param
    if name == "op":
        return Place(name, through_ops(monkeypatch), "cpu")
    return Place(name, name, "cuda" if name == "triton" and torch.cuda.is_available() else "cpu")


def selector_for(place, profile="paper", **options):
    torch.manual_seed(0)
    selector = S2SentSelector(D, N, H, M, profile=profile, backend=place.backend, **options).to(place.device)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 1.0))
        if selector.norm is not None:
            selector.norm.running_mean.copy_(torch.randn(N * D))
            selector.norm.running_var.copy_(torch.rand(N * D) + 0.5)
    return selector.eval()


def batch_for(place, mask="right", **options):
    return make_batch(N, B, L, D, options.pop("dtype", torch.float32), mask, device=place.device, **options)


def call(selector, hidden_states, mask=None, path=None, **options):
    if path is None:
        return selector(hidden_states, mask, **options)
    return selector.pool(hidden_states, mask, pooling=path, **options)


def gradients(selector, hidden_states, mask, path, forward_context=None):
    """The output and the gradients of the hidden states and of the parameters."""
    hidden_states = [u.detach().clone().requires_grad_() for u in hidden_states]
    selector.zero_grad()
    with forward_context or contextlib.nullcontext():
        out = call(selector, hidden_states, mask, path)
    out.backward(make_gradient(out))
    return out.detach(), [u.grad for u in hidden_states], [p.grad for p in selector.parameters()]


paths = pytest.mark.parametrize("path", PATHS)
profiles = pytest.mark.parametrize("profile", ["paper", "official"])
modes = pytest.mark.parametrize("training", [False, True])


# ---------------------------------------------------------------- attention mask given


@paths
def test_paper_sees_real_tokens_only(place, path):
    """Whatever stands at padding changes nothing, and gets no gradient."""
    selector = selector_for(place)
    hidden_states, mask = batch_for(place, "mixed")
    other = [torch.where(mask[..., None], u, torch.randn_like(u)) for u in hidden_states]
    out, du, dp = gradients(selector, hidden_states, mask, path)
    again, du2, dp2 = gradients(selector, other, mask, path)
    for a, b in zip([out, *du, *dp], [again, *du2, *dp2], strict=True):
        assert torch.equal(a, b)
    assert all(not grad[~mask].any() for grad in du)
    if path is None:
        assert not out[~mask].any() and out[mask].all()


@paths
def test_official_squeezes_the_padding_too(place, path):
    selector = selector_for(place, "official")
    hidden_states, mask = batch_for(place)
    other = [torch.where(mask[..., None], u, u + 1) for u in hidden_states]
    assert not torch.allclose(selector.gates(hidden_states, mask), selector.gates(other, mask))
    out = call(selector, hidden_states, mask, path)
    if path is None:
        assert not out[~mask].any() and out[mask].all()
    else:
        _, p = s2.squeeze(hidden_states, mask, frequencies=M, profile="official", pooling=path, backend=place.backend)
        _, p2 = s2.squeeze(other, mask, frequencies=M, profile="official", pooling=path, backend=place.backend)
        assert torch.equal(p, p2)
        assert_close(out, (selector.gates(hidden_states, mask) * p).sum(1), CLOSE)


# ---------------------------------------------------------------- no mask


@paths
@profiles
def test_no_mask_is_a_mask_of_ones(place, profile, path):
    selector = selector_for(place, profile)
    hidden_states, _ = batch_for(place, "none")
    ones = torch.ones(B, L, dtype=torch.int64, device=place.device)
    for a, b in zip(
        [t for group in gradients(selector, hidden_states, None, path) for t in group],
        [t for group in gradients(selector, hidden_states, ones, path) for t in group],
        strict=False,
    ):
        assert_close(a, b, CLOSE)


# ---------------------------------------------------------------- left padding, holes


@pytest.mark.parametrize("kind", ["left", "holes", "mixed"])
@paths
def test_tokens_count_by_their_rank(place, path, kind):
    """Left-padded and holed sentences are the same sentences as their real tokens moved to the front."""
    selector = selector_for(place)
    hidden_states, mask = batch_for(place, kind)
    order = mask.int().argsort(dim=1, descending=True, stable=True)  # real tokens first, in their order
    moved = [u.gather(1, order[..., None].expand_as(u)) for u in hidden_states]
    moved_mask = mask.gather(1, order)
    out = call(selector, hidden_states, mask, path)
    expected = call(selector, moved, moved_mask, path)
    if path is None:
        out, expected = out[mask], expected[moved_mask]
    assert_close(out, expected, CLOSE)
    assert_close(selector.gates(hidden_states, mask), selector.gates(moved, moved_mask), CLOSE)


@pytest.mark.parametrize("path", POOLINGS)
def test_official_pools_holes_by_the_mask(place, path):
    hidden_states, mask = batch_for(place, "holes")
    _, p = s2.squeeze(hidden_states, mask, frequencies=M, profile="official", pooling=path, backend=place.backend)
    _, expected = s2.squeeze(hidden_states, mask, frequencies=M, pooling=path, backend=place.backend)
    assert_close(p, expected, CLOSE)


# ---------------------------------------------------------------- packed


@paths
def test_packed_is_padded(place, path):
    selector = selector_for(place)
    hidden_states, mask = batch_for(place, "mixed")
    packed, cu_seqlens = pack(hidden_states, mask)
    out = call(selector, packed, path=path, cu_seqlens=cu_seqlens)
    expected = call(selector, hidden_states, mask, path)
    assert_close(out, expected[mask] if path is None else expected, CLOSE)
    assert_close(selector.gates(packed, cu_seqlens=cu_seqlens), selector.gates(hidden_states, mask), CLOSE)


@paths
@modes
def test_official_packed_is_an_error(place, path, training):
    selector = selector_for(place, "official").train(training)
    packed, cu_seqlens = pack(*batch_for(place))
    with pytest.raises(ValueError, match=r"cu_seqlens: .*official"):
        call(selector, packed, path=path, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"cu_seqlens: .*official"):
        s2.squeeze(packed, cu_seqlens=cu_seqlens, profile="official", backend=place.backend)


# ---------------------------------------------------------------- a sentence with no real token


@paths
@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_sentence(place, path, packed):
    selector = selector_for(place)
    hidden_states, mask = batch_for(place, "right")
    mask[2] = False
    if packed:
        hidden_states, cu_seqlens = pack(hidden_states, mask)
        where = {"cu_seqlens": cu_seqlens}
    else:
        where = {"mask": mask}
    f, p = s2.squeeze(
        hidden_states, where.get("mask"), cu_seqlens=where.get("cu_seqlens"), frequencies=M, pooling=path,
        backend=place.backend,
    )  # fmt: skip
    assert not f[2].any() and f[[0, 1, 3]].all()
    assert p is None or not p[2].any()
    hidden_states = [u.requires_grad_() for u in hidden_states]
    out = call(selector, hidden_states, path=path, **where)
    assert (packed and path is None) or not out[2].any()
    assert not out.isnan().any()
    out.backward(make_gradient(out))
    for u in hidden_states:
        assert not u.grad.isnan().any() and u.grad.any()
        assert packed or not u.grad[2].any()
    gates = selector.gates(hidden_states, where.get("mask"), cu_seqlens=where.get("cu_seqlens"))
    nothing = selector.gates([torch.zeros(1, 1, D, device=place.device)] * N)  # f = 0
    assert_close(gates[2:3], nothing, CLOSE)


@paths
def test_a_batch_of_empty_sentences(place, path):
    selector = selector_for(place)
    hidden_states, _ = batch_for(place, "none")
    mask = torch.zeros(B, L, dtype=torch.bool, device=place.device)
    out, du, dp = gradients(selector, hidden_states, mask, path)
    assert not out.any() and not any(grad.any() for grad in du)
    assert not any(grad.isnan().any() for grad in dp)


@paths
@profiles
def test_no_tokens_at_all(place, path, profile):
    """L = 0: every sentence is empty."""
    selector = selector_for(place, profile)
    hidden_states = [torch.zeros(2, 0, D, device=place.device, requires_grad=True) for _ in range(N)]
    out = call(selector, hidden_states, path=path)
    assert out.shape == ((2, 0, D) if path is None else (2, D)) and not out.any()
    out.sum().backward()
    gates = selector.gates(hidden_states)
    assert gates.shape == (2, N, D) and gates.isfinite().all()


@paths
def test_an_empty_sentence_is_a_row_of_the_batch_statistics(place, path):
    """Three sentences, one of them empty: its f = 0 counts as the third row."""
    hidden_states, mask = batch_for(place, "right")
    mask[2] = False
    selector = selector_for(place).train()
    start = selector.norm.running_mean.clone()
    call(selector, hidden_states, mask, path)
    f, _ = s2.squeeze(hidden_states, mask, frequencies=M, backend=place.backend)
    assert not f[2].any()
    z = selector.up(torch.tanh(selector.down(f)))
    assert_close(selector.norm.running_mean, (0.9 * start + 0.1 * z.mean(0)).detach(), CLOSE)
    without = z[[0, 1, 3, 4, 5]].mean(0)
    assert (z.mean(0) - without).abs().max() > 1e-2


@paths
@modes
def test_official_empty_sentence(place, path, training):
    """Output and p are 0; the gates are finite and enter the normaliser, which stays a sum of one."""
    selector = selector_for(place, "official").train(training)
    hidden_states, mask = batch_for(place, "right")
    mask[2] = False
    out, du, _ = gradients(selector, hidden_states, mask, path)
    assert not out[2].any() and out[1].any()
    assert all(grad.isfinite().all() for grad in du)
    if path is not None:
        _, p = s2.squeeze(hidden_states, mask, frequencies=M, profile="official", pooling=path, backend=place.backend)
        assert not p[2].any()
    gates = selector.gates(hidden_states, mask)
    assert gates[2].all()
    assert abs(gates.sum().item() - 1) < 1e-5


# ---------------------------------------------------------------- B = 0


@paths
@modes
@profiles
@pytest.mark.parametrize("norm", ["batch", None])
def test_an_empty_batch(place, path, training, profile, norm):
    selector = selector_for(place, profile, gate_norm=norm).train(training)
    before = {name: value.clone() for name, value in selector.named_buffers()}
    hidden_states = [torch.zeros(0, L, D, device=place.device) for _ in range(N)]
    for mask in (None, torch.zeros(0, L, dtype=torch.bool, device=place.device)):
        out, du, dp = gradients(selector, hidden_states, mask, path)
        assert out.shape == ((0, L, D) if path is None else (0, D))
        assert all(grad.shape == (0, L, D) for grad in du)
        assert all(grad is not None and not grad.any() for grad in dp)  # zeros, and no NaN
    assert selector.gates(hidden_states).shape == (0, N, D)
    for name, value in selector.named_buffers():
        assert torch.equal(value, before[name]), name


@paths
@modes
def test_an_empty_packed_batch(place, path, training):
    selector = selector_for(place).train(training)
    hidden_states = [torch.zeros(0, D, device=place.device, requires_grad=True) for _ in range(N)]
    cu_seqlens = torch.zeros(1, dtype=torch.int32, device=place.device)
    out = call(selector, hidden_states, path=path, cu_seqlens=cu_seqlens)
    assert out.shape == (0, D)
    out.sum().backward()
    assert all(not parameter.grad.any() for parameter in selector.parameters())
    assert selector.norm.running_mean.isfinite().all() and selector.norm.running_var.isfinite().all()


# ---------------------------------------------------------------- B = 1 in training


@paths
@profiles
def test_one_sentence_has_no_batch_statistics(place, path, profile):
    selector = selector_for(place, profile).train()
    before = {name: value.clone() for name, value in selector.named_buffers()}
    hidden_states = [torch.randn(1, L, D, device=place.device) for _ in range(N)]
    with pytest.raises(ValueError):
        call(selector, hidden_states, path=path)
    for name, value in selector.named_buffers():  # the count goes up before the error, as in nn.BatchNorm1d
        assert name == "norm.num_batches_tracked" or torch.equal(value, before[name]), name
    frozen = selector_for(place, profile).train()
    frozen.norm.eval()
    assert call(frozen, hidden_states, path=path).isfinite().all()
    without = selector_for(place, profile, gate_norm=None).train()
    assert call(without, hidden_states, path=path).isfinite().all()


# ---------------------------------------------------------------- NaN and inf


@paths
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["none", "right", "packed"])
def test_nan_in_a_real_token_stays_in_its_sentence(place, path, value, kind):
    selector = selector_for(place)
    clean, mask = batch_for(place, "right" if kind == "packed" else kind)
    hidden_states = [u.clone() for u in clean]
    hidden_states[1][2, :, 3] = value
    assert mask is None or mask[2].any()
    if kind == "packed":
        packed, cu_seqlens = pack(hidden_states, mask)
        out = call(selector, packed, path=path, cu_seqlens=cu_seqlens)
        expected = call(selector, pack(clean, mask)[0], path=path, cu_seqlens=cu_seqlens)
        start, end = cu_seqlens[2:4].tolist()
        inside = slice(start, end) if path is None else slice(2, 3)
    else:
        out = call(selector, hidden_states, mask, path)
        expected = call(selector, clean, mask, path)
        inside = slice(2, 3)
    assert not out[inside].isfinite().all()
    others = torch.ones(len(out), dtype=torch.bool)
    others[inside] = False
    assert torch.equal(out[others], expected[others])
    assert out[others].isfinite().all()


@paths
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "mixed"])
@modes
def test_nan_at_padding_has_no_effect(place, path, value, kind, training):
    selector = selector_for(place).train(training)
    clean, mask = batch_for(place, kind)
    dirty = [torch.where(mask[..., None], u, torch.full_like(u, value)) for u in clean]
    assert not all(u.isfinite().all() for u in dirty)
    buffers = {name: b.clone() for name, b in selector.named_buffers()}
    expected = gradients(selector, clean, mask, path)
    after = {name: b.clone() for name, b in selector.named_buffers()}
    selector.load_state_dict(buffers, strict=False)
    actual = gradients(selector, dirty, mask, path)
    for a, e in zip([actual[0], *actual[1], *actual[2]], [expected[0], *expected[1], *expected[2]], strict=True):
        assert torch.equal(a, e)
    for name, value in selector.named_buffers():
        assert torch.equal(value, after[name]), name


@paths
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["real", "padding"])
def test_official_nan_reaches_the_batch(place, path, value, where):
    selector = selector_for(place, "official")
    hidden_states, mask = batch_for(place, "right")
    mask[2] = torch.arange(L, device=place.device) < 3
    hidden_states[1][2, 0 if where == "real" else L - 1, :] = value
    if value == float("inf"):  # both signs beside each other, so that no activation swallows it
        hidden_states[1][2, 0 if where == "real" else L - 1, ::2] = -value
    gates = selector.gates(hidden_states, mask)
    assert gates.isnan().all()
    out = call(selector, hidden_states, mask, path)
    assert out[mask].isnan().all() if path is None else out.isnan().all()


def test_nan_in_the_output_gradient_at_padding_has_no_effect(place):
    """v is 0 at padding whatever u is, so nothing flows back from there."""
    selector = selector_for(place)
    clean, mask = batch_for(place, "mixed")
    hidden_states = [u.requires_grad_() for u in clean]
    out = selector(hidden_states, mask)
    gradient = make_gradient(out)
    expected = torch.autograd.grad(out, hidden_states, gradient, retain_graph=True)
    actual = torch.autograd.grad(out, hidden_states, gradient.masked_fill(~mask[..., None], float("nan")))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


# ---------------------------------------------------------------- autocast


@paths
@profiles
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("replaced", [False, True])
def test_autocast_changes_nothing(place, path, profile, training, dtype, replaced):
    hidden_states, mask = batch_for(place, "right", dtype=dtype)

    def run(enabled):
        selector = selector_for(place, profile).train(training)
        if replaced:
            selector.down.register_forward_hook(lambda *args: None)
        autocast = torch.autocast(place.device, dtype=torch.bfloat16, enabled=enabled)
        out, du, dp = gradients(selector, hidden_states, mask, path, autocast)
        with autocast:
            gates = selector.gates(hidden_states, mask)
        return [out, gates, *du, *dp, *selector.buffers()]

    for a, e in zip(run(True), run(False), strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@paths
def test_autocast_around_the_backward_changes_no_op(monkeypatch, path):
    """The written-out backward; recorded PyTorch would be cast, as PyTorch's own modules are."""
    place = Place("op", through_ops(monkeypatch), "cpu")
    hidden_states, mask = batch_for(place)
    selector = selector_for(place)
    expected = gradients(selector, hidden_states, mask, path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(selector, hidden_states, mask, path)
    for a, e in zip([actual[0], *actual[1], *actual[2]], [expected[0], *expected[1], *expected[2]], strict=True):
        assert torch.equal(a, e)


def test_autocast_changes_no_function(place):
    hidden_states, mask = batch_for(place)
    parameters = make_parameters(N, D, H, torch.float32, device=place.device)

    def run():
        f, p = s2.squeeze(hidden_states, mask, pooling="mean", backend=place.backend)
        g = s2.gate(f, parameters, num_blocks=N, backend=place.backend)
        v = s2.fuse(hidden_states, g, mask, backend=place.backend)
        return f, p, g, v

    expected = run()
    with torch.autocast(place.device, dtype=torch.bfloat16):
        actual = run()
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


# ---------------------------------------------------------------- dtypes


def each_dtype(place):
    return DTYPES.get(place.name, DTYPES["op"][:3])


@profiles
@modes
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(place, profile, training, held):
    """v and o have the hidden states' dtype; f, p and gates are float32 (float64); parameters may be of any."""
    for dtype in each_dtype(place):
        selector = selector_for(place, profile).to(held).train(training)
        hidden_states, mask = batch_for(place, "right", dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        f, p = s2.squeeze(hidden_states, mask, frequencies=M, profile=profile, pooling="mean", backend=place.backend)
        gates = selector.gates(hidden_states, mask)
        assert (f.dtype, p.dtype, gates.dtype) == (wide, wide, wide)
        assert s2.fuse(hidden_states, gates, mask, backend=place.backend).dtype == dtype
        for path in PATHS:
            out, du, dp = gradients(selector, hidden_states, mask, path)
            assert out.dtype == dtype
            assert all(grad.dtype == dtype for grad in du)
            assert all(grad.dtype == held and grad.isfinite().all() for grad in dp)
        # computed in `wide` from the parameters as they are: the same as from parameters held in `wide`
        if not training:
            same = selector_for(place, profile).to(held).to(wide)
            assert_close(gates, same.gates(hidden_states, mask), 1e-5 if wide == torch.float32 else 1e-12)


# ---------------------------------------------------------------- second derivatives and forward mode: never zeros
#
# What an op computes raises. Where plain PyTorch computes, its derivatives of every order are there and must be right.


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
    names = [name for name, t in parameters._asdict().items() if t is not None and not name.startswith("running")]

    def rebuild(tensors):
        statistics = {name: getattr(parameters, name).clone() for name in ("running_mean", "running_var")}
        return parameters._replace(**statistics, **dict(zip(names, tensors, strict=True)))

    return hidden_states, mask, [getattr(parameters, name) for name in names], rebuild, f, g


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
    if plain and place.name not in DTYPES:
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
    """Tangents that are zero but for one input, for each of them."""
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
    dtype = torch.float64 if place.name in DTYPES else torch.float32
    if name == "gate" and training and place.name not in DTYPES:
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
    if place.name != "reference" and not training:
        assert count == len(inputs)


@paths
@profiles
@modes
@forwards
def test_the_selector_refuses_forward_mode(place, path, profile, training, forward):
    selector = selector_for(place, profile).train(training)
    hidden_states, mask = batch_for(place)
    for tangents in one_tangent_each(hidden_states):
        with refused():
            forward(lambda *u: call(selector, u, mask, path), hidden_states, tangents)


# ---------------------------------------------------------------- alone and in a batch


@paths
def test_a_sentence_alone_and_in_a_batch(place, path):
    """Profile paper, eval: alone, at another position, further padded, packed."""
    selector = selector_for(place)
    hidden_states, mask = batch_for(place, "right")
    out = call(selector, hidden_states, mask, path)
    for b in range(B):
        length = int(mask[b].sum())
        alone = call(selector, [u[b : b + 1, :length] for u in hidden_states], None, path)
        expected = out[b : b + 1, :length] if path is None else out[b : b + 1]
        assert_close(alone, expected, CLOSE)
    turned = call(selector, [u.flip(0) for u in hidden_states], mask.flip(0), path)
    assert_close(turned.flip(0), out, CLOSE)
    padded = [torch.nn.functional.pad(u, (0, 0, 0, 9), value=5.0) for u in hidden_states]
    longer = call(selector, padded, torch.nn.functional.pad(mask, (0, 9)), path)
    assert_close(longer[:, :L] if path is None else longer, out, CLOSE)
