"""The token path that reads each hidden state once (csrc/cuda/sm90/select.cu) has the bits of the one that reads them twice."""

import pytest
import torch
from builders import make_mask
from harness import BACKEND, BF16, DEVICE, F32, make_parameters, randn

from s2sent_kernels import functional
from s2sent_kernels.engines.native import engine
from s2sent_kernels.formula.call import KERNEL_DTYPES, Batch, Gating, Reading

pytestmark = pytest.mark.skipif(
    not (BACKEND == "native" and DEVICE.type == "cuda" and torch.cuda.get_device_capability() == (9, 0)),
    reason="needs the native backend's CUDA part, compiled for sm_90a, on such a GPU",
)


def select(monkeypatch, one_pass, hidden, parameters, **options):
    """(v, f, g), from the one-pass kernel or from the others; fails where that kernel does not support the batch."""
    taken = []
    original = engine.select_once
    batch = Batch(hidden, options.get("attention_mask"), options.get("cu_seqlens"))
    reading, gating = Reading(options.get("frequencies", 4)), Gating(options.get("activation", "tanh"), 1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(
            engine, "select_once", lambda *args, **options: taken.append(original(*args, **options)) or taken[-1]
        )
        results = engine.select(batch, reading, parameters, gating, one_pass)
    assert [result is not None for result in taken] == [True] * one_pass
    torch.cuda.synchronize()
    return results


def check(monkeypatch, hidden, parameters, **options):
    once = select(monkeypatch, True, hidden, parameters, **options)
    twice = select(monkeypatch, False, hidden, parameters, **options)
    for name, a, b in zip("vfg", once, twice, strict=True):
        assert not b.isnan().any(), name
        assert torch.equal(a, b), name


def make_hidden(N, shape, dtype):
    return [randn(*shape, seed=n).to(dtype).to(DEVICE) for n in range(N)]


def gate_parameters(N, D, H, **options):
    return make_parameters(N, D, H, **options).each(lambda tensor: tensor.to(DEVICE, F32))


@pytest.mark.parametrize("dtype", [dtype for dtype in KERNEL_DTYPES if dtype.itemsize == 2], ids=str)
@pytest.mark.parametrize(
    "N, D, H, B, L",
    [
        (12, 768, 64, 40, 128),
        (12, 768, 64, 3, 150),
        (1, 768, 64, 2, 70),
        (6, 384, 32, 50, 37),
        (3, 768, 64, 20, 700),
        (12, 384, 30, 9, 96),
        (3, 1024, 85, 9, 65),
        (9, 512, 42, 30, 64),
        (2, 200, 17, 5, 33),
        (4, 48, 4, 7, 1),
    ],
)
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_bits(monkeypatch, dtype, N, D, H, B, L, kind):
    where = {} if kind == "none" else {"attention_mask": make_mask(kind, B, L).to(DEVICE)}
    frequencies = 1 if D == 200 or N == 1 else 2 if D == 48 else 4
    check(monkeypatch, make_hidden(N, (B, L, D), dtype), gate_parameters(N, D, H), frequencies=frequencies, **where)


@pytest.mark.parametrize("frequencies", [1, 2, 16])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": False},
        {"prior": (0.5, -1.0, 2.0, 0.0, 1.0, -3.0)},
        {"prior": (0.5, -1.0, 2.0, 0.0, 1.0, -3.0), "scale": 4.0},
        {"scale": -70.0},
        {"activation": "relu"},
    ],
    ids=str,
)
def test_bits_of_every_gate(monkeypatch, frequencies, options):
    options = dict(options)
    activation = options.pop("activation", "tanh")
    hidden = make_hidden(6, (5, 61, 768), BF16)
    check(monkeypatch, hidden, gate_parameters(6, 768, 64, **options), frequencies=frequencies, activation=activation)


@pytest.mark.parametrize(
    "N, D, lengths",
    [
        (12, 768, [5, 0, 130, 64, 32, 1, 0]),
        (12, 768, [400, 3, 250, 33]),  # longer than what a cluster holds: these are read twice
        (1, 96, [5000, 2048, 2049, 7]),  # more than one running sum
    ],
)
def test_bits_packed(monkeypatch, N, D, lengths):
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    hidden = make_hidden(N, (sum(lengths), D), BF16)
    check(monkeypatch, hidden, gate_parameters(N, D, D // 12), frequencies=1 if N == 1 else 4, cu_seqlens=cu_seqlens)


def test_bits_of_views(monkeypatch):
    """Hidden states side by side in one tensor, their features dense."""
    wide = randn(4, 50, 3 * 384, seed=0).to(BF16).to(DEVICE)
    check(monkeypatch, list(wide.split(384, dim=-1)), gate_parameters(3, 384, 32))


def test_runs_again(monkeypatch):
    """Same bits on every run, whatever clusters are ahead of others."""
    hidden, parameters = make_hidden(12, (64, 128, 768), BF16), gate_parameters(12, 768, 64)
    first = select(monkeypatch, True, hidden, parameters)[0]
    for _ in range(20):
        assert torch.equal(first, select(monkeypatch, True, hidden, parameters)[0])


@pytest.mark.parametrize("change", ["float32", "width", "blocks", "length"])
def test_what_it_does_not_take(change):
    dtype = F32 if change == "float32" else BF16
    N, L, H = 30 if change == "blocks" else 12, 300 if change == "length" else 32, 100 if change == "width" else 64
    hidden = make_hidden(N, (2, L, 768), dtype)
    parameters = gate_parameters(N, 768, H)
    assert engine.select_once(Batch(hidden), Reading(4), parameters, Gating("tanh", 1e-5), always=True) is None
    functional.select(hidden, parameters, frequencies=4, backend="native")
