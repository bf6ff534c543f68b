"""The native backend on the CPU beside its stages: threads, storage types, cached tables."""

import contextlib
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import s2sent_kernels as s2
from s2sent_kernels import functional
from s2sent_kernels.engines.native import layout
from s2sent_kernels.formula.call import KERNEL_DTYPES, POOLINGS

BUILT = pytest.mark.skipif(not s2.backends()["native"].usable, reason=s2.backends()["native"].reason)
N, B, L, H, M = 5, 6, 40, 8, 4


# ---------------------------------------------------------------- threads


@contextlib.contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@BUILT
@pytest.mark.parametrize("pooling", [None, "mean"])
@pytest.mark.parametrize("mask", [None, "right", "packed"])
@pytest.mark.parametrize("batch_size", [1, B])
@pytest.mark.parametrize("training", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(training, batch_size, mask, pooling):
    """Outputs, all gradients, and the running statistics."""
    if training and batch_size == 1:
        pytest.skip("has no statistics")
    torch.manual_seed(0)
    size = 768  # large enough that every stage is shared
    shapes = s2.GateParameters.shapes(N, size, H).items()
    tensors = {name: torch.randn(shape).abs() + 0.1 if "var" in name else torch.randn(shape) for name, shape in shapes}
    hidden = [torch.randn(batch_size, L, size) for _ in range(N)]
    where = {}
    lengths = torch.tensor([L - 7 * b for b in range(batch_size)])
    if mask == "right":
        where = {"attention_mask": torch.arange(L) < lengths[:, None]}
    elif mask == "packed":
        hidden = [u.flatten(0, 1) for u in hidden]
        where = {"cu_seqlens": torch.arange(0, batch_size * L + 1, L, dtype=torch.int32)}

    def run():
        leaves = [u.detach().requires_grad_() for u in hidden]
        parameters = s2.GateParameters(
            *(t.clone().requires_grad_(not name.startswith("running")) for name, t in tensors.items())
        )
        options = {"frequencies": M, "backend": "native", "training": training, **where}
        if pooling is None:
            output = functional.select(leaves, parameters, **options)
        else:
            output = functional.select_pool(leaves, parameters, pooling=pooling, **options)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output)
        trained = [t for t in parameters if t.requires_grad]
        statistics = parameters.running_mean, parameters.running_var
        return [output, *statistics, *torch.autograd.grad((output * weights).sum(), [*leaves, *trained])]

    results = []
    for number in (1, 2, 3):
        with threads(number):
            results.append(run())
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@BUILT
@pytest.mark.parametrize("pooling", POOLINGS)
def test_bits_do_not_depend_on_where_the_padding_is(pooling):
    torch.manual_seed(0)
    parameters = s2.GateParameters(*(torch.randn(shape) for shape in ((H, 64), (H,), (N * 64, H), (N * 64,))))
    hidden = [torch.randn(1, L, 64) for _ in range(N)]
    options = {"frequencies": M, "pooling": pooling, "backend": "native"}
    alone = functional.select_pool(hidden, parameters, **options)
    place = torch.stack([torch.randperm(3 * L).sort()[1][:L].sort()[0], torch.arange(2 * L, 3 * L)])  # holes, left
    padded = [torch.full((2, 3 * L, 64), float("nan")) for _ in range(N)]
    mask = torch.zeros(2, 3 * L, dtype=torch.bool).scatter(1, place, True)
    for u, wide in zip(hidden, padded, strict=True):
        wide[mask] = u.expand(2, -1, -1).flatten(0, 1)
    assert torch.equal(functional.select_pool(padded, parameters, mask, **options), alone.expand(2, -1))


