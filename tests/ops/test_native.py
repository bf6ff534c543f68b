"""The native backend on the CPU beside its stages: storage types, cached tables."""

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import s2sent_kernels as s2
from s2sent_kernels import functional
from s2sent_kernels.engines.native import layout
from s2sent_kernels.formula.call import KERNEL_DTYPES

BUILT = pytest.mark.skipif(not s2.backends()["native"].usable, reason=s2.backends()["native"].reason)


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
