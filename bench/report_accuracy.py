"""bench/results/accuracy/*.json to bench/ACCURACY.md. No number is typed by hand.

python bench/report_accuracy.py [--results bench/results/accuracy] [--output bench/ACCURACY.md]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import record
from accuracy import LIMIT, PRIOR_AND_SCALE, SECTION, Errors
from pages import table
from suite import Parser, guarded

from s2sent_kernels.files import write_atomically

Row = dict[str, Any]
METHOD = f"""\
`python bench/accuracy.py` measures, `python bench/report_accuracy.py` writes this page. The truth is the reference in float64
on the same (rounded) inputs. The yardstick, "eager", is `bench/eager.py`: the formulas in plain PyTorch, in the hidden states'
own dtype throughout, on the same device. Errors are root mean squares, over the elements and over several draws, in units of
what the rounding of the result alone may cause: half an ulp of 1 times the result's size. A ratio is this package's error over
the larger of eager's and one unit, and over the factor for few elements of `bench/tolerance.py`.

f, p, gates, pooled and tokens are the outputs; "d hidden" and "d weights" the gradients of the hidden states and of the gate's
weights through the pooled and the token path. A cell is the **largest** ratio among the cases of its row, and "d prior, scale"
the median: these are single numbers, sums of terms that cancel, so that one case's ratio is mostly chance. Bold: beyond
{LIMIT}. "Huge token": one token of each sentence is 10,000 times as large. "Similar tokens": all tokens of a sentence are the
same vector but for a percent, so that roundings add up instead of cancelling. f, p and gates are float32 for bfloat16 hidden
states too, and are judged after rounding to bfloat16, in which eager has them."""
# Why a result may be beyond the limit. The page says so beside what is, and a test that each has a reason.
_ONE_CASE = "one case of the row, by chance: its other magnitudes and lengths are below"
REASONS: dict[str, str] = {  # by a result, or by backend and result
    PRIOR_AND_SCALE: "single numbers, sums of N D terms and more that cancel: both errors are remainders, drawn once or twice a "
    "case, and the reference's are as often beyond",
    **dict.fromkeys(("triton, d hidden, pooled", "native, d hidden, pooled", "native, d weights, tokens"), _ONE_CASE),
}


def _rows(results: record.Results, backend: str, dtype: str) -> list[Row]:
    return [row for row in results.of(SECTION, contestant=backend) if row["dtype"] == dtype]


def quantities(rows: Sequence[Row]) -> list[str]:
    return list(rows[0]["errors"])


def errors(row: Row, what: str) -> Errors:
    return Errors(*row["errors"][what])


def cell(rows: Sequence[Row], what: str) -> float:
    ratios = [errors(row, what).ratio for row in rows]
    if any(ratio != ratio for ratio in ratios):
        return float("nan")
    return statistics.median(ratios) if what == PRIOR_AND_SCALE else max(ratios)


def _marked(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio <= LIMIT else f"**{ratio:.2f}**"


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of a table: L by kind, then N, then magnitudes."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for length in sorted({row["tokens"] for row in rows}):
            group = [row for row in rows if row["kind"] == kind and row["tokens"] == length]
            if group:
                yield f"{kind}, L = {length:,}", group
    for depth in sorted({row["blocks"] for row in rows}):
        yield f"N = {depth}", [row for row in rows if row["blocks"] == depth]
    for size in sorted({row["magnitude"] for row in rows}):
        yield f"magnitude {size:g}", [row for row in rows if row["magnitude"] == size]


def ratio_table(rows: Sequence[Row]) -> str:
    names = quantities(rows)
    lines = [(title, *(_marked(cell(group, what)) for what in names)) for title, group in _groups(rows)]
    return table(("<cases", *names), lines)


def worst_table(rows: Sequence[Row]) -> str:
    """Each quantity where it is worst: errors in units, in the mean and in the largest element."""
    lines = []
    for what in quantities(rows):
        row = max(rows, key=lambda row: (errors(row, what).ratio != errors(row, what).ratio, errors(row, what).ratio))
        of, most = errors(row, what), max(rows, key=lambda row: errors(row, what).ratio_of_largest)
        peak = errors(most, what)
        mean = [f"{each:.2f}" for each in (of.ratio, of.ours, of.eager)]
        largest = [f"{each:.2f}" for each in (peak.ratio_of_largest, peak.largest, peak.eager_largest)]
        lines.append((what, *mean, row["case"].partition(", ")[2], *largest))
    ours = ("error", "eager's")
    head = ("<result", "largest ratio", *ours, "<case", "ratio of the largest elements", *ours)
    return table(head, lines)


def beyond(results: record.Results) -> list[tuple[str, str, str, float]]:
    """Backend and dtype, result, cases, and ratio of every cell of the tables that is beyond the limit."""
    found = []
    for backend, dtype in _parts(results):
        rows = _rows(results, backend, dtype)
        for title, group in _groups(rows):
            ratios = {what: cell(group, what) for what in quantities(rows)}
            found += [(f"{backend}, {dtype}", what, title, each) for what, each in ratios.items() if not each <= LIMIT]
    return found


def reason(where: str, what: str) -> str:
    """Why a result of a backend is beyond the limit."""
    return REASONS.get(what) or REASONS.get(f"{where.partition(',')[0]}, {what}") or "**not explained**"


def _parts(results: record.Results) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["contestant"], row["dtype"]) for row in results.of(SECTION)))


def section(results: record.Results) -> str:
    run = results.runs[-1]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "triton") if name in run["versions"])
    parts = [f"## {run['device']}", f"{run['date']}, commit {run['commit']}, {versions}."]
    found = beyond(results)
    if found:
        lines = [(where, what, title, f"{ratio:.2f}", reason(where, what)) for where, what, title, ratio in found]
        head = ("<backend", "<result", "<cases", "ratio", "<why")
        parts += [f"### Beyond {LIMIT} times eager", table(head, lines)]
    else:
        parts.append(f"No result is beyond {LIMIT} times eager's error.")
    for backend, dtype in _parts(results):
        rows = _rows(results, backend, dtype)
        parts += [f"### `{backend}`, {dtype}: error over eager's", ratio_table(rows), worst_table(rows)]
    return "\n\n".join(parts)


def build(files: Sequence[Path], output: Path) -> str:
    found = [record.Results(record.load(path)) for path in files]
    if not found:
        raise record.UserError("no results to report: run bench/accuracy.py first")
    found.sort(key=lambda results: (results.device == "cpu", results.device))  # GPUs first
    text = "\n\n".join(["# Accuracy", METHOD, *map(section, found)]) + "\n"
    write_atomically(output, text.encode())
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("report_accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS / "accuracy", help="a folder of .json files")
    parser.add_argument("--output", type=Path, default=record.BENCH / "ACCURACY.md")
    arguments = parser.parse_args(argv)

    def action() -> int:
        build(sorted(arguments.results.glob("*.json")), arguments.output)
        print(arguments.output)
        return 0

    return guarded("report_accuracy", action)


if __name__ == "__main__":
    sys.exit(main())
