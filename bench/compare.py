"""Did my change help? Times rows of the working tree and of a git revision in alternation, on this machine, in one run.

    python bench/compare.py --base main [--rows pool,gate/*] [--cases A,C] [--backends native] [--rounds 4] [--record]

``--base`` is a revision, which is checked out into a temporary worktree and built there, or the folder of another checkout, which
is built only where it has no extension. ``--rows`` takes shell patterns of function/mode/clock/case/backend, or single parts of
it; bench/measure.py lists them.

Each round measures the base and then the working tree, each in a process of its own. The first round also compares every row with
its tree's reference in float64: where that fails in either tree there is no ratio. "bits" tells whether both trees give the same
bits. "noise" is the spread of the rounds' medians within one tree, the larger of both, at least 2 %. A row is faster or slower if
its ratio differs from 1 by more than that, and every round of one tree is faster than every round of the other. Exit code 1 where
a row of the working tree fails, 2 where the command is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from record import UserError
from suite import Parser, guarded
from timing import Times

ROOT = record.BENCH.parent
LEAST_NOISE = 0.02


@dataclass(frozen=True)
class Tree:
    """A checkout; ``name`` is its commit."""

    folder: Path
    name: str

    @property
    def extension(self) -> Path | None:
        return next((self.folder / "s2sent_kernels").glob("_C*.so"), None)

    @property
    def interface(self) -> str | None:
        """The extension's interface number in the Python sources: INTERFACE, formerly NATIVE_INTERFACE."""
        for path in sorted((self.folder / "s2sent_kernels").rglob("*.py")):
            found = re.search(r"^(?:NATIVE_)?INTERFACE\b.*?=\s*(\d+)", path.read_text(encoding="utf-8"), re.M)
            if found:
                return found.group(1)
        return None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the base


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"git: {error}") from error
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)}: {done.stderr.strip() or 'failed'}")
    return done.stdout.strip()


@contextlib.contextmanager
def checked_out(base: str, build: bool) -> Iterator[Tree]:
    folder = Path(base)
    if (folder / "s2sent_kernels").is_dir():
        tree = Tree(folder.resolve(), str(folder))
        if tree.extension is None:
            say(_provide_extension(tree, Tree(ROOT, ""), build))
        yield tree
        return
    commit = _git("rev-parse", "--short=12", "--verify", f"{base}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        folder = Path(temporary) / "base"
        _git("worktree", "add", "--detach", "--force", str(folder), commit)
        try:
            tree = Tree(folder, commit)
            say(_provide_extension(tree, Tree(ROOT, ""), build))
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(folder))


def _provide_extension(base: Tree, work: Tree, build: bool) -> str:
    """Give the base its compiled extension; the line to report."""
    if work.extension is None:
        return "native is not compared: the working tree has no compiled extension"
    if build:
        say("building the base's extension (--no-build skips that)")
        variables = {name: value for name, value in os.environ.items() if name != "S2SENT_BUILD"}
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=base.folder,
            env=variables,
            capture_output=True,
            text=True,
        )
        if done.returncode or base.extension is None:
            lines = (done.stdout + done.stderr).strip().splitlines()
            return f"native is not compared: the base's extension was not built: {lines[-1] if lines else ''}"
        return "the base has its own extension"
    if base.interface != work.interface:
        return f"native is not compared: its interface was {base.interface} and is {work.interface}, and --no-build"
    shutil.copy(work.extension, base.folder / "s2sent_kernels")
    return "both trees use the working tree's extension: of native only the Python side is compared"


def _stale(tree: Tree) -> bool:
    """Whether csrc changed after the extension was built."""
    if tree.extension is None:
        return False
    built = tree.extension.stat().st_mtime
    return any(path.stat().st_mtime > built for path in (tree.folder / "csrc").rglob("*") if path.is_file())


# ---------------------------------------------------------------- rounds


