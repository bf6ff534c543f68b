"""The gate with batch statistics on a GPU: parity, and device time beside running statistics, for bench/NOTES.md.

    python bench/probes/gate_training.py                       # cases A, B and E
    python bench/probes/gate_training.py B,E --tiles           # with other tiles, eight at most

Parity: every result against the reference in float64, beside the reference in float32; "ratio" is the largest quotient of the
root mean square errors, with the tensor's name. Times are medians of CUDA graphs over rotating inputs, in microseconds: the
pooled path, "eval" with running statistics and "train" with those of the batch, forward, and forward and backward with
squeeze_backward. A tile is statistics/columns, each sentences:columns:block_h:warps:stages:unroll of ``config.ColumnTile``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/, also where this file is run by its path

import torch
from cases import BOTTLENECK, CASES, FREQUENCIES, Case, Inputs
from timing import device_times

from s2sent_kernels import S2SentSelector
from s2sent_kernels.engines import plain
from s2sent_kernels.engines.triton import config, engine
from s2sent_kernels.formula.call import Batch, GateParameters, Gating, HiddenGradients, Reading
from s2sent_kernels.plan import plain_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in the interpreter, to try the script
TARGETS = {"A": 1.08, "B": 1.25, "E": 1.2}  # of train / eval, forward and backward
READING, EVAL, TRAIN = Reading(FREQUENCIES, pooling="mean"), Gating(), Gating(training=True)
SETTINGS = (
    "64:32:64:8:2:1/32:32:64:4:2:4",
    "64:16:64:4:2:1/32:32:64:4:2:4",
    "64:64:64:8:2:1/32:32:64:4:2:4",
    "64:32:64:4:2:1/32:32:64:4:1:4",
    "64:32:64:4:2:1/32:32:64:8:2:4",
    "64:32:64:4:2:1/64:32:64:4:2:4",
    "64:32:64:4:2:1/64:32:64:8:2:4",
    "64:32:64:4:2:1/32:16:64:4:2:4",
)


class Tiles(NamedTuple):
    statistics: config.ColumnTile
    columns: config.ColumnTile

    @staticmethod
    def of(text: str) -> Tiles:
        return Tiles(*(config.ColumnTile(*map(int, part.split(":"))) for part in text.split("/")))

    def around(self, call: Callable[[], object]) -> object:
        usual = config.gate_statistics, config.gate_training_backward
        for name, tile in zip(("gate_statistics", "gate_training_backward"), self, strict=True):
            setattr(config, name, lambda *_, tile=tile: tile)
        try:
            return call()
        finally:
            for name, function in zip(("gate_statistics", "gate_training_backward"), usual, strict=True):
                setattr(config, name, function)


def parameters_of(case: Case) -> GateParameters:
    """Away from the initial values, at which some gradients are small."""
    selector = S2SentSelector(case.size, case.blocks, BOTTLENECK, FREQUENCIES, block_prior=True).to(DEVICE)
    parameters = plain_tensors(selector).each(torch.Tensor.detach)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name in ("norm_weight", "norm_bias", "running_mean"):
        tensor = getattr(parameters, name)
        tensor += 0.3 * torch.randn(tensor.shape, generator=generator, device=DEVICE)
    return parameters


def batch_of(inputs: Inputs) -> Batch:
    return Batch(inputs.blocks, inputs.mask, inputs.cu_seqlens)


# ---------------------------------------------------------------- parity


def results(f, p, grad, parameters: GateParameters, which) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    kept = parameters._replace(running_mean=parameters.running_mean.clone(), running_var=parameters.running_var.clone())
    output, statistics = which.gate_in_training(f, p, kept, TRAIN, f.dtype)
    dp, df, grads = which.gate_in_training_backward(grad, f, p, statistics, kept, TRAIN)
    found = {"output": output, **statistics._asdict(), "dp": dp, "df": df}
    found |= {"running_mean": kept.running_mean, "running_var": kept.running_var}
    return found | {name: t for name, t in grads._asdict().items() if t is not None}


def parity(case: Case, draws: int = 3) -> str:
    """The largest ratios of errors, from ``draws`` inputs together."""
    parameters, ours, theirs = parameters_of(case), {}, {}
    for seed in range(draws):
        inputs = Inputs(case, 1000 + seed, False)
        f, p = engine.squeeze(batch_of(inputs), READING)
        grad = inputs.grad_pooled.float()
        double = [t.double() for t in (f, p, grad)]
        truth = results(*double, parameters.each(torch.Tensor.double), plain)
        for errors, which in ((ours, engine), (theirs, plain)):
            for name, t in results(f, p, grad, parameters, which).items():
                errors[name] = errors.get(name, 0.0) + (t.double() - truth[name]).square().sum().item()
        first, again = (results(f, p, grad, parameters, engine) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first), "bits differ from run to run"
    ratios = {name: (ours[name] / max(theirs[name], 1e-300)) ** 0.5 for name in ours}
    worst = sorted(ratios, key=ratios.__getitem__)[-3:][::-1]
    return ", ".join(f"{name} {ratios[name]:.2f}" for name in worst)


# ---------------------------------------------------------------- time


def step(case: Case, inputs: Inputs, parameters: GateParameters, training: bool, backward: bool) -> object:
    """The pooled path with the engine's functions, as autograd calls them."""
    batch = batch_of(inputs)
    if training:
        _, f, p, statistics = engine.select_pool_in_training(batch, READING, parameters, TRAIN)
    else:
        _, f, p = engine.select_pool(batch, READING, parameters, EVAL)
    if not backward:
        return None
    grad = inputs.grad_pooled
    if training:
        dp, df, _ = engine.gate_in_training_backward(grad, f, p, statistics, parameters, TRAIN)
    else:
        dp, df, _ = engine.gate_pool_backward(grad, f, p, parameters, EVAL)
    return engine.squeeze_backward(HiddenGradients(squeezed=df, pooled=dp), batch.layout, [True] * case.blocks, READING)


