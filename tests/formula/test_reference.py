"""The reference against the specification's formula, written out here a second time, and the ops against the reference.

``definition_*`` share nothing with the package: they stack the hidden states, fill the bases number by number and use
float64 throughout.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from builders import (
    GRADIENTS,
    LAYOUTS,
    MASKS,
    assert_close,
    make_batch,
    make_gradient,
    make_parameters,
    pack,
    through_ops,
)
from torch.utils._python_dispatch import TorchDispatchMode

import s2sent_kernels as s2
from s2sent_kernels import S2SentSelector, functional

X = [int(k) for k in "00110221203401301234501234561234"]
Y = [int(k) for k in "01012012230043154321065432106543"]
POOLINGS = ("mean", "cls", "last")


def c(k, i, P):
    return math.cos(math.pi * k * (i + 0.5) / P) * (math.sqrt(2) if k > 0 else 1.0) / math.sqrt(P)


def definition_squeeze(hidden_states, mask, frequencies, profile="paper", dtype=torch.float64):
    """f [B, D]"""
    u = torch.stack(hidden_states, dim=1).to(dtype)  # [B, N, L, D]
    B, N, L, D = u.shape
    if profile == "official":
        grid = F.adaptive_avg_pool2d(u.permute(0, 3, 1, 2), (6, 6))  # [B, D, 6, 6]
        plane = torch.zeros(D, 6, 6, dtype=torch.float64)
        for d in range(D):
            m = d // (D // frequencies)
            for i in range(6):
                for j in range(6):
                    plane[d, i, j] = c(X[m], i, 6) * c(Y[m], j, 6)
        return (grid * plane).sum((2, 3))
    pairs = [pair for pair in zip(X, Y, strict=True) if pair[0] < N][:frequencies]
    real = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
    alpha = torch.tensor([[c(x, n, N) for n in range(N)] for x, _ in pairs], dtype=torch.float64)
    beta = torch.zeros(B, frequencies, L, dtype=torch.float64)
    for b in range(B):
        places = real[b].nonzero().flatten().tolist()
        for m, (_, y) in enumerate(pairs):
            if y < len(places):
                row = [6 / math.sqrt(N * len(places)) * c(y, rank, len(places)) for rank in range(len(places))]
                beta[b, m, places] = torch.tensor(row, dtype=torch.float64)
    weights = (alpha[None, :, :, None] * beta[:, :, None, :]).to(dtype)  # [B, M, N, L]
    return torch.einsum("bnlmd,bmnl->bmd", u.unflatten(-1, (frequencies, -1)), weights).flatten(1)


def definition_pool_blocks(hidden_states, mask, pooling, dtype=torch.float64):
    """p [B, N, D]"""
    u = torch.stack(hidden_states, dim=1).to(dtype)
    B, _, L, _ = u.shape
    real = torch.ones(B, L, dtype=torch.bool) if mask is None else mask.bool()
    w = torch.zeros(B, L, dtype=torch.float64)
    for b in range(B):
        places = real[b].nonzero().flatten().tolist()
        if places:
            chosen = {"mean": places, "cls": places[:1], "last": places[-1:]}[pooling]
            w[b, chosen] = 1 / len(chosen)
    return torch.einsum("bnld,bl->bnd", u, w.to(dtype))


def definition_gate(f, parameters, N, activation="tanh", eps=1e-6, profile="paper", training=False):
    """g [B, N, D], in f's dtype"""
    p = type(parameters)(*(t if t is None else t.to(f.dtype) for t in parameters))
    D = f.shape[1]
    s = getattr(torch, activation)(torch.einsum("hd,bd->bh", p.down_weight, f) + p.down_bias)
    gates = []
    for n in range(N):
        part = slice(n * D, (n + 1) * D)
        z = torch.einsum("dh,bh->bd", p.up_weight[part], s) + p.up_bias[part]
        if p.norm_weight is not None:
            mean, variance = p.running_mean[part], p.running_var[part]
            if training:
                mean = z.mean(0)
                variance = ((z - mean) ** 2).mean(0)
            z = (z - mean) / torch.sqrt(variance + eps) * p.norm_weight[part] + p.norm_bias[part]
        gates.append(torch.sigmoid(z))
    e = torch.stack(gates, dim=1)
    if p.block_prior is not None:
        e = e + p.block_prior[:, None]
    powers = torch.exp(e)
    return powers / (powers.sum() if profile == "official" else powers.sum(1, keepdim=True))


