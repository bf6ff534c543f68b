"""squeeze: f, p and every hidden state's gradient, in one launch and block by block."""

import pytest
import torch
from builders import table
from harness import (
    BACKEND,
    BF16,
    DEVICE,
    F16,
    F32,
    HIDDEN_DTYPES,
    INTERPRETED,
    assert_as_close,
    check,
    make_batch,
    randn,
)

from s2sent_kernels import functional
from s2sent_kernels.engines.choice import engine_for
from s2sent_kernels.formula.call import KERNEL_DTYPES, POOLINGS, Call

# Pairwise: every possible pair of values of two columns occurs in some row. D / M is a multiple of no tile.
# N, M, D, L, mask, pooling, dtype, layout, output gradient
CASES = [
    (1, 1, 40, 5, "holes", "mean", F16, "offset", "expanded"),
    (1, 1, 40, 5, "right", "cls", F32, "transposed", "random"),
    (1, 2, 24, 33, "holes", "cls", F16, "expanded", "random"),
    (1, 3, 66, 1, "left", "cls", F32, "transposed", "expanded"),
    (1, 3, 66, 5, "holes", "last", F32, "different", "strided"),
    (1, 3, 66, 5, "none", "mean", F16, "different", "strided"),
    (1, 5, 40, 1, "packed", "cls", F16, "window", "strided"),
    (1, 5, 40, 5, "mixed", None, F16, "contiguous", "expanded"),
    (1, 5, 40, 5, "none", None, F32, "offset", "strided"),
    (2, 1, 40, 33, "right", None, F32, "window", "strided"),
    (2, 1, 40, 33, "none", "cls", F16, "contiguous", "random"),
    (2, 2, 24, 1, "left", "mean", F32, "different", "expanded"),
    (2, 3, 66, 33, "packed", "mean", F16, "offset", "expanded"),
    (2, 5, 40, 1, "holes", None, F32, "different", "random"),
    (2, 8, 96, 1, "none", "last", F16, "expanded", "expanded"),
    (2, 8, 96, 1, "holes", "mean", F32, "transposed", "random"),
    (2, 8, 96, 1, "packed", "last", F16, "offset", "random"),
    (2, 8, 96, 5, "mixed", "last", F16, "window", "random"),
    (2, 8, 96, 5, "right", "last", F32, "contiguous", "expanded"),
    (3, 1, 40, 1, "packed", "last", F32, "different", "expanded"),
    (3, 1, 40, 33, "mixed", "cls", F16, "different", "expanded"),
    (3, 2, 24, 1, "right", "cls", F32, "offset", "strided"),
    (3, 2, 24, 1, "none", None, F32, "offset", "random"),
    (3, 3, 66, 1, "packed", "last", F32, "contiguous", "random"),
    (3, 5, 40, 1, "mixed", "mean", F32, "expanded", "strided"),
    (3, 5, 40, 5, "right", "last", F16, "transposed", "random"),
    (3, 5, 40, 5, "left", "mean", F16, "window", "random"),
    (3, 8, 96, 1, "right", "cls", F32, "expanded", "expanded"),
    (3, 8, 96, 5, "left", "cls", F16, "contiguous", "strided"),
    (3, 8, 96, 5, "holes", None, F16, "contiguous", "expanded"),
    (3, 8, 96, 5, "right", "cls", F16, "different", "strided"),
    (7, 1, 40, 1, "left", None, F16, "expanded", "random"),
    (7, 1, 40, 33, "left", "last", F32, "offset", "random"),
    (7, 2, 24, 5, "none", "cls", F32, "window", "expanded"),
    (7, 2, 24, 33, "none", "last", F32, "transposed", "strided"),
    (7, 2, 24, 33, "packed", "mean", F16, "contiguous", "expanded"),
    (7, 2, 24, 33, "mixed", None, F32, "transposed", "random"),
    (7, 3, 66, 1, "right", "mean", F32, "different", "expanded"),
    (7, 3, 66, 1, "mixed", "last", F16, "offset", "random"),
    (7, 3, 66, 5, "packed", None, F16, "expanded", "expanded"),
    (7, 3, 66, 5, "holes", "mean", F16, "window", "expanded"),
]
# N, M, D, L, mask, pooling
OFFICIAL = [
    (1, 1, 40, 5, "left", "last"),
    (1, 2, 24, 13, "right", None),
    (1, 4, 24, 1, "mixed", "cls"),
    (1, 8, 32, 1, "none", "mean"),
    (1, 8, 32, 5, "right", "last"),
    (1, 8, 32, 5, "mixed", None),
    (2, 1, 40, 1, "none", None),
    (2, 2, 24, 1, "mixed", "last"),
    (2, 4, 24, 5, "right", "mean"),
    (2, 8, 32, 13, "left", "cls"),
    (3, 1, 40, 5, "none", "cls"),
    (3, 1, 40, 13, "mixed", "mean"),
    (3, 2, 24, 1, "right", "cls"),
    (3, 2, 24, 5, "none", None),
    (3, 4, 24, 5, "left", "last"),
    (7, 1, 40, 5, "mixed", None),
    (7, 1, 40, 5, "right", "cls"),
    (7, 2, 24, 5, "left", "mean"),
    (7, 4, 24, 1, "left", None),
    (7, 4, 24, 13, "none", "last"),
]


