"""What is promised bit by bit: one test for each row of the table in docs/bitwise.md, and no other test.

The fixture ``same`` compares as that row asks of the backend under test. The expectation of most is a sentence alone.
"""

import contextlib
import functools
import random

import numpy
import pytest
import torch
from builders import assert_close, lay_out
from harness import BACKEND, DEVICE, HIDDEN_DTYPES, INTERPRETED, make_batch, make_selector, pack, randn, run
from promises import NONE, ROUNDING, SAME, column_of, table

from s2sent_kernels.formula.call import POOLINGS, PROFILES

COLUMN = column_of(BACKEND, DEVICE.type)
PATHS = (None, *POOLINGS, "gates")  # None is the token output
# Around the tiles of tokens that the kernels sum and write.
LENGTHS = (33, 1, 32, 31, 65)
D = 32
THREADS = (1, 2, 3, 8)
WIDEST = 256 if BACKEND == "triton" else 300  # bottleneck

# N, D, M, dtype, path, lengths
SMALL = [
    (N, D, M, dtype, path, LENGTHS if path in (None, "mean") else LENGTHS[:3])
    for N, M, dtype in [
        (3, 1, HIDDEN_DTYPES[0]),
        (4, 2, HIDDEN_DTYPES[-1]),
        (7, 1, HIDDEN_DTYPES[-1]),
        (1, 2, HIDDEN_DTYPES[0]),
    ]
    for path in PATHS
]
# The shapes that encoders have, and one without vector loads. The interpreter would take minutes for each.
ENCODERS = [
    (N, size, M, dtype, path, (*LENGTHS, 128, 512, 600))
    for N, size, M in [(12, 768, 4), (6, 384, 4), (24, 1024, 8), (3, 768, 1), (8, 21, 3)]
    for dtype in HIDDEN_DTYPES
    for path in (None, "mean", "gates")
]


@pytest.fixture(autouse=True)
def exact_dot(monkeypatch):
    """The interpreter's tl.dot is numpy's, where a row's bits depend on its place among the others, by how many rows the
    CPU's library takes at a time. A GPU's do not. Summed in float64 and rounded, they do not here either."""
    if INTERPRETED:
        matmul = numpy.matmul
        monkeypatch.setattr(
            numpy, "matmul", lambda a, b, dtype: matmul(a.astype("float64"), b.astype("float64")).astype(dtype)
        )


# ---------------------------------------------------------------- what the row asks for


def same_bits(one, other):
    """None of them NaN."""
    assert one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def equal_to_rounding(one, other):
    """Of float32: 84 ulps of the largest number."""
    assert_close(one, other, 1e-5)


COMPARE = {SAME: same_bits, ROUNDING: equal_to_rounding}


@pytest.fixture
def same(request):
    """Asserts that two tensors are as equal as the test's row promises for the backend under test; skips where nothing is
    promised."""
    word = table()[request.node.originalname][COLUMN]
    if word not in COMPARE:
        pytest.skip(f"docs/bitwise.md, {COLUMN}: {word}" if word == NONE else f"does not concern {COLUMN}")
    return COMPARE[word]


# ---------------------------------------------------------------- sentences


class Case:
    """A selector, sentences of some lengths in one padded batch, and what each gives alone."""

    def __init__(self, N, size, M, dtype, path, lengths):
        self.N, self.size, self.M, self.dtype, self.path, self.lengths = N, size, M, dtype, path, lengths

    @functools.cached_property
    def selector(self):
        return selector_for(self.N, self.M, self.size)

    @functools.cached_property
    def hidden(self):
        return make_batch(self.N, len(self.lengths), max(self.lengths), self.size, self.dtype, seed=3).hidden_states

    @functools.cached_property
    def alone(self):
        return [self.run([u[b : b + 1, :n] for u in self.hidden])[0] for b, n in enumerate(self.lengths)]

    def run(self, hidden, **where):
        return run(self.selector, hidden, where, self.path)

    def mask(self, order=None, more=0):
        lengths = self.lengths if order is None else [self.lengths[b] for b in order]
        return mask_of(lengths, max(self.lengths) + more)

    def each(self, output, order=None, packed=False):
        """(a sentence's part of the output of a batch, what it gives alone), sentence by sentence."""
        order = range(len(self.lengths)) if order is None else order
        lengths = [self.lengths[b] for b in order]
        if self.path is not None:
            parts = output
        elif packed:
            parts = output.split(lengths)
        else:
            parts = [fused[:n] for fused, n in zip(output, lengths, strict=True)]
        return zip(parts, [self.alone[b] for b in order], strict=True)


