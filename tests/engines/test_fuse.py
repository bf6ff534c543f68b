"""fuse: v, and the gradients of the gates and of every hidden state."""

import pytest
import torch
from builders import NAN, table
from harness import BACKEND, BF16, DEVICE, F16, F32, INTERPRETED, assert_as_close, check, make_batch, pack, randn

from s2sent_kernels import functional

# Pairwise: every possible pair of values of two columns occurs in some row.
# N, D, L, mask, dtype, layout, output gradient
CASES = [
    (1, 7, 1, "left", F16, "expanded", "strided"),
    (1, 7, 5, "right", F32, "expanded", "expanded"),
    (1, 40, 5, "mixed", F16, "window", "expanded"),
    (1, 40, 5, "packed", F16, "different", "random"),
    (1, 66, 5, "none", F16, "contiguous", "expanded"),
    (1, 136, 1, "holes", F16, "offset", "random"),
    (1, 136, 33, "mixed", F32, "different", "strided"),
    (1, 136, 33, "left", F16, "transposed", "expanded"),
    (2, 7, 1, "right", F16, "different", "expanded"),
    (2, 7, 5, "holes", F32, "window", "random"),
    (2, 7, 33, "none", F32, "offset", "strided"),
    (2, 7, 33, "packed", F32, "contiguous", "strided"),
    (2, 7, 33, "holes", F32, "contiguous", "strided"),
    (2, 40, 5, "holes", F16, "expanded", "strided"),
    (2, 66, 1, "mixed", F16, "transposed", "expanded"),
    (2, 66, 1, "none", F16, "different", "random"),
    (2, 136, 5, "packed", F32, "offset", "random"),
    (2, 136, 33, "left", F16, "window", "expanded"),
    (3, 7, 33, "mixed", F16, "expanded", "random"),
    (3, 40, 1, "right", F32, "contiguous", "random"),
    (3, 66, 1, "packed", F16, "window", "strided"),
    (3, 66, 1, "mixed", F16, "contiguous", "random"),
    (3, 66, 5, "left", F32, "offset", "expanded"),
    (3, 66, 33, "holes", F32, "different", "random"),
    (3, 136, 1, "none", F16, "expanded", "random"),
    (3, 136, 5, "right", F32, "offset", "expanded"),
    (3, 136, 33, "right", F32, "transposed", "strided"),
    (7, 7, 5, "holes", F16, "transposed", "expanded"),
    (7, 40, 1, "mixed", F32, "offset", "random"),
    (7, 40, 5, "left", F32, "different", "random"),
    (7, 40, 5, "none", F32, "window", "expanded"),
    (7, 40, 33, "none", F16, "transposed", "random"),
    (7, 66, 33, "packed", F32, "expanded", "expanded"),
    (7, 66, 33, "right", F32, "window", "strided"),
    (7, 136, 5, "left", F16, "contiguous", "strided"),
]


def fuse_of(where):
    """fuse as ``check`` calls it."""

    def function(backend, inputs):
        hidden = [u for name, u in inputs.items() if name != "g"]
        return {"v": functional.fuse(hidden, inputs["g"], **where, backend=backend)}

    return function


def inputs_of(batch, gates=None):
    """Gates of both signs, though those of the selector are positive."""
    if gates is None:
        gates = randn(batch.num_sentences, len(batch.hidden_states), batch.hidden_states[0].shape[-1], seed=77)
    return {"g": gates} | {f"u{n}": u for n, u in enumerate(batch.hidden_states)}


@table("N, D, L, mask, dtype, layout, gradient", CASES)
def test_fuse(N, D, L, mask, dtype, layout, gradient):
    batch = make_batch(N, 3, L, D, dtype, mask, layout)
    found = check(fuse_of(batch.where), inputs_of(batch), gradient)
    assert found["v"].is_contiguous() and found["v"].dtype == dtype
    assert not found["v"][~batch.real].any()
    for n in range(N):
        assert not found[f"gradient of u{n}"][~batch.real].any()


@pytest.mark.parametrize("L", [512, 513, 1100])
@pytest.mark.parametrize("mask", ["none", "right", "holes", "packed"])
def test_long_sentences(mask, L):
    """Sums over tokens are cut into chunks: of 512 tokens here, beside a sentence of several."""
    batch = make_batch(2, 2, L, 64, mask=mask)
    check(fuse_of(batch.where), inputs_of(batch))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates where it stores bfloat16")
@pytest.mark.parametrize("N", [1, 3, 7, 12, 24])
@pytest.mark.parametrize("mask", ["holes", "packed"])
def test_bfloat16(mask, N):
    batch = make_batch(N, 3, 33, 136, BF16, mask, "offset")
    check(fuse_of(batch.where), inputs_of(batch))


