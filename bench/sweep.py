"""Times the squeeze kernel, and the pooled path, over a handful of configurations: what bench/NOTES.md draws on.

python bench/sweep.py squeeze 4,1,3 4,1,4 8,1,3     # loads a thread, warps, blocks a group
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from latency import CASES, Inputs
from timing import device_times

from s2sent_kernels import S2SentSelector, kernels
from s2sent_kernels.kernels import config


def call(selector, inputs: Inputs, loads: int, warps: int, group: int):
    """The pooled path under one configuration, or without a selector its squeeze alone."""
    config.squeeze = lambda part, vector: config._sum_tile(part, vector, loads, warps)
    config.BLOCK_GROUP = group
    with torch.no_grad():
        if selector is None:
            return kernels.squeeze_groups(inputs.blocks, inputs.mask, inputs.cu_seqlens, 4, "paper", "mean")
        return selector.pool(inputs.blocks, inputs.mask, cu_seqlens=inputs.cu_seqlens)


def main() -> None:
    names, settings = sys.argv[1].split(","), sys.argv[2:]
    for case in CASES:
        if case.name not in names:
            continue
        torch.manual_seed(0)
        selector = S2SentSelector(case.size, case.blocks, 64, 4, block_prior=True).cuda().eval()
        size = case.batch * case.tokens * case.size * case.blocks * 2
        rotation = [Inputs(case, seed, False) for seed in range(max(1, min(32, (128 << 20) // size)))]
        variants = {}
        for setting in settings:
            loads, warps, group = (int(number) for number in setting.split(","))

            variants[f"{setting} squeeze"] = [partial(call, None, i, loads, warps, group) for i in rotation]
            variants[f"{setting} pool"] = [partial(call, selector, i, loads, warps, group) for i in rotation]
        for name, times in device_times(variants, 20).items():
            print(
                f"{case.name} {name:14s} {times.median:8.2f} us (p20 {times.p20:.2f}, p80 {times.p80:.2f})", flush=True
            )
        del rotation
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
