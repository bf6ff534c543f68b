"""Sections "latency" and "sweep" of bench/suite.py: times of the stages and paths, their competitors, and traffic floors.

Every contestant that computes the selector is first compared with the reference in float64, output and gradients; one that
fails gets no times. A floor is a stage's or path's bytes over the ceilings measured in the same run; a backward's writes are over
that of the fastest writer of as many bytes (``writers``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import writers
from calls import backward_of, call_of, free, grad_mode, row_of
from cases import MODES, PATHS, STAGES, Case, Inputs, floor_us, input_sets, traffic
from contestants import MEAN_OF_LAST, OURS, Contestant, Missing, contestants, ours, with_batch_statistics
from memory import peak_row
from parity import check
from record import Row
from timing import capture_stream, describe, device_times, l2_bytes, on_gpu, wall_time, wall_times

from s2sent_kernels.engines.choice import choose
from s2sent_kernels.formula.call import Call


class Settings:
    """How much to measure, and until when: no compilation begins after ``deadline`` (of time.monotonic)."""

    def __init__(
        self, ceilings: dict[str, float], competitors: str, repeats: int = 30, deadline: float = float("inf")
    ) -> None:
        self.ceilings, self.competitors, self.repeats, self.deadline = ceilings, competitors, repeats, deadline
        self.device = "cuda" if on_gpu() else "cpu"
        self.seconds = 4.0 if on_gpu() else 1.0  # limit for one table cell's rounds, all contestants together


def _row(contestant: Contestant, case: Case, what: str, mode: str, settings: Settings) -> Row:
    row = row_of(case, what, mode, contestant.name) | {"section": "stages" if what in STAGES else "paths"}
    if contestant.note:
        row["note"] = contestant.note
    if contestant.judged:
        read, write = traffic(case, what, mode)
        row |= {"read_bytes": read, "write_bytes": write}
        ceilings = settings.ceilings
        if mode != "forward":
            row["writer"], row["write_tb_s"] = writers.fastest(write)
            ceilings = ceilings | {"write": row["write_tb_s"]}
        row["floor_us"] = floor_us(case, what, mode, ceilings)
    if contestant.name == OURS:
        row["backend"] = choose("auto", Call(torch.device(settings.device), case.dtype))
    return row


def _profile(contestant: Contestant) -> str:
    return "official" if contestant.name.startswith(("published", "official")) else "paper"


def _judge(contestant: Contestant, case: Case, what: str, rows: dict[str, Row], settings: Settings) -> bool:
    """Write parity into every mode's row; True if times may be taken."""
    if not contestant.judged:
        return True
    gradients = not {"both", "training"}.isdisjoint(contestant.modes)
    try:
        outcome = check(contestant, case, what, settings.device, _profile(contestant), gradients)
    except Exception as error:
        for row in rows.values():
            row |= {"status": "error", "note": describe(error)}
        return False
    for row in rows.values():
        row["parity"] = outcome.as_dict()
        if not outcome.ok:
            row |= {"status": "parity failed", "note": f"{outcome.worst}: {outcome.share:.2f} of what is allowed"}
    free()
    return outcome.ok


def calls_on(contestant: Contestant, sets: list[Inputs], what: str, mode: str) -> list[Callable[[], object]]:
    if contestant.name == MEAN_OF_LAST and mode == "forward":
        # It reads one hidden state of a set. Rotate through all of them, so that none is still in the cache.
        return [partial(contestant.call, _with_last(inputs, n)) for inputs in sets for n in range(len(inputs.blocks))]
    if mode == "backward":
        with capture_stream():
            return [backward_of(contestant, inputs, what) for inputs in sets]
    return [call_of(contestant, inputs, what, mode) for inputs in sets]


def _with_last(inputs: Inputs, n: int) -> Inputs:
    other = object.__new__(Inputs)
    other.__dict__.update(inputs.__dict__)
    other.blocks = [inputs.blocks[n]]
    return other


def _entrants(case: Case, what: str, settings: Settings) -> Iterator[Contestant | Missing]:
    for contestant in contestants(case, what, settings.device, settings.competitors):
        late = time.monotonic() > settings.deadline
        if isinstance(contestant, Contestant) and contestant.compiled and late:
            continue  # no row: a later run may measure it
        yield contestant
        if isinstance(contestant, Contestant):
            training = with_batch_statistics(contestant, case, what, settings.device)
            if training is not None:
                yield training


def measure(case: Case, settings: Settings, say: Callable[[str], None] = print) -> Iterator[tuple[str, list[Row]]]:
    """The rows of a case, one stage or path at a time."""
    for what in (*STAGES, *PATHS):
        say(f"{case.name} {what}")
        yield what, _measure(case, what, settings)
        if on_gpu():
            torch._dynamo.reset()
        free()