@BUILT
def test_threads_over_one_module_get_what_each_gets_alone():
    """make sanitize-threads runs the same under ThreadSanitizer."""
    script = Path(__file__).parents[1] / "races.py"
    done = subprocess.run([sys.executable, script, "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- long sentences


@BUILT
@pytest.mark.parametrize("length", [127, 129, 136, 2047, 2049, 2200, 4231])
def test_a_sentence_of_several_runs_has_the_same_bits_in_every_layout(length):
    """Runs of 128 tokens and chunks of 16 runs: alone, padded, packed behind another, with holes, and block by block."""
    torch.manual_seed(0)
    real = [torch.randn(1, length, 16) for _ in range(2)]
    gates, grad = torch.rand(1, 2, 16), torch.randn(1, length, 16)

    def results(hidden, dv, **where):
        f, p = functional.squeeze(hidden, pooling="mean", frequencies=4, backend="native", **where)
        g = gates.expand(len(f), 2, 16).clone().requires_grad_()
        v = functional.fuse(hidden, g, backend="native", **where)
        return f[-1], p[-1], torch.autograd.grad(v, g, dv)[0][-1]

    alone = results(real, grad)
    other = [torch.randn(1, length + 40, 16) for _ in range(2)]
    spread = torch.arange(length) + (torch.arange(length) * 40 // length)  # 40 holes
    laid = {"padded": torch.arange(length), "left": torch.arange(40, length + 40), "holes": spread}
    for name, at in laid.items():
        mask = torch.ones(2, length + 40, dtype=torch.bool)
        mask[1] = False
        mask[1, at] = True
        hidden = [torch.cat([o, torch.full_like(o, float("nan"))]) for o in other]
        dv = torch.randn(2, length + 40, 16)
        for u, r in zip(hidden, real, strict=True):
            u[1, at] = r[0]
        dv[1, at] = grad[0]
        for one, expected in zip(results(hidden, dv, attention_mask=mask), alone, strict=True):
            assert torch.equal(one, expected), name
    packed = [torch.cat([o[0], r[0]]) for o, r in zip(other, real, strict=True)]
    ends = torch.tensor([0, length + 40, 2 * length + 40], dtype=torch.int32)
    dv = torch.cat([torch.randn(length + 40, 16), grad[0]])
    for one, expected in zip(results(packed, dv, cu_seqlens=ends), alone, strict=True):
        assert torch.equal(one, expected), "packed"
    selector = s2.S2SentSelector(16, 2, 8, 4, backend="native").eval()
    stream = selector.blockwise()
    with torch.no_grad():
        for n, u in enumerate(real):
            stream.add(n, u)
        assert torch.equal(stream.result(), selector.pool(real))


# ---------------------------------------------------------------- storage types


@BUILT
@pytest.mark.parametrize("dtype", [dtype for dtype in KERNEL_DTYPES if dtype.itemsize == 2])
def test_every_number_is_read_and_rounded_as_pytorch_does(dtype):
    """All 65536 values, with subnormal, infinite and NaN, times factors that cause every kind of rounding."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None, None]
    generator = torch.Generator().manual_seed(0)
    for gates in (torch.ones(1, 1, 2**16), torch.rand(1, 1, 2**16, generator=generator) * 4, torch.full((), 0.5)):
        gates = gates.expand(1, 1, 2**16)
        found = functional.fuse([every], gates, backend="native")
        # fuse adds to 0, which turns -0 into 0
        assert torch.equal(found.nan_to_num(nan=123.0), (gates * every.float()).to(dtype).nan_to_num(nan=123.0))
        assert torch.equal(found.isnan(), every.isnan())


# ---------------------------------------------------------------- tables


@BUILT
def test_tables_of_factors_stay():
    """A captured CUDA graph reads them at every replay, so later calls must not free them."""
    device = torch.device("cpu")

    def tables():
        return [layout.block_factors(n, 4, "paper", device)[0] for n in range(6, 90)]

    assert all(a is b for a, b in zip(tables(), tables(), strict=True))


@BUILT
def test_tables_of_lengths_do_not_fill_the_memory(monkeypatch):
    device = torch.device("cpu")
    kept = [weakref.ref(layout.grid_factors(size, 4, device)) for size in range(1, 300)]
    assert sum(table() is not None for table in kept) == layout._LENGTHS
    assert layout.grid_factors(299, 4, device) is kept[-1]()
    # On a GPU a table that is read by a graph stays.
    on_gpu, table = torch.device("cuda", 0), torch.ones(4, 7)
    monkeypatch.setattr(layout, "_grid_factors", lambda *key: table)
    monkeypatch.setattr(layout, "_captured", {})
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        layout.grid_factors(7, 4, on_gpu)
        assert (layout._captured == {}) is not capturing
