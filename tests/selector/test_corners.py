"""The specification's table of corner cases: masks, packing, empty sentences and batches. See corners.py."""

import pytest
import torch
from builders import assert_close, make_gradient, pack
from corners import (
    CLOSE,
    POOLINGS,
    B,
    D,
    L,
    M,
    N,
    batch_for,
    call,
    every_path,
    gradients,
    modes,
    paths,
    profiles,
    selector_for,
)
from torch.utils.checkpoint import checkpoint

import s2sent_kernels as s2

# ---------------------------------------------------------------- attention mask given


@paths
def test_paper_sees_real_tokens_only(place, path):
    """Values at padding change nothing and have no gradient."""
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


@every_path
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
        hidden_states,
        where.get("mask"),
        cu_seqlens=where.get("cu_seqlens"),
        frequencies=M,
        pooling=path,
        backend=place.backend,
    )
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
    assert place.computes_float64 or torch.equal(gates[2:3], nothing)  # native and triton promise the bits


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
    without = z[torch.arange(B) != 2].mean(0)
    assert (z.mean(0) - without).abs().max() > 1e-2


@paths
@modes
def test_official_empty_sentence(place, path, training):
    """Output and p are 0. The gates are finite and enter the normaliser: all gates still sum to one."""
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
    selector.zero_grad()
    gates = selector.gates(hidden_states)
    assert gates.shape == (0, N, D)
    gates.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in selector.parameters())
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

ONE_SENTENCE = r"gate_norm: expected 2 or more sentences in a batch, .* got 1\. .* \(dataloader_drop_last=True"


@paths
@profiles
def test_one_sentence_has_no_batch_statistics(place, path, profile):
    selector = selector_for(place, profile).train()
    before = {name: value.clone() for name, value in selector.named_buffers()}
    hidden_states = [torch.randn(1, L, D, device=place.device) for _ in range(N)]
    with pytest.raises(ValueError, match=ONE_SENTENCE):
        call(selector, hidden_states, path=path)
    with pytest.raises(ValueError, match=ONE_SENTENCE):
        selector.gates(hidden_states)
    for name, value in selector.named_buffers():  # the count too
        assert torch.equal(value, before[name]), name
    frozen = selector_for(place, profile).train()
    frozen.norm.eval()
    assert call(frozen, hidden_states, path=path).isfinite().all()
    without = selector_for(place, profile, gate_norm=None).train()
    assert call(without, hidden_states, path=path).isfinite().all()


@paths
@pytest.mark.parametrize("kind", ["hooked", "without running statistics"])
def test_one_sentence_under_a_norm_that_is_called_as_a_module(place, path, kind):
    selector = selector_for(place).train()
    if kind == "hooked":
        selector.norm.register_forward_hook(lambda module, args, output: None)
    else:
        selector.norm = torch.nn.BatchNorm1d(N * D, track_running_stats=False).to(place.device).eval()
    hidden_states = [torch.randn(1, L, D, device=place.device) for _ in range(N)]
    with pytest.raises(ValueError, match=ONE_SENTENCE):
        call(selector, hidden_states, path=path)
    assert all(not tracked for name, tracked in selector.named_buffers() if name == "norm.num_batches_tracked")


def test_one_sentence_in_the_functions(place):
    selector = selector_for(place)
    parameters = selector.gate_parameters()
    hidden_states = [torch.randn(1, L, D, device=place.device) for _ in range(N)]
    options = {"frequencies": selector.frequencies, "backend": place.backend, "training": True}
    for function in (s2.select, s2.select_pool):
        with pytest.raises(ValueError, match=ONE_SENTENCE):
            function(hidden_states, parameters, **options)
        bare = parameters._replace(norm_weight=None, norm_bias=None, running_mean=None, running_var=None)
        assert function(hidden_states, bare, **options).isfinite().all()


# ---------------------------------------------------------------- a forward that is recomputed in the backward pass


@paths
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_recomputed_forward_counts_once(place, path, use_reentrant, hooked):
    """The running statistics and gradients are those without a checkpoint. A hook lets the norm be called as a module."""
    found = []
    for checkpointed in (False, True):
        selector = selector_for(place).train()
        if hooked:
            selector.norm.register_forward_hook(lambda module, args, output: None)
        hidden_states, mask = batch_for(place)
        leaf = hidden_states[0].requires_grad_()

        def run(first, selector=selector, rest=hidden_states[1:], mask=mask):
            return call(selector, [first, *rest], mask, path)

        out = checkpoint(run, leaf, use_reentrant=use_reentrant) if checkpointed else run(leaf)
        out.backward(make_gradient(out))
        found.append([leaf.grad, *(p.grad for p in selector.parameters()), *selector.buffers()])
        assert selector.norm.num_batches_tracked == 1 and selector.norm.momentum == 0.1
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


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
