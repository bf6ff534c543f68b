"""A folder of parts is complete: each part is checked against the plan, and the manifest, which says so, is written last."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ...files import importing, write_atomically
from .parts import CUT
from .plan import PLAN, Plan, load
from .stock import MANIFEST, NOTE, PART, footer, is_ours

with importing(None, "encode"):
    from pyarrow import parquet


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
    columns = check(plan, folder)
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


def check(plan: Plan, folder: Path) -> Any:
    """The schema of all parts.

    Raises:
        ValueError: a part cannot be read, or is not the plan's.
    """
    known: Any = None
    for part in plan.parts:
        found = footer(folder, part, plan.digest).schema.to_arrow_schema()
        if known is not None and found != known:
            raise ValueError(f"{folder / part.name}: expected columns {known.names} as in the other parts, got others")
        known = found
    return known
