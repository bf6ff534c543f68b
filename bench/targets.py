"""The targets on one H200 in bfloat16 and on two CPU cores in float32, and how far the results are from them.

A target is a limit on a quantity, which ``value`` finds in the results. Ratios to the floor use the ceilings of the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from contestants import NATIVE, ONE_PASS, OURS, REFERENCE, SUM
from end_to_end import FED, KEPT
from record import times_ours

GPU, CPU = "nvidia-h200", "cpu"  # the names of the result files
Find = Callable[
    ..., dict[str, Any] | None
]  # (section, case, what, mode, contestant) to a row with status "ok", or None


@dataclass(frozen=True)
class Target:
    text: str
    limit: float
    unit: str  # "x floor", "x", "us", "%"; or "x faster", whose limit is a lower one
    value: Callable[[Find], float | None]
    gap: str = ""  # why the limit is missed, where known from NOTES.md


def _median(find: Find, case: str, what: str, mode: str = "forward", clock: str = "device_us") -> float | None:
    row = find("paths", case, what, mode, OURS)
    return row[clock]["median"] if row and clock in row else None


def _ratio(case: str, what: str, mode: str = "forward") -> Callable[[Find], float | None]:
    def value(find: Find) -> float | None:
        row = find("paths", case, what, mode, OURS)
        return row["device_us"]["median"] / row["floor_us"] if row else None

    return value


def _time(case: str, what: str, clock: str = "device_us") -> Callable[[Find], float | None]:
    return lambda find: _median(find, case, what, clock=clock)


def _over(case: str, other: str, what: str, factor: float = 1.0) -> Callable[[Find], float | None]:
    """The time of one case over ``factor`` times that of another."""

    def value(find: Find) -> float | None:
        mine, theirs = _median(find, case, what), _median(find, other, what)
        return mine / (factor * theirs) if mine and theirs else None

    return value


def _beside(case: str, what: str, mode: str, other: str, faster: bool = False) -> Callable[[Find], float | None]:
    """This package's time over another contestant's; with ``faster`` the inverse."""

    def value(find: Find) -> float | None:
        mine, theirs = (find("paths", case, what, mode, name) for name in (OURS, other))
        if not mine or not theirs:
            return None
        slower = times_ours(theirs, mine)
        return slower if faster else 1 / slower

    return value


def _slower(find: Find, case: str, what: str, other: str) -> float | None:
    """Another contestant's time over this package's."""
    ratio = _beside(case, what, "forward", other)(find)
    return None if ratio is None else 1 / ratio


def _one_pass_over_floor(find: Find) -> float | None:
    """The floor of its own traffic: squeeze's read of every state, and fuse's write without its read."""
    row, fuse = find("paths", "A", "token", "forward", ONE_PASS), find("stages", "A", "fuse", "forward", NATIVE)
    if not row or not fuse:
        return None
    each = fuse["floor_us"] / (fuse["read_bytes"] + fuse["write_bytes"])
    size = row["read_bytes"] / 2 + row["write_bytes"]  # the row counts two passes
    return row["device_us"]["median"] / (each * size)


def _overhead(batch: str, names: tuple[str, ...], key: str = "overhead") -> Callable[[Find], float | None]:
    """Percent over BERT-base with the mean of the last block, for the best of ``names``."""

    def value(find: Find) -> float | None:
        rows = [find("end to end", batch, "BERT-base", "forward", name) for name in names]
        found = [100 * row[key] for row in rows if row and key in row]
        return min(found) if found else None

    return value


EITHER = (KEPT, FED)
_H200 = (
    Target(
        "A pooled forward",
        1.20,
        "x floor",
        _ratio("A", "pooled"),
        "squeeze's instructions, not its loads, set its pace (1.2 x its floor); the gate adds 29 µs of latency",
    ),
    Target(
        "A pooled forward + backward",
        1.35,
        "x floor",
        _ratio("A", "pooled", "both"),
        "the gate's backward is four launches and 110 µs; squeeze's writes no faster than a fill of that memory (178 µs)",
    ),
    Target("A token forward, two-pass floor", 1.25, "x floor", _ratio("A", "token"), "squeeze, as above; the gate"),
    Target(
        "A token forward + backward, two-pass floor",
        1.40,
        "x floor",
        _ratio("A", "token", "both"),
        "the gate's backward, as above",
    ),
    Target(
        "A token forward, one pass over the faster of two",
        1.0,
        "x",
        lambda find: _slower(find, "A", "token", ONE_PASS),
        "as for its floor, below",
    ),
    Target(
        "A token forward, one pass over its floor",
        1.35,
        "x",
        _one_pass_over_floor,
        "rows of 96 bytes come at 2.7 TB/s, which alone is 1.5 x the floor; squeeze and fuse issue instructions for most of it",
    ),
    Target(
        "A ragged pooled forward over full A",
        0.70,
        "x",
        _over("A-ragged", "A", "pooled"),
        "the gate takes as long as for full sentences",
    ),
    Target("D pooled forward", 1.25, "x floor", _ratio("D", "pooled"), "the gate's 17 µs; squeeze alone is at 1.17"),
    Target(
        "E pooled forward",
        1.35,
        "x floor",
        _ratio("E", "pooled"),
        "parts of 96 features: rows of 64 bytes, few tokens a program",
    ),
    Target(
        "B pooled forward as a graph",
        10,
        "us",
        _time("B", "pooled"),
        "two chains of latencies: mask, hidden states, sum; then t, tanh, product, exp",
    ),
    Target("B token forward as a graph", 12, "us", _time("B", "token"), "three of them"),
    Target("C pooled forward as a graph", 8, "us", _time("C", "pooled"), "the same two chains"),
    Target(
        "C pooled forward, wall time eager",
        45,
        "us",
        _time("C", "pooled", "wall_us"),
        "Python: checks, two launches by Triton's launcher; the GPU works 12 µs of it",
    ),
    Target("A packed over padded, pooled forward", 1.03, "x", _over("A-packed", "A-ragged", "pooled")),
    Target(
        "A packed over padded, token forward",
        1.03,
        "x",
        _over("A-packed", "A-ragged", "token"),
        "fuse looks up the sentence of every tile of packed tokens",
    ),
    Target(
        "BERT-base 256 x 128, the faster of states kept and block by block",
        1.0,
        "%",
        _overhead("256x128", EITHER),
        "the pooled selector alone, at its present speed, is more than this",
    ),
    Target("BERT-base 64 x 32, the faster of both", 2.5, "%", _overhead("64x32", EITHER)),
    Target("BERT-base 1 x 32, the faster of both", 2.0, "%", _overhead("1x32", EITHER)),
    Target("BERT-base 256 x 128, block by block", 1.5, "%", _overhead("256x128", (FED,))),
    Target("BERT-base 256 x 128, peak memory block by block", 3, "%", _overhead("256x128", (FED,), "peak_overhead")),
    Target("A pooled forward, float16 over bfloat16", 1.05, "x", _over("A-float16", "A", "pooled")),
    Target("A token forward, float16 over bfloat16", 1.05, "x", _over("A-float16", "A", "token")),
    Target("A pooled forward, float32 over twice bfloat16", 1.15, "x", _over("A-float32", "A", "pooled", 2)),
    Target("A token forward, float32 over twice bfloat16", 1.15, "x", _over("A-float32", "A", "token", 2)),
)

_CPU = (
    Target(
        "A-small pooled forward, torch.sum of the same states", 3, "x", _beside("A-small", "pooled", "forward", SUM)
    ),
    *(
        Target(
            f"A-small {what} {text}, the official reference compiled",
            least,
            "x faster",
            _beside("A-small", what, mode, REFERENCE, faster=True),
            gap,
        )
        for what, mode, text, least, gap in (
            (
                "pooled",
                "forward",
                "forward",
                5,
                "compiled it takes 3.9 x torch.sum: a fifth of that is less than reading",
            ),
            ("token", "forward", "forward", 4, "two reads and a write of the states take more than a fourth of it"),
            (
                "pooled",
                "both",
                "forward + backward",
                3,
                "the floor, the states read and their gradients written once, is nearly a third of it",
            ),
            ("token", "both", "forward + backward", 3, "the floor is more than a third of it"),
        )
    ),
)
TARGETS = {GPU: _H200, CPU: _CPU}


def verdicts(find: Find, device: str = GPU) -> list[tuple[str, str, str, str, str]]:
    """For every target: text, limit, value, whether it is met or by how much it is missed, and why it is missed."""
    rows = []
    for target in TARGETS[device]:
        value = target.value(find)
        at_least = target.unit == "x faster"
        limit = f"{'≥' if at_least else '≤'} {_number(target.limit, target.unit)}"
        if value is None:
            rows.append((target.text, limit, "–", "not measured", ""))
            continue
        missed = target.limit - value if at_least else value - target.limit
        if missed <= 0:
            verdict = "met"
        elif target.unit == "%":
            verdict = f"missed by {missed:.2f} points"
        else:
            verdict = f"missed by {100 * missed / target.limit:.1f} %"
        rows.append((target.text, limit, _number(value, target.unit), verdict, target.gap if missed > 0 else ""))
    return rows


def _number(value: float, unit: str) -> str:
    if unit == "us":
        return f"{value:.1f} µs"
    if unit == "%":
        return f"{value:+.2f} %"
    return f"{value:.2f} ×" + {"x floor": " floor", "x faster": " faster"}.get(unit, "")
