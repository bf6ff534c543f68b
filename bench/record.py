"""Results: one JSON file for each device, rewritten after every step, merged row by row. One row a line, so that a diff of two
runs is a diff of rows.

    python bench/record.py merged.json part.json [--only=NAME] [part.json ...]     # later files win
    python bench/record.py --rewrite FILE [FILE ...]                               # the same content, one row a line

To keep the rows of merged.json, name it as the first part too.

Of the parts after --only=NAME only that contestant's rows are used: a ratio of two cases belongs to one run. This package's
times in that run are kept with them, as "ours_us".

    {"format": 2, "device": slug, "runs": [{environment, ceilings, ...}], "rows": [{"section", "case", ..., "run": index}]}
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cases import CASES, CPU_CASES
from contestants import OURS, version

from s2sent_kernels.files import write_atomically

FORMAT = 2
BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
PACKAGES = (
    "s2sent_kernels", "torch", "triton", "transformers", "sentence-transformers", "flash-linear-attention", "numpy",
)  # fmt: skip
CLOCKS = {
    "sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm", "memory_mhz": "clocks.mem",
    "memory_max_mhz": "clocks.max.mem", "power_limit_w": "power.limit", "driver": "driver_version",
}  # fmt: skip
KEY = ("section", "case", "what", "mode", "contestant")

Row = dict[str, Any]


class UserError(Exception):
    """Reported in one line, exit code 2."""


def slug() -> str:
    """The device's name in file names; "cpu" for any CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The checked-out commit, or $COMMIT for a copy without history."""
    told = os.environ.get("COMMIT")
    if told:
        return told
    found = _output_of("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return "unknown"
    return found + ("" if _output_of("git", "status", "--porcelain", "--", "../s2sent_kernels") == "" else ", changed")


def clocks() -> dict[str, str]:
    """Clocks and limits of the first GPU by nvidia-smi. They are read, never set."""
    if not torch.cuda.is_available():
        return {}
    line = _output_of("nvidia-smi", f"--query-gpu={','.join(CLOCKS.values())}", "--format=csv,noheader,nounits")
    if not line:
        return {}
    values = (value.strip() for value in line.splitlines()[0].split(","))
    return dict(zip(CLOCKS, values, strict=False))


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "threads": None if gpu else torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if gpu else None,
        "versions": {name: version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "clocks": clocks(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def dumps(content: dict[str, Any]) -> str:
    """JSON with a line for each key of ``content``, and where its value is a list of records, for each of them. A record's
    fields are in a fixed order, those of ``KEY`` first, whichever code measured it; the order inside a field has a meaning."""
    fields = (f"{json.dumps(name)}: {_lines(value)}" for name, value in content.items())
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        return json.dumps(value)
    return "[\n " + ",\n ".join(json.dumps(_ordered(row)) for row in value) + "\n]"


def _ordered(row: Row) -> Row:
    first = [name for name in KEY if name in row]
    return {name: row[name] for name in (*first, *sorted(row.keys() - set(first)))}


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dumps(content).encode())


def load(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise UserError(f"{path}: expected results of format {FORMAT}; written by another version of the suite")
    return results


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The rows of both, the new one where both have it. Runs without remaining rows are dropped."""
    if old is None:
        return new
    if old["device"] != new["device"]:
        raise UserError(f"results of {new['device']} cannot be merged into those of {old['device']}")
    runs = list(old["runs"])
    place = []  # of each new run: parts may share one
    for run in new["runs"]:
        if run not in runs:
            runs.append(run)
        place.append(runs.index(run))
    rows = {key(row): row for row in old["rows"]}
    rows |= {key(row): row | {"run": place[row["run"]]} for row in new["rows"]}
    used = sorted({row["run"] for row in rows.values()})
    renumbered = {run: place for place, run in enumerate(used)}
    return new | {
        "runs": [runs[run] for run in used],
        "rows": [row | {"run": renumbered[row["run"]]} for row in rows.values()],
    }


def _rows_of(contestant: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = {
        key(row)[:-1]: row["device_us"]["median"] for row in rows if row["contestant"] == OURS and "device_us" in row
    }
    found = [row for row in rows if row["contestant"] == contestant]
    return [row | {"ours_us": ours[key(row)[:-1]]} if key(row)[:-1] in ours else row for row in found]


def times_ours(row: dict[str, Any], mine: dict[str, Any]) -> float:
    """A row's time over this package's, measured in the same run where known, else over ``mine``."""
    return row["device_us"]["median"] / row.get("ours_us", mine["device_us"]["median"])


class Results:
    """One device's file, and its rows by key."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.device, self.runs = content["device"], content["runs"]
        # Merging leaves rows in any order; sort by case.
        order = {case.name: place for place, case in enumerate((*CASES, *CPU_CASES))}
        self.rows: list[Row] = sorted(content["rows"], key=lambda row: order.get(row["case"], len(order)))
        self._rows = {key(row): row for row in self.rows}

    def find(self, section: str, case: str, what: str, mode: str, contestant: str) -> Row | None:
        """The row of that key if its status is "ok"."""
        row = self._rows.get((section, case, what, mode, contestant))
        return row if row and row["status"] == "ok" else None

    def of(self, *sections: str, **wanted: str) -> list[Row]:
        return [
            row
            for row in self.rows
            if row["section"] in sections and all(row[name] == value for name, value in wanted.items())
        ]


class Record:
    """One run's results, merged into ``path`` at every ``add``."""

    def __init__(self, path: Path, run: dict[str, Any], device: str) -> None:
        self.path = path
        self._results: dict[str, Any] = {"format": FORMAT, "device": device, "runs": [run], "rows": []}
        self._old = None
        if path.exists():
            try:
                self._old = load(path)
            except UserError as error:
                print(f"{error}: it is replaced", file=sys.stderr)
            if self._old is not None:
                merge(self._old, self._results)  # refuse another device's file before measuring

    @property
    def rows(self) -> list[Row]:
        return self._results["rows"]

    def add(self, rows: list[Row]) -> None:
        self._results["rows"] += [row | {"run": 0} for row in rows]
        self.save()

    def save(self) -> None:
        merged = merge(self._old, self._results)
        write(self.path, merged)


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2:
            raise UserError("expected the merged file and at least one part")
        if arguments[0] == "--rewrite":
            for name in arguments[1:]:
                write(Path(name), json.loads(Path(name).read_text(encoding="utf-8")))
            return 0
        merged: dict[str, Any] | None = None
        only = None
        for part in arguments[1:]:
            if part.startswith("--only="):
                only = part.removeprefix("--only=")
                continue
            content = load(Path(part))
            if only is not None:
                content["rows"] = _rows_of(only, content["rows"])
            merged = merge(merged, content)
        if merged is None:
            raise UserError("expected at least one part")
        write(Path(arguments[0]), merged)
    except UserError as error:
        print(f"record: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