def _measure(case: Case, what: str, settings: Settings) -> list[Row]:
    found, rows, missing = [], {}, []
    for contestant in _entrants(case, what, settings):
        if isinstance(contestant, Missing):
            section = "stages" if what in STAGES else "paths"
            row = row_of(case, what, "forward", contestant.name)
            missing.append(row | {"section": section, "status": contestant.why})
            continue
        mine = {mode: _row(contestant, case, what, mode, settings) for mode in contestant.modes}
        rows.setdefault(contestant.name, {}).update(mine)
        _first_calls(contestant, case, what, mine, settings)
        failed = "status" in mine[contestant.modes[0]]
        if not failed and _judge(contestant, case, what, mine, settings):
            found.append(contestant)
        else:
            for row in mine.values():
                row.pop("first_call_ms", None)
    peaks: list[Row] = []
    for mode in MODES:
        running = [c for c in found if mode in c.modes and "status" not in rows[c.name][mode]]
        if running:
            peaks += _time(running, case, what, mode, {c.name: rows[c.name][mode] for c in running}, settings)
            free()
    return [row for mine in rows.values() for row in mine.values()] + missing + peaks


def _first_calls(contestant: Contestant, case: Case, what: str, rows: dict[str, Row], settings: Settings) -> None:
    """Wall time of the first call of this case in the process, compilation included."""
    for mode in ("forward", "both"):
        if mode not in rows:
            continue
        try:
            inputs = Inputs(case, 0, mode == "both", settings.device)
            with grad_mode(mode):
                rows[mode]["first_call_ms"] = wall_time(call_of(contestant, inputs, what, mode)) / 1e3
        except Exception as error:
            failed = rows.values() if mode == "forward" else [row for m, row in rows.items() if m != "forward"]
            for row in failed:
                row |= {"status": "error", "note": describe(error)}
            return


def _time(
    running: list[Contestant], case: Case, what: str, mode: str, rows: dict[str, Row], settings: Settings
) -> list[Row]:
    """Write the interleaved times of one mode into ``rows``; return the rows of peak memory."""
    sets = [
        Inputs(case, seed, mode != "forward", settings.device)
        for seed in range(input_sets(case, l2_bytes(), settings.device))
    ]
    errors: dict[str, str] = {}
    variants = {}
    for contestant in running:
        try:
            variants[contestant.name] = calls_on(contestant, sets, what, mode)
        except Exception as error:
            errors[contestant.name] = describe(error)
    with grad_mode(mode):
        times = device_times(variants, settings.repeats, seconds=settings.seconds, errors=errors)
        alive = {name: calls[0] for name, calls in variants.items() if name in times}
        wall = wall_times(alive, settings.repeats, seconds=settings.seconds / 2) if on_gpu() else {}
    peaks = []
    for contestant in running:
        row = rows[contestant.name]
        if contestant.name not in times:
            row |= {"status": "error", "note": errors[contestant.name]}
            row.pop("first_call_ms", None)
            continue
        row |= {"status": "ok", "device_us": times[contestant.name].as_dict()}
        if contestant.name in wall:
            row["wall_us"] = wall[contestant.name].as_dict()
        if "floor_us" in row:
            row["ratio"] = row["device_us"]["median"] / row["floor_us"]
        if mode != "backward" and what in PATHS and (on_gpu() or not contestant.compiled):
            peaks.append(peak_row(contestant, case, sets[0], what, mode))
    return peaks


def sweep(axis: str, cases: tuple[Case, ...], settings: Settings) -> Iterator[list[Row]]:
    """Forward times for a line picture: both paths and the mean of the last block."""
    for case in cases:
        rows: list[Row] = []
        sets = [
            Inputs(case, seed, False, settings.device) for seed in range(input_sets(case, l2_bytes(), settings.device))
        ]
        variants: dict[tuple[str, str], Contestant] = {
            (what, OURS): ours(case, what, settings.device) for what in PATHS
        }
        mean = [c for c in contestants(case, "pooled", settings.device, "none") if c.name == MEAN_OF_LAST]
        variants |= {("pooled", c.name): c for c in mean if isinstance(c, Contestant)}
        calls = {}
        for (what, name), whole in variants.items():
            contestant = replace(whole, modes=("forward",))  # gradients are judged where they are timed
            row = _row(contestant, case, what, "forward", settings) | {"section": "sweep", "axis": axis}
            rows.append(row)
            if _judge(contestant, case, what, {"forward": row}, settings):
                calls[f"{what} {name}"] = (row, calls_on(contestant, sets, what, "forward"))
        errors: dict[str, str] = {}
        with torch.no_grad():
            times = device_times(
                {name: each for name, (_, each) in calls.items()},
                settings.repeats,
                seconds=settings.seconds,
                errors=errors,
            )
        for name, (row, _) in calls.items():
            if name in times:
                row |= {"status": "ok", "device_us": times[name].as_dict()}
            else:
                row |= {"status": "error", "note": errors[name]}
        del sets, calls
        free()
        yield rows
