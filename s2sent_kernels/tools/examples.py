"""Training examples from files: tables, or a text file (.txt), each line of which is its own positive. Every error names the file
and, if it concerns one, the line or row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import readers, tables
from .columns import SPLIT, Columns
from .tables import Rows

SUFFIXES = (*readers.SUFFIXES, ".txt")
COLUMNS = ("anchor", "positive", "negative", "negatives", SPLIT)  # and negative_1, negative_2, ...
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


def read_examples(path: str | Path, split: str | None = None, columns: Columns | None = None) -> Examples:
    """From a table the columns ``anchor``, ``positive`` and, in their order in the file, ``negative`` or ``negative_1``,
    ``negative_2``, ...; a negative may be empty in some rows. The lists of texts of a column ``negatives`` (.jsonl, .parquet)
    become columns ``negatives_1``, ``negatives_2``, ..., the last of which are empty where a list is shorter. From a text file
    its non-empty lines.

    Args:
        split: as ``of_split``'s, whose usual one is "train".
        columns: other names in the table.

    Raises:
        ValueError: the suffix is not one of SUFFIXES; the file cannot be read, is broken, empty or not UTF-8; a column is missing
            or appears twice, or looks like training data and is none of these; an anchor or a positive is empty; a value is no
            text.
        ImportError: pyarrow, which reads Parquet, is not installed.
    """
    if readers.kind(path, None if columns is None else columns.format) == "text":
        if split is not None:
            raise ValueError(
                f"{path}: expected a table with a column split, whose {split!r} is asked for, got sentences"
            )
        if columns is not None and (columns.named or columns.ignored):
            raise ValueError(f"{path}: expected a table, whose columns are named, got sentences")
        texts = [line.strip() for _, line in tables.read_lines(path) if line.strip()]
        if not texts:
            raise ValueError(f"{path}: expected sentences, got an empty file")
        return Examples(("anchor", "positive"), [(text, text) for text in texts], supervised=False)
    columns = columns or Columns()
    whole = read_rows(path, ("anchor", "positive"), suffixes=SUFFIXES, columns=columns)
    # A JSON object may omit columns, so any row may be the first with a negative.
    names = list(dict.fromkeys(name for _, row in whole for name in row))
    single = [name for name in names if _NEGATIVE.fullmatch(name)]
    columns.check(path, whole, ("anchor", "positive", *(single or ["negative"]), "negatives"))
    found = of_split(path, whole, split, "train")
    lists = [_negatives(f"{path}: {place}: negatives", row.get("negatives")) for place, row in found]
    longest = max(map(len, lists), default=0)
    used = ("anchor", "positive", *single)
    rows = []
    for (place, row), several in zip(found, lists, strict=True):
        values = [tables.filled(f"{path}: {place}: {name}", row.get(name, tables.ABSENT)) for name in used[:2]]
        for name in single:  # of which a row may have none
            values.append("" if row.get(name) is None else tables.text(f"{path}: {place}: {name}", row[name]))
        rows.append((*values, *several, *[""] * (longest - len(several))))
    return Examples((*used, *(f"negatives_{n + 1}" for n in range(longest))), rows, supervised=True)


def _negatives(place: str, value: Any) -> list[str]:
    """A row's list of negatives, empty where it has none."""
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{place}: expected a list of texts, as .jsonl and .parquet have, got {tables.shown(value)}")
    return [tables.text(place, text) for text in value or ()]


def of_split(path: str | Path, rows: Rows, split: str | None, usual: str) -> Rows:
    """The rows of ``split``; by default those of ``usual`` where the file has a column split, else all. ValueError where there is
    no such split, or a row of such a file is of none."""
    there = splits(path, rows)
    if not there:
        if split is not None:
            raise ValueError(f"{path}: expected a column split, whose {split!r} is asked for, and there is none")
        return rows
    wanted = usual if split is None else split
    if wanted not in there:
        raise ValueError(f"{path}: expected rows of split {wanted!r}, got splits {', '.join(sorted(there))}")
    return [(place, row) for place, row in rows if str(row[SPLIT]) == wanted]


def too_few(path: str | Path, whole: Rows, rows: Rows) -> ValueError:
    """The error of a single row, of those of a file or of one of its splits."""
    split = rows[0][1].get(SPLIT)
    of_split = "" if split is None else f" of split {str(split)!r}, of {len(whole)} in all"
    return ValueError(f"{path}: expected two or more rows, got {len(rows)}{of_split}")


def splits(path: str | Path, rows: Rows) -> list[str]:
    """Those in a file's column split, none without one. ValueError where some rows alone are of one."""
    there = list(dict.fromkeys(str(row[SPLIT]) for _, row in rows if row.get(SPLIT) is not None))
    without = [place for place, row in rows if row.get(SPLIT) is None]
    if there and without:
        raise ValueError(f"{path}: {without[0]}: expected a split, as other rows have, got none")
    return there


def read_rows(
    path: str | Path,
    required: Sequence[str],
    *choices: Sequence[str],
    suffixes: Sequence[str] = readers.SUFFIXES,
    columns: Columns | None = None,
) -> Rows:
    """Places ("line 2", "row 1") and rows of a table.

    Args:
        required: columns; a row of JSON lines or Parquet may lack a value.
        choices: alternative sets of columns, of which one is required.
        suffixes: that the error of a wrong one lists.
        columns: other names in the table; the rows have the expected ones.

    Raises:
        ValueError: as ``read_examples``, but of values.
    """
    columns = columns or Columns()
    wanted, alternatives = columns.of(required), [columns.of(choice) for choice in choices]
    given = columns.named.values()
    found = columns.unfold(readers.read(path, columns.format, suffixes, wanted, alternatives, given))
    if not found:
        raise ValueError(f"{path}: expected rows{' with columns ' * bool(wanted)}{' and '.join(wanted)}, got none")
    names = dict.fromkeys(name for _, row in found for name in row)
    tables.check_columns(path, list(names), wanted, alternatives, given)
    return columns.rename(path, found)
