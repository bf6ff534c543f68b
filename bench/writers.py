"""How fast this machine writes as many bytes as a backward does: the fastest of several writers is the ceiling of that size.

``fill_`` of one tensor far larger than the caches is the ceiling of ``timing.ceilings``. At the size of a backward's gradients
another writer may be faster; which one, a row says ("writer").
"""

from __future__ import annotations

import functools

import torch
from timing import Call, device_times, l2_bytes, on_gpu

TENSORS = 12  # as many gradients as case A has
FILL, FILL_EACH, STORE = "fill_", f"fill_ of {TENSORS} tensors", "Triton stores of random values"
# Four tiles of 2048 int32 a program, 8 warps: each thread stores 16 bytes at a time.
TILE, TILES, WARPS = 2048, 4, 8


def fastest(size: int) -> tuple[str, float]:
    """The fastest writer of ``size`` bytes, and its TB/s. Less than the caches hold is measured as twice that, because rows of
    results rotate through inputs that exceed them."""
    rates = measure(max(size, 2 * l2_bytes()))
    return max(rates.items(), key=lambda rate: rate[1])


@functools.cache
def measure(size: int) -> dict[str, float]:
    """TB/s of each writer."""
    unit = 4 * TILE * TILES * TENSORS
    words = torch.empty(-(-size // unit) * unit // 4, dtype=torch.int32, device="cuda" if on_gpu() else "cpu")
    parts = words.chunk(TENSORS)
    writers: dict[str, list[Call]] = {
        FILL: [lambda: words.fill_(7)],
        FILL_EACH: [lambda: [part.fill_(7) for part in parts]],
    }
    if on_gpu():
        writers[STORE] = [_storer(words)]
    times = device_times(writers, repeats=15)
    return {name: words.numel() * 4 / value.median / 1e6 for name, value in times.items()}


def _storer(words: torch.Tensor) -> Call:
    import triton
    import triton.language as tl

    @triton.jit
    def store_kernel(p_out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        for step in tl.static_range(STEPS):
            at = (i * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
            # One step of a linear congruential generator: no two words are alike.
            tl.store(p_out + at, at.to(tl.int32) * 1664525 + 1013904223)

    programs = words.numel() // (TILE * TILES)
    return lambda: store_kernel[(programs,)](words, TILE, TILES, num_warps=WARPS)
