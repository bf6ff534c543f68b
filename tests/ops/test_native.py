"""The native backend on the CPU beside its stages: storage types, cached tables."""

import weakref

import pytest
import torch

import s2sent_kernels as s2
from s2sent_kernels import functional
from s2sent_kernels.engines.native import layout
from s2sent_kernels.formula.call import KERNEL_DTYPES

BUILT = pytest.mark.skipif(not s2.backends()["native"].usable, reason=s2.backends()["native"].reason)


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