def times(case: Case, settings: list[str]) -> None:
    rotation = [Inputs(case, seed, False) for seed in range(max(1, min(32, (128 << 20) // case.state_bytes)))]
    parameters, variants = parameters_of(case), {}
    for backward in (False, True):
        what = "both" if backward else "forward"
        for training in (False, True):
            calls = [partial(step, case, inputs, parameters, training, backward) for inputs in rotation]
            variants[f"{'train' if training else 'eval'} {what}"] = calls
        for setting in settings:
            variants[f"{setting} {what}"] = [partial(Tiles.of(setting).around, call) for call in calls]
    errors: dict[str, str] = {}
    found = device_times(variants, 20, errors=errors)
    for name in ("train", *settings):
        row = [found.get(f"{which} {what}") for what in ("forward", "both") for which in ("eval", name)]
        if None in row:
            print(f"{case.name} {name:32s} failed: {errors}", flush=True)
            continue
        before, after, both_before, both = (one.median for one in row if one is not None)
        target = f"(target {TARGETS[case.name]})" if case.name in TARGETS else ""
        print(
            f"{case.name} {name:32s} forward {before:7.1f} {after:7.1f}   both {both_before:7.1f} {both:7.1f}"
            f"   ratio {both / both_before:.3f} {target}",
            flush=True,
        )


def kernels(case: Case) -> None:
    """Each kernel's own time in one training step, from the profiler."""
    inputs, parameters = Inputs(case, 0, False), parameters_of(case)
    for _ in range(3):
        step(case, inputs, parameters, True, True)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step(case, inputs, parameters, True, True)
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_device_time_total)
    print(f"{case.name} " + ", ".join(f"{row.key} {row.self_device_time_total / row.count:.1f}" for row in rows[:12]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="?", default="A,B,E")
    parser.add_argument("--tiles", action="store_true", help="time the other tiles of SETTINGS too")
    arguments = parser.parse_args()
    print("case, variant, forward eval/train, forward + backward eval/train")
    for case in CASES:
        if case.name not in arguments.cases.split(","):
            continue
        print(f"{case.name} parity, worst ratios: {parity(case)}", flush=True)
        times(case, list(SETTINGS) if arguments.tiles else [])
        kernels(case)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