def test_the_gates_gradient_is_float32_for_bfloat16():
    batch = make_batch(4, 2, 5, 40, BF16, "holes")
    dv = randn(2, 5, 40, seed=5, dtype=BF16)
    mask = batch.real

    def dgates(hidden, dv, backend):
        return torch.ops.s2sent.fuse_backward(dv, hidden, mask, None, backend)

    truth = dgates([u.double() for u in batch.hidden_states], dv.double(), "reference")
    found, same_dtype = (dgates(batch.hidden_states, dv, backend) for backend in (BACKEND, "reference"))
    assert found.dtype == F32
    assert_as_close(found, same_dtype, truth, "dg")


@pytest.mark.parametrize("dtype", [F16, BF16, torch.float64])
def test_gates_of_another_dtype(dtype):
    batch = make_batch(2, 2, 5, 24, mask="right")
    gates = randn(2, 2, 24, seed=77, dtype=dtype)
    strided = gates.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    check(fuse_of(batch.where), inputs_of(batch, strided))


@pytest.mark.parametrize("frozen", [("g",), ("u0",), ("u0", "u1", "u2", "u3"), ("g", "u1", "u2")])
def test_only_some_inputs_need_a_gradient(frozen):
    batch = make_batch(4, 2, 5, 24, mask="holes")
    found = check(fuse_of(batch.where), inputs_of(batch), frozen=frozen)
    assert sum(name.startswith("gradient") for name in found) == 5 - len(frozen)


# ---------------------------------------------------------------- packed


@pytest.mark.parametrize(
    "lengths",
    [
        [1, 0, 2, 5, 0, 0, 7, 1, 1, 3, 0],  # a tile of tokens holds many sentences
        [0, 0, 70, 0, 3],  # and a sentence many tiles
        [16, 16, 1, 15, 32],  # a sentence ends with a tile
        [1] * 40,
        [0, 0],
        [],
    ],
)
def test_packed_tiles(lengths):
    B, L = max(1, len(lengths)), max(1, *lengths, 1)
    padded = make_batch(2, B, L, 24)
    hidden, where = pack(padded.hidden_states, lengths)
    gates = randn(len(lengths), 2, 24, seed=77)
    found = check(fuse_of(where), {"g": gates, "u0": hidden[0], "u1": hidden[1]})
    mask = torch.tensor([[i < length for i in range(L)] for length in lengths] or [[False] * L], device=DEVICE)
    if lengths:
        v = functional.fuse(padded.hidden_states, gates, mask, backend=BACKEND)
        assert torch.equal(found["v"], v[mask])


# ---------------------------------------------------------------- padding


@pytest.mark.parametrize("mask", ["right", "left", "holes", "mixed"])
def test_nan_at_padding_has_no_effect(mask):
    """In hidden states, in the output's gradient, and in the gates of an empty sentence."""
    batch = make_batch(3, 4, 5, 40, mask=mask)
    gates = randn(4, 3, 40, seed=77)
    empty = ~batch.real.any(1)
    assert empty.any() == (mask == "mixed")

    def run(hidden, gates, dv):
        hidden = [u.detach().requires_grad_() for u in hidden]
        gates = gates.clone().requires_grad_()
        v = functional.fuse(hidden, gates, batch.real, backend=BACKEND)
        return [v, *torch.autograd.grad(v, [gates, *hidden], dv)]

    dv = randn(4, 5, 40, seed=5)
    clean = run(batch.hidden_states, gates, dv)
    hidden = [u.masked_fill(~batch.real[..., None], NAN) for u in batch.hidden_states]
    gates[empty] = NAN
    dirty = run(hidden, gates, dv.masked_fill(~batch.real[..., None], NAN))
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)
    assert not dirty[0][~batch.real].any() and not dirty[1][empty].any()
    assert not any(du[~batch.real].any() for du in dirty[2:])


def test_nan_in_a_gate_stays_in_its_sentence_and_feature():
    batch = make_batch(2, 2, 3, 24)
    gates = randn(2, 2, 24, seed=77)
    clean = functional.fuse(batch.hidden_states, gates, backend=BACKEND)
    gates[1, 0, 3] = NAN
    v = functional.fuse(batch.hidden_states, gates, backend=BACKEND)
    assert v[1, :, 3].isnan().all()
    v[1, :, 3] = clean[1, :, 3]
    assert torch.equal(v, clean)


@pytest.mark.parametrize("B, L", [(0, 3), (2, 0)])
def test_no_tokens(B, L):
    inputs = {"g": randn(B, 2, 24, seed=1), "u0": randn(B, L, 24, seed=2), "u1": randn(B, L, 24, seed=3)}
    found = check(fuse_of({}), inputs)
    assert found["v"].shape == (B, L, 24) and not found["gradient of g"].any()
