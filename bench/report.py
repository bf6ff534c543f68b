"""bench/results/*.json to bench/REPORT.md and its pictures, and to the README's table of costs. No number is typed by hand.

    python bench/report.py [--results bench/results] [--output bench/REPORT.md] [--readme README.md]

Pictures are written to a folder "pictures" beside the report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import charts
import costs
import record
import report_caller
import report_encode
import targets
from contestants import OURS
from pages import insert, table
from record import Results, Row
from suite import Parser, guarded

from s2sent_kernels.files import write_atomically

MODES = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward + backward",
    "training": "forward + backward, batch statistics",
}
METHOD = """\
The first tables are eager calls, as a program makes them. Host time is what one call of a row of calls costs its caller, who
does not wait for the GPU in between. Wall time is one call until its result is ready. "Mean" is the masked mean of the last
block by the operators that Pooling of sentence-transformers calls. Device time is the time of CUDA-graph replays between
events, over rotating inputs that together exceed the L2 cache; on a CPU it is the wall time of the same calls. Contestants
are interleaved in one loop, in a rotating order. Times are medians, with the 20th and 80th percentiles in parentheses.
Outside of the first tables, the first call is the first of its case in a process with empty compiler caches, compilation
included. Peak memory is what a call allocates beyond what was allocated before, its results included. Floors are the bytes
that a stage or path must move over the ceilings of the same run; what a backward writes, over the rate of the fastest of
several writers of as many bytes. Before timing, the result and every timed gradient are compared with the reference in
float64: the error may be twice that of the reference in the inputs' own dtype, plus the rounding of the result itself. A
contestant that fails gets no times. "max-autotune" runs without its own CUDA graphs, which cannot be captured within the
measuring ones, and with products by cuBLAS. The formulas, and "published" in end-to-end rows, are the reference's two
profiles in plain PyTorch, with their bases held as buffers. Like the reference they compute in float32. A module that
computes in the hidden states' own dtype, as the authors' does, moves fewer bytes and takes less time; it is not among the
contestants.

Texts to embeddings (`bench/encode.py`) are whole calls on the same texts, Wikipedia sentences, tokenization included, with
the same weights in the same dtype. "Library" is `SentenceTransformer.encode` with mean pooling, at the best of three batch
sizes. Hugging Face's Text Embeddings Inference is not among the contestants: it is a server, measured through its requests,
with another batching and no selector."""


def microseconds(times: dict[str, float] | None) -> str:
    if not times:
        return "–"
    digits = 1 if times["median"] < 1000 else 0
    return f"{times['median']:.{digits}f} ({times['p20']:.{digits}f}–{times['p80']:.{digits}f})"


def mebibytes(row: Row | None) -> str:
    if not row:
        return "–"
    return f"{row['peak_mib']:.{0 if row['peak_mib'] >= 100 else 1}f}"


def _bandwidth(row: Row) -> str:
    moved = row["read_bytes"] + row["write_bytes"]
    return f"{moved / row['device_us']['median'] / 1e6:.3g}"


def _shape(row: Row) -> str:
    return ", ".join(map(str, row["shape"]))


def own_table(results: Results, *sections: str) -> str:
    """This package's stages or paths with their floors."""
    lines = []
    for row in results.of(*sections, contestant=OURS):
        start = (row["case"], _shape(row), f"{row['dtype']}, {row['layout']}", row["what"], MODES[row["mode"]])
        if row["status"] != "ok":
            lines.append((*start, f"**{row['status']}**", *("–",) * 6))
            continue
        first = f"{row['first_call_ms']:.0f}" if "first_call_ms" in row else "–"
        peak = mebibytes(results.find("memory", row["case"], row["what"], row["mode"], OURS))
        lines.append(
            (
                *start, microseconds(row["device_us"]), f"{row['floor_us']:.1f}",
                f"{row['device_us']['median'] / row['floor_us']:.2f}", _bandwidth(row),
                microseconds(row.get("wall_us")), first, peak,
            )
        )  # fmt: skip
    head = (
        "<case", "<B, L, N, D", "<dtype, layout", "<what", "<mode", "device µs", "floor µs", "ratio", "TB/s", "wall µs",
        "first call ms", "peak MiB",
    )  # fmt: skip
    return table(head, lines)