def measured(tree: Tree, options: Sequence[str], check: bool) -> dict[str, Any]:
    """What bench/measure.py finds in ``tree``, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="compare-") as temporary:
        output = Path(temporary) / "rows.json"
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, str(record.BENCH / "measure.py"), str(output), *options]
        done = subprocess.run(
            command + (["--check"] if check else []), cwd=temporary, env=variables | {"PYTHONPATH": str(tree.folder)}
        )
        if done.returncode:
            raise UserError(f"measuring {tree.folder} ended with code {done.returncode}")
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    if Path(found["package"]).parent != tree.folder.resolve():
        raise UserError(f"measured {found['package']}, not the package in {tree.folder}")
    return found


def alternate(base: Tree, work: Tree, rounds: int, options: Sequence[str]) -> tuple[list[Any], list[Any]]:
    of_base, of_work = [], []
    for turn in range(rounds):
        for tree, found, name in ((base, of_base, "base"), (work, of_work, "working tree")):
            say(f"round {turn + 1} of {rounds}, {name}")
            found.append(measured(tree, options, check=turn == 0))
    return of_base, of_work


# ---------------------------------------------------------------- the table


def rows_of(of_base: list[Any], of_work: list[Any]) -> list[dict[str, Any]]:
    """A row for each name in either tree, with times of both and a verdict, or with the reason for having none."""
    first_base, first_work = of_base[0], of_work[0]
    differ = [name for name, usable in first_work["usable"].items() if usable != first_base["usable"].get(name)]
    rows = []
    for name in dict.fromkeys([*first_work["rows"], *first_base["rows"]]):
        row: dict[str, Any] = {"row": name}
        sides = [[found["rows"].get(name) for found in side] for side in (of_base, of_work)]
        why = [_why_not(side) for side in sides]
        if name.endswith("/auto") and differ:
            row |= {"verdict": "not compared", "why": f"{', '.join(differ)}: usable in one tree only"}
        elif any(why):
            which = [f"{tree}: {text}" for tree, text in zip(("base", "working tree"), why, strict=True) if text]
            failed = why[1] not in (None, MISSING, why[0]) or (why[1] or "").startswith(PARITY)
            row |= {"verdict": "failed" if failed else "not compared", "why": "; ".join(which)}
        else:
            row |= compared(*([found["samples"] for found in side] for side in sides))
            row["bits"] = "same" if sides[0][0]["bits"] == sides[1][0]["bits"] else "differ"
        rows.append(row)
    return rows


MISSING, PARITY = "no such row", "parity failed"


def _why_not(rounds: list[Any]) -> str | None:
    first = rounds[0]
    if first is None:
        return MISSING
    if "parity" in first and not first["parity"]["ok"]:
        return f"{PARITY}: {first['parity']['worst']}: {first['parity']['share']:.2f} of the bound"
    return next((found["error"] for found in rounds if found and "error" in found), None)


def compared(base: list[list[float]], work: list[list[float]]) -> dict[str, Any]:
    """Times of all rounds together, their ratio, and whether it is larger than the noise."""
    medians = [[statistics.median(samples) for samples in side] for side in (base, work)]
    times = [Times.of([value for samples in side for value in samples]) for side in (base, work)]
    ratio = times[1].median / times[0].median
    noise = max(LEAST_NOISE, *(max(side) / min(side) - 1 for side in medians))
    verdict = "within noise"
    if 1 / ratio > 1 + noise and max(medians[1]) < min(medians[0]):
        verdict = "faster"
    elif ratio > 1 + noise and min(medians[1]) > max(medians[0]):
        verdict = "slower"
    both = {"base_us": times[0].as_dict(), "work_us": times[1].as_dict()}
    return both | {"ratio": ratio, "noise": noise, "verdict": verdict}


def table(rows: list[dict[str, Any]]) -> str:
    head = ("row", "base us [p20, p80]", "working tree us [p20, p80]", "ratio", "noise", "verdict", "bits")
    lines = [head]
    for row in rows:
        if "ratio" in row:
            times = (_microseconds(row["base_us"]), _microseconds(row["work_us"]))
            numbers = (f"{row['ratio']:.3f}", f"{100 * row['noise']:.0f} %")
            lines.append((row["row"], *times, *numbers, row["verdict"], row["bits"]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text += [f"{row['row']}: {row['verdict']}: {row['why']}" for row in rows if "ratio" not in row]
    return "\n".join(text)


def _microseconds(times: dict[str, float]) -> str:
    digits = 1 if times["median"] < 1000 else 0
    return "{median:.{d}f} [{p20:.{d}f}, {p80:.{d}f}]".format(**times, d=digits)


# ---------------------------------------------------------------- the command


def _parser() -> argparse.ArgumentParser:
    parser = Parser("compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a git revision, or the folder of another checkout")
    parser.add_argument("--rows", help="patterns of rows, or parts of their names (default: all)")
    parser.add_argument("--cases", help="names of cases (default: some that differ in kind)")
    parser.add_argument("--backends", help="names, auto among them (default: the compiled ones; for host rows all)")
    parser.add_argument("--rounds", type=int, default=4, help="processes of each tree (default: 4)")
    parser.add_argument("--seconds", type=float, default=0.5, help="limit for one row in one round (default: 0.5)")
    parser.add_argument(
        "--no-build", action="store_true", help="do not compile the base: copy the extension if it fits"
    )
    parser.add_argument("--record", action="store_true", help="write bench/results/compare-<device>.json")
    parser.add_argument("--output", type=Path, help="write the rows to this file")
    return parser


def run(arguments: argparse.Namespace) -> int:
    if arguments.rounds < 2:
        raise UserError(f"--rounds: expected 2 or more, got {arguments.rounds}")
    options = ["--seconds", str(arguments.seconds)]
    for name in ("rows", "cases", "backends"):
        if getattr(arguments, name) is not None:
            options += [f"--{name}", getattr(arguments, name)]
    work = Tree(ROOT, record.commit())
    if _stale(work):
        say("warning: csrc is newer than the working tree's extension: python setup.py build_ext --inplace")
    with checked_out(arguments.base, not arguments.no_build) as base:
        rows = rows_of(*alternate(base, work, arguments.rounds, options))
        if not rows:
            raise UserError("no row has that name: see bench/measure.py")
        content = {"device": record.slug(), "base": base.name, "work": work.name, "rounds": arguments.rounds}
        content |= {"environment": record.environment(), "rows": rows}
    print(table(rows))
    paths = [arguments.output] if arguments.output else []
    paths += [record.RESULTS / f"compare-{record.slug()}.json"] if arguments.record else []
    for path in paths:
        record.write(path, content)
        print(path)
    return 1 if any(row["verdict"] == "failed" for row in rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    return guarded("compare", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
