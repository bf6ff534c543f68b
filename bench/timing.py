"""How this project measures: device time of CUDA-graph replays, wall time of eager calls, and the ceilings of the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Microseconds."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: Sequence[float]) -> Times:
        ordered = sorted(samples)
        return Times(
            statistics.median(ordered),
            ordered[len(ordered) // 5],
            ordered[min(len(ordered) - 1, len(ordered) * 4 // 5)],
        )

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph that runs every call once, after warming each up on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def device_times(variants: dict[str, Sequence[Call]], repeats: int = 30) -> dict[str, Times]:
    """Device time of one call of each variant. A variant is a list of calls on different inputs, so many that together they
    exceed the L2 cache; its graph runs them in turn. Variants are interleaved, so that a noisy moment hits all of them."""
    graphs = {name: capture(calls) for name, calls in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for repeat in range(repeats + 2):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 2:
                samples[name].append(start.elapsed_time(end) * 1e3 / len(variants[name]))
    return {name: Times.of(values) for name, values in samples.items()}


def wall_times(
    variants: dict[str, Call], repeats: int = 50, synchronise: Call = torch.cuda.synchronize
) -> dict[str, Times]:
    """Wall time of one eager call until its result is there."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 3):
        for name, call in variants.items():
            synchronise()
            begin = time.perf_counter()
            call()
            synchronise()
            if repeat >= 3:
                samples[name].append((time.perf_counter() - begin) * 1e6)
    return {name: Times.of(values) for name, values in samples.items()}


def ceilings(gigabytes: float = 2.0) -> dict[str, float]:
    """TB/s that this GPU reads, writes and copies (a copy's bytes counted both ways), over tensors far larger than L2."""
    import triton
    import triton.language as tl

    @triton.jit
    def read_kernel(p_x, p_out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        total = tl.zeros([BLOCK], tl.int32)
        for step in tl.static_range(STEPS):
            total ^= tl.load(p_x + (i * STEPS + step) * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
        tl.store(p_out + i, tl.sum(total, axis=0))

    block, steps = 2048, 8
    programs = int(gigabytes * 1e9) // (4 * block * steps)
    x = torch.randint(0, 1 << 30, (programs * block * steps,), dtype=torch.int32, device="cuda")
    y, out = torch.empty_like(x), torch.empty(programs, dtype=torch.int32, device="cuda")
    size = x.numel() * 4
    times = device_times(
        {
            "read": [lambda: read_kernel[(programs,)](x, out, block, steps, num_warps=8)],
            "write": [lambda: y.fill_(7)],
            "copy": [lambda: y.copy_(x)],
        },
        repeats=15,
    )
    factor = {"read": 1, "write": 1, "copy": 2}
    return {name: size * factor[name] / value.median / 1e6 for name, value in times.items()}