def definition_fuse(hidden_states, gates, mask):
    """v [B, L, D]"""
    v = sum(g[:, None] * u.double() for g, u in zip(gates.unbind(1), hidden_states, strict=True))
    return v if mask is None else v * mask.double()[..., None]


def definition_select(hidden_states, parameters, mask, frequencies, pooling=None, profile="paper", **gate_options):
    """v [B, L, D], or o [B, D]"""
    f = definition_squeeze(hidden_states, mask, frequencies, profile)
    g = definition_gate(f, parameters, len(hidden_states), profile=profile, **gate_options)
    if pooling is None:
        return definition_fuse(hidden_states, g, mask)
    return torch.einsum("bnd,bnd->bd", g, definition_pool_blocks(hidden_states, mask, pooling))


# ---------------------------------------------------------------- the formula

# N, M, L, mask: pairwise rather than in full
SHAPES = [
    (1, 1, 5, "none"), (1, 3, 1, "right"), (1, 5, 33, "holes"), (1, 7, 33, "mixed"),
    (2, 2, 1, "none"), (2, 3, 5, "left"), (2, 7, 33, "right"), (2, 14, 5, "mixed"),
    (3, 1, 33, "left"), (3, 4, 5, "right"), (3, 5, 33, "none"), (3, 7, 1, "mixed"), (3, 20, 33, "holes"),
    (6, 3, 5, "holes"), (6, 4, 33, "mixed"), (6, 31, 5, "left"), (6, 7, 1, "none"),
    (7, 1, 1, "left"), (7, 5, 5, "mixed"), (7, 7, 33, "right"), (7, 32, 33, "holes"),
]  # fmt: skip
shapes = pytest.mark.parametrize("N, M, L, mask", SHAPES)


@shapes
def test_squeeze_is_the_formula(N, M, L, mask):
    hidden_states, attention_mask = make_batch(N, 5, L, 3 * M, mask=mask)
    f, p = s2.squeeze(hidden_states, attention_mask, frequencies=M, backend="reference")
    assert p is None
    assert_close(f, definition_squeeze(hidden_states, attention_mask, M), 1e-12)
    for pooling in POOLINGS:
        again, p = s2.squeeze(hidden_states, attention_mask, frequencies=M, pooling=pooling, backend="reference")
        assert torch.equal(again, f)
        assert_close(p, definition_pool_blocks(hidden_states, attention_mask, pooling), 1e-12)


@pytest.mark.parametrize("N", [1, 2, 3, 6, 7, 13])
@pytest.mark.parametrize("M", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("L", [1, 5, 6, 33])
def test_official_squeeze_is_the_pooled_plane(N, M, L):
    hidden_states, attention_mask = make_batch(N, 3, L, 2 * M, mask="right")
    expected = definition_squeeze(hidden_states, None, M, "official")
    for mask in (None, attention_mask):  # all L positions, whatever the mask
        f, _ = s2.squeeze(hidden_states, mask, frequencies=M, profile="official", backend="reference")
        assert_close(f, expected, 1e-12)
    f, p = s2.squeeze(
        hidden_states, attention_mask, frequencies=M, profile="official", pooling="mean", backend="reference"
    )
    assert_close(p, definition_pool_blocks(hidden_states, attention_mask, "mean"), 1e-12)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("profile, norm, prior", [
    ("paper", True, False), ("paper", False, True), ("paper", True, True), ("paper", False, False),
    ("official", True, False), ("official", False, False),
])  # fmt: skip
@pytest.mark.parametrize("N", [1, 2, 3, 7])
def test_gate_is_the_formula(N, profile, norm, prior, training, activation):
    parameters = make_parameters(N, 6, 5, norm=norm, prior=prior)
    f = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"activation": activation, "profile": profile, "training": training}
    expected = definition_gate(f, parameters, N, **options)
    g = s2.gate(f, parameters, num_blocks=N, backend="reference", **options)
    assert_close(g, expected, 1e-12)
    assert_close(g.sum() if profile == "official" else g.sum(1), torch.ones_like(expected.sum(1))[:1, 0].sum()
                 if profile == "official" else torch.ones_like(expected.sum(1)), 1e-12)  # fmt: skip


