"""The report's tables of section "caller": what a caller of the public API waits for."""

from __future__ import annotations

from cases import caller_cases_of
from contestants import MEAN_OF_LAST
from first_call import WHAT as FIRST_CALL
from pages import table
from record import Results, Row

MODES = {"forward": "inference", "both": "eval, forward + backward", "training": "training, forward + backward"}
NOT_MEASURED = "Not measured on this device yet: `python bench/suite.py --sections caller`."
OURS = ("s2sent", "S2Sent", "+")  # how the names of this package's contestants begin


def tables(results: Results) -> list[tuple[str, str]]:
    """Titles and texts; a section that has no rows says so."""
    if not results.of("caller"):
        return [("Eager calls", NOT_MEASURED)]
    return [
        ("Eager calls of the selector", selector_table(results)),
        ("Eager calls of an encoder with its sentence embeddings, encode, and training", encoder_table(results)),
        ("First call of a process", first_call_table(results)),
    ]


def _quantiles(times: dict[str, float] | None, unit: float = 1.0, digits: int = 0) -> str:
    if not times:
        return "–"
    median, low, high = (f"{times[name] / unit:.{digits}f}" for name in ("median", "p20", "p80"))
    return f"{median} ({low}–{high})"


def _over(row: Row, mean: Row | None, clock: str) -> str:
    if not mean or clock not in row or clock not in mean:
        return "–"
    return f"{row[clock]['median'] / mean[clock]['median']:.2f}"


def _failed(row: Row) -> str:
    return row["status"] + (f": {row['note']}" if row.get("note") else "")


def _name(row: Row) -> str:
    name = f"**{row['contestant']}**" if row["contestant"].startswith(OURS) else row["contestant"]
    return name + (f" (`{row['backend']}`)" if "backend" in row else "")


def selector_table(results: Results) -> str:
    """Both paths of a case beside the mean of its last block, host time first."""
    lines = []
    device = "cpu" if results.device == "cpu" else "cuda"
    order = {case.name: place for place, case in enumerate(caller_cases_of(device))}
    rows = [row for row in results.of("caller") if row["what"] in ("pooled", "token")]
    rows.sort(key=lambda row: (order.get(row["case"], len(order)), list(MODES).index(row["mode"])))
    for row in rows:
        shape = ", ".join(map(str, row["shape"]))
        start = (row["case"], shape, MODES[row["mode"]], row["what"], _name(row))
        if row["status"] != "ok":
            lines.append((*start, *("–",) * 5, _failed(row)))
            continue
        mode = "forward" if row["mode"] == "forward" else "both"
        mean = results.find("caller", row["case"], "pooled", mode, MEAN_OF_LAST)
        remark = f"its kernels {row['kernels_us']:.0f}" if "kernels_us" in row else ""
        if "first_call_ms" in row:
            remark = f"compiled in {row['first_call_ms'] / 1e3:.0f} s"
        remark = row.get("note") or remark
        lines.append(
            (
                *start, _quantiles(row["host_us"]), _over(row, mean, "host_us"), _quantiles(row.get("wall_us")),
                _quantiles(row.get("device_us"), digits=1), _over(row, mean, "device_us"), remark,
            )
        )  # fmt: skip
    head = (
        "<case", "<B, L, N, D", "<mode", "<path", "<contestant", "host µs", "× mean", "wall µs", "device µs", "× mean",
        "<remark",
    )  # fmt: skip
    return table(head, lines)


def encoder_table(results: Results) -> str:
    """Rows with a baseline: an encoder, encode, a training step."""
    lines = []
    for row in results.of("caller"):
        if row["what"] in ("pooled", "token", FIRST_CALL):
            continue
        start = (row["what"], row["case"].replace("x", " × "), _name(row))
        if row["status"] != "ok":
            lines.append((*start, *("–",) * 5, _failed(row)))
            continue
        over = f"{1 + row['overhead']:.3f}" if "overhead" in row else ""
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else "–"
        more = f"{100 * row['peak_overhead']:+.1f} %" if "peak_overhead" in row else ""
        wall, host = (_quantiles(row.get(clock), 1e3, 2) for clock in ("wall_us", "host_us"))
        lines.append((*start, wall, over, host, peak, more, row.get("note", "")))
    head = (
        "<what", "<B × L, or sentences", "<variant", "wall ms", "× baseline", "host ms", "peak MiB", "more memory",
        "<remark",
    )  # fmt: skip
    return table(head, lines)


def first_call_table(results: Results) -> str:
    lines = []
    for row in results.of("caller", what=FIRST_CALL):
        taken = f"{row['first_call_ms']:.0f}" if row["status"] == "ok" else _failed(row)
        lines.append((row["contestant"], ", ".join(map(str, row["shape"])), taken))
    return table(("<backend", "<B, L, N, D", "ms"), lines)
