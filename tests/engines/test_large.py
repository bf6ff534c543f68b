"""On a GPU only: more elements than 2^31, CUDA graphs, streams, a second device, torch.compile and torch.export."""

import pytest
import torch
from harness import BACKEND, BF16, DEVICE, F32, make_batch, make_parameters, make_selector, randn, run

from s2sent_kernels import functional

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")

LIMIT = 2**31  # elements, from where 32-bit offsets wrap
PATHS = (None, "mean", "last", "gates")


def needs(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    torch.cuda.empty_cache()


# ---------------------------------------------------------------- more than 2^31 elements


def large(B, L, D):
    """A hidden state whose last three sentences are random and all others zero."""
    u = torch.zeros(B, L, D, dtype=BF16, device=DEVICE)
    u[-3:] = randn(3, L, D, seed=1, dtype=BF16)
    return u


def tail(tensor, sentences=3):
    return tensor[-sentences:].clone()


@pytest.mark.parametrize("form", ["padded", "packed", "masked"])
@pytest.mark.parametrize("N", [1, 2])
def test_one_hidden_state_of_more_than_2_31_elements(N, form):
    """The last sentences of the forward and of every gradient have the bits that they have alone."""
    needs(40)
    B, L, D, M = LIMIT // (256 * 1024) + 3, 256, 1024, 4
    u = large(B, L, D)
    assert u.numel() > LIMIT
    small = tail(u)
    mask = torch.ones(3, L, dtype=torch.bool, device=DEVICE)
    if form == "masked":
        mask[:, ::3] = False
    gates = torch.rand(3, N, D, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def outputs(u, gates, mask):
        """f, p, v, dg and du_0 of squeeze and of fuse, of the last three sentences."""
        rows = u.shape[0]
        where = {"attention_mask": mask} if form == "masked" else {}
        if form == "packed":
            where = {"cu_seqlens": torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * L}
            u = u.flatten(0, 1)
        dv = u.detach()  # the gradient of v: as good as any, and no further memory
        hidden = [u.detach().requires_grad_(n == 0) for n in range(N)]
        shape = (rows, L, D)
        found = []
        f, p = functional.squeeze(hidden, **where, frequencies=M, pooling="mean", backend=BACKEND)
        found += [tail(f.detach()), tail(p.detach())]
        (du,) = torch.autograd.grad([f, p], hidden[:1], [torch.ones_like(f), torch.ones_like(p)])
        found.append(tail(du.view(shape)))
        del f, p, du
        g = gates.new_zeros(rows, N, D)
        g[-3:] = gates
        g.requires_grad_()
        v = functional.fuse(hidden, g, **where, backend=BACKEND)
        found.append(tail(v.detach().view(shape)))
        dg, du = torch.autograd.grad(v, [g, hidden[0]], dv)
        return [*found, tail(dg), tail(du.view(shape))]

    mask_of_all = mask[:1].expand(B, L) if form == "masked" else None
    expected = outputs(small, gates, mask)
    torch.cuda.empty_cache()
    for one, other in zip(outputs(u, gates, mask_of_all), expected, strict=True):
        assert torch.equal(one, other)


def test_2_31_elements_in_all_together():
    """N x B x L x D, and B x N x D of p and of the gates, are beyond the limit; no hidden state is."""
    needs(40)
    L, D, N = 2, 1024, 24
    B = LIMIT // (16 * D) + 5
    u = large(B, L, D)
    assert u.numel() < LIMIT < N * B * D
    parameters = make_parameters(N, D, 8, norm=False)
    small = tail(u)

    def outputs(u):
        hidden = [u] * N
        with torch.no_grad():
            o = tail(functional.select_pool(hidden, parameters, frequencies=4, backend=BACKEND))
            torch.cuda.empty_cache()
            return o, tail(functional.select(hidden, parameters, frequencies=4, backend=BACKEND))

    for one, other in zip(outputs(u), outputs(small), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stride", ["batch", "token"])
def test_a_stride_beyond_2_31(stride):
    """Three sentences, or tokens, that lie far apart in one buffer."""
    needs(8)
    D, far = 64, LIMIT // 2 + 64
    buffer = torch.full((3 * far,), float("nan"), dtype=BF16, device=DEVICE)
    apart = buffer.as_strided((3, 3, D), (far, D, 1) if stride == "batch" else (D, far, 1))
    apart.copy_(randn(3, 3, D, seed=1, dtype=BF16))
    gates = randn(3, 1, D, seed=2)

    def outputs(u):
        f, p = functional.squeeze([u], frequencies=4, pooling="mean", backend=BACKEND)
        return f, p, functional.fuse([u], gates, backend=BACKEND)

    for one, other in zip(outputs(apart), outputs(apart.contiguous()), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- graphs, streams, devices


@pytest.mark.parametrize("path", [None, "mean"])
def test_cuda_graph_of_the_backward(path):
    """Of packed sentences. That outputs have the bits of eager: test_bits.py."""
    selector = make_selector(3, 96, 4, backend=BACKEND)
    hidden = [u.requires_grad_() for u in make_batch(3, 4, 17, 96, mask="packed").hidden_states]
    ends = make_batch(3, 4, 17, 96, mask="packed").where["cu_seqlens"]

    def step():
        output = run(selector, hidden, {"cu_seqlens": ends}, path)
        return [output, *torch.autograd.grad(output, [*hidden, *selector.parameters()], output.detach())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for u in hidden:
            u.copy_(randn(*u.shape, seed=9))
        ends.copy_(torch.tensor([0, 1, 1, 30, hidden[0].shape[0]], dtype=torch.int32))
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # the gate's backward is PyTorch's


@pytest.mark.parametrize("path", PATHS)
def test_another_stream(path):
    """Work queued before on that stream is waited for, and work after it sees the result."""
    selector = make_selector(3, 96, 4, backend=BACKEND)
    batch = make_batch(3, 5, 33, 96, BF16, "right")
    expected = run(selector, batch.hidden_states, batch.where, path)
    hidden = [torch.zeros_like(u) for u in batch.hidden_states]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds: a launch on any other stream would read zeros
        for u, value in zip(hidden, batch.hidden_states, strict=True):
            u.copy_(value)
        hidden = [u.requires_grad_() for u in hidden]
        output = run(selector, hidden, batch.where, path)
        twice = output * 2
        grads = torch.autograd.grad(output, hidden, torch.ones_like(output))
    side.synchronize()
    assert torch.equal(output, expected) and torch.equal(twice, expected * 2)
    assert all(du.isfinite().all() for du in grads)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("path", PATHS)
def test_another_device(path):
    """While the first is the current one: the same bits and gradients there."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        selector = make_selector(3, 96, 4, backend=BACKEND).to(device)
        batch = make_batch(3, 5, 33, 96, BF16, "right")
        hidden = [u.to(device).requires_grad_() for u in batch.hidden_states]
        output = run(selector, hidden, {"attention_mask": batch.real.to(device)}, path)
        assert output.device == torch.device(device) and torch.cuda.current_device() == 0
        results.append([output, *torch.autograd.grad(output, hidden, torch.ones_like(output))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


# ---------------------------------------------------------------- compile and export


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("path", [None, "mean"])
def test_compile_in_training(path, dynamic, monkeypatch):
    """fullgraph=True with Inductor, forward and backward, at two shapes. In eval mode: test_bits.py."""
    monkeypatch.undo()  # the poison is no part of what is compiled
    torch._dynamo.reset()
    selectors = [make_selector(3, 96, 4, block_prior=True, backend=BACKEND).train() for _ in range(2)]
    eager, compiled = (selector.forward if path is None else selector.pool for selector in selectors)
    compiled = torch.compile(compiled, fullgraph=True, dynamic=dynamic)
    for B, L in ((5, 33), (7, 40)):
        batch = make_batch(3, B, L, 96, mask="right")
        results = []
        for selector, function in zip(selectors, (eager, compiled), strict=True):
            hidden = [u.detach().requires_grad_() for u in batch.hidden_states]
            output = function(hidden, **batch.where)
            gradient = randn(*output.shape, seed=5)
            results.append([output, *torch.autograd.grad(output, [*hidden, *selector.parameters()], gradient)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


class _Pool(torch.nn.Module):
    def __init__(self, selector):
        super().__init__()
        self.selector = selector

    def forward(self, hidden_states, attention_mask):
        return self.selector.pool(hidden_states, attention_mask)


@pytest.mark.parametrize("path", [None, "mean"])
def test_export(path, monkeypatch):
    """In eval mode, with B and L left open."""
    monkeypatch.undo()
    selector = make_selector(3, 96, 4, backend=BACKEND).requires_grad_(False)
    module = selector if path is None else _Pool(selector)
    B, L = torch.export.Dim("B", min=2, max=64), torch.export.Dim("L", min=2, max=512)
    batch = make_batch(3, 5, 33, 96, F32, "right")
    exported = torch.export.export(
        module, (batch.hidden_states, batch.real), dynamic_shapes=([{0: B, 1: L}] * 3, {0: B, 1: L})
    )
    for B, L in ((5, 33), (2, 7)):
        batch = make_batch(3, B, L, 96, F32, "right")
        output = exported.module()(batch.hidden_states, batch.real)
        assert torch.equal(output, module(batch.hidden_states, batch.real))
