"""What is promised bit by bit: run to run, and in profile ``paper``, eval, whatever batch a sentence stands in.

A sentence has the same bits alone, in any batch, at any position, with any right padding, packed, and fed block by
block.
"""

import numpy
import pytest
import torch
from builders import lay_out
from harness import BACKEND, DEVICE, HIDDEN_DTYPES, INTERPRETED, make_batch, make_selector, pack, randn, run

from s2sent_kernels.formula.call import POOLINGS

PATHS = (None, *POOLINGS, "gates")  # None is the token output
# Around the tiles of tokens that the kernels sum and write.
LENGTHS = (33, 1, 32, 31, 65)
D = 32

# N, M, dtype
KINDS = [(3, 1, HIDDEN_DTYPES[0]), (4, 2, HIDDEN_DTYPES[-1]), (7, 1, HIDDEN_DTYPES[-1]), (1, 2, HIDDEN_DTYPES[0])]


@pytest.fixture(autouse=True)
def exact_dot(monkeypatch):
    """The interpreter's tl.dot is numpy's, where a row's bits depend on its place among the others, by how many rows the
    CPU's library takes at a time. A GPU's do not. Summed in float64 and rounded, they do not here either."""
    if INTERPRETED:
        matmul = numpy.matmul
        monkeypatch.setattr(
            numpy, "matmul", lambda a, b, dtype: matmul(a.astype("float64"), b.astype("float64")).astype(dtype)
        )


# The shapes that encoders have, and one without vector loads: N, D, M. The interpreter would take minutes for each.
ENCODERS = [(12, 768, 4), (6, 384, 4), (24, 1024, 8), (3, 768, 1), (8, 21, 3)]


def selector_for(N, M, size=D, **options):
    return make_selector(N, size, M, H=8, block_prior=True, gate_scale=4.0, backend=BACKEND, **options)


