"""Latency of the selector's paths against their traffic floors and against plain PyTorch, on one GPU.

    python bench/latency.py --output bench/results/<device>.json [--cases A,B,C] [--compile]

Every case is first checked against the reference in float64; one that fails prints no time. Floors are the bytes of the path
over the ceilings measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timing import Times, ceilings, device_times, wall_times

import s2sent_kernels
from s2sent_kernels import S2SentSelector

L2_BYTES = 128 << 20  # more than the L2 of any GPU so far: inputs rotate until they exceed it


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    tokens: int
    blocks: int
    size: int
    dtype: torch.dtype = torch.bfloat16
    layout: str = "full"  # or ragged, packed (the same sentences without padding)


CASES = (
    Case("A", 256, 128, 12, 768),
    Case("A-float16", 256, 128, 12, 768, torch.float16),
    Case("A-float32", 256, 128, 12, 768, torch.float32),
    Case("A-ragged", 256, 128, 12, 768, layout="ragged"),
    Case("A-packed", 256, 128, 12, 768, layout="packed"),
    Case("B", 64, 32, 3, 768),
    Case("C", 1, 32, 12, 768),
    Case("D", 32, 512, 24, 1024),
    Case("E", 256, 128, 6, 384),
)


class Inputs:
    """One set of hidden states and what goes with them."""

    def __init__(self, case: Case, seed: int, grad: bool) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        lengths = torch.full((case.batch,), case.tokens)
        if case.layout != "full":
            lengths = torch.randint(
                case.tokens // 4, case.tokens + 1, (case.batch,), generator=torch.Generator().manual_seed(1)
            )
        self.real_tokens = int(lengths.sum())
        self.mask = self.cu_seqlens = None
        shape: tuple[int, ...] = (case.batch, case.tokens, case.size)
        if case.layout == "packed":
            shape = (self.real_tokens, case.size)
            self.cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32).cuda()
        else:
            self.mask = (torch.arange(case.tokens) < lengths[:, None]).long().cuda()
        self.blocks = [
            torch.randn(shape, generator=generator, device="cuda", dtype=case.dtype).requires_grad_(grad)
            for _ in range(case.blocks)
        ]
        self.grad_pooled = torch.randn(case.batch, case.size, generator=generator, device="cuda", dtype=case.dtype)
        self.grad_fused = torch.randn(shape, generator=generator, device="cuda", dtype=case.dtype)


def run(selector: S2SentSelector, inputs: Inputs, path: str):
    keywords = {"cu_seqlens": inputs.cu_seqlens}
    if path == "pooled":
        return selector.pool(inputs.blocks, inputs.mask, **keywords)
    return selector(inputs.blocks, inputs.mask, **keywords)


def both_ways(selector: S2SentSelector, inputs: Inputs, path: str):
    output = run(selector, inputs, path)
    wanted = [*inputs.blocks, *selector.parameters()]
    return torch.autograd.grad(output, wanted, inputs.grad_pooled if path == "pooled" else inputs.grad_fused)


def floor(case: Case, inputs: Inputs, path: str, backward: bool, ceiling: dict[str, float]) -> float:
    """Microseconds: SPEC of the traffic floors, bytes over ceilings. The token path reads twice (two passes)."""
    element = torch.finfo(case.dtype).bits // 8
    real = inputs.real_tokens * case.size * element  # one hidden state's real tokens
    whole = inputs.blocks[0].numel() * element
    pooled = case.batch * case.size * element
    if path == "pooled":
        read, write = case.blocks * real, pooled
        if backward:
            write += case.blocks * whole
    else:
        read, write = 2 * case.blocks * real, whole
        if backward:
            read += case.blocks * real + 2 * real
            write += case.blocks * whole
    return read / ceiling["read"] / 1e6 + write / ceiling["write"] / 1e6


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


def parity(case: Case, selector: S2SentSelector, path: str) -> tuple[bool, float, float]:
    """Whether the output's error against float64 is at most twice that of the same-dtype reference; both errors."""
    few = Case(case.name, min(case.batch, 8), case.tokens, case.blocks, case.size, case.dtype, case.layout)
    inputs = Inputs(few, 7, False)
    with torch.no_grad():
        actual = run(selector, inputs, path)
        selector.backend = "reference"
        same_dtype = run(selector, inputs, path)
        inputs.blocks = [u.double() for u in inputs.blocks]
        truth = run(selector, inputs, path)
        selector.backend = "auto"
    ours, theirs = error(actual, truth), error(same_dtype, truth)
    return ours <= 2 * theirs, ours, theirs


