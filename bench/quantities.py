"""What the targets are about: functions from rows of the results to one number, or None where a row is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from caller import on_backend
from contestants import MEAN_OF_LAST, NATIVE, ONE_PASS, OURS, SCALED
from record import times_ours

# (section, case, what, mode, contestant) to a row with status "ok", or None
Find = Callable[..., dict[str, Any] | None]
Value = Callable[[Find], float | None]


# ---------------------------------------------------------------- what a caller waits for


def host_over_mean(cases: tuple[str, ...], what: str, mode: str, backend: str) -> Value:
    """Host time of this package over that of the mean of the last block, in the worst of ``cases``."""

    def value(find: Find) -> float | None:
        ratios = []
        for case in cases:
            mine = find("caller", case, what, mode, on_backend(backend))
            mean = find("caller", case, "pooled", "forward" if mode == "forward" else "both", MEAN_OF_LAST)
            if not mine or not mean:
                return None
            ratios.append(mine["host_us"]["median"] / mean["host_us"]["median"])
        return max(ratios)

    return value


def called_over(
    case: str, what: str, mode: str, other: str, *, other_what: str = "pooled", faster: bool = False
) -> Value:
    """Host time of what "auto" takes over another contestant's; with ``faster`` the inverse."""

    def value(find: Find) -> float | None:
        mine, theirs = (
            find("caller", case, what, mode, on_backend("auto")),
            find("caller", case, other_what, mode, other),
        )
        if not mine or not theirs:
            return None
        ratio = mine["host_us"]["median"] / theirs["host_us"]["median"]
        return 1 / ratio if faster else ratio

    return value


def host_overhead(case: str) -> Value:
    """Microseconds of a pooled call beside its kernels' own."""

    def value(find: Find) -> float | None:
        row = find("caller", case, "pooled", "forward", on_backend("auto"))
        return row["host_us"]["median"] - row["kernels_us"] if row and "kernels_us" in row else None

    return value


def called_overhead(case: str, what: str, mode: str, name: str) -> Value:
    """One call's wall time over that of the row's baseline."""

    def value(find: Find) -> float | None:
        row = find("caller", case, what, mode, name)
        return 1 + row["overhead"] if row and "overhead" in row else None

    return value


def called_memory(case: str, what: str, mode: str, name: str) -> Value:
    """Percent of peak memory over that of the row's baseline."""

    def value(find: Find) -> float | None:
        row = find("caller", case, what, mode, name)
        return 100 * row["peak_overhead"] if row and "peak_overhead" in row else None

    return value


def first_call(case: str, what: str, name: str) -> Value:
    """Milliseconds."""

    def value(find: Find) -> float | None:
        row = find("caller", case, what, "forward", name)
        return row["first_call_ms"] if row else None

    return value


# ---------------------------------------------------------------- device time


def training_over_eval(case: str) -> Value:
    """Forward + backward with the batch's statistics over that with running ones."""

    def value(find: Find) -> float | None:
        training, running = (find("paths", case, "pooled", mode, OURS) for mode in ("training", "both"))
        if not training or not running:
            return None
        return training["device_us"]["median"] / running["device_us"]["median"]

    return value


def scaled_over_plain(case: str, what: str, mode: str) -> Value:
    """With a gate scale over without one."""

    def value(find: Find) -> float | None:
        scaled, plain = (find("paths", case, what, mode, name) for name in (SCALED, OURS))
        if not scaled or not plain:
            return None
        return times_ours(scaled, plain)

    return value


def over_writer(case: str, what: str) -> Value:
    """A stage's backward over the time that the fastest writer takes for as many bytes as it writes."""

    def value(find: Find) -> float | None:
        row = find("stages", case, what, "backward", OURS)
        if not row or "write_tb_s" not in row:
            return None
        return row["device_us"]["median"] / (row["write_bytes"] / row["write_tb_s"] / 1e6)

    return value


def stage_time(case: str, what: str, mode: str) -> Value:
    def value(find: Find) -> float | None:
        row = find("stages", case, what, mode, OURS)
        return row["device_us"]["median"] if row else None

    return value


def median(find: Find, case: str, what: str, mode: str = "forward", clock: str = "device_us") -> float | None:
    row = find("paths", case, what, mode, OURS)
    return row[clock]["median"] if row and clock in row else None


def ratio(case: str, what: str, mode: str = "forward") -> Value:
    def value(find: Find) -> float | None:
        row = find("paths", case, what, mode, OURS)
        return row["device_us"]["median"] / row["floor_us"] if row else None

    return value


def time(case: str, what: str, clock: str = "device_us") -> Value:
    return lambda find: median(find, case, what, clock=clock)


def over(case: str, other: str, what: str, factor: float = 1.0) -> Value:
    """The time of one case over ``factor`` times that of another."""

    def value(find: Find) -> float | None:
        mine, theirs = median(find, case, what), median(find, other, what)
        return mine / (factor * theirs) if mine and theirs else None

    return value


def beside(case: str, what: str, mode: str, other: str, faster: bool = False) -> Value:
    """This package's time over another contestant's; with ``faster`` the inverse."""

    def value(find: Find) -> float | None:
        mine, theirs = (find("paths", case, what, mode, name) for name in (OURS, other))
        if not mine or not theirs:
            return None
        slower = times_ours(theirs, mine)
        return slower if faster else 1 / slower

    return value


def slower(find: Find, case: str, what: str, other: str) -> float | None:
    """Another contestant's time over this package's."""
    ratio = beside(case, what, "forward", other)(find)
    return None if ratio is None else 1 / ratio


def one_pass_over_floor(find: Find) -> float | None:
    """The floor of its own traffic: squeeze's read of every state, and fuse's write without its read."""
    row, fuse = find("paths", "A", "token", "forward", ONE_PASS), find("stages", "A", "fuse", "forward", NATIVE)
    if not row or not fuse:
        return None
    each = fuse["floor_us"] / (fuse["read_bytes"] + fuse["write_bytes"])
    size = row["read_bytes"] / 2 + row["write_bytes"]  # the row counts two passes
    return row["device_us"]["median"] / (each * size)


def overhead(batch: str, names: tuple[str, ...], key: str = "overhead") -> Value:
    """Percent over BERT-base with the mean of the last block, for the best of ``names``."""

    def value(find: Find) -> float | None:
        rows = [find("end to end", batch, "BERT-base", "forward", name) for name in names]
        found = [100 * row[key] for row in rows if row and key in row]
        return min(found) if found else None

    return value


# ---------------------------------------------------------------- texts to embeddings


def texts_over_library(case: str, what: str, mode: str, library: tuple[str, ...], mine: tuple[str, ...]) -> Value:
    """Texts a second of the faster of ``mine`` over the fastest of ``library``."""

    def value(find: Find) -> float | None:
        rates = [[find("encode", case, what, mode, name) for name in names] for names in (mine, library)]
        if not all(any(rows) for rows in rates):
            return None
        ours, theirs = (max(row["texts_per_s"] for row in rows if row) for rows in rates)
        return ours / theirs

    return value


def texts_a_second(case: str, what: str, names: tuple[str, ...]) -> Value:
    """Of the encoder alone, the fastest of ``names``, in thousands."""

    def value(find: Find) -> float | None:
        rows = [find("encode", case, what, "tokens", name) for name in names]
        return max((row["texts_per_s"] / 1e3 for row in rows if row), default=None)

    return value
