"""A folder of parts is complete: each part is checked against the plan, and the manifest, which says so, is written last."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...files import write_atomically
from ..progress import stepwise
from .plan import PLAN, Plan, load
from .stock import FAILED, MANIFEST, NOTE, PART, check_extra, each, is_ours, read


class Checked(NamedTuple):
    """What all parts of a plan are together."""

    schema: Any  # pyarrow's
    cut: int  # texts that were longer than the encoder takes, where it counts them
    limit: int | None  # how many tokens that are
    sums: list[str]  # SHA-256 of the files
    skipped: list[dict[str, Any]]  # the rows that could not be encoded: part, file, row and error

    def say(self, plan: Plan, say: Callable[[str], None]) -> None:
        if self.cut:
            cut = f"more than {self.limit} tokens and were cut"
            what = "more tokens than the model takes" if self.limit is None else cut
            say(f"{self.cut:,} of {sum(part.rows for part in plan.parts):,} texts have {what}")

    def notes(self) -> bytes:
        """A line of JSON for each row that could not be encoded."""
        return "".join(json.dumps(one) + "\n" for one in self.skipped).encode()

    def say_skipped(self, plan: Plan, place: Path, say: Callable[[str], None]) -> None:
        if self.skipped:
            rows = sum(part.rows for part in plan.parts)
            say(
                f"{len(self.skipped):,} of {rows:,} texts could not be encoded, and their embeddings are NaN: see {place}"
            )


def finish(folder: Path, say: Callable[[str], None] = print) -> int:
    """Write ``manifest.json`` and return the number of rows. What only a run needs, as copies and notes of failures, is removed.
    ``say`` is told how many texts were cut.

    Raises:
        ValueError: there is no plan; parts are missing, or are not the plan's.
    """
    plan = load(folder)
    if plan is None:
        raise ValueError(
            f"{folder}: expected a folder of parts, which shards were written into, got one without {PLAN}"
        )
    names = set(os.listdir(folder))
    absent = [part for part in plan.parts if part.name not in names]
    if absent:
        part = absent[0]
        where = f"rows {part.start.row + 1} to {part.stop} of {plan.sources[part.source].name}"
        notes = [name for name in names if re.fullmatch(NOTE, name)]
        failed = f"; {' and '.join(sorted(notes))} says which failed" if notes else ""
        raise ValueError(
            f"{folder}: {len(absent):,} of {len(plan.parts):,} parts are missing, the first {part.name}, {where}{failed}"
        )
    check_extra(folder, plan)
    checked = check(plan, folder)
    rows = sum(part.rows for part in plan.parts)
    manifest = {
        "plan": plan.digest,
        "rows": rows,
        "cut": checked.cut,
        "skipped": len(checked.skipped),
        **({} if plan.about is None else {"provenance": plan.about}),
        "columns": {field.name: str(field.type) for field in checked.schema},
        "parts": [
            {
                "file": part.name,
                "rows": part.rows,
                "source": plan.sources[part.source].name,
                "start": part.start.row,
                "sha256": sha256,
            }
            for part, sha256 in zip(plan.parts, checked.sums, strict=True)
        ],
    }
    if checked.skipped:
        write_atomically(folder / FAILED, checked.notes(), sync=True)
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode(), sync=True)
    kept = f"{PART}|{PLAN}|{MANIFEST}" + (f"|{re.escape(FAILED)}" if checked.skipped else "")
    for name in names:
        if is_ours(name) and not re.fullmatch(kept, name):
            (folder / name).unlink(missing_ok=True)
    checked.say(plan, say)
    checked.say_skipped(plan, folder / FAILED, say)
    return rows


def check(plan: Plan, folder: Path) -> Checked:
    """Judge every part, by every byte.

    Raises:
        ValueError: a part cannot be read, is damaged, or is not the plan's.
    """
    known: Any = None
    cut, sums = 0, []
    limit: int | None = None
    skipped: list[dict[str, Any]] = []
    digest = plan.digest
    found = each(lambda part: read(folder, part, digest), plan.parts)
    with contextlib.closing(stepwise(plan.parts, "checking", "parts")) as parts:
        for part, one in zip(parts, found, strict=True):
            cut, limit = cut + one.cut, one.limit if limit is None else limit
            sums.append(one.sha256)
            file = plan.sources[part.source].name
            skipped += [{"part": part.number, "file": file, "row": row, "error": why} for row, why in one.skipped]
            columns = one.about.schema.to_arrow_schema()
            if known is not None and columns != known:
                raise ValueError(
                    f"{folder / part.name}: expected columns {known.names} as in the other parts, got others"
                )
            known = columns
    return Checked(known, cut, limit, sums, skipped)