def label(values):
    N, size, M, dtype, path, _ = values
    return f"{N}-{size}-{M}-{dtype}-{path}".replace("torch.", "")


@pytest.fixture(
    scope="module",  # so that one case's tests follow one another, and share what each sentence gives alone
    params=[
        *(pytest.param(values, id=label(values)) for values in SMALL),
        *(
            pytest.param(
                values,
                id=label(values),
                marks=pytest.mark.skipif(INTERPRETED, reason="needs a GPU: too many programs for the interpreter"),
            )
            for values in ENCODERS
        ),
    ],
)
def case(request):
    return Case(*request.param)


def selector_for(N, M, size=D, H=8):
    return make_selector(N, size, M, H=H, block_prior=True, gate_scale=4.0, backend=BACKEND)


def mask_of(lengths, L):
    return torch.arange(L, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


def by_blocks(selector, hidden_states, where, pooling):
    stream = selector.blockwise(**where, pooling=pooling)
    for block, u in enumerate(hidden_states):
        stream.add(block, u)
    return stream.result()


def shuffled(count):
    order = list(range(count))
    random.Random(1).shuffle(order)
    return order


# ---------------------------------------------------------------- run to run


def one_run(path, profile, training, B, gradients):
    """The output and the running statistics, or every gradient."""
    N, L, size = (2, 2, 8) if B > 3 else (4 if profile == "paper" else 2, 5, D)
    batch = make_batch(N, B, L, size, HIDDEN_DTYPES[-1], mask="holes")
    selector = make_selector(N, size, 2, profile=profile, backend=BACKEND).train(training)
    hidden = [u.clone().requires_grad_() for u in batch.hidden_states]
    output = run(selector, hidden, batch.where, path)
    if not gradients:
        return [output, *selector.buffers()]
    given = randn(*output.shape, seed=5, dtype=output.dtype)
    return torch.autograd.grad(output, [*hidden, *selector.parameters()], given)


RUNS = pytest.mark.parametrize(
    "path, profile, training, B",
    [
        *(
            (path, profile, training, 3)
            for path in (None, "mean")
            for profile in PROFILES
            for training in (False, True)
        ),
        *(("mean", "paper", training, 40) for training in (False, True)),  # more than one program of the gate
    ],
)


@RUNS
def test_again(same, path, profile, training, B):
    one, other = (one_run(path, profile, training, B, gradients=False) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        same(a, b)


@RUNS
def test_again_backward(same, path, profile, training, B):
    one, other = (one_run(path, profile, training, B, gradients=True) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        same(a, b)


# ---------------------------------------------------------------- the batch around a sentence


@pytest.mark.parametrize("B, L", [(5, 33), (19, 3)])  # 19 are more than a program of the gate takes
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("N, M, H, dtype", [(3, 1, 8, HIDDEN_DTYPES[0]), (4, 2, WIDEST, HIDDEN_DTYPES[-1])])
def test_alone(same, N, M, H, dtype, path, B, L):
    """Sentences of one length, no mask."""
    selector = selector_for(N, M, H=H)
    hidden = make_batch(N, B, L, D, dtype).hidden_states
    output = run(selector, hidden, {}, path)
    for b in {0, 1, B // 2, B - 2, B - 1}:
        same(output[b], run(selector, [u[b : b + 1] for u in hidden], {}, path)[0])


def test_position(same, case):
    order = shuffled(len(case.lengths))
    output = case.run([u[order] for u in case.hidden], attention_mask=case.mask(order))
    for one, alone in case.each(output, order):
        same(one, alone)


@pytest.mark.parametrize("more", [0, 9])
def test_right_padding(same, case, more):
    """More tokens than the longest sentence has, and NaN in them."""
    hidden = [torch.cat([u, torch.full_like(u[:, :1], float("nan")).expand(-1, more, -1)], dim=1) for u in case.hidden]
    for one, alone in case.each(case.run(hidden, attention_mask=case.mask(more=more))):
        same(one, alone)


def test_packed(same, case):
    order = shuffled(len(case.lengths))
    packed, where = pack([u[order] for u in case.hidden], [case.lengths[b] for b in order])
    for one, alone in case.each(case.run(packed, **where), order, packed=True):
        same(one, alone)


@pytest.mark.parametrize("form", ["mask", "packed"])
def test_block_by_block(same, case, form):
    if case.path not in POOLINGS:
        pytest.skip("only poolings can be fed block by block")
    hidden, where = case.hidden, {"attention_mask": case.mask()}
    if form == "packed":
        hidden, where = pack(case.hidden, case.lengths)
    for one, alone in case.each(by_blocks(case.selector, hidden, where, case.path)):
        same(one, alone)


@pytest.mark.parametrize("mask", ["left", "holes"])
@pytest.mark.parametrize("path", PATHS)
def test_left_padding_and_holes(same, path, mask):
    selector = selector_for(3, 2)
    batch = make_batch(3, 2, 70, D, mask=mask)
    hidden = [u.masked_fill(~batch.real[:, :, None], float("nan")) for u in batch.hidden_states]
    output = run(selector, hidden, batch.where, path)
    for b in range(2):
        real = batch.real[b]
        alone = run(selector, [u[b : b + 1, real] for u in batch.hidden_states], {}, path)[0]
        same(output[b][real] if path is None else output[b], alone)


@pytest.mark.parametrize("path", [None, "mean", "gates"])
@pytest.mark.parametrize("form", ["alone", "reversed", "padded", "packed"])
@pytest.mark.parametrize("N, M, dtype", [(3, 1, HIDDEN_DTYPES[0]), (4, 2, HIDDEN_DTYPES[-1])])
def test_gradients_in_any_batch(same, N, M, dtype, form, path):
    """Those of a sentence's hidden states, from the same gradient of its part of the output."""
    selector, lengths = selector_for(N, M), LENGTHS[:3] * 6 if form == "alone" and not INTERPRETED else LENGTHS[:3]
    lengths = [33] * len(lengths) if form == "alone" else lengths
    B, L = len(lengths), max(lengths)
    hidden = make_batch(N, B, L, D, dtype, seed=3).hidden_states
    given = randn(B, *((N,) if path == "gates" else (L,) if path is None else ()), D, seed=4, dtype=torch.float32)
    given = given if path == "gates" else given.to(dtype)

    def gradients(hidden, where, given):
        leaves = [u.detach().clone().requires_grad_() for u in hidden]
        return torch.autograd.grad(run(selector, leaves, where, path), leaves, given)

    def of_sentence(b):
        part = given[b : b + 1]
        return gradients(
            [u[b : b + 1, : lengths[b]] for u in hidden], {}, part[:, : lengths[b]] if path is None else part
        )

    order, where = list(range(B)), {}
    if form == "alone":
        found = gradients(hidden, where, given)
    elif form == "packed":
        states, where = pack(hidden, lengths)
        found = gradients(states, where, pack([given], lengths)[0][0] if path is None else given)
        found = [torch.nn.utils.rnn.pad_sequence(du.split(lengths), batch_first=True) for du in found]
    else:
        order = order[::-1] if form == "reversed" else order
        found = gradients(
            [u[order] for u in hidden], {"attention_mask": mask_of([lengths[b] for b in order], L)}, given[order]
        )
    for place, b in enumerate(order):
        for one, alone in zip(found, of_sentence(b), strict=True):
            same(one[place, : lengths[b]], alone[0])


# ---------------------------------------------------------------- how it is run


@pytest.mark.parametrize("layout", ["transposed", "column", "offset", "sliced", "window", "different"])
@pytest.mark.parametrize("path", [None, "mean"])
@pytest.mark.parametrize("L, size", [(5, D), (70, 768)])  # where the kernels load 128 bits at a time
def test_strides(same, L, size, path, layout):
    if INTERPRETED and size > D:
        pytest.skip("needs a GPU: too many programs for the interpreter")
    selector = selector_for(4, 2, size)
    for dtype in HIDDEN_DTYPES:
        batch = make_batch(4, 2, L, size, dtype, mask="right")
        strided = [lay_out(u, layout, n) for n, u in enumerate(batch.hidden_states)]
        same(run(selector, strided, batch.where, path), run(selector, batch.hidden_states, batch.where, path))


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", [None, "mean"])
@pytest.mark.parametrize("form", [None, "right", "packed"])
@pytest.mark.parametrize("B", [1, 6])
@pytest.mark.parametrize("training", [False, True])
def test_threads(same, training, B, form, path):
    """Outputs, all gradients, and the running statistics."""
    if training and B == 1:
        pytest.skip("has no statistics")
    N, L, size = 5, 40, 768  # large enough that every stage is shared
    hidden, lengths, where = make_batch(N, B, L, size).hidden_states, [L - 7 * b for b in range(B)], {}
    if form == "right":
        where = {"attention_mask": mask_of(lengths, L)}
    elif form == "packed":
        hidden, where = pack(hidden, lengths)

    def results():
        selector = selector_for(N, 4, size).train(training)
        leaves = [u.detach().requires_grad_() for u in hidden]
        output = run(selector, leaves, where, path)
        weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)
        gradients = torch.autograd.grad((output * weights).sum(), [*leaves, *selector.parameters()])
        return [output, *selector.buffers(), *gradients]

    found = []
    for number in THREADS:
        with threads(number):
            found.append(results())
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            same(one, two)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("form", ["none", "mixed", "packed"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [HIDDEN_DTYPES[0], HIDDEN_DTYPES[-1]])
def test_cuda_graph(same, dtype, path, form):
    """Captured once, replayed on other contents of the same memory, those of the mask or cu_seqlens too."""
    selector, batch = selector_for(3, 4, 96).requires_grad_(False), make_batch(3, 5, 33, 96, dtype, form)
    where = {name: tensor.clone() for name, tensor in batch.where.items()}
    run(selector, batch.hidden_states, where, path)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(selector, batch.hidden_states, where, path)
    for seed in (1, 2):
        for n, u in enumerate(batch.hidden_states):
            u.copy_(randn(*u.shape, seed=100 * seed + n, dtype=dtype))
        if form == "mixed":
            where["attention_mask"].copy_(batch.real.roll(seed, 0))
        elif form == "packed":
            where["cu_seqlens"][1:-1] = torch.tensor([1, 1, 30, 40 + seed], dtype=torch.int32, device=DEVICE)
        graph.replay()
        torch.cuda.synchronize()
        same(output, run(selector, batch.hidden_states, where, path))


def eager_and_compiled(path, form, dynamic, gradients):
    """By Inductor, fullgraph=True, at two shapes: [output, *gradients] of both."""
    torch._dynamo.reset()
    size, shapes = (8, [(2, 4), (3, 6)]) if INTERPRETED else (96, [(5, 33), (7, 40)])
    selector = selector_for(3, 4, size)
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for B, L in shapes:
        hidden, lengths = make_batch(3, B, L, size).hidden_states, [max(1, L - 3 * b) for b in range(B)]
        hidden, where = pack(hidden, lengths) if form == "packed" else (hidden, {"attention_mask": mask_of(lengths, L)})
        results = []
        for function in (run, compiled):
            leaves = [u.detach().requires_grad_(gradients) for u in hidden]
            with torch.set_grad_enabled(gradients):
                results.append([function(selector, leaves, where, path)])
            if gradients:
                (output,) = results[-1]
                given = randn(*output.shape, seed=5)
                results[-1] += torch.autograd.grad(output, [*leaves, *selector.parameters()], given)
        yield results


COMPILED = pytest.mark.parametrize(
    "path, form, dynamic", [(None, "mask", False), ("mean", "packed", True), ("gates", "mask", True)]
)


@COMPILED
def test_compiled(same, path, form, dynamic, monkeypatch):
    monkeypatch.undo()  # the poison is no part of what is compiled
    for (eager,), (compiled,) in eager_and_compiled(path, form, dynamic, gradients=False):
        same(compiled, eager)


@COMPILED
def test_compiled_backward(same, path, form, dynamic, monkeypatch):
    monkeypatch.undo()
    for eager, compiled in eager_and_compiled(path, form, dynamic, gradients=True):
        for one, other in zip(compiled, eager, strict=True):
            same(one, other)