def squeeze_of(where, M, profile="paper", pooling=None):
    """squeeze as ``check`` calls it."""

    def function(backend, hidden):
        f, p = functional.squeeze(
            list(hidden.values()), **where, frequencies=M, profile=profile, pooling=pooling, backend=backend
        )
        return {"f": f} if pooling is None else {"f": f, "p": p}

    return function


def named(hidden_states):
    return {f"u{n}": u for n, u in enumerate(hidden_states)}


@table("N, M, D, L, mask, pooling, dtype, layout, gradient", CASES)
def test_squeeze(N, M, D, L, mask, pooling, dtype, layout, gradient):
    batch = make_batch(N, 3, L, D, dtype, mask, layout)
    found = check(squeeze_of(batch.where, M, pooling=pooling), named(batch.hidden_states), gradient)
    for n in range(N):
        assert not found[f"gradient of u{n}"][~batch.real].any()


@table("N, M, D, L, mask, pooling", OFFICIAL)
def test_official_squeeze(N, M, D, L, mask, pooling):
    dtype, layout = (F32, "window") if L % 4 == 1 else (F16, "offset")
    batch = make_batch(N, 2, L, D, dtype, mask, layout)
    check(squeeze_of(batch.where, M, "official", pooling), named(batch.hidden_states))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_f_and_p_are_float32(dtype):
    batch = make_batch(3, 2, 5, 24, dtype, "holes")
    found = check(squeeze_of(batch.where, 3, pooling="mean"), named(batch.hidden_states), gradient=None)
    assert found["f"].dtype == found["p"].dtype == F32


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates where it stores bfloat16")
@pytest.mark.parametrize("mask", ["holes", "packed"])
@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_bfloat16_gradients(pooling, mask):
    batch = make_batch(7, 3, 33, 40, BF16, mask, "offset")
    check(squeeze_of(batch.where, 5, pooling=pooling), named(batch.hidden_states))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, F32, F16, "strided", "expanded", "weighty"])
@pytest.mark.parametrize("profile", ["paper", "official"])
def test_every_mask_is_the_same_mask(profile, dtype):
    batch = make_batch(2, 2, 5, 16, mask="holes")
    mask = batch.real
    if dtype == "expanded":
        mask = mask[:1].expand(2, -1)
    same = mask.contiguous()
    if dtype == "strided":
        mask = mask.long().T.contiguous().T
    elif dtype == "weighty":  # nonzero is real
        mask = mask.float() * 0.25
    elif dtype != "expanded":
        mask = mask.to(dtype)

    def run(mask):
        hidden = [u.detach().requires_grad_() for u in batch.hidden_states]
        f, p = functional.squeeze(hidden, mask, frequencies=2, profile=profile, pooling="last", backend=BACKEND)
        return [f, p, *torch.autograd.grad([f, p], hidden, [torch.ones_like(f), torch.ones_like(p)])]

    for one, other in zip(run(mask), run(same), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("frozen", [("u0",), ("u1", "u2"), ("u0", "u1", "u3")])
def test_only_some_hidden_states_need_a_gradient(frozen):
    batch = make_batch(4, 2, 5, 24, mask="right")
    found = check(squeeze_of(batch.where, 3, pooling="mean"), named(batch.hidden_states), frozen=frozen)
    assert sum(name.startswith("gradient") for name in found) == 4 - len(frozen)


@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("output", ["f", "p"])
def test_a_gradient_of_one_output_alone(output, profile):
    batch = make_batch(2, 3, 5, 24, mask="mixed")
    both = squeeze_of(batch.where, 4, profile, "mean")
    check(lambda *arguments: {output: both(*arguments)[output]}, named(batch.hidden_states))


@pytest.mark.parametrize(
    "profile, mask",
    [("paper", "right"), ("paper", "left"), ("paper", "holes"), ("paper", "mixed"), ("official", "mixed")],
)
def test_nan_at_padding_has_no_effect_on_p(profile, mask):
    """In profile ``paper`` it has none on f either."""
    batch = make_batch(3, 4, 5, 24, mask=mask)
    clean = squeeze_of(batch.where, 4, profile, "mean")(BACKEND, named(batch.hidden_states))
    for u in batch.hidden_states:
        u[~batch.real] = float("nan")
    dirty = squeeze_of(batch.where, 4, profile, "mean")(BACKEND, named(batch.hidden_states))
    assert torch.equal(dirty["p"], clean["p"])
    assert profile == "official" or torch.equal(dirty["f"], clean["f"])


@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_nan_in_a_token_that_is_not_pooled_does_not_reach_p(pooling, profile):
    batch = make_batch(1, 2, 5, 24, mask="right")
    function = squeeze_of(batch.where, 4, profile, pooling)
    clean = function(BACKEND, named(batch.hidden_states))
    batch.hidden_states[0][:, 1] = float("nan")
    expected = function("reference", named(batch.hidden_states))
    dirty = function(BACKEND, named(batch.hidden_states))
    assert torch.equal(dirty["p"], clean["p"]) and dirty["f"].isnan().all() and expected["f"].isnan().all()


@pytest.mark.parametrize("L", [0, 2])
@pytest.mark.parametrize("mask", ["none", "empty", "packed"])
@pytest.mark.parametrize("profile", ["paper", "official"])
def test_nothing_to_squeeze(profile, mask, L):
    """No sentence has a real token."""
    if mask == "packed":
        if profile == "official" or L:
            pytest.skip("no such batch")
        hidden = {"u0": randn(0, 16, seed=0)}
        where = {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device=DEVICE)}
    else:
        hidden = {"u0": randn(2, L, 16, seed=0)}
        where = {"attention_mask": torch.zeros(2, L, device=DEVICE)} if mask == "empty" else {}
        if mask == "none" and L:
            pytest.skip("has real tokens")
    found = check(squeeze_of(where, 2, profile, "mean"), hidden)
    assert not found["p"].any() and (profile == "official" or not found["f"].any())
    assert profile == "official" or not found["gradient of u0"].any()