def test_gate_takes_eps():
    parameters = make_parameters(2, 4)
    f = torch.randn(3, 4, dtype=torch.float64)
    wide = s2.gate(f, parameters, num_blocks=2, eps=0.5, backend="reference")
    assert_close(wide, definition_gate(f, parameters, 2, eps=0.5), 1e-12)
    assert (wide - s2.gate(f, parameters, num_blocks=2, backend="reference")).abs().max() > 1e-4


def test_a_large_block_prior_does_not_overflow():
    parameters = make_parameters(3, 4, prior=True)._replace(block_prior=torch.tensor([0.0, 2000.0, -2000.0]).double())
    f = torch.randn(3, 4, dtype=torch.float64)
    g = s2.gate(f, parameters, num_blocks=3, backend="reference")
    assert_close(g, torch.tensor([0.0, 1.0, 0.0]).double()[None, :, None].expand(3, 3, 4), 1e-15)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("N", [1, 2, 3, 6, 7])
def test_fuse_is_the_formula(N, mask):
    hidden_states, attention_mask = make_batch(N, 5, 5, 6, mask=mask)
    g = torch.rand(5, N, 6, dtype=torch.float64)
    v = s2.fuse(hidden_states, g, attention_mask, backend="reference")
    assert_close(v, definition_fuse(hidden_states, g, attention_mask), 1e-12)
    if attention_mask is not None:
        assert not v[~attention_mask].any()


@shapes
@pytest.mark.parametrize("training", [False, True])
def test_select_is_the_formula(N, M, L, mask, training):
    hidden_states, attention_mask = make_batch(N, 5, L, 2 * M, mask=mask)
    parameters = make_parameters(N, 2 * M, prior=N > 2)
    options = {"frequencies": M, "training": training}
    v = s2.select(hidden_states, parameters, attention_mask, backend="reference", **options)
    assert_close(v, definition_select(hidden_states, parameters, attention_mask, **options), 1e-11)
    for pooling in POOLINGS:
        o = s2.select_pool(hidden_states, parameters, attention_mask, pooling=pooling, backend="reference", **options)
        assert_close(o, definition_select(hidden_states, parameters, attention_mask, pooling=pooling, **options), 1e-11)


@pytest.mark.parametrize("mask", ["none", "right", "holes", "mixed"])
@pytest.mark.parametrize("training", [False, True])
def test_official_select_is_the_formula(mask, training):
    hidden_states, attention_mask = make_batch(3, 5, 9, 8, mask=mask)
    parameters = make_parameters(3, 8)
    options = {"frequencies": 4, "training": training, "profile": "official"}
    v = s2.select(hidden_states, parameters, attention_mask, backend="reference", **options)
    assert_close(v, definition_select(hidden_states, parameters, attention_mask, **options), 1e-12)
    for pooling in POOLINGS:
        o = s2.select_pool(hidden_states, parameters, attention_mask, pooling=pooling, backend="reference", **options)
        assert_close(o, definition_select(hidden_states, parameters, attention_mask, pooling=pooling, **options), 1e-12)


