"""Files of lines: tab-separated tables (UTF-8, a header line, no quoting) and JSON lines. Every error names the file and, if it
concerns one, the line."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import os
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..files import TO_UTF8, first_line, importing

STDIN = "-"
KINDS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = tuple(dict.fromkeys(KINDS.values()))  # of standard input
Rows = list[tuple[str, dict[str, Any]]]  # places ("line 2", "row 1"), and values by their columns' names


def kind_of(path: str | Path) -> tuple[str, str | None] | None:
    """What a file's suffixes say: a value of KINDS, and one of COMPRESSIONS or None. None where they say nothing."""
    stem, suffix = os.path.splitext(str(path).lower())
    compression = COMPRESSIONS.get(suffix)
    if compression is not None:
        suffix = os.path.splitext(stem)[1]
    return (KINDS[suffix], compression) if suffix in KINDS else None


def read_bytes(path: str | Path) -> bytes:
    """All of a file, decompressed, or of standard input. Errors as of ``read_lines``."""
    try:
        with _opened(path) as file:
            return b"".join(file)
    except _BROKEN as error:
        raise _unreadable(path, error) from error


_BROKEN = (OSError, EOFError, zlib.error)  # EOFError: a .gz file that ends too early


def _unreadable(path: str | Path, error: BaseException) -> ValueError:
    return ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or first_line(error)}")


def _opened(path: str | Path) -> Any:
    """The bytes of a file, decompressed, or of standard input, line by line: a context that ends with the file. MissingPackage
    where it is one of .zst and pyarrow is not installed."""
    suffix = Path(path).suffix.lower()
    if path == STDIN:
        if sys.stdin is None:
            raise ValueError(f"{path}: standard input is closed")
        # Bytes if it is a byte stream: its own decoder follows the locale and may accept bytes that are not UTF-8.
        return contextlib.nullcontext(getattr(sys.stdin, "buffer", None) or map(str.encode, sys.stdin))
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        with importing(f"{path}: pyarrow", "train"):
            import pyarrow
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def read_table(
    path: str | Path, columns: Sequence[str], *choices: Sequence[str], given: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows, with all columns of the file. Empty lines are skipped.

    Args:
        columns: required columns.
        choices: alternative sets of columns, of which one is required.
        given: those of them that ``--columns`` has named.

    Raises:
        ValueError: the file cannot be read, is not UTF-8 or empty, lacks a column or has one twice; a row has another number
            of fields.
    """
    lines = read_lines(path)
    number, header = next(lines, (0, ""))
    names = header.split("\t")
    if not header:
        raise ValueError(f"{path}: expected a header line and rows, got an empty file")
    try:
        check_columns(path, names, columns, choices, given)
    except WrongColumns as error:
        if len(names) > 1 or "," not in header:
            raise
        got = f"a first line without a tab, {header[:80]!r}"
        raise ValueError(f"{path}: expected columns that tabs separate, got {got}: one of commas is a .csv") from error
    unique(path, names)
    empty = True
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) != len(names):
            raise ValueError(f"{path}: line {number}: expected {len(names)} tab-separated fields, got {len(fields)}")
        empty = False
        yield number, dict(zip(names, fields, strict=True))
    if empty:
        raise ValueError(f"{path}: expected rows below the header, got none")


def check_columns(
    path: str | Path,
    names: Sequence[str],
    columns: Sequence[str],
    choices: Sequence[Sequence[str]] = (),
    given: Collection[str] = (),
) -> None:
    """ValueError where a table has not all of ``columns``, or none of the sets ``choices``; names those that are wanted, that are
    there, and that are missing.

    Args:
        names: of the table.
        given: those that ``--columns`` has named.
    """
    missing = [name for name in columns if name not in names]
    if choices and not any(set(choice) <= set(names) for choice in choices):
        # Of sets that lack equally many the largest is nearest.
        lacking = [[name for name in choice if name not in names] for choice in sorted(choices, key=len, reverse=True)]
        missing += sorted(lacking, key=len)[0]
    if not missing:
        return
    parts = [*columns, *(choices[0] if len(choices) == 1 else ())]
    if len(choices) > 1:
        parts.append(f"either {' or '.join(map(_listed, choices))}")
    known = {name for some in (columns, *choices) for name in some}
    there = ", ".join(names) or "none"
    if not known.isdisjoint(names):
        there += f", without {_listed(missing)}"
    named = [name for name in missing if name in given]
    they = "it is" if len(missing) == 1 else "they are"
    advice = f": --columns {','.join(f'{name}=NAME' for name in missing)} says which {they}"
    if named:
        advice = f"; --columns says that there is {'one' if len(named) == 1 else 'each'} named {_listed(named)}"
    several = "columns" if len(parts) > 1 or len(choices) else "a column"
    raise WrongColumns(str(path), names, f"{path}: expected {several} {_listed(parts)}, got {there}", advice)


class WrongColumns(ValueError):
    """A table lacks columns.

    Attributes:
        path, names: of the table, and of its columns.
        said: the message without its advice.
    """

    def __init__(self, path: str, names: Sequence[str], said: str, advice: str) -> None:
        super().__init__(said + advice)
        self.path, self.names, self.said = path, list(names), said


def _listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def unique(path: str | Path, names: Sequence[str]) -> None:
    """ValueError if a column appears twice: which one is meant is ambiguous."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: expected each column once, got {', '.join(twice)} twice")