def against_table(results: Results, what: str) -> str:
    """All contestants on the same inputs, fastest first; failed ones last."""
    lines = []
    rows = results.of("paths", what=what)
    for case in dict.fromkeys(row["case"] for row in rows):
        for mode in MODES:
            group = [row for row in rows if row["case"] == case and row["mode"] == mode]
            if len(group) < 2:
                continue
            group.sort(key=lambda row: row["device_us"]["median"] if row["status"] == "ok" else float("inf"))
            mine = results.find("paths", case, what, mode, OURS)
            lines += [_against(results, row, mine) for row in group]
    head = (
        "<case",
        "<mode",
        "<contestant",
        "device µs",
        "× this package",
        "wall µs",
        "first call ms",
        "peak MiB",
        "<remark",
    )
    return table(head, lines)


def _against(results: Results, row: Row, mine: Row | None) -> tuple[str, ...]:
    name = f"**{row['contestant']}**" if row["contestant"] == OURS else row["contestant"]
    start = (row["case"], MODES[row["mode"]], name)
    remark = row.get("note", "")
    if row["status"] != "ok":
        return (*start, "–", "–", "–", "–", "–", row["status"] + (f": {remark}" if remark else ""))
    if mine and results.runs[row["run"]] != results.runs[mine["run"]]:
        beside = f"beside {row['ours_us']:.1f} there" if "ours_us" in row else f"this package in {mine['run'] + 1}"
        remark = "; ".join(filter(None, (remark, f"measured in run {row['run'] + 1}, {beside}")))
    times = f"{record.times_ours(row, mine):.3g}" if mine else "–"
    first = f"{row['first_call_ms']:.0f}" if "first_call_ms" in row else "–"
    peak = mebibytes(results.find("memory", row["case"], row["what"], row["mode"], row["contestant"]))
    return (*start, microseconds(row["device_us"]), times, microseconds(row.get("wall_us")), first, peak, remark)


def end_to_end_table(results: Results) -> str:
    lines = []
    for row in results.of("end to end"):
        start = (row["what"], row["case"].replace("x", " × "), row["contestant"])
        if row["status"] != "ok":
            lines.append((*start, *("–",) * 5, row["status"] + (f": {row['note']}" if "note" in row else "")))
            continue
        times = {name: value / 1e3 for name, value in row["device_us"].items()}
        over, more = (f"{100 * row[k]:+.2f} %" if k in row else "" for k in ("overhead", "peak_overhead"))
        device = f"{times['median']:.3f} ({times['p20']:.3f}–{times['p80']:.3f})"
        wall = f"{row['wall_us']['median'] / 1e3:.2f}" if "wall_us" in row else "–"
        lines.append((*start, device, over, wall, mebibytes(row), more, row.get("note", "")))
    head = ("<encoder", "<B × L", "<variant", "device ms", "overhead", "wall ms", "peak MiB", "more memory", "<remark")
    return table(head, lines)


def memory_table(results: Results) -> str:
    lines = []
    rows = results.of("memory")
    for case, what in dict.fromkeys((row["case"], row["what"]) for row in rows):
        group = [row for row in rows if (row["case"], row["what"]) == (case, what)]
        for name in dict.fromkeys(row["contestant"] for row in group):
            both = (results.find("memory", case, what, mode, name) for mode in ("forward", "both"))
            cells = [mebibytes(row) for row in both]
            if cells != ["–", "–"]:
                lines.append((case, what, name, *cells, f"{group[0]['states_mib']:.0f}"))
    head = ("<case", "<path", "<contestant", "forward MiB", "forward + backward MiB", "hidden states themselves MiB")
    return table(head, lines)


def parity_table(results: Results) -> str:
    lines = []
    seen = set()
    for row in results.rows:
        outcome = row.get("parity")
        what = row["what"] + (", batch statistics" if row["mode"] == "training" else "")
        name = (row["case"], what, row["contestant"])
        if outcome is None or (name, row["section"]) in seen:
            continue
        seen.add((name, row["section"]))
        errors = (f"{outcome['output_error']:.2e}", f"{outcome['yardstick_error']:.2e}")
        worst = f"{outcome['share']:.2f} ({outcome['worst']})" if "share" in outcome else "–"
        gradients = "yes" if outcome.get("gradients") else "no"
        lines.append((*name, "agrees" if outcome["ok"] else "**FAILS**", *errors, gradients, worst))
    head = (
        "<case", "<what", "<contestant", "<outcome", "error", "error of the same dtype", "<gradients", "<share of bound",
    )  # fmt: skip
    return table(head, lines)