@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_pooling_the_fused_tokens_is_the_pooled_output(pooling):
    """o is v's mean, first or last real token: the two paths are one function."""
    hidden_states, attention_mask = make_batch(3, 6, 7, 8, mask="mixed")
    parameters = make_parameters(3, 8)
    v = s2.select(hidden_states, parameters, attention_mask, backend="reference")
    if pooling is None:
        assert not v[~attention_mask].any()
        return
    o = s2.select_pool(hidden_states, parameters, attention_mask, pooling=pooling, backend="reference")
    assert_close(o, definition_pool_blocks([v], attention_mask, pooling)[:, 0], 1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("N, M", [(1, 7), (3, 5), (6, 3)])
def test_packed_is_padded(N, M, mask):
    hidden_states, attention_mask = make_batch(N, 6, 5, 2 * M, mask=mask)
    packed, cu_seqlens = pack(hidden_states, attention_mask)
    parameters = make_parameters(N, 2 * M)
    real = slice(None) if attention_mask is None else attention_mask
    for pooling in POOLINGS:
        f, p = s2.squeeze(hidden_states, attention_mask, frequencies=M, pooling=pooling, backend="reference")
        fp, pp = s2.squeeze(packed, cu_seqlens=cu_seqlens, frequencies=M, pooling=pooling, backend="reference")
        assert_close(fp, f, 1e-12)
        assert_close(pp, p, 1e-12)
        options = {"frequencies": M, "pooling": pooling, "backend": "reference"}
        o = s2.select_pool(hidden_states, parameters, attention_mask, **options)
        assert_close(s2.select_pool(packed, parameters, cu_seqlens=cu_seqlens, **options), o, 1e-12)
    v = s2.select(hidden_states, parameters, attention_mask, frequencies=M, backend="reference")
    vp = s2.select(packed, parameters, cu_seqlens=cu_seqlens, frequencies=M, backend="reference")
    assert_close(vp, v[real].flatten(0, -2), 1e-12)


def test_masks_of_every_dtype_are_the_same_mask():
    hidden_states, mask = make_batch(2, 5, 6, 4, mask="mixed")
    expected, _ = s2.squeeze(hidden_states, mask, frequencies=2, backend="reference")
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16, torch.bfloat16):
        f, _ = s2.squeeze(hidden_states, mask.to(dtype), frequencies=2, backend="reference")
        assert torch.equal(f, expected), dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    hidden_states, mask = make_batch(3, 5, 7, 8, layout=layout)
    assert layout == "contiguous" or not hidden_states[0].is_contiguous()
    parameters = make_parameters(3, 8)
    dense = [u.contiguous() for u in hidden_states]
    v = s2.select(hidden_states, parameters, mask, backend="reference")
    assert_close(v, definition_select(dense, parameters, mask, 4), 1e-12)
    o = s2.select_pool(hidden_states, parameters, mask, backend="reference")
    assert_close(o, definition_select(dense, parameters, mask, 4, "mean"), 1e-12)


# ---------------------------------------------------------------- facts of the factor and of the table


@pytest.mark.parametrize("N", [1, 3, 7])
@pytest.mark.parametrize("L", [1, 5, 33, 512])
def test_one_component_is_six_times_the_global_average(N, L):
    hidden_states, mask = make_batch(N, 3, L, 4, mask="right")
    f, _ = s2.squeeze(hidden_states, mask, frequencies=1, backend="reference")
    average = definition_pool_blocks(hidden_states, mask, "mean").mean(1)
    assert_close(f, 6 * average, 1e-12)


@pytest.mark.parametrize("N, count", list(zip(range(1, 10), [7, 14, 20, 25, 29, 31, 32, 32, 32], strict=True)))
def test_number_of_components(N, count):
    hidden_states, _ = make_batch(N, 1, 3, count, mask="none")
    f, _ = s2.squeeze(hidden_states, frequencies=count, backend="reference")
    assert_close(f, definition_squeeze(hidden_states, None, count), 1e-12)
    hidden_states, _ = make_batch(N, 1, 3, count + 1, mask="none")
    with pytest.raises(ValueError, match=rf"frequencies: .*{N}\b.*{count + 1}\b"):
        s2.squeeze(hidden_states, frequencies=count + 1, backend="reference")


def test_a_component_beyond_the_sentence_is_zero():
    """y >= l: a sentence of two tokens has no third frequency, one of three has."""
    hidden_states, _ = make_batch(1, 2, 3, 7, mask="none")
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    f, _ = s2.squeeze(hidden_states, mask, frequencies=7, backend="reference")  # y = 0 1 2 3 4 5 6
    assert f[0, :2].all() and not f[0, 2:].any()
    assert f[1, :3].all() and not f[1, 3:].any()


def test_long_sentences_keep_their_digits():
    hidden_states, _ = make_batch(2, 1, 4099, 7, mask="none")
    f, _ = s2.squeeze(hidden_states, frequencies=7, backend="reference")
    assert_close(f, definition_squeeze(hidden_states, None, 7), 1e-11)


# ---------------------------------------------------------------- gradients of the reference


def small(N=2, requires_grad=True):
    hidden_states, mask = make_batch(N, 4, 4, 4, mask="mixed", requires_grad=requires_grad)
    return hidden_states, mask


