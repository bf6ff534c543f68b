"""Section "caller" of bench/suite.py: what a caller of the public API waits for, in eager calls. The usual pooling beside it is
the mean of the last block.

    caller.py           selector.pool and selector(...), without gradients, and forward + backward in eval and training mode
    caller_encoder.py   an encoder and its sentence embeddings; SentenceTransformer.encode
    training_step.py    a step of an encoder, its pooling, a contrastive loss and an optimizer
    first_call.py       the first call of a process

Host time is what a call of a row of calls costs the Python program, which does not wait for the GPU in between. Wall time is one
call until its result is ready. Device time is that of the same call as a CUDA graph. On a CPU all three are one. All contestants
of a loop take turns, and both paths share the loop, so that every ratio to the mean belongs to one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import caller_encoder
import first_call
import torch
import training_step
from calls import call_of, free, grad_mode, row_of
from cases import PATHS, Case, Inputs, caller_cases_of, input_sets
from contestants import (
    MEAN_OF_LAST,
    SUM,
    Contestant,
    Missing,
    make_selector,
    mean_of_last,
    ours,
    selector_call,
    sum_of_states,
    weighted_layer_pooling,
)
from latency import Settings, calls_on
from parity import check
from record import Row
from timing import Call, Times, describe, device_times, host_times, l2_bytes, on_gpu, wall_time, wall_times

from s2sent_kernels import backends
from s2sent_kernels.engines.choice import choose
from s2sent_kernels.formula.call import Call as EngineCall

SECTION = "caller"
COMPILED_CASES = ("C", "B", "A-small")
EAGER, COMPILED = "reference, eager", "reference, torch.compile"
LOOPS = (("forward",), ("both", "training"))  # modes that are timed in turn
# Calls of a row. A launch queue holds about a thousand kernels, and a caller waits when it is full.
CALLS = {"forward": 50, "both": 20, "training": 20}
CALLS_OF_MANY_KERNELS = 4
SECONDS = 2.0  # limit for one loop's rounds, all contestants together
KERNELS = "s2sent_native::"  # the compiled kernels' own operators, as a profiler names them


def backends_here(device: str) -> list[str]:
    """What a caller can select on this device: "auto", and every usable backend with kernels."""
    usable = [name for name, status in backends().items() if status.usable and name != "reference"]
    if device == "cpu" and "triton" in usable:  # that is Triton's interpreter
        usable.remove("triton")
    return ["auto", *usable]


def on_backend(backend: str) -> str:
    return f"s2sent_kernels, {backend}"


def steps(cases: tuple[Case, ...], device: str) -> int:
    return (
        len(cases) * len(LOOPS) + caller_encoder.steps(device) + training_step.steps(device) + first_call.steps(device)
    )


def measure(cases: tuple[Case, ...], settings: Settings, say: Callable[[str], None] = print) -> Iterator[list[Row]]:
    names = backends_here(settings.device)
    for case in cases:
        for modes in LOOPS:
            say(f"caller {case.name} {modes[0]}")
            yield _measure(case, modes, names, settings)
            if on_gpu():
                torch._dynamo.reset()
            free()
    yield from caller_encoder.measure(names, settings, say)
    yield from training_step.measure(names, settings, say)
    yield from first_call.measure(names, settings, say)


def chosen(names: list[str], device: str) -> tuple[Case, ...]:
    return tuple(case for case in caller_cases_of(device) if case.name in names)


# ---------------------------------------------------------------- contestants of one loop


def contestants(
    case: Case, modes: tuple[str, ...], names: list[str], settings: Settings
) -> Iterator[tuple[str, Contestant]]:
    """What is timed in one loop, each with its path."""
    device, choice = settings.device, settings.competitors
    for backend in names:
        if modes == ("forward",):
            for what in PATHS:
                yield what, replace(ours(case, what, device, backend, on_backend(backend)), modes=modes)
            continue
        yield "pooled", replace(ours(case, "pooled", device, backend, on_backend(backend)), modes=("both",))
        if case.batch > 1:
            yield "pooled", ours(case, "pooled", device, backend, on_backend(backend), training=True)
    mode = modes[0]
    yield "pooled", Contestant(MEAN_OF_LAST, mean_of_last, judged=False, modes=(mode,))
    if device == "cpu" and mode == "forward":
        yield "pooled", Contestant(SUM, sum_of_states, judged=False, modes=(mode,))
    if choice == "none":
        return
    weighted = weighted_layer_pooling(case, "pooled", device)
    if not isinstance(weighted, Missing):
        yield "pooled", replace(weighted, modes=(mode,))
    yield "pooled", _reference(case, "pooled", mode, device, compiled=False)
    # It is compiled for ten seconds; with gradients for more, and tokens would be compiled once more.
    if choice == "all" and mode == "forward" and case.name in COMPILED_CASES:
        yield "pooled", _reference(case, "pooled", mode, device, compiled=True)


def _reference(case: Case, what: str, mode: str, device: str, *, compiled: bool) -> Contestant:
    selector = make_selector(case, device, backend="reference")
    call = selector_call(selector, what)
    return Contestant(
        COMPILED if compiled else EAGER,
        torch.compile(call, dynamic=False) if compiled else call,
        dict(selector.named_parameters()),
        judged=False,  # it is what the others are compared with
        compiled=compiled,
        modes=(mode,),
    )


# ---------------------------------------------------------------- one loop


class _Entry:
    """A contestant on one path in one mode, and its row."""

    def __init__(self, what: str, contestant: Contestant, case: Case, device: str) -> None:
        self.what, self.contestant, (self.mode,) = what, contestant, contestant.modes
        self.key = f"{what} {self.mode} {contestant.name}"
        self.row = row_of(case, what, self.mode, contestant.name) | {"section": SECTION}
        if contestant.name == on_backend("auto"):
            self.row["backend"] = _chosen_by_auto(case, device)

    def fail(self, status: str, note: str) -> None:
        self.row |= {"status": status, "note": note}

    @property
    def alive(self) -> bool:
        return "status" not in self.row

    def call(self, inputs: Inputs) -> Call:
        return call_of(self.contestant, inputs, self.what, self.mode)

    @property
    def calls_of_a_row(self) -> int:
        ours = self.contestant.judged or self.contestant.name == MEAN_OF_LAST
        return CALLS[self.mode] if ours else CALLS_OF_MANY_KERNELS


def _chosen_by_auto(case: Case, device: str) -> str:
    place = (torch.device(device, 0) if device == "cuda" else torch.device(device), case.dtype)
    return choose("auto", EngineCall(*place, case.blocks))


def _measure(case: Case, modes: tuple[str, ...], names: list[str], settings: Settings) -> list[Row]:
    device = settings.device
    entries = [_Entry(what, each, case, device) for what, each in contestants(case, modes, names, settings)]
    judged = [entry for entry in entries if entry.contestant.judged]
    for entry in judged:
        if not _judged_as_another(entry, judged):
            _judge(entry, case, device)
    for entry in judged:
        same = _judged_as_another(entry, judged)
        if same:
            entry.row |= {name: same.row[name] for name in ("parity", "status", "note") if name in same.row}
    inputs = Inputs(case, 0, modes[0] != "forward", device)
    with grad_mode(modes[0]):
        for entry in filter(lambda entry: entry.alive, entries):
            try:
                entry.row["first_call_ms"] = wall_time(entry.call(inputs)) / 1e3
            except Exception as error:
                entry.fail("error", describe(error))
        running = {entry.key: entry for entry in entries if entry.alive}
        _time(running, case, inputs, settings)
    for entry in running.values():
        entry.row["status"] = "ok"
        if not entry.contestant.compiled:
            entry.row.pop("first_call_ms")  # parity ran before it
    return [entry.row for entry in entries]


def _judged_as_another(entry: _Entry, others: list[_Entry]) -> _Entry | None:
    """The entry that computes the same by name: of "auto", that of the backend it takes."""
    name = on_backend(entry.row.get("backend", ""))
    found = (each for each in others if (each.what, each.mode, each.contestant.name) == (entry.what, entry.mode, name))
    return next(found, None)


def _judge(entry: _Entry, case: Case, device: str) -> None:
    try:
        outcome = check(entry.contestant, case, entry.what, device, "paper", entry.mode != "forward")
    except Exception as error:
        entry.fail("error", describe(error))
        return
    entry.row["parity"] = outcome.as_dict()
    if not outcome.ok:
        entry.fail("parity failed", f"{outcome.worst}: {outcome.share:.2f} of what is allowed")
    free()


def _time(running: dict[str, _Entry], case: Case, inputs: Inputs, settings: Settings) -> None:
    device = settings.device
    calls = {key: entry.call(inputs) for key, entry in running.items()}
    rows = {key: (call, _row_length(running[key], call)) for key, call in calls.items()}
    host = host_times(rows, settings.repeats, seconds=SECONDS)
    wall = wall_times(calls, settings.repeats, seconds=SECONDS / 2) if on_gpu() else {}
    graphs = _graphs(running, case, settings) if on_gpu() else {}
    for key, entry in running.items():
        entry.row |= {"host_us": host[key].as_dict(), "calls": rows[key][1]}
        if key in wall:
            entry.row["wall_us"] = wall[key].as_dict()
        if key in graphs:
            entry.row["device_us"] = graphs[key].as_dict()
        if device == "cpu" and entry.contestant.judged and entry.mode == "forward":
            kernels = kernels_us(calls[key])
            if kernels is not None:
                entry.row["kernels_us"] = kernels


def _row_length(entry: _Entry, call: Call) -> int:
    """On a CPU, where a call is the whole computation, rows of about 5 ms."""
    return entry.calls_of_a_row if on_gpu() else max(1, min(entry.calls_of_a_row, int(5e3 / wall_time(call))))


def _graphs(running: dict[str, _Entry], case: Case, settings: Settings) -> dict[str, Times]:
    """Device times of this package's calls and of the mean; the others' are in section "latency". A call that cannot be captured
    keeps its host time, and its row says why it has no other."""
    mine = {
        key: entry for key, entry in running.items() if entry.contestant.judged or entry.contestant.name == MEAN_OF_LAST
    }
    grad = any(entry.mode != "forward" for entry in mine.values())
    sets = [Inputs(case, seed, grad, settings.device) for seed in range(input_sets(case, l2_bytes(), settings.device))]
    calls: dict[str, Sequence[Call]] = {
        key: calls_on(entry.contestant, sets, entry.what, entry.mode) for key, entry in mine.items()
    }
    errors: dict[str, str] = {}
    times = device_times(calls, settings.repeats, seconds=SECONDS / 2, errors=errors)
    for key, why in errors.items():
        mine[key].row["note"] = f"no graph: {why}"
    return times


def kernels_us(call: Call, count: int = 30) -> float | None:
    """CPU time of the compiled kernels in one call, by PyTorch's profiler; the rest of the call's time is its overhead.
    None where the call runs none."""
    for _ in range(3):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            call()
    own = [event.self_cpu_time_total for event in profiler.key_averages() if event.key.startswith(KERNELS)]
    return sum(own) / count if own else None
