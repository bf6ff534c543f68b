"""Times one kernel over a handful of configurations: what bench/NOTES.md draws on.

    python bench/sweep.py squeeze A,D 4:8:64:1 4:16:64:2      # the fields of the kernel's entry in kernels/config.py

Kernels: squeeze and fuse_backward (SumTile), fuse and squeeze_backward (Tile), gate (GateTile). Compiling takes longer than
measuring: a dozen settings are enough for one run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from latency import CASES, Inputs
from timing import device_times

from s2sent_kernels import S2SentSelector, kernels
from s2sent_kernels.kernels import config

TILES = {
    "squeeze": config.SumTile,
    "fuse_backward": config.SumTile,
    "fuse": config.Tile,
    "squeeze_backward": config.Tile,
    "gate": config.GateTile,
}


def call_of(name: str, case, inputs: Inputs) -> Callable[[], object]:
    """One launch of the kernel on these inputs (squeeze: with pooling; squeeze_backward: of the pooled path)."""
    batch = (inputs.mask, inputs.cu_seqlens)
    gates = torch.rand(case.batch, case.blocks, case.size, device="cuda")
    if name == "squeeze":
        return partial(kernels.squeeze_groups, inputs.blocks, *batch, 4, "paper", "mean")
    if name == "fuse":
        return partial(kernels.fuse, inputs.blocks, gates, *batch)
    if name == "fuse_backward":
        return partial(kernels.fuse_backward, inputs.grad_fused, inputs.blocks, *batch)
    if name == "squeeze_backward":
        first = inputs.blocks[0]
        rest = (first.shape, first.dtype, first.device, [True] * case.blocks, *batch, 4, "paper", "mean")
        return partial(kernels.squeeze_backward, gates[:, 0].contiguous(), gates, None, None, *rest)
    selector = S2SentSelector(case.size, case.blocks, 64, 4, block_prior=True).cuda()
    parameters = selector._parameters_of_gate().each(torch.Tensor.detach)
    groups = torch.rand(case.batch, -(-case.blocks // config.BLOCK_GROUP), case.size, device="cuda")
    return partial(kernels.gate_pool, groups, gates, parameters, "tanh", 1e-6, case.dtype)


def with_setting(name: str, tile, call: Callable[[], object]) -> object:
    usual = getattr(config, name)
    setattr(config, name, lambda *_: tile)
    try:
        return call()
    finally:
        setattr(config, name, usual)


def main() -> None:
    name, cases, settings = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
    for case in CASES:
        if case.name not in cases:
            continue
        torch.manual_seed(0)
        size = case.batch * case.tokens * case.size * case.blocks * 2
        rotation = [Inputs(case, seed, False) for seed in range(max(1, min(32, (128 << 20) // size)))]
        calls = [call_of(name, case, inputs) for inputs in rotation]
        variants = {"as configured": calls}
        for setting in settings:
            tile = TILES[name](*(int(number) for number in setting.split(":")))
            variants[setting] = [partial(with_setting, name, tile, call) for call in calls]
        for setting, times in device_times(variants, 20).items():
            quantiles = f"p20 {times.p20:.2f}, p80 {times.p80:.2f}"
            print(f"{name} {case.name} {setting:14s} {times.median:8.2f} us ({quantiles})", flush=True)
        del rotation, calls, variants
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