def kept(parameters):
    """What gradcheck varies: every tensor but the running statistics. And the way back to GateParameters, whose
    running statistics are fresh copies, because batch statistics update them."""
    names = [name for name, t in parameters._asdict().items() if t is not None and not name.startswith("running")]

    def rebuild(tensors):
        statistics = {
            name: t.clone() for name, t in parameters._asdict().items() if t is not None and name.startswith("running")
        }
        return parameters._replace(**statistics, **dict(zip(names, tensors, strict=True)))

    return [getattr(parameters, name) for name in names], rebuild


@pytest.fixture(params=["reference", "op"])
def backend(request, monkeypatch):
    return "reference" if request.param == "reference" else through_ops(monkeypatch)


@pytest.mark.parametrize("profile, M", [("paper", 1), ("paper", 4), ("official", 2)])
@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_gradcheck_squeeze(backend, profile, M, pooling):
    hidden_states, mask = small()

    def function(*hidden_states):
        f, p = s2.squeeze(hidden_states, mask, frequencies=M, profile=profile, pooling=pooling, backend=backend)
        return f if p is None else (f, p)

    assert torch.autograd.gradcheck(function, hidden_states)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("profile, norm, prior", [
    ("paper", True, False), ("paper", False, True), ("paper", True, True), ("official", True, False),
])  # fmt: skip
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_gradcheck_gate(backend, activation, profile, norm, prior, training):
    tensors, rebuild = kept(make_parameters(2, 4, 3, norm=norm, prior=prior, requires_grad=True))
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
    tensors, rebuild = kept(make_parameters(2, 4, 3, prior=profile == "paper", requires_grad=True))
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
    selector = S2SentSelector(4, 2, 3, 2, block_prior=True, backend=backend).double().train(training)
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
@pytest.mark.parametrize("pooling, used", [
    (None, (True,)), ("mean", (True, True)), ("cls", (True, True)), ("last", (True, False)), ("mean", (False, True)),
])  # fmt: skip
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
@pytest.mark.parametrize("pooling", [None, "mean", "cls", "last"])
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
@pytest.mark.parametrize("activation", ["tanh", "relu"])
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
@pytest.mark.parametrize("used", [(True, True, True), (True, False, True), (False, True, True), (False, True, False),
                                  (False, False, True)])  # fmt: skip
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


# ---------------------------------------------------------------- each hidden state's gradient is written once


class Count(TorchDispatchMode):
    """Calls of squeeze_backward and squeeze, and whatever else adds or copies tensors shaped like a hidden state."""

    WATCHED = ("aten::add", "aten::mul", "aten::copy", "aten::clone", "aten::zeros_like")

    def __init__(self, shape):
        super().__init__()
        self.shape, self.writes, self.reads, self.extra = shape, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if name.startswith("s2sent::squeeze_backward"):
            self.writes += 1
        elif name.startswith("s2sent::fuse_backward"):
            self.reads += 1
        elif isinstance(out, torch.Tensor) and out.shape == self.shape and name.startswith(self.WATCHED):
            self.extra.append(name)
        return out


def backward_calls(function, hidden_states):
    with Count(hidden_states[0].shape) as count:
        out = function(hidden_states)
        out.backward(make_gradient(out))
    assert all(u.grad is not None for u in hidden_states)
    return count


def test_the_count_sees_what_autograd_adds():
    """The positive control: squeeze and fuse as two ops write twice, and autograd adds."""
    hidden_states, mask = make_batch(3, 6, 5, 8, requires_grad=True)
    parameters = make_parameters(3, 8)

    def function(u):
        f, _ = torch.ops.s2sent.squeeze(u, mask, None, 4, "paper", None, "reference")
        g = s2.gate(f, parameters, num_blocks=3, backend="reference")
        return torch.ops.s2sent.fuse(u, mask, None, g, "reference")

    count = backward_calls(function, hidden_states)
    assert count.writes == 2
    assert count.extra.count("aten::add.Tensor") == 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate_function", ["fused", "modules"])
