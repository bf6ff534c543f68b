"""The reference against the specification's formulas (definition.py)."""

import pytest
import torch
from builders import (
    LAYOUTS,
    MASKS,
    assert_close,
    make_batch,
    make_gradient,
    make_parameters,
    pack,
    table,
)
from definition import definition_fuse, definition_gate, definition_pool_blocks, definition_select, definition_squeeze

import s2sent_kernels as s2
from s2sent_kernels.formula.call import ACTIVATIONS, POOLINGS

# ---------------------------------------------------------------- the formula

# N, M, L, mask: pairwise rather than in full
SHAPES = [
    (1, 1, 5, "none"),
    (1, 3, 1, "right"),
    (1, 5, 33, "holes"),
    (1, 7, 33, "mixed"),
    (2, 2, 1, "none"),
    (2, 3, 5, "left"),
    (2, 7, 33, "right"),
    (2, 14, 5, "mixed"),
    (3, 1, 33, "left"),
    (3, 4, 5, "right"),
    (3, 5, 33, "none"),
    (3, 7, 1, "mixed"),
    (3, 20, 33, "holes"),
    (6, 3, 5, "holes"),
    (6, 4, 33, "mixed"),
    (6, 31, 5, "left"),
    (6, 7, 1, "none"),
    (7, 1, 1, "left"),
    (7, 5, 5, "mixed"),
    (7, 7, 33, "right"),
    (7, 32, 33, "holes"),
]
shapes = table("N, M, L, mask", SHAPES)


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [False, True])
@table(
    "profile, norm, prior",
    [
        ("paper", True, False),
        ("paper", False, True),
        ("paper", True, True),
        ("paper", False, False),
        ("official", True, False),
        ("official", False, False),
    ],
)
@pytest.mark.parametrize("N", [1, 2, 3, 7])
def test_gate_is_the_formula(N, profile, norm, prior, training, activation):
    parameters = make_parameters(N, 6, 5, norm=norm, prior=prior)
    f = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"activation": activation, "profile": profile, "training": training}
    expected = definition_gate(f, parameters, N, **options)
    g = s2.gate(f, parameters, num_blocks=N, backend="reference", **options)
    assert_close(g, expected, 1e-12)
    assert_close(
        g.sum() if profile == "official" else g.sum(1),
        torch.ones_like(expected.sum(1))[:1, 0].sum() if profile == "official" else torch.ones_like(expected.sum(1)),
        1e-12,
    )


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


# ---------------------------------------------------------------- low precision: beside PyTorch's own error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@table("N, M, L, mask", [(3, 4, 33, "mixed"), (6, 3, 5, "none"), (7, 7, 33, "holes")])
@pytest.mark.parametrize("pooling", [None, "mean", "last"])
def test_low_precision_forward_and_gradients(dtype, N, M, L, mask, pooling, backend):
    """Against float64 on the same rounded inputs: the root mean square of the errors is at most 1.5 times that of the formula in
    PyTorch with everything in ``dtype``. The largest one is at most twice PyTorch's, but for the rounding of the result, in which
    a BLAS may be lucky."""
    D = 16 * M  # enough numbers for their largest error to be meaningful
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
        error, eager = (b.double() - t).abs(), (a.double() - t).abs()
        assert error.square().mean() <= 1.5**2 * eager.square().mean(), f"tensor {index}"
        half_an_ulp = torch.finfo(dtype).eps / 2 * t.abs().max()
        assert error.max() <= 2 * eager.max() + half_an_ulp, f"tensor {index}"


@pytest.mark.parametrize("options", [{}, {"training": True}, {"profile": "official"}], ids=str)
def test_forward_mode_through_the_gates_parameters(options):
    """Plain PyTorch has forward mode; ops alone refuse it."""
    parameters = make_parameters(3, 8)
    if options:
        parameters = parameters._replace(block_prior=None)
    f, tangent = torch.randn(4, 8, dtype=torch.float64), torch.randn_like(parameters.down_weight)

    def gate(weight):
        copied = parameters.each(torch.clone)._replace(down_weight=weight)  # training updates the running statistics
        return s2.gate(f, copied, num_blocks=3, backend="reference", **options)

    _, found = torch.func.jvp(gate, (parameters.down_weight,), (tangent,))
    step = 1e-6 * tangent
    expected = (gate(parameters.down_weight + step) - gate(parameters.down_weight - step)) / 2e-6
    assert_close(found, expected, 1e-6)
