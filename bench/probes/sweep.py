"""Times one kernel over a handful of configurations, for bench/NOTES.md.

    python bench/probes/sweep.py squeeze A,D 4:4:64:3 2:4:64:4      # the fields of the kernel's entry in kernels/config.py

Kernels: squeeze and fuse_backward (SumTile), fuse and squeeze_backward (Tile), gate (GateTile), gate_backward
(GateBackwardTile, for the largest of its kernels). select_pool and select are whole paths, without settings. Compilation needs
more time than the measurement: a dozen settings fill one run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, also where this file is run by its path

import torch
from cases import BOTTLENECK, CASES, FREQUENCIES, Inputs
from timing import device_times

from s2sent_kernels import S2SentSelector, kernels
from s2sent_kernels.kernels import config
from s2sent_kernels.kernels.gate import _pool as pool
from s2sent_kernels.kernels.squeeze import squeeze_for_gate

TILES = {
    "squeeze": config.SumTile,
    "fuse_backward": config.SumTile,
    "fuse": config.Tile,
    "squeeze_backward": config.Tile,
    "gate": config.GateTile,
    "gate_backward": config.GateBackwardTile,  # of its largest kernel; the call is gate_pool_backward
}


def call_of(name: str, case, inputs: Inputs) -> Callable[[], object]:
    """One launch of the kernel on these inputs (squeeze: with pooling; squeeze_backward: of the pooled path), or one path."""
    batch = (inputs.mask, inputs.cu_seqlens)
    selector = S2SentSelector(case.size, case.blocks, BOTTLENECK, FREQUENCIES, block_prior=True).cuda()
    parameters = selector._parameters_of_gate().each(torch.Tensor.detach)
    first, gates = inputs.blocks[0], inputs.gates
    if name == "squeeze":
        return partial(squeeze_for_gate, inputs.blocks, *batch, FREQUENCIES, "paper", "mean", parameters.down_weight)
    if name == "gate":
        done = squeeze_for_gate(inputs.blocks, *batch, FREQUENCIES, "paper", "mean", parameters.down_weight)
        return partial(pool, done, done.pooled, parameters, "tanh", 1e-6, case.dtype)
    if name == "fuse":
        return partial(kernels.fuse, inputs.blocks, gates, *batch)
    if name == "fuse_backward":
        return partial(kernels.fuse_backward, inputs.grad_fused, inputs.blocks, *batch)
    if name == "squeeze_backward":
        rest = (first.shape, first.dtype, first.device, [True] * case.blocks, *batch, FREQUENCIES, "paper", "mean")
        return partial(kernels.squeeze_backward, inputs.squeezed, gates, None, None, *rest)
    if name == "gate_backward":
        return partial(kernels.gate_pool_backward, inputs.grad_pooled, inputs.squeezed, gates, parameters, "tanh", 1e-6)
    if name == "select_pool":
        return partial(kernels.select_pool, inputs.blocks, *batch, parameters, FREQUENCIES, "mean", "tanh", 1e-6)
    return partial(kernels.select, inputs.blocks, *batch, parameters, FREQUENCIES, "tanh", 1e-6)


def field(text: str) -> int | tuple[int, ...]:
    """A number, or several: 8.4 is (8, 4)."""
    numbers = tuple(int(number) for number in text.split(".") if number)
    return numbers if "." in text else numbers[0]


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
        rotation = [Inputs(case, seed, False) for seed in range(max(1, min(32, (128 << 20) // case.state_bytes)))]
        calls = [call_of(name, case, inputs) for inputs in rotation]
        variants = {"as configured": calls}
        for setting in settings:
            tile = TILES[name](*(field(text) for text in setting.split(":")))
            variants[setting] = [partial(with_setting, name, tile, call) for call in calls]
        for setting, times in device_times(variants, 20).items():
            quantiles = f"p20 {times.p20:.2f}, p80 {times.p80:.2f}"
            print(f"{name} {case.name} {setting:14s} {times.median:8.2f} us ({quantiles})", flush=True)
        del rotation, calls, variants
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