def run_table(results: Results) -> str:
    lines = []
    for number, run in enumerate(results.runs, 1):
        versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items() if value != "not installed")
        clock = ", ".join(f"{name} {value}" for name, value in run["clocks"].items()) or "–"
        if run.get("threads"):
            clock = f"{run['threads']} threads"
        ceiling = ", ".join(f"{name} {value:.3g}" for name, value in run.get("ceilings_tb_s", {}).items()) or "–"
        python = f"Python {run['python']}" + (f", CUDA {run['cuda']}" if run.get("cuda") else "")
        lines.append((str(number), run["date"], run["commit"], ceiling, clock, f"{python}, {versions}"))
    return table(("run", "<date", "<commit", "<ceilings TB/s", "<clocks", "<versions"), lines)


def section(results: Results, pictures: Path) -> str:
    """One device's part of the report. Writes its pictures."""
    parts = [f"## {results.runs[-1]['device'] if results.runs else results.device}", run_table(results)]
    used = sorted({row["backend"] for row in results.rows if "backend" in row})
    if used:
        parts.append(f"`{OURS}` runs here on backend " + " and ".join(f"`{name}`" for name in used) + ".")
    for title, body in report_caller.tables(results):
        parts += [f"### {title}", body]
    for title, body in report_encode.tables(results):
        drawn = [_picture(results, pictures, *one) for one in PICTURES.get(title, ())]
        parts += [f"### {title}", *filter(None, drawn), body]
    if results.device in targets.TARGETS:
        head = ("<target", "limit", "measured", "<verdict", "<why")
        parts += ["### Targets", table(head, targets.verdicts(results.find, results.device))]
    for title, text in (
        ("Paths", lambda: own_table(results, "paths")),
        ("Pooled path beside others", lambda: against_table(results, "pooled")),
        ("Token path beside others", lambda: against_table(results, "token")),
        ("Stages", lambda: own_table(results, "stages")),
        ("Encoder and selector", lambda: end_to_end_table(results)),
        ("Peak extra memory", lambda: memory_table(results)),
        ("Parity", lambda: parity_table(results)),
    ):
        body = text()
        drawn = [_picture(results, pictures, *one) for one in PICTURES.get(title, ())]
        if body.count("\n") > 1 or any(drawn):
            parts += [f"### {title}", *filter(None, drawn)] + ([body] if body.count("\n") > 1 else [])
    return "\n\n".join(parts)


Draw = Callable[[Results], bytes | None]
PICTURES: dict[str, tuple[tuple[str, str, Draw], ...]] = {
    "Texts to embeddings": (("encode", "Texts a second, tokenization included", charts.encoding),),
    "Paths": (
        ("scaling", "Time against tokens and against blocks, with the floors", charts.scaling),
        ("bandwidth", "Achieved bandwidth against the ceiling", charts.bandwidth),
    ),
    "Pooled path beside others": (("contestants", "Pooled path, forward, beside others", charts.beside),),
    "Encoder and selector": (("overhead", "Overhead and peak memory over the encoder alone", charts.overhead),),
    "Peak extra memory": (("memory", "Peak extra memory", charts.memory),),
}


def _picture(results: Results, pictures: Path, name: str, text: str, draw: Draw) -> str:
    content = draw(results)
    if content is None:
        return ""
    path = pictures / f"{results.device}-{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return f"![{text}]({pictures.name}/{path.name})"


def build(files: Sequence[Path], output: Path, readme: Path | None = None) -> str:
    """Write the report and, between its markers, the table of ``readme``; the report's text."""
    found = []
    for path in files:
        try:
            found.append(Results(record.load(path)))
        except record.UserError as error:
            print(f"report: left out: {error}", file=sys.stderr)
    if not found:
        raise record.UserError("no results to report: run bench/suite.py first")
    found.sort(key=lambda results: (results.device == "cpu", results.device))  # GPUs first
    intro = "Written by `bench/report.py` from the results beside it; `make bench` measures and rebuilds it."
    parts = ["# Benchmarks", intro, METHOD, *(section(results, output.parent / "pictures") for results in found)]
    text = "\n\n".join(parts) + "\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, text.encode())
    if readme is not None:
        gpu = next((results for results in found if results.device == targets.GPU), None)
        if gpu is None:
            raise record.UserError(f"{readme}: its table needs the results of {targets.GPU}")
        insert(readme, costs.START, costs.END, costs.costs(gpu, record.RESULTS / "quality"))
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="a folder of .json files")
    parser.add_argument("--output", type=Path, default=record.BENCH / "REPORT.md")
    parser.add_argument("--readme", type=Path, help="also write the table between this file's markers")
    arguments = parser.parse_args(argv)

    def action() -> int:
        files = (path for path in arguments.results.glob("*.json") if not path.name.startswith("compare-"))
        build(sorted(files), arguments.output, arguments.readme)
        print(arguments.output)
        return 0

    return guarded("report", action)


if __name__ == "__main__":
    sys.exit(main())
