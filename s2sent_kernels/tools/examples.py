"""Training examples from files: tables (.tsv, .csv, .jsonl, .parquet), or a text file (.txt), each line of which is its own
positive. Every error names the file and, if it concerns one, the line or row."""

from __future__ import annotations

import contextlib
import csv
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import importing
from . import tables

SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet", ".txt")
_NEGATIVE = re.compile(r"negative(_\d+)?")


class Examples(NamedTuple):
    """Columns anchor and positive, then the negatives; and rows with one text per column."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]  # an empty text: no negative
    supervised: bool  # False: each anchor is its own positive


class Scored(NamedTuple):
    """Pairs of sentences, the score of each, and the loss that learns from them, one of ``recipe.LOSSES``."""

    rows: list[tuple[str, str]]
    scores: list[float]
    loss: str


def read_examples(path: str | Path, split: str | None = None) -> Examples:
    """From a table the columns ``anchor``, ``positive`` and, in their order in the file, ``negative`` or ``negative_1``,
    ``negative_2``, ...; a negative may be empty in some rows. From a text file its non-empty lines.

    Args:
        split: as ``of_split``'s, whose usual one is "train".

    Raises:
        ValueError: the suffix is not one of SUFFIXES; the file cannot be read, is broken, empty or not UTF-8; a column is missing
            or appears twice; an anchor or a positive is empty; a value is no text.
        ImportError: pyarrow, which reads Parquet, is not installed.
    """
    if Path(path).suffix.lower() == ".txt":
        if split is not None:
            raise ValueError(
                f"{path}: expected a table with a column split, whose {split!r} is asked for, got sentences"
            )
        texts = [line.strip() for _, line in tables.read_lines(path) if line.strip()]
        if not texts:
            raise ValueError(f"{path}: expected sentences, got an empty file")
        return Examples(("anchor", "positive"), [(text, text) for text in texts], supervised=False)
    found = of_split(path, read_rows(path, ("anchor", "positive"), suffixes=SUFFIXES), split, "train")
    # A JSON object may omit columns, so any row may be the first with a negative.
    names = dict.fromkeys(name for _, row in found for name in row)
    columns = ("anchor", "positive", *(name for name in names if _NEGATIVE.fullmatch(name)))
    rows = []
    for place, row in found:
        values = ["" if row.get(name) is None else row[name] for name in columns]
        for name, value in zip(columns, values, strict=True):
            tables.text(f"{path}: {place}: {name}", value)
        if not values[0].strip() or not values[1].strip():
            raise ValueError(f"{path}: {place}: expected an anchor and a positive, got an empty field")
        rows.append(tuple(values))
    return Examples(columns, rows, supervised=True)


def of_split(
    path: str | Path, rows: list[tuple[str, dict[str, Any]]], split: str | None, usual: str
) -> list[tuple[str, dict[str, Any]]]:
    """The rows of ``split``; by default those of ``usual`` where the file has a column split, else all. ValueError where there is
    no such split."""
    there = list(dict.fromkeys(str(row["split"]) for _, row in rows if "split" in row))
    if not there:
        if split is not None:
            raise ValueError(f"{path}: expected a column split, whose {split!r} is asked for, and there is none")
        return rows
    wanted = usual if split is None else split
    if wanted not in there:
        raise ValueError(f"{path}: expected rows of split {wanted!r}, got splits {', '.join(sorted(there))}")
    return [(place, row) for place, row in rows if str(row.get("split")) == wanted]


def read_rows(
    path: str | Path, columns: Sequence[str], *choices: Sequence[str], suffixes: Sequence[str] = SUFFIXES[:-1]
) -> list[tuple[str, dict[str, Any]]]:
    """Places ("line 2", "row 1") and rows of a table.

    Args:
        columns: required columns; a row of JSON lines or Parquet may lack a value.
        choices: alternative sets of columns, of which one is required.
        suffixes: that the error of a wrong one lists.

    Raises:
        ValueError: as ``read_examples``, but of values.
    """
    suffix = Path(path).suffix.lower()
    if suffix != ".tsv" and suffix not in _READERS:
        raise ValueError(f"{path}: expected a file of {', '.join(suffixes)}, got suffix {suffix!r}")
    if suffix == ".tsv":
        return [(f"line {line}", row) for line, row in tables.read_table(path, columns, *choices)]
    found = list(_READERS[suffix](path))
    if not found:
        raise ValueError(f"{path}: expected rows{' with columns ' * bool(columns)}{' and '.join(columns)}, got none")
    names = dict.fromkeys(name for _, row in found for name in row)
    missing = [name for name in columns if name not in names]
    if choices and not any(set(choice) <= set(names) for choice in choices):
        missing.append(" or ".join("+".join(choice) for choice in choices))
    if missing:
        raise ValueError(f"{path}: expected a column {', '.join(missing)}, got {', '.join(names) or 'none'}")
    return found


_LONGEST = 2**31 - 1  # characters, what fits a C long on every platform
_limit_lock = threading.Lock()


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Within it csv takes texts of any length. Its limit, 131,072 characters, belongs to the whole process, where others may
    rely on it, and is put back."""
    with _limit_lock:
        before = csv.field_size_limit(_LONGEST)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _read_csv(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    place = "line 1"

    def lines() -> Iterator[str]:
        nonlocal place
        for number, line in tables.read_lines(path, keep_empty=True):
            place = f"line {number}"
            yield line + "\n"

    reader, rows = csv.DictReader(lines(), strict=True), []
    try:
        with _long_fields():
            tables.unique(path, list(reader.fieldnames or ()))
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}: {place}: expected {len(reader.fieldnames or ())} comma-separated fields")
                rows.append((place, row))
    except csv.Error as error:
        raise ValueError(f"{path}: {place} is broken: {error}") from error
    return rows


def _read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"line {line}", row) for line, row in tables.read_json(path))


def _read_parquet(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with importing(f"{path}: pyarrow", "train"):
        import pyarrow
        from pyarrow import parquet
    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    number = 0
    for batch in table.to_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


_READERS: dict[str, Callable[[str | Path], Iterable[tuple[str, dict[str, Any]]]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
