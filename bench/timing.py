"""How this project measures.

Device time on a GPU is the time between events around replays of a CUDA graph; on a CPU it is the wall time of the same calls.
Variants are interleaved in a rotating order, so that noise and warm caches affect all of them alike. Also measured: the wall time
of one eager call, its host time alone, and the ceilings of the same run.
"""

from __future__ import annotations

import contextlib
import functools
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


def on_gpu() -> bool:
    return torch.cuda.is_available()


def synchronise() -> None:
    if on_gpu():
        torch.cuda.synchronize()


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@contextlib.contextmanager
def capture_stream():
    """The stream that every graph is captured on. Autograd runs a backward on its forward's stream, so a forward that runs before
    the capture of its backward must run on this stream too."""
    if not on_gpu():
        yield
        return
    _stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream()):
        yield
    torch.cuda.current_stream().wait_stream(_stream())


def capture(calls: Sequence[Call], pool: object = None, warm_up: int = 2) -> torch.cuda.CUDAGraph:
    """A graph that runs every call once, after warming up on the same side stream. Graphs that share ``pool`` share
    their memory, since none of their results outlives a replay."""
    with capture_stream():
        for _ in range(warm_up):
            for call in calls[:2]:  # the others are the same on other inputs
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=_stream()):
        for call in calls:
            call()
    return graph


def _replayer(calls: Sequence[Call], pool: object) -> Callable[[], float]:
    """A function that runs every call once and returns the milliseconds taken."""
    if on_gpu():
        graph = capture(calls, pool)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def replay() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

    else:

        def replay() -> float:
            begin = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - begin) * 1e3

    return replay


def device_times(
    variants: dict[str, Sequence[Call]],
    repeats: int = 30,
    *,
    seconds: float = 20.0,
    errors: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Quantiles of ``device_samples``."""
    found = device_samples(variants, repeats, seconds=seconds, errors=errors)
    return {name: Times.of(values) for name, values in found.items()}


def device_samples(
    variants: dict[str, Sequence[Call]],
    repeats: int = 30,
    *,
    seconds: float = 20.0,
    errors: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Microseconds of device time of one call of each variant, a sample a round. A variant is a list of calls on different
    inputs, together larger than the L2 cache; its graph runs them in turn. There are ``repeats`` rounds, fewer where they would
    take longer than ``seconds`` (but at least five, on a CPU three). A variant that fails is left out, and the reason recorded
    in ``errors``; without ``errors`` it raises."""
    pool = torch.cuda.graph_pool_handle() if on_gpu() else None
    replayers: dict[str, Callable[[], float]] = {}
    for name, calls in variants.items():
        try:
            replayers[name] = _replayer(calls, pool)
        except Exception as error:
            if errors is None:
                raise
            errors[name] = describe(error)
            # A failed capture may have left the pool in use.
            pool = torch.cuda.graph_pool_handle() if on_gpu() else None
    samples: dict[str, list[float]] = {name: [] for name in replayers}
    order = list(replayers)
    begin = time.perf_counter()
    for name in order * (2 if on_gpu() else 1):  # warms up
        replayers[name]()
    one_round = (time.perf_counter() - begin) / (2 if on_gpu() else 1)
    rounds = max(5 if on_gpu() else 3, min(repeats, int(seconds / max(one_round, 1e-9))))
    for turn in range(rounds):
        shift = turn % max(1, len(order))
        for name in order[shift:] + order[:shift]:
            samples[name].append(replayers[name]() * 1e3 / len(variants[name]))
    return samples


def wall_times(variants: dict[str, Call], repeats: int = 50, *, seconds: float = 20.0) -> dict[str, Times]:
    """Wall time of one eager call until its result is ready."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order, spent, turn = list(variants), 0.0, -3
    while turn < min(5, repeats) or (turn < repeats and spent < seconds):
        shift = turn % max(1, len(order))
        for name in order[shift:] + order[:shift]:
            took = wall_time(variants[name])
            spent += took / 1e6
            if turn >= 0:
                samples[name].append(took)
        turn += 1
    return {name: Times.of(values) for name, values in samples.items()}


def host_times(variants: dict[str, tuple[Call, int]], repeats: int, *, seconds: float) -> dict[str, Times]:
    """``host_time`` of eager calls in rows; a variant is a call and how many make a row. A row of each variant in turn."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    order, end = list(variants), time.perf_counter() + seconds
    for call, count in variants.values():  # warms up
        host_time(call, min(count, 3))
    turn = 0
    while turn < min(5, repeats) or (turn < repeats and time.perf_counter() < end):
        shift = turn % max(1, len(order))
        for name in order[shift:] + order[:shift]:
            samples[name].append(host_time(*variants[name]))
        turn += 1
    return {name: Times.of(values) for name, values in samples.items()}


def wall_time(call: Call) -> float:
    """Microseconds of this one call, including what it has to compile or to warm up."""
    synchronise()
    begin = time.perf_counter()
    call()
    synchronise()
    return (time.perf_counter() - begin) * 1e6


def host_time(call: Call, count: int) -> float:
    """Microseconds that the caller spends in one of ``count`` eager calls in a row, none of which waits for the GPU. On a CPU
    that is the whole call. ``count`` must be so small that the GPU's launch queue does not fill, which would block the caller."""
    synchronise()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    took = time.perf_counter() - begin
    synchronise()
    return took * 1e6 / count


def describe(error: BaseException) -> str:
    """An error in one line, for a row of the results."""
    while error.__context__ is not None:  # a failed capture reports itself, the cause is its context
        error = error.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].strip()


def l2_bytes() -> int:
    """The cache that rotating inputs have to exceed; for a CPU the usual size of a last-level cache."""
    if on_gpu():
        return getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20)
    return 32 << 20


def ceilings(gigabytes: float | None = None) -> dict[str, float]:
    """TB/s at which this machine reads, writes and copies (a copy's bytes count twice) tensors far larger than its caches."""
    gigabytes = gigabytes or (2.0 if on_gpu() else 0.25)
    read, x = _reader(gigabytes)
    y, size = torch.empty_like(x), x.numel() * x.element_size()
    variants = {"read": [read], "write": [lambda: y.fill_(7)], "copy": [lambda: y.copy_(x)]}
    times = device_times(variants, repeats=15)  # type: ignore[arg-type]
    factor = {"read": 1, "write": 1, "copy": 2}
    return {name: size * factor[name] / value.median / 1e6 for name, value in times.items()}


def _reader(gigabytes: float) -> tuple[Call, torch.Tensor]:
    """A call that reads a tensor of that size, and the tensor."""
    if not on_gpu():
        floats = torch.ones(int(gigabytes * 1e9) // 4)
        return floats.sum, floats
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
    out = torch.empty(programs, dtype=torch.int32, device="cuda")
    return lambda: read_kernel[(programs,)](x, out, block, steps, num_warps=8), x