# ---------------------------------------------------------------- block by block


def squeeze_by_blocks(batch, M, profile, pooling, backend=BACKEND):
    """f, p from squeeze_block, called with each block in turn."""
    engine = engine_for(backend, Call(DEVICE, F32))
    N, D = len(batch.hidden_states), batch.hidden_states[0].shape[-1]
    groups = torch.zeros(batch.num_sentences, engine.num_groups(N), D, device=DEVICE)
    pooled = None if pooling is None else torch.empty(batch.num_sentences, N, D, device=DEVICE)
    mask, cu_seqlens = batch.where.get("attention_mask"), batch.where.get("cu_seqlens")
    for n, u in enumerate(batch.hidden_states):
        torch.ops.s2sent.squeeze_block(u, n, N, groups, pooled, mask, cu_seqlens, M, profile, pooling, backend)
    return engine.sum_groups(groups), pooled


@table(
    "N, M, D, L, mask, pooling, profile, layout",
    [
        (1, 1, 24, 5, "right", "mean", "paper", "contiguous"),
        (1, 2, 40, 33, "holes", None, "official", "sliced"),
        (2, 3, 66, 33, "left", "cls", "paper", "different"),
        (2, 4, 24, 1, "mixed", "mean", "official", "window"),
        (3, 4, 40, 5, "holes", "last", "paper", "offset"),
        (3, 1, 66, 33, "packed", None, "paper", "contiguous"),
        (4, 3, 66, 5, "packed", "mean", "paper", "column"),
        (4, 1, 24, 13, "none", "cls", "official", "transposed"),
        (7, 2, 40, 5, "mixed", "mean", "paper", "expanded"),
        (7, 1, 24, 1, "none", "last", "paper", "contiguous"),
    ],
)
def test_squeeze_block(N, M, D, L, mask, pooling, profile, layout):
    for dtype in HIDDEN_DTYPES[:: N % 2 + 1]:
        batch = make_batch(N, 3, L, D, dtype, mask, layout)
        found = dict(zip("fp", squeeze_by_blocks(batch, M, profile, pooling), strict=True))
        function = squeeze_of(batch.where, M, profile, pooling)
        same_dtype = function("reference", named(batch.hidden_states))
        truth = function("reference", named([u.double() for u in batch.hidden_states]))
        for name in truth:
            assert_as_close(found[name], same_dtype[name], truth[name], name)


@pytest.mark.parametrize("L", [700, 3000])
def test_a_long_sentence(L):
    """One running sum over all of it would round like L terms in a row: three times the yardstick at 4096 tokens."""
    hidden = {"u0": randn(1, L, 16, seed=1) + 1}
    check(squeeze_of({}, 1, "paper", "mean"), hidden)
