"""Tables of every kind that the commands take, as rows: .tsv, .csv, .jsonl, .parquet and .arrow, also compressed, standard input
in any of these formats, and data sets that the library datasets saved on disk."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..files import first_line, importing
from . import tables
from .tables import STDIN, Rows

# What datasets' save_to_disk writes beside the Arrow files, and above splits.
SAVED, DICT = "state.json", "dataset_dict.json"
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet", ".arrow")
_MAGIC = b"ARROW1"  # with which an Arrow file begins, and no Arrow stream
_LONGEST = 2**31 - 1  # characters, what fits a C long on every platform
_limit_lock = threading.Lock()


def kind(path: str | Path, format: str | None = None) -> str | None:
    """A value of ``tables.KINDS``, "dataset" for a folder that datasets saved, or None. ``format``: of standard input."""
    if str(path) == STDIN:
        return format or "text"
    if os.path.isfile(Path(path) / SAVED) or os.path.isfile(Path(path) / DICT):
        return "dataset"
    found = tables.kind_of(path)
    return None if found is None else found[0]


def read(
    path: str | Path,
    format: str | None = None,
    suffixes: Sequence[str] = SUFFIXES,
    required: Sequence[str] = (),
    choices: Sequence[Sequence[str]] = (),
    given: Collection[str] = (),
) -> Rows:
    """Places ("line 2", "row 1") and rows of a table. A data set of several splits gets their names in a column ``split``.

    Args:
        format: of standard input, "-".
        suffixes: that the error of a wrong one lists.
        required, choices, given: columns, as in ``tables.read_table``; of tab-separated files alone, whose first line tells.

    Raises:
        ValueError: it is no table, cannot be read, or is broken; or a column is there twice.
        ImportError: pyarrow, which reads Parquet and Arrow, is not installed.
    """
    which = kind(path, format)
    if which is None or which == "text":
        if str(path) != STDIN and not os.path.exists(path):
            raise ValueError(f"{path}: there is no such file")
        got = f"suffix {Path(path).suffix!r}"
        if str(path) == STDIN:
            got = "standard input as text: --format tells another"
        elif os.path.isdir(path):
            got = "a folder that datasets has not saved"
        raise ValueError(f"{path}: expected a file of {', '.join(suffixes)}, also with .gz or .zst, got {got}")
    if which == "tsv":
        return [(f"line {line}", row) for line, row in tables.read_table(path, required, *choices, given=given)]
    if which == "csv":
        return _csv(path)
    if which == "jsonl":
        return [(f"line {line}", row) for line, row in tables.read_json(path)]
    with importing(f"{path}: pyarrow", "train"):
        import pyarrow
    try:
        return list(_numbered(_dataset(Path(path)) if which == "dataset" else _batches(path, which)))
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from error


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


# ---------------------------------------------------------------- lines


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


def _csv(path: str | Path) -> Rows:
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


# ---------------------------------------------------------------- Parquet and Arrow


def _batches(path: str | Path, which: str) -> Iterator[dict[str, Any]]:
    from pyarrow import ipc, parquet

    compressed = Path(path).suffix.lower() in tables.COMPRESSIONS
    if str(path) == STDIN or compressed:
        content: Any = io.BytesIO(tables.read_bytes(path))
    else:
        content = str(path)
    if which == "parquet":
        table = parquet.read_table(content)
        batches: Any = table.to_batches()
    else:
        with contextlib.nullcontext(content) if isinstance(content, io.BytesIO) else open(content, "rb") as file:
            magic = file.read(len(_MAGIC))
            file.seek(0)
            whole = file.read()
        batches = ipc.open_file(whole).read_all().to_batches() if magic == _MAGIC else ipc.open_stream(whole)
    for batch in batches:
        tables.unique(path, batch.schema.names)
        yield from batch.to_pylist()


def _dataset(folder: Path) -> Iterator[dict[str, Any]]:
    if (folder / DICT).is_file():
        for split in _listed(folder / DICT, "splits"):
            for row in _dataset(folder / str(split)):
                yield {**row, "split": str(split)}
        return
    for file in _listed(folder / SAVED, "_data_files"):
        yield from _batches(folder / str(file["filename"]), "arrow")


def _listed(path: Path, name: str) -> list[Any]:
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))[name])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read, save the dataset again: {first_line(error)}") from error
