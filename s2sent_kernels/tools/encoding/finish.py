"""A folder of parts is complete: each part is checked against the plan, and the manifest, which says so, is written last."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ...files import importing, write_atomically
from .parts import CUT, DIGEST
from .plan import COPY, PLAN, Plan, load

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet

MANIFEST, LOCK = "manifest.json", ".lock"
PART = r"part-\d+\.parquet"
NOTE = r"failed[\w-]*\.jsonl"
# What a run writes into a folder; with a dot and more behind it while it is written.
OURS = re.compile(rf"{PART}|{NOTE}|{PLAN}|{MANIFEST}|{COPY}|{LOCK}.*|whole\.\w+|\.({PART}|{PLAN}|{MANIFEST}|stdin)\..*")


def is_ours(name: str) -> bool:
    return OURS.fullmatch(name) is not None


def finish(folder: Path) -> int:
    """Write ``manifest.json`` and return the number of rows. What only a run needs, as copies and notes of failures, is removed.

    Raises:
        ValueError: there is no plan; parts are missing, or are not the plan's.
    """
    plan = load(folder)
    if plan is None:
        raise ValueError(f"{folder}: expected a folder of parts, got one without {PLAN}")
    names = set(os.listdir(folder))
    absent = [part for part in plan.parts if part.name not in names]
    if absent:
        part = absent[0]
        where = f"rows {part.start.row + 1} to {part.stop} of {plan.sources[part.source].name}"
        notes = [name for name in names if re.fullmatch(NOTE, name)]
        failed = f"; {' and '.join(sorted(notes))} says which failed" if notes else ""
        raise ValueError(
            f"{folder}: {len(absent)} of {len(plan.parts)} parts are missing, the first {part.name}, {where}{failed}"
        )
    columns = _check(plan, folder)
    rows = sum(part.rows for part in plan.parts)
    manifest = {
        "plan": plan.digest,
        "rows": rows,
        "cut": count_cut(plan, folder),
        "columns": {field.name: str(field.type) for field in columns},
        "parts": [
            {"file": part.name, "rows": part.rows, "source": plan.sources[part.source].name, "start": part.start.row}
            for part in plan.parts
        ],
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode(), sync=True)
    for name in names:
        if is_ours(name) and not re.fullmatch(f"{PART}|{PLAN}|{MANIFEST}", name):
            (folder / name).unlink(missing_ok=True)
    return rows


def count_cut(plan: Plan, folder: Path) -> int:
    """How many texts were longer than the encoder takes, where it counts them."""
    about = (parquet.read_metadata(folder / part.name).metadata or {} for part in plan.parts)
    return sum(int(each.get(CUT, 0)) for each in about)


def _check(plan: Plan, folder: Path) -> Any:
    """The schema of all parts."""
    known: Any = None
    for part in plan.parts:
        try:
            about = parquet.read_metadata(folder / part.name)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{folder / part.name}: cannot be read: {str(error).splitlines()[0]}") from error
        found = about.schema.to_arrow_schema()
        if (about.metadata or {}).get(DIGEST) != plan.digest.encode():
            raise ValueError(f"{folder / part.name}: is of another plan: remove it and run the command again")
        if about.num_rows != part.rows:
            raise ValueError(f"{folder / part.name}: expected {part.rows} rows, got {about.num_rows}")
        if known is not None and found != known:
            raise ValueError(f"{folder / part.name}: expected columns {known.names} as in the other parts, got others")
        known = found
    return known
