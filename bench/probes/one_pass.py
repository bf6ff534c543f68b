"""Times the token forward in one read of the hidden states and in two, over shapes. csrc/cuda/sm90/select.cu's rule follows it.

    python bench/probes/one_pass.py [N,B,L,D ...]

bfloat16, no mask, H = D / 12; microseconds of device time. Caches are not flushed between calls. A shape that the one-pass
kernel does not support has no time of one pass. For the others the line also reports whether both ways give the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, also where this file is run by its path

import torch
from cases import FREQUENCIES, Case, Inputs
from timing import device_times

from s2sent_kernels import S2SentSelector, backends, functional
from s2sent_kernels.engines.native import engine as native
from s2sent_kernels.formula.call import Batch, Gating, Reading

SHAPES = (
    (12, 256, 128, 768),
    (12, 1, 128, 768),
    (12, 42, 128, 768),
    (12, 512, 32, 768),
    (6, 256, 128, 768),
    (6, 64, 32, 384),
    (6, 512, 32, 384),
    (4, 256, 64, 384),
    (3, 28, 512, 768),
    (3, 256, 128, 768),
    (3, 1024, 32, 768),
    (2, 256, 128, 768),
    (1, 256, 128, 768),
    (6, 128, 128, 1024),
    (9, 128, 64, 512),
)


@torch.no_grad()
def main(shapes: Sequence[tuple[int, ...]]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for N, B, L, D in shapes:
        case = Case(f"N = {N}, B = {B}, L = {L}, D = {D}", B, L, N, D)
        hidden = Inputs(case, 0, False, device).blocks
        selector = S2SentSelector(D, N, D // 12, FREQUENCIES, block_prior=True).to(device).eval()
        parameters = selector.gate_parameters()
        assert parameters is not None
        arguments = (Batch(hidden), Reading(FREQUENCIES), parameters, Gating("tanh", 1e-5))
        two = partial(native.select, *arguments, one_pass=False)
        variants = {"two passes": [two]}
        if backends()["triton"].usable:
            call = partial(functional.select, hidden, parameters, frequencies=FREQUENCIES, backend="triton")
            variants["triton"] = [call]
        bits = "no one-pass kernel"
        once = native.select_once(*arguments, always=True) if device == "cuda" else None
        if once is not None:
            bits = "the same bits" if all(map(torch.equal, once, two())) else "OTHER BITS"
            variants["one pass"] = [partial(native.select, *arguments, one_pass=True)]
        times = ", ".join(f"{name} {found.median:.1f}" for name, found in device_times(variants, 20).items())
        print(f"{case.name}: {times}; {bits}", flush=True)


if __name__ == "__main__":
    main([tuple(map(int, text.split(","))) for text in sys.argv[1:]] or list(SHAPES))