@pytest.mark.parametrize("gate_needs", [True, False])
def test_the_token_path_writes_once(gate_function, gate_needs, packed):
    torch.manual_seed(0)
    hidden_states, mask = make_batch(3, 6, 5, 8)
    cu_seqlens = None
    if packed:
        hidden_states, cu_seqlens = pack(hidden_states, mask)
        mask = None
    hidden_states = [u.requires_grad_() for u in hidden_states]
    parameters = make_parameters(3, 8, requires_grad=gate_needs)
    linear = torch.nn.Linear(8, 24).double().requires_grad_(gate_needs)

    def gate(f):
        if gate_function == "fused":
            return s2.gate(f, parameters, num_blocks=3, backend="reference")
        return linear(f).sigmoid().unflatten(1, (3, 8))

    def by_reference(u):
        return functional.select_with(gate, u, mask, cu_seqlens, 4, "paper", "reference")

    by_reference(hidden_states).backward(make_gradient(hidden_states[0]))
    expected = [u.grad for u in hidden_states]
    for u in hidden_states:
        u.grad = None

    with pytest.MonkeyPatch.context() as monkeypatch:
        backend = through_ops(monkeypatch)
        count = backward_calls(
            lambda u: functional.select_with(gate, u, mask, cu_seqlens, 4, "paper", backend), hidden_states
        )
    assert (count.writes, count.reads, count.extra) == (1, 1, [])
    for u, grad in zip(hidden_states, expected, strict=True):
        assert_close(u.grad, grad, 1e-12)


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("training", [False, True])
def test_the_selector_writes_once(pooling, profile, training, monkeypatch):
    torch.manual_seed(0)
    selector = S2SentSelector(8, 3, 5, 4, profile=profile).double().train(training)
    selector.backend = through_ops(monkeypatch)
    hidden_states, mask = make_batch(3, 6, 5, 8, requires_grad=True)

    def function(u):
        return selector(u, mask) if pooling is None else selector.pool(u, mask, pooling=pooling)

    count = backward_calls(function, hidden_states)
    assert (count.writes, count.extra) == (1, [])
    assert count.reads == (1 if pooling is None else 0)  # the pooled backward reads no hidden state


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_the_pooled_path_saves_no_hidden_state(pooling, monkeypatch):
    selector = S2SentSelector(8, 3, 5, 4).double().eval()
    selector.backend = through_ops(monkeypatch)
    hidden_states, mask = make_batch(3, 6, 5, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = selector(hidden_states, mask) if pooling is None else selector.pool(hidden_states, mask)
    shapes = [t.shape for t in saved]
    assert shapes.count(hidden_states[0].shape) == (3 if pooling is None else 0)
    out.sum().backward()


# ---------------------------------------------------------------- low precision: at most twice PyTorch's own error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, M, L, mask", [(3, 4, 33, "mixed"), (6, 3, 5, "none"), (7, 7, 33, "holes")])
@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_low_precision_forward_and_gradients(dtype, N, M, L, mask, pooling, backend):
    """Against float64 on the same rounded inputs; beside it the formula in PyTorch with everything in ``dtype``."""
    D = 16 * M  # enough numbers for their largest error to say something
    low, attention_mask = make_batch(N, 32, L, D, dtype=dtype, mask=mask)
    parameters = make_parameters(N, D, dtype=torch.float32)

    def plain(u):
        """The formula with the arithmetic of u's dtype, as an eager user would write it."""
        kind = u[0].dtype
        g = definition_gate(definition_squeeze(u, attention_mask, M, dtype=kind), parameters, N)
        if pooling is None:
            v = sum(g[:, n, None] * u[n] for n in range(N))
            return v if attention_mask is None else v * attention_mask[..., None]
        return (g * definition_pool_blocks(u, attention_mask, pooling, dtype=kind)).sum(1)

    def run(function, u):
        u = [t.detach().clone().requires_grad_() for t in u]
        out = function(u)
        out.backward(make_gradient(low[0] if pooling is None else low[0][:, 0]).to(out.dtype))
        return [out.detach(), *(t.grad for t in u)]

    options = {"frequencies": M, "backend": backend}

    def ours(u):
        if pooling is None:
            return s2.select(u, parameters, attention_mask, **options)
        return s2.select_pool(u, parameters, attention_mask, pooling=pooling, **options)

    truth = run(plain, [t.double() for t in low])
    theirs = run(plain, low)
    mine = run(ours, low)
    for index, (t, a, b) in enumerate(zip(truth, theirs, mine, strict=True)):
        assert b.dtype == dtype
        allowed = 2 * (a.double() - t).abs().max()
        assert (b.double() - t).abs().max() <= allowed, f"tensor {index}"
