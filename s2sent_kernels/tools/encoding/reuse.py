"""What a run keeps of the parts of an earlier one, whose inputs were other files: a row was repaired, or rows were added. A part
carries a checksum of the rows that it was made from, so the inputs need only be read again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import importing
from .plan import Part, Plan
from .reading import Reader, Rows
from .rows import DataError
from .stock import DIGEST, NUMBER, RECIPE, ROWS, read

with importing(None, "encode"):
    import pyarrow as pa
    from pyarrow import parquet

AT_ONCE = 16384  # rows


class RowSum:
    """A checksum of rows, the same however they are cut into slices.

    Args:
        first: the number of the first row over all inputs, which is its id where there is no column of ids.
    """

    def __init__(self, first: int) -> None:
        self._first: int | None = first
        self._lengths, self._texts, self._ids = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

    def add(self, rows: Rows) -> None:
        lengths = [-1 if text is None else len(text) for text in rows.texts]  # they tell where a text ends
        self._lengths.update("".join(f"{length} " for length in lengths).encode())
        self._texts.update("".join(text for text in rows.texts if text is not None).encode())
        if rows.ids is not None:
            self._first = None
            for some in rows.ids:
                values = some if isinstance(some, list) else some.to_pylist()
                self._ids.update("".join(f"{value!r}\n" for value in values).encode())

    def hexdigest(self) -> str:
        sums = (part.hexdigest() for part in (self._lengths, self._texts, self._ids))
        return hashlib.sha256(" ".join([str(self._first), *sums]).encode()).hexdigest()


def unchanged(plan: Plan, folder: Path, parts: Sequence[Part]) -> list[Part]:
    """Those of the plan's ``parts`` that are there, whole, made by the same recipe, and from the rows that the inputs have now.
    They may be of another plan."""
    found, reader, recipe = [], Reader(plan.columns, skip=True), plan.recipe.encode()
    for part in parts:
        known = _metadata(folder, part)
        same = known.get(RECIPE) == recipe and known.get(NUMBER) == str(part.number).encode()
        if not same or ROWS not in known:
            continue
        try:
            about = read(folder, part, known[DIGEST].decode()).about
            if about.schema.to_arrow_schema().field("id").type != plan.id_type:
                continue
            total = RowSum(part.first)
            for rows in reader.rows(plan.sources[part.source], part.start, part.stop, AT_ONCE):
                total.add(rows)
        except (ValueError, DataError):  # it is damaged, or the input cannot be read there
            continue
        if total.hexdigest().encode() == known[ROWS]:
            found.append(part)
    return found


def _metadata(folder: Path, part: Part) -> dict[bytes, Any]:
    try:
        return parquet.read_metadata(folder / part.name).metadata or {}
    except (OSError, pa.ArrowException):
        return {}