def read_json(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a file with a JSON object per line. Empty lines are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is not UTF-8 or no JSON object.
    """
    for number, line in read_lines(path):
        yield number, parse_json(path, number, line)


def parse_json(path: str | Path, number: int, line: str) -> dict[str, Any]:
    """The object in line ``number`` of ``path``; ValueError if there is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {number} is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise ValueError(f"{path}: line {number} cannot be read: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}: line {number}: expected an object with columns, got {line[:40]!r}")
    return row


def number(value: Any) -> float:
    """A field's number; NaN where it has none. Python's own notations, as 1_0 for ten, are no numbers of a table."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


class _Absent:
    def __repr__(self) -> str:
        return "a row without it"


ABSENT = _Absent()  # the value of a column that a row of JSON lines has not


def shown(value: Any) -> str:
    """A value of a table in messages. What Python calls None is null in every format that has it."""
    return "null" if value is None else "an empty text" if value == "" else repr(value)


def text(place: str, value: Any) -> str:
    """``value``, checked to be a text.

    Raises:
        ValueError: it is not a string, or holds a lone surrogate, which JSON can spell and no tokenizer accepts. Starts with
            ``place``.
    """
    if not isinstance(value, str):
        raise ValueError(f"{place}: expected a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: expected a text, got half a character, {value[error.start]!a}") from error
    return value


def filled(place: str, value: Any) -> str:
    """As ``text``, and ValueError where there is nothing in it."""
    if value is None or value is ABSENT or (isinstance(value, str) and not value.strip()):
        got = "an empty one" if value == "" else shown(value)
        raise ValueError(f"{place}: expected a text, got {got}: fill it in, or leave the row out")
    return text(place, value)


def read_lines(path: str | Path, *, keep_empty: bool = False) -> Iterator[tuple[int, str]]:
    """Line numbers and lines of a UTF-8 file, or of standard input ("-"), without line ends. Empty lines are skipped unless
    ``keep_empty``.

    Raises:
        ValueError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        with _opened(path) as file:
            yield from _decoded(path, file, keep_empty)
    except _BROKEN as error:
        raise _unreadable(path, error) from error


def _decoded(path: str | Path, lines: Iterable[bytes], keep_empty: bool) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(lines, 1):
        line = decode(path, number, raw)
        if line or keep_empty:
            yield number, line


def decode(path: str | Path, number: int, raw: bytes) -> str:
    """Line ``number`` of ``path`` without its end, and line 1 without a byte order mark; ValueError if it is not UTF-8."""
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: line {number} is not UTF-8 (byte 0x{byte:02x}): {TO_UTF8}") from error