def measure(case: Case, ceiling: dict[str, float], repeats: int, backward: bool, compile_reference: bool) -> list[dict]:
    torch.manual_seed(0)
    selector = S2SentSelector(case.size, case.blocks, 64, 4, block_prior=True).cuda().eval()
    one = Inputs(case, 0, False)
    size = sum(u.numel() * u.element_size() for u in one.blocks)
    rotation = [one, *(Inputs(case, seed, False) for seed in range(1, min(64, 1 + L2_BYTES // size)))]
    rows = []
    for path in ("pooled", "token"):
        ok, ours, theirs = parity(case, selector, path)
        row = {"case": case.name, "path": path, "parity": ok, "error": ours, "error_of_same_dtype_reference": theirs}
        rows.append(row)
        if not ok:
            continue
        with torch.no_grad():
            variants = {"forward": [partial(run, selector, i, path) for i in rotation]}
            if path == "pooled" and case.layout != "packed":
                variants["mean of last"] = [partial(mean_of_last, i) for i in rotation]
            times = device_times(variants, repeats)
            wall = wall_times({"forward": partial(run, selector, one, path)})
            if compile_reference and case.layout == "full":
                times |= compiled_reference(selector, rotation, path, repeats)
        row["device_us"] = {name: value.as_dict() for name, value in times.items()}
        row["wall_us"] = {name: value.as_dict() for name, value in wall.items()}
        row["floor_us"] = {"forward": floor(case, one, path, False, ceiling)}
        if backward:
            inputs = Inputs(case, 0, True)
            value = device_times({"both": [partial(both_ways, selector, inputs, path)]}, repeats)["both"]
            row["device_us"]["forward + backward"] = value.as_dict()
            row["floor_us"]["forward + backward"] = floor(case, inputs, path, True, ceiling)
            del inputs
            torch.cuda.empty_cache()
        show(row)
    return rows


def mean_of_last(inputs: Inputs):
    weight = inputs.mask[..., None].to(inputs.blocks[-1].dtype)
    return (inputs.blocks[-1] * weight).sum(1) / weight.sum(1)


def compiled_reference(selector, rotation, path, repeats) -> dict[str, Times]:
    selector.backend = "reference"
    function = torch.compile(lambda i: run(selector, i, path))
    times = device_times({"formula, torch.compile": [partial(function, rotation[0])]}, repeats)
    selector.backend = "auto"
    return times


def show(row: dict) -> None:
    for what, floor_us in row["floor_us"].items():
        median = row["device_us"][what]["median"]
        wall = f", wall {row['wall_us'][what]['median']:.0f}" if what in row["wall_us"] else ""
        print(
            f"{row['case']:10s} {row['path']:7s} {what:18s} {median:8.1f} us, floor {floor_us:7.1f}, "
            f"ratio {median / floor_us:5.2f}{wall}",
            flush=True,
        )


def environment() -> dict[str, object]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "s2sent_kernels": s2sent_kernels.__version__,
        # A copy without its history is told: COMMIT=...
        "commit": os.environ.get("COMMIT") or (commit.stdout.strip() if commit.returncode == 0 else "unknown"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-backward", action="store_true")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the plain formula as well")
    arguments = parser.parse_args()
    ceiling = ceilings()
    print("ceilings, TB/s: " + ", ".join(f"{name} {value:.2f}" for name, value in ceiling.items()), flush=True)
    results: dict[str, object] = {"environment": environment(), "ceilings_tb_s": ceiling}
    rows: list[dict] = []
    for case in CASES:
        if case.name in arguments.cases.split(","):
            rows += measure(case, ceiling, arguments.repeats, not arguments.no_backward, arguments.compile)
    results["rows"] = rows
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    if not all(row["parity"] for row in rows):
        sys.exit("parity failed: " + ", ".join(f"{r['case']} {r['path']}" for r in rows if not r["parity"]))


if __name__ == "__main__":
    main()