def equal(one, other):
    """The same bits, and none of them NaN."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def mask_of(lengths, L):
    return torch.arange(L, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


def by_blocks(selector, hidden_states, where, pooling):
    stream = selector.blockwise(**where, pooling=pooling)
    for block, u in enumerate(hidden_states):
        stream.add(block, u)
    return stream.result()


@pytest.mark.parametrize("N, M, dtype", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_a_sentence_has_its_own_bits(path, N, M, dtype):
    lengths = LENGTHS if path in (None, "mean") else LENGTHS[:3]
    check_own_bits(path, N, D, M, dtype, lengths)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: too many programs for the interpreter")
@pytest.mark.parametrize("N, size, M", ENCODERS)
@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
@pytest.mark.parametrize("path", [None, "mean", "gates"])
def test_a_sentence_has_its_own_bits_in_encoders(path, dtype, N, size, M):
    check_own_bits(path, N, size, M, dtype, (*LENGTHS, 128, 512, 600))


def check_own_bits(path, N, size, M, dtype, lengths):
    """The expectation is each sentence alone; every batch below must give each of its sentences those bits."""
    selector = selector_for(N, M, size)
    B, L = len(lengths), max(lengths)
    hidden = make_batch(N, B, L, size, dtype, seed=3).hidden_states
    alone = [run(selector, [u[b : b + 1, :n] for u in hidden], {}, path)[0] for b, n in enumerate(lengths)]

    def matches(output, order, packed=False):
        if path is None:
            output = output.split([lengths[b] for b in order]) if packed else map(_head, output, order)
        return all(equal(o, alone[b]) for o, b in zip(output, order, strict=True))

    def _head(fused, b):
        return fused[: lengths[b]]

    straight, back = list(range(B)), list(range(B))[::-1]
    mask = mask_of(lengths, L)
    assert matches(run(selector, hidden, {"attention_mask": mask}, path), straight)
    more = [torch.cat([u, torch.full_like(u[:, :9], float("nan"))], dim=1).flip(0) for u in hidden]
    padded = {"attention_mask": mask_of([lengths[b] for b in back], L + 9)}
    assert matches(run(selector, more, padded, path), back)
    packed, where = pack([u.flip(0) for u in hidden], [lengths[b] for b in back])
    assert matches(run(selector, packed, where, path), back, packed=True)
    if path in POOLINGS:
        assert matches(by_blocks(selector, hidden, {"attention_mask": mask}, path), straight)
        assert matches(by_blocks(selector, packed, where, path), back)


@pytest.mark.parametrize("path", [None, "mean", "gates"])
def test_a_large_batch(path):
    """More sentences than a program of the gate takes, at both ends of the batch."""
    selector = selector_for(2, 1)
    hidden = make_batch(2, 19, 3, D).hidden_states
    output = run(selector, hidden, {}, path)
    for b in (0, 1, 7, 15, 16, 18):
        assert equal(run(selector, [u[b : b + 1] for u in hidden], {}, path)[0], output[b])


@pytest.mark.parametrize("path", [None, "mean"])
def test_a_bottleneck_wider_than_the_kernel_holds(path):
    """Its gate is plain PyTorch, whose matrix products depend on the batch in the last bits: no promise there."""
    from s2sent_kernels.engines.triton import config

    selector = make_selector(2, D, 1, H=config.MAX_BOTTLENECK + 44, backend=BACKEND)
    hidden = make_batch(2, 5, 3, D).hidden_states
    output = run(selector, hidden, {}, path)
    for b in range(5):
        alone = run(selector, [u[b : b + 1] for u in hidden], {}, path)[0]
        torch.testing.assert_close(alone, output[b], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["left", "holes"])
@pytest.mark.parametrize("path", PATHS)
def test_padding_elsewhere_agrees_to_rounding(path, mask):
    selector = selector_for(3, 2)
    batch = make_batch(3, 2, 33, D, mask=mask)
    output = run(selector, batch.hidden_states, batch.where, path)
    for b in range(2):
        real = batch.real[b]
        alone = run(selector, [u[b : b + 1, real] for u in batch.hidden_states], {}, path)[0]
        torch.testing.assert_close(output[b][real] if path is None else output[b], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "column", "offset", "sliced", "window", "different"])
@pytest.mark.parametrize("path", [None, "mean"])
def test_strides_do_not_matter(path, layout):
    selector = selector_for(4, 2)
    for dtype in HIDDEN_DTYPES:
        batch = make_batch(4, 2, 5, D, dtype, mask="right")
        strided = [lay_out(u, layout, n) for n, u in enumerate(batch.hidden_states)]
        one, other = (run(selector, hidden, batch.where, path) for hidden in (strided, batch.hidden_states))
        assert equal(one, other)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("profile", ["paper", "official"])
@pytest.mark.parametrize("path", [None, "mean"])
def test_run_to_run(path, profile, training):
    """Outputs and every gradient."""
    N = 4 if profile == "paper" else 2
    batch = make_batch(N, 3, 5, D, HIDDEN_DTYPES[-1], mask="holes")
    results = []
    for _ in range(2):
        selector = make_selector(N, D, 2, profile=profile, backend=BACKEND).train(training)
        hidden = [u.clone().requires_grad_() for u in batch.hidden_states]
        output = run(selector, hidden, batch.where, path)
        gradient = randn(*output.shape, seed=5, dtype=output.dtype)
        results.append([output, *torch.autograd.grad(output, [*hidden, *selector.parameters()], gradient)])
    assert all(equal(one, other) for one, other in zip(*results, strict=True))


def test_cu_seqlens_of_any_strides():
    selector = selector_for(2, 1)
    packed, where = pack(make_batch(2, 3, 5, D).hidden_states, [3, 0, 5])
    strided = torch.stack([where["cu_seqlens"], torch.full_like(where["cu_seqlens"], 7)], dim=1)[:, 0]
    assert not strided.is_contiguous()
    for path in (None, "mean"):
        assert equal(run(selector, packed, {"cu_seqlens": strided}, path), run(selector, packed, where, path))
