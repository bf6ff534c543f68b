"""Times squeeze and fuse's backward, the two sums over a sentence's tokens, for bench/NOTES.md.

    python bench/probes/long_sentences.py triton            # or native; on the GPU where there is one, else on the CPU
    PYTHONPATH=TREE python bench/probes/long_sentences.py triton    # of another tree of this package

Prints the median of 15 calls, in microseconds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

import s2sent_kernels
from s2sent_kernels import functional

NUM_BLOCKS, HIDDEN_SIZE = 12, 768
# dtype, B, L
CASES = {
    "cuda": (
        (torch.float32, 8, 2048),
        (torch.float32, 32, 512),
        (torch.float32, 64, 128),
        (torch.bfloat16, 8, 2048),
        (torch.bfloat16, 32, 512),
    ),
    "cpu": ((torch.float32, 1, 2048), (torch.float32, 4, 512), (torch.float32, 16, 128)),
}
WARM_UP, CALLS = 3, 15


def median(call: Callable[[], object], device: str) -> float:
    """Microseconds of a call."""
    found = []
    for _ in range(WARM_UP + CALLS):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(1e3 * begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found[WARM_UP:])


def main() -> None:
    backend = sys.argv[1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{s2sent_kernels.__file__}, {backend} on {device}", flush=True)
    for dtype, batch, length in CASES[device]:
        hidden = [torch.randn(batch, length, HIDDEN_SIZE, device=device, dtype=dtype) for _ in range(NUM_BLOCKS)]
        grad = torch.randn_like(hidden[0])
        squeeze = median(lambda u=hidden: functional.squeeze(u, pooling="mean", backend=backend), device)
        backward = median(lambda u=hidden, dv=grad: torch.ops.s2sent.fuse_backward(dv, u, None, None, backend), device)
        name = str(dtype).removeprefix("torch.")
        print(f"{name:8} {batch:2} x {length:4}: squeeze {squeeze:.1f}, fuse_backward {backward:.1f}", flush=True)


if __name__ == "__main__":
    main()
