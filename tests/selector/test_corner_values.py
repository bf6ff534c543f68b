"""The specification's table of corner cases: NaN and infinity, autocast, dtypes. See corners.py."""

import pytest
import torch
from builders import assert_close, make_gradient, make_parameters, pack
from corners import (
    INTERPRETED,
    PATHS,
    D,
    H,
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

import s2sent_kernels as s2
from s2sent_kernels.formula.call import KERNEL_DTYPES

# ---------------------------------------------------------------- NaN and inf


LAYOUTS = ("none", "right", "left", "holes", "packed")
POISONED = 2  # the sentence that NaN or infinity is put into
# Under the slow interpreter infinity has one sign.
values = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")][: 2 if INTERPRETED else 3])
layouts = pytest.mark.parametrize("kind", LAYOUTS)


def laid_out(place, kind):
    """Hidden states, where their tokens are, and for each kind of tensor which rows are the poisoned sentence's: of [B, ...], and
    of tensors like a hidden state."""
    hidden_states, mask = batch_for(place, "right" if kind == "packed" else kind)
    of_sentence = torch.arange(len(hidden_states[0]), device=place.device) == POISONED
    if kind != "packed":
        return hidden_states, {} if mask is None else {"mask": mask}, of_sentence, of_sentence
    hidden_states, cu_seqlens = pack(hidden_states, mask)
    place_of = torch.arange(len(hidden_states[0]), device=place.device)
    return (
        hidden_states,
        {"cu_seqlens": cu_seqlens},
        of_sentence,
        (place_of >= cu_seqlens[POISONED]) & (place_of < cu_seqlens[POISONED + 1]),
    )


def poisoned(hidden_states, rows, value):
    """One feature of one block; the whole sentence, so that a real token is among them."""
    changed = [u.clone() for u in hidden_states]
    changed[1][rows, ..., 3] = value
    return changed


def stays(found, clean, rows):
    """``rows`` are not all finite, and the others are bit by bit what they were."""
    assert not found[rows].isfinite().all()
    assert torch.equal(found[~rows], clean[~rows])
    assert found[~rows].isfinite().all()


@every_path
@values
@layouts
def test_nan_in_a_real_token_stays_in_its_sentence(place, path, value, kind):
    selector = selector_for(place)
    clean, where, of_sentence, of_token = laid_out(place, kind)
    expected = call(selector, clean, path=path, **where)
    found = call(selector, poisoned(clean, of_token, value), path=path, **where)
    stays(found, expected, of_token if path is None else of_sentence)


@values
@layouts
def test_nan_stays_in_its_sentence_block_by_block(place, value, kind):
    selector = selector_for(place)
    clean, where, of_sentence, of_token = laid_out(place, kind)
    where = {"attention_mask" if name == "mask" else name: tensor for name, tensor in where.items()}

    def result(hidden_states):
        stream = selector.blockwise(**where, pooling="mean")
        with torch.no_grad():
            for block, u in enumerate(hidden_states):
                stream.add(block, u)
            return stream.result()

    stays(result(poisoned(clean, of_token, value)), result(clean), of_sentence)


@paths
@values
@layouts
@pytest.mark.parametrize("origin", ["hidden state", "output's gradient"])
def test_nan_stays_in_its_sentence_backward(place, path, value, kind, origin):
    """The hidden states' gradients. The parameters' are sums over the batch."""
    selector = selector_for(place)
    clean, where, of_sentence, of_token = laid_out(place, kind)

    def grads(hidden_states, poison):
        leaves = [u.detach().clone().requires_grad_() for u in hidden_states]
        out = call(selector, leaves, path=path, **where)
        gradient = make_gradient(out)
        if poison:
            gradient[of_token if path is None else of_sentence, ..., 3] = value
        return torch.autograd.grad(out, leaves, gradient)

    expected = grads(clean, False)
    if origin == "hidden state":
        found = grads(poisoned(clean, of_token, value), False)
    else:
        found = grads(clean, True)
    for one, other in zip(found, expected, strict=True):
        stays(one, other, of_token)


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
    if value == float("inf"):  # both signs, so that no activation saturates to a finite value
        hidden_states[1][2, 0 if where == "real" else L - 1, ::2] = -value
    gates = selector.gates(hidden_states, mask)
    assert gates.isnan().all()
    out = call(selector, hidden_states, mask, path)
    assert out[mask].isnan().all() if path is None else out.isnan().all()


@modes
@pytest.mark.parametrize("kind", ["left", "mixed"])
def test_nan_in_the_output_gradient_at_padding_has_no_effect(place, kind, training):
    """v is 0 at padding whatever u is, so no gradient flows back from there."""
    selector = selector_for(place).train(training)
    clean, mask = batch_for(place, kind)
    hidden_states = [u.requires_grad_() for u in clean]
    out = selector(hidden_states, mask)
    gradient = make_gradient(out)
    expected = torch.autograd.grad(out, hidden_states, gradient, retain_graph=True)
    actual = torch.autograd.grad(out, hidden_states, gradient.masked_fill(~mask[..., None], float("nan")))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


# ---------------------------------------------------------------- autocast

# hidden states' dtype, whether a part is hooked; under the slow interpreter half of the pairs
AUTOCAST = [(torch.float32, False), (torch.bfloat16, True)]
if not INTERPRETED:
    AUTOCAST += [(torch.float32, True), (torch.bfloat16, False)]


@paths
@profiles
@modes
@pytest.mark.parametrize("dtype, replaced", AUTOCAST)
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
def test_autocast_around_the_backward_changes_no_op(place, path):
    """The written-out backward; recorded PyTorch would be cast, as PyTorch's own modules are."""
    if place.name == "reference":
        pytest.skip("its backward is recorded PyTorch")
    hidden_states, mask = batch_for(place)
    selector = selector_for(place)
    expected = gradients(selector, hidden_states, mask, path)
    with torch.autocast(place.device, dtype=torch.bfloat16):
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

HELD = [torch.float32, torch.bfloat16, torch.float16, torch.float64]  # by parameters


@profiles
@modes
@pytest.mark.parametrize("held", HELD)
def test_dtypes(place, profile, training, held):
    """v and o have the hidden states' dtype; f, p and gates are float32 (float64); parameters may be of any."""
    # the interpreter is slow: each dtype of parameters with one of hidden states
    for dtype in [KERNEL_DTYPES[HELD.index(held) % len(KERNEL_DTYPES)]] if INTERPRETED else place.dtypes:
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
