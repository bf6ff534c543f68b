"""Tab-separated files: UTF-8, a header line, no quoting. Every error names the file, and the line where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path


def read_table(
    path: str | Path, columns: Sequence[str], *choices: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows. Other columns than those asked for come along; empty lines are skipped.

    Args:
        columns: must be there.
        choices: of these sets of columns one must be there.

    Raises:
        ValueError: the file cannot be read, is not UTF-8 or empty, or lacks a column; a row has another number of fields.
    """
    lines = read_lines(path)
    number, header = next(lines, (0, ""))
    names = header.split("\t")
    if not header:
        raise ValueError(f"{path}: expected a header line and rows, got an empty file")
    missing = [name for name in columns if name not in names]
    if choices and not any(set(choice) <= set(names) for choice in choices):
        missing.append(" or ".join("+".join(choice) for choice in choices))
    if missing:
        raise ValueError(f"{path}: expected a tab-separated column {', '.join(missing)}, got {', '.join(names)}")
    empty = True
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) != len(names):
            raise ValueError(f"{path}: line {number}: expected {len(names)} tab-separated fields, got {len(fields)}")
        empty = False
        yield number, dict(zip(names, fields, strict=True))
    if empty:
        raise ValueError(f"{path}: expected rows below the header, got none")


def read_lines(path: str | Path, *, keep_empty: bool = False) -> Iterator[tuple[int, str]]:
    """Numbers and lines of a UTF-8 file, without their ends; those that are not empty, unless ``keep_empty``.

    Raises:
        ValueError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    byte = raw[error.start]
                    raise ValueError(f"{path}: line {number} is not UTF-8 (byte 0x{byte:02x})") from error
                if line or keep_empty:
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
