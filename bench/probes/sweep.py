"""Times one kernel over a handful of configurations, for bench/NOTES.md.

    python bench/probes/sweep.py squeeze A,D 4:4:64:3 2:4:64:4      # the fields of its entry in engines/triton/config.py

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
from cases import BOTTLENECK, CASES, FREQUENCIES, Case, Inputs
from timing import device_times

from s2sent_kernels import S2SentSelector
from s2sent_kernels.engines.triton import config, engine
from s2sent_kernels.engines.triton.gate import pool
from s2sent_kernels.engines.triton.squeeze import laid_out, squeeze_for_gate
from s2sent_kernels.formula.call import Batch, Gating, HiddenGradients, Reading

TILES = {
    "squeeze": config.SumTile,
    "fuse_backward": config.SumTile,
    "fuse": config.Tile,
    "squeeze_backward": config.Tile,
    "gate": config.GateTile,
    "gate_backward": config.GateBackwardTile,  # of its largest kernel; the call is gate_pool_backward
}


def call_of(name: str, case: Case, inputs: Inputs) -> Callable[[], object]:
    """One launch of the kernel on these inputs (squeeze: with pooling; squeeze_backward: of the pooled path), or one path."""
    batch, reading, gating = (
        Batch(inputs.blocks, inputs.mask, inputs.cu_seqlens),
        Reading(FREQUENCIES, pooling="mean"),
        Gating(),
    )
    selector = S2SentSelector(case.size, case.blocks, BOTTLENECK, FREQUENCIES, block_prior=True).cuda().eval()
    parameters = selector.gate_parameters()
    assert parameters is not None
    parameters = parameters.each(torch.Tensor.detach)
    gates = inputs.gates
    if name == "squeeze":
        return partial(squeeze_for_gate, laid_out(batch, reading), batch, reading, parameters.down_weight)
    if name == "gate":
        done = squeeze_for_gate(laid_out(batch, reading), batch, reading, parameters.down_weight)
        return partial(pool, done, done.pooled, parameters, gating, case.dtype)
    if name == "fuse":
        return partial(engine.fuse, batch, gates)
    if name == "fuse_backward":
        return partial(engine.fuse_backward, inputs.grad_fused, batch)
    if name == "squeeze_backward":
        grads = HiddenGradients(squeezed=inputs.squeezed, pooled=gates)
        return partial(engine.squeeze_backward, grads, batch.layout, [True] * case.blocks, reading)
    if name == "gate_backward":
        return partial(engine.gate_pool_backward, inputs.grad_pooled, inputs.squeezed, gates, parameters, gating)
    if name == "select_pool":
        return partial(engine.select_pool, batch, reading, parameters, gating)
    return partial(engine.select, batch, reading._replace(pooling=None), parameters, gating)


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
