"""The benchmark suite: measures what this machine can and merges it into one file of results for its device.

    python bench/suite.py [--sections caller,latency,sweep,memory,end_to_end] [--cases A,B] [--competitors none|eager|all]
                          [--minutes 8] [--output bench/results]

A run replaces the rows that it measures and keeps all others; the file is rewritten after every step. Ceilings are measured in
every run. Exit code 1 where a contestant failed parity or raised, 2 where the command line is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

SECTIONS = ("caller", "latency", "sweep", "memory", "end_to_end")


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, as ``guarded`` does every other error."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self._name = name

    def error(self, message: str) -> NoReturn:
        print(f"{self._name}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="of " + ", ".join(SECTIONS))
    parser.add_argument("--cases", help="names of cases, for caller, latency and memory (default: all)")
    parser.add_argument(
        "--competitors",
        choices=("none", "eager", "all"),
        help="all: some are compiled, which takes minutes (default on a GPU)",
    )
    parser.add_argument("--repeats", type=int, default=30, help="rounds of every measurement (default: 30)")
    parser.add_argument(
        "--minutes", type=float, help="begin no compilation and no further step after this time (default on a CPU: 8)"
    )
    parser.add_argument("--output", type=Path, help="a .json file or a folder (default: bench/results)")
    return parser


def _chosen(text: str | None, known: Sequence[str], what: str) -> list[str]:
    wanted = list(known) if text is None else [part.strip() for part in text.split(",") if part.strip()]
    for name in wanted:
        if name not in known:
            raise ValueError(f"{what}: expected some of {', '.join(known)}, got {name!r}")
    return wanted


class Progress:
    """A bar over the steps, on stderr where that is a terminal; a line a step everywhere."""

    def __init__(self, steps: int) -> None:
        from tqdm import tqdm

        self._begin = time.monotonic()
        # None: no bar without a terminal; ``say`` prints lines instead.
        self._bar = tqdm(total=steps, desc="bench", file=sys.stderr, disable=None, unit="step")

    def say(self, text: str) -> None:
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", file=sys.stderr, flush=True)

    def step(self) -> None:
        self._bar.update()

    def write(self, line: str) -> None:
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


def line_of(row: dict[str, Any]) -> str | None:
    """What a run prints: rows of this package, and any that failed."""
    name = f"{row['case']:15s} {row['what']:10s} {row['mode']:8s}"
    if row["status"] in ("parity failed", "error"):
        return f"{name} {row['contestant']}: {row['status']}: {row.get('note', '')}"
    if (
        row["status"] != "ok"
        or not row["contestant"].startswith(("s2sent", "S2Sent", "+"))
        or row["section"] == "memory"
    ):
        return None
    if row["section"] == "caller":
        return _caller_line(name, row)
    line = f"{name} {row['device_us']['median']:10.1f} us"
    if "floor_us" in row:
        line += f"  {row['device_us']['median'] / row['floor_us']:5.2f} x floor"
    if "wall_us" in row:
        line += f"  wall {row['wall_us']['median']:.0f}"
    if "overhead" in row:
        line += f"  {row['contestant']} {100 * row['overhead']:+.2f} %, memory {100 * row['peak_overhead']:+.1f} %"
    return line


def _caller_line(name: str, row: dict[str, Any]) -> str:
    line = f"{name} {row['contestant']:26s}"
    for clock in ("host_us", "wall_us", "device_us"):
        if clock in row:
            line += f"  {clock.removesuffix('_us')} {row[clock]['median']:.1f} us"
    return line + (f"  {100 * row['overhead']:+.2f} %" if "overhead" in row else "")


def run(arguments: argparse.Namespace) -> int:
    import caller
    import end_to_end
    import latency
    import memory
    import record
    from cases import PATHS, STAGES, caller_cases_of, cases_of, sweeps_of
    from timing import ceilings, on_gpu

    device = "cuda" if on_gpu() else "cpu"
    _quieten()
    _settle()
    known = list(dict.fromkeys(case.name for case in (*cases_of(device), *caller_cases_of(device))))
    names = _chosen(arguments.cases, known, "--cases")
    chosen = [case for case in cases_of(device) if case.name in names]
    called = caller.chosen(names, device)
    sections = _chosen(arguments.sections, SECTIONS, "--sections")
    competitors = arguments.competitors or ("all" if on_gpu() else "eager")
    minutes = arguments.minutes or (float("inf") if on_gpu() else 8.0)
    deadline = time.monotonic() + 60 * minutes
    sweeps = sweeps_of(device)
    counts = {
        "caller": caller.steps(called, device),
        "latency": len(chosen) * len((*STAGES, *PATHS)),
        "sweep": sum(len(each) for each in sweeps.values()),
        "memory": len(chosen),
        "end_to_end": sum(len(batches) for _, batches in end_to_end.plan(device)),
    }
    output = arguments.output or record.RESULTS
    path = output if output.suffix == ".json" else output / f"{record.slug()}.json"
    measured = ceilings()
    run_info = record.environment() | {"ceilings_tb_s": measured}
    results = record.Record(path, run_info, record.slug())
    settings = latency.Settings(measured, competitors, arguments.repeats, deadline)
    progress = Progress(sum(counts[section] for section in sections))
    progress.write("ceilings, TB/s: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))

    def add(rows: list[dict[str, Any]]) -> None:
        results.add(rows)
        for line in filter(None, map(line_of, rows)):
            progress.write(line)
        progress.step()

    def steps() -> Any:
        """Lists of rows, the most important first, since a run may run out of time."""
        if "caller" in sections:
            yield from caller.measure(called, settings, progress.say)
        if "latency" in sections:
            for case in chosen:
                for _, rows in latency.measure(case, settings, progress.say):
                    yield rows
        if "end_to_end" in sections:
            yield from end_to_end.measure(device, arguments.repeats, progress.say)
        if "sweep" in sections:
            for axis, of_axis in sweeps.items():
                progress.say(f"over {axis}")
                yield from latency.sweep(axis, of_axis, settings)
        if "memory" in sections:
            for case in chosen:
                progress.say(f"memory {case.name}")
                yield list(memory.measure(case, device, competitors))

    try:
        for rows in steps():
            add(rows)
            if time.monotonic() > deadline:
                progress.write("out of time: what was not measured keeps its earlier rows, if there are any")
                break
    finally:
        progress.close()
    print(f"{path}: {len(results.rows)} rows measured")
    bad = [row for row in results.rows if row["status"] in ("parity failed", "error")]
    return 1 if bad else 0


def _settle() -> None:
    """Import the large libraries now and exempt their objects from garbage collection, which every graph capture runs."""
    for name in ("transformers.models.bert.modeling_bert", "sentence_transformers.sentence_transformer.modules"):
        with contextlib.suppress(ImportError), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _quieten() -> None:
    """Silence the compilers' warnings."""
    import torch

    warnings.filterwarnings("ignore", module=r"torch\..*")
    for name in ("torch._inductor", "torch._dynamo"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Every contestant recompiles the same code object.
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 64)
            break


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    # First calls include compilation, so they must not find the cache of an earlier process.
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as caches:
        for variable, name in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
            os.environ.setdefault(variable, f"{caches}/{name}")
        return guarded("bench", lambda: run(arguments))


def guarded(name: str, action: Callable[[], int]) -> int:
    """Run ``action``; an error that the user can correct becomes one line on stderr and exit code 2."""
    from record import UserError

    try:
        return action()
    except (UserError, ValueError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
